"""What a backend must implement: `About` always, and one of the other protocols per kind of operation it runs.

    x [M, K], weight [N, K] or None (the identity: a series adapter), bias [N], y [M, N], ids int32 [M]

A backend is a module of this folder that has functions with these names and signatures for the operations it runs. Its
function `backend()` passes the module to `Backend`, where mypy checks the signatures. `peftk.reference` specifies what
the functions compute.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from peftk.adapters.adapter import ALL, Adapter, AdapterGrads, Wanted
from peftk.adapters.dropout import Dropout
from peftk.adapters.table import AdapterTable
from peftk.backends.call import Call
from peftk.launch.segments import Segments
from peftk.reference.merge import Factors
from peftk.reference.receipt import MergeReceipt


class About(Protocol):
    """What every backend has: whether it can run a call, and a description for people."""

    def cannot_run(self, call: Call) -> str | None:
        """Why it cannot run a call, or None if it can."""

    def describe(self, call: Call) -> str:
        """One line about the kernels that would run, for `peftk.explain`."""


class Forward(Protocol):
    """Returns y and, if save_z, z for the backward: fp32 [M, R], or [M, table.z_width]."""

    def lora_linear(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        adapter: Adapter | None,
        *,
        dropout: Dropout | None = None,
        save_z: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...

    def multi_lora_linear(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        table: AdapterTable,
        ids: Tensor,
        *,
        dropout: Dropout | None = None,
        save_z: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...


class Backward(Protocol):
    """Returns dx [M, K] if need_dx, and the gradients of the adapters' tensors in `wanted` (None: all of them).

    x: may be None if no dA is wanted. z: may be None if no gradient reads it (`peftk.reference.lora_linear.reads_z`).
    """

    def lora_linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        adapter: Adapter | None,
        z: Tensor | None,
        *,
        dropout: Dropout | None = None,
        need_dx: bool = True,
        wanted: Wanted = ALL,
    ) -> tuple[Tensor | None, AdapterGrads]: ...

    def multi_lora_linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        table: AdapterTable,
        ids: Tensor,
        z: Tensor | None,
        *,
        dropout: Dropout | None = None,
        need_dx: bool = True,
        wanted: Sequence[Wanted] | None = None,
    ) -> tuple[Tensor | None, list[AdapterGrads | None]]: ...


class Direct(Protocol):
    """The shortest way to run a forward without gradients; returns None if these arguments cannot take it.

    The arguments are unchecked. limit: up to how many multiply-adds (M·K·N) the backend runs a call unasked; above, it
    asks whether it is chosen (cuda), or leaves the call to the ordinary way (cpu).
    """

    def direct_lora_linear(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        activation: str,
        bias_A: Tensor | None,
        bias_B: Tensor | None,
        limit: int,
    ) -> Tensor | None: ...


class DirectMulti(Protocol):
    """The same for a table of adapters."""

    def direct_multi_lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor, limit: int
    ) -> Tensor | None: ...


class Merge(Protocol):
    """Merges in place. Raises NotFiniteError if W' would not be finite, and leaves W unchanged."""

    def merge_(self, weight: Tensor, factors: Factors) -> MergeReceipt: ...

    def unmerge_(self, weight: Tensor, receipt: MergeReceipt) -> None: ...

    def remerge_(self, weight: Tensor, receipt: MergeReceipt, factors: Factors) -> MergeReceipt: ...

    def checksum(self, weight: Tensor) -> int: ...


class MergeLayers(Protocol):
    """The same for layers of one device and one pair of dtypes: all or none. NotFiniteError names the layer."""

    def merge_layers_(self, weights: Sequence[Tensor], factors: Sequence[Factors]) -> list[MergeReceipt]: ...

    def unmerge_layers_(self, weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None: ...

    def checksums(self, weights: Sequence[Tensor]) -> list[int]: ...


class Sort(Protocol):
    """Sorts the rows of a batch by adapter: `peftk.reference.segments`."""

    def segments(self, ids: Tensor, adapters: int) -> Segments: ...


class Backend(NamedTuple):
    """A backend's parts. None: it does not run these operations."""

    about: About
    forward: Forward | None = None
    backward: Backward | None = None
    direct: Direct | None = None
    direct_multi: DirectMulti | None = None
    merge: Merge | None = None
    merge_layers: MergeLayers | None = None
    sort: Sort | None = None
    rounds_once: bool = True  # to y's dtype; if False, the base layer's part is rounded as well
    batch_invariant: bool = False  # it honours `determinism.is_batch_invariant`
    checks_ids: bool = False  # it raises ValueError itself for an id outside the table
    quantized: Collection[str] = ()  # the formats of a quantized W (`peftk.quantized`) that it reads


_Part = TypeVar("_Part")


def require(part: _Part | None) -> _Part:
    """`part`, which must exist: the backend has said that it can run the call."""
    assert part is not None, "a backend accepted a call for which it has no function"
    return part
