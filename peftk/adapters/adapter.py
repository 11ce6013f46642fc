"""One adapter of one linear layer, its gradients, and which gradients are wanted."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 16


def pages_of(rank: int) -> int:
    """How many pages an adapter of this rank has."""
    return -(-rank // PAGE)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter of one linear layer: `s · act(x Aᵀ + a) Bᵀ + β`.

    pages_A: tensors [r_p, K] with contiguous rows, whose concatenation is A [R, K]. pages_B: tensors [N, r_p] with any
    strides, whose concatenation is B [N, R]. Each tensor but the last holds a multiple of 16 ranks. Both are empty for
    a bias-only adapter. scaling: s, no unit. activation: act, a key of `activations.CODES`. bias_A: a [R]; bias_B:
    β [N].
    """

    pages_A: tuple[Tensor, ...]
    pages_B: tuple[Tensor, ...]
    scaling: float
    activation: str = "identity"
    bias_A: Tensor | None = None
    bias_B: Tensor | None = None

    @property
    def rank(self) -> int:
        pages = self.pages_A
        return pages[0].shape[0] if len(pages) == 1 else sum(page.shape[0] for page in pages)

    @property
    def lora_A(self) -> Tensor | None:
        """A as one tensor [R, K]: the page itself if there is only one, a copy if there are several, None if none."""
        if len(self.pages_A) <= 1:
            return self.pages_A[0] if self.pages_A else None
        return torch.cat(self.pages_A, dim=0)

    @property
    def lora_B(self) -> Tensor | None:
        """B as one tensor [N, R]: the page itself if there is only one, a copy if there are several, None if none."""
        if len(self.pages_B) <= 1:
            return self.pages_B[0] if self.pages_B else None
        return torch.cat(self.pages_B, dim=1)

    def tensors(self) -> tuple[Tensor, ...]:
        factors = self.pages_A + self.pages_B
        if self.bias_A is None and self.bias_B is None:  # the fast path: every call comes here
            return factors
        return factors + tuple(t for t in (self.bias_A, self.bias_B) if t is not None)


class AdapterGrads(NamedTuple):
    """Gradients of one adapter, in the shapes and dtypes of its dense tensors. None: no such tensor, or not wanted."""

    lora_A: Tensor | None
    lora_B: Tensor | None
    bias_A: Tensor | None
    bias_B: Tensor | None


class Wanted(NamedTuple):
    """Which gradients of one adapter a backward computes."""

    lora_A: bool = True
    lora_B: bool = True
    bias_A: bool = True
    bias_B: bool = True


ALL = Wanted()
NOTHING = Wanted(False, False, False, False)


def adapter_of(
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    activation: str = "identity",
    bias_A: Tensor | None = None,
    bias_B: Tensor | None = None,
) -> Adapter | None:
    """The Adapter of these tensors, without copying them; None if there are none.

    Raises ValueError if only one of lora_A and lora_B is given.
    """
    check_both_factors(lora_A, lora_B)
    if lora_A is None or lora_B is None:
        return None if bias_B is None else Adapter((), (), scaling, activation, None, bias_B)
    return Adapter((lora_A,), (lora_B,), scaling, activation, bias_A, bias_B)


FlatAdapter = tuple[Tensor | None, Tensor | None, float, str, Tensor | None, Tensor | None]


def flat_adapter(adapter: Adapter | None) -> FlatAdapter:
    """What `adapter_of` takes, in that order, for torch's Functions and custom ops, which take no objects."""
    if adapter is None:
        return None, None, 1.0, "identity", None, None
    return adapter.lora_A, adapter.lora_B, adapter.scaling, adapter.activation, adapter.bias_A, adapter.bias_B


def check_both_factors(lora_A: Tensor | None, lora_B: Tensor | None) -> None:
    """Raises ValueError if only one of lora_A and lora_B is given."""
    if (lora_A is None) != (lora_B is None):
        missing = "lora_A" if lora_A is None else "lora_B"
        raise ValueError(f"{missing}: expected a tensor, as lora_A and lora_B belong together, got None")
