"""Inputs of merge with all corner cases: zeros of both signs, denormals, values near overflow, ragged rows."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from peftk import functional
from peftk.launch import merge_layers
from peftk.reference.merge import Factors, factors
from peftk.reference.receipt import MergeReceipt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {2: torch.int16, 4: torch.int32}


@dataclasses.dataclass
class MergeCase:
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    @property
    def factors(self) -> Factors:
        return factors((self.lora_A,), (self.lora_B,), (self.scaling,))

    def with_weight(self, weight: Tensor) -> MergeCase:
        return dataclasses.replace(self, weight=weight)

    def __str__(self) -> str:
        return (
            f"weight {list(self.weight.shape)} {self.weight.dtype} strides {self.weight.stride()}, "
            f"rank {self.lora_A.shape[0]} {self.lora_A.dtype}, scaling {self.scaling}"
        )


def merge_case(
    seed: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *,
    size: float,
    padding: int,
) -> MergeCase:
    """Weights of size 1 with a share of each corner case; ΔW of about `size`, sometimes zero, denormal or huge.

    The rows of W are K + padding elements apart.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def share(shape: torch.Size, part: float) -> Tensor:
        return torch.rand(shape, generator=generator) < part

    weight = normal(N, K + padding)[:, :K]
    tiny = torch.finfo(dtype).tiny
    weight[share(weight.shape, 0.1)] *= tiny  # denormal in the weight's dtype
    weight[share(weight.shape, 0.05)] *= torch.finfo(dtype).max / 64
    weight[share(weight.shape, 0.1)] = 0.0
    weight[share(weight.shape, 0.1)] = -0.0
    lora_A, lora_B = normal(R, K), normal(N, R) * (size / R**0.5)
    lora_A[:, share(torch.Size([K]), 0.2)] *= tiny
    lora_B[share(torch.Size([N]), 0.2)] = 0.0
    lora_B[share(torch.Size([N]), 0.2)] *= -(2.0**-100)  # with the columns above: a chain that underflows to ±0
    stored = torch.empty(N, K + padding, dtype=dtype)[:, :K].copy_(weight)
    return MergeCase(stored, lora_A.to(adapter_dtype), lora_B.to(adapter_dtype), 1.5)


def several(seed: int, weight: Tensor, ranks: tuple[int, ...], size: float, dtype: torch.dtype) -> Factors:
    """Adapters of these ranks for one weight, with scalings of both signs."""
    cases = [
        merge_case(seed + t, *weight.shape, rank, weight.dtype, dtype, size=size, padding=0)
        for t, rank in enumerate(ranks)
    ]
    A, B = [case.lora_A for case in cases], [case.lora_B for case in cases]
    return factors(A, B, [(-1) ** t * (0.7 + t) for t in range(len(ranks))])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether shape, dtype and bits are equal; all NaNs count as equal."""
    integer = _BITS[a.element_size()]
    same = a.contiguous().view(integer) == b.contiguous().view(integer)
    return a.shape == b.shape and a.dtype == b.dtype and bool((same | (a.isnan() & b.isnan())).all())


def copies(weights: list[Tensor]) -> list[Tensor]:
    """Copies with the strides of the originals."""
    return [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).copy_(w) for w in weights]


def bits(weight: Tensor) -> Tensor:
    """The bits as integers, for comparisons that include NaNs."""
    return weight.contiguous().view(_BITS[weight.itemsize])


def check_receipt(ours: MergeReceipt, theirs: MergeReceipt) -> None:
    assert ours.code.dtype == theirs.code.dtype
    assert torch.equal(ours.code, theirs.code)
    assert torch.equal(ours.far, theirs.far)
    assert torch.equal(bits(ours.raw_values), bits(theirs.raw_values))
    assert ours.checksum == theirs.checksum


# the ratio |ΔW| / |W| for which a receipt of bf16 has each of its forms
FORMS = {1.0: (torch.uint8, True), 100.0: (torch.int8, True), 1e5: (torch.int8, False)}


def check_forms_across_backends(name: str, ratio: float) -> None:
    """All backends make the same receipt, and any backend can use it, to unmerge and to switch a list of layers."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(9, K, generator=generator).bfloat16() for K in (33, 64)]
    A = [torch.randn(3, K, generator=generator) for K in (33, 64)]
    B = [torch.randn(9, 3, generator=generator) * ratio for _ in weights]
    left, merged = {}, copies(weights)
    for backend in (name, "cpu"):
        merged = copies(weights)
        left[backend] = functional.merge_layers_(merged, A, B, backend=backend)
    for mine, theirs in zip(*left.values(), strict=True):
        check_receipt(mine, theirs)
    assert {(receipt.code.dtype, receipt.code.numel() > 0) for receipt in left["cpu"]} == {FORMS[ratio]}
    small = [factor / ratio for factor in B]
    for first, second in ((name, "cpu"), ("cpu", name), (name, "reference")):
        again = copies(merged)
        switched = functional.remerge_layers_(again, left[first], A, small, 0.5, backend=second)
        functional.unmerge_layers_(again, switched, backend=first)
        straight = copies(merged)
        functional.unmerge_layers_(straight, left[first], backend=second)
        for W, *backs in zip(weights, again, straight, strict=True):
            assert all(torch.equal(bits(back), bits(W)) for back in backs)


def check_refusal(
    backend: ModuleType, weights: list[Tensor], factors: list[Factors], bad: float, place: int, *, last: bool
) -> None:
    """A bad number in the first (or last) row of layer `place`: the error names the layer, and no bit has changed."""
    edge = -1 if last else 0
    factors[place].lora_B[edge] = bad
    factors[place].lora_A[:, edge] = 1e38
    before = copies(weights)
    with pytest.raises(ValueError, match="finite") as error:
        backend.merge_layers_(weights, factors)
    assert error.value.layer == place
    for weight, new in zip(before, weights, strict=True):
        assert torch.equal(bits(new), bits(weight))


def check_failures_while_packing(
    backend: ModuleType, weights: list[Tensor], factors: list[Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, or Ctrl-C, when all layers are merged and some of their receipts packed."""
    merged, pack = copies(weights), merge_layers.pack_receipt
    for error, at in ((torch.OutOfMemoryError, 1), (KeyboardInterrupt, len(weights))):
        failing = mock.Mock(side_effect=[*[pack] * (at - 1), error])

        def packed(*args: Any, failing: mock.Mock = failing) -> MergeReceipt:
            return failing()(*args)

        with monkeypatch.context() as patch:
            patch.setattr(merge_layers, "pack_receipt", packed)
            with pytest.raises(error):
                backend.merge_layers_(merged, factors)
        assert failing.call_count == at
        for weight, new in zip(weights, merged, strict=True):
            assert torch.equal(bits(new), bits(weight))
