"""What a backend is: what every one has, and what one has that serves a kind of operation.

    x [M, K], weight [N, K] or None (the identity: a series adapter), bias [N], y [M, N], ids int32 [M]

A backend is a module of this folder, with functions of these names and signatures for what it serves, and a function
`backend()` that names them to `Backend`, where mypy compares them. What they compute is `peftk.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """What every backend says of itself."""

    def cannot_run(self, call: Call) -> str | None:
        """Why it cannot run a call, or None where it can."""

    def describe(self, call: Call) -> str:
        """One line about the kernels that would run, for `peftk.explain`."""


class Forward(Protocol):
    """y, and where save_z asks, z for the backward: fp32 [M, R], or [M, table.z_width]."""

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
    """dx [M, K] where need_dx asks, and the gradients of the adapters' tensors that are wanted (None: of all).

    x: None where no dA is wanted. z: None where no gradient reads it (`peftk.reference.reads_z`).
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
    """The shortest way of a forward without gradients on a CPU; None where there is none for these tensors."""

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

    def direct_multi_lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, table: AdapterTable, ids: Tensor, limit: int
    ) -> Tensor | None: ...


class Merge(Protocol):
    """In place. Raises NotFiniteError where W' would not be finite; W is unchanged then."""

    def merge_(self, weight: Tensor, factors: Factors) -> MergeReceipt: ...

    def unmerge_(self, weight: Tensor, receipt: MergeReceipt) -> None: ...

    def remerge_(self, weight: Tensor, receipt: MergeReceipt, factors: Factors) -> MergeReceipt: ...

    def checksum(self, weight: Tensor) -> int: ...


class MergeLayers(Protocol):
    """The same for layers of one device and one pair of dtypes. All are merged, or none: NotFiniteError says which."""

    def merge_layers_(self, weights: Sequence[Tensor], factors: Sequence[Factors]) -> list[MergeReceipt]: ...

    def unmerge_layers_(self, weights: Sequence[Tensor], receipts: Sequence[MergeReceipt]) -> None: ...

    def checksums(self, weights: Sequence[Tensor]) -> list[int]: ...


class Sort(Protocol):
    def segments(self, ids: Tensor, adapters: int) -> Segments: ...


class Backend(NamedTuple):
    """A backend by what it serves: None is what it does not."""

    about: About
    forward: Forward | None = None
    backward: Backward | None = None
    direct: Direct | None = None
    merge: Merge | None = None
    merge_layers: MergeLayers | None = None
    sort: Sort | None = None
    rounds_once: bool = True  # to y's dtype; if not, also the base layer's part of it
    looks_at_ids: bool = False  # raises ValueError itself for an id outside of the table


_Part = TypeVar("_Part")


def served(part: _Part | None) -> _Part:
    """A part of a backend that has said that it serves the call."""
    assert part is not None, "a backend serves a call for which it has no function"
    return part
