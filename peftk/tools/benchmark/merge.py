"""merge and unmerge of one layer's weight, compared with a copy of W (the cheapest pass over it) and with HF PEFT.

peftk's merge includes the receipt that restores every bit; PEFT's unmerge subtracts. Each side has its own W, which is
restored after every run, untimed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftk import functional
from peftk.reference import bounds
from peftk.tools.benchmark import peers
from peftk.tools.benchmark.common import COPY, PEFT, SCALING, Case, Shape, Side, backends_to_time, factors, plain_linear

RANKS = (16,)
DIMS = ((768, 768), (4096, 4096))


def shapes(op: str, dtype: str, dims: tuple[int, int], ranks: Sequence[int]) -> list[Shape]:
    return [Shape(op, dtype, 0, *dims, rank, 1) for rank in ranks]


def case(shape: Shape, device: str, requested: Sequence[str]) -> Case:
    dtype = shape.torch_dtype
    weight = plain_linear(shape.K, shape.N, dtype, device).weight.detach()
    A, B = factors(shape.K, shape.N, shape.rank, dtype, device)
    B /= 4  # elements of ΔW are about a quarter of W's
    expected = bounds.merged(weight, A, B, SCALING)
    copy = torch.empty_like(weight)
    sides = [Side(COPY, lambda: copy.copy_(weight), lambda: 0.0)]
    make_peft, make_ours = (_peft_merge, _our_merge) if shape.op == "merge" else (_peft_unmerge, _our_unmerge)
    if peers.has_peft():
        sides.append(make_peft(shape, device, weight, A, B, expected))
    for name in backends_to_time(shape, device, requested):
        sides.append(make_ours(name, weight, A, B, expected))
    return Case(shape, tuple(sides), bounds.sensitivity(expected, dtype), inference=False)


def _our_merge(name: str, original: Tensor, A: Tensor, B: Tensor, expected: bounds.Expected) -> Side:
    weight = original.clone()

    def run() -> functional.MergeReceipt:
        return functional.merge_(weight, A, B, SCALING, backend=name)

    def error() -> float:
        """The error of the merged weight; inf if the receipt does not restore every bit."""
        receipt = run()
        merged = bounds.error(weight, expected, fused=True)
        functional.unmerge_(weight, receipt, backend=name)
        return merged if _same_bits(weight, original) else float("inf")

    return Side(f"peftk {name}", run, error, lambda: weight.copy_(original))


def _our_unmerge(name: str, original: Tensor, A: Tensor, B: Tensor, expected: bounds.Expected) -> Side:
    weight = original.clone()
    receipt = functional.merge_(weight, A, B, SCALING, backend=name)
    merged = weight.clone()

    def run() -> None:
        functional.unmerge_(weight, receipt, backend=name)

    def error() -> float:
        run()
        return 0.0 if _same_bits(weight, original) else float("inf")

    return Side(f"peftk {name}", run, error, lambda: weight.copy_(merged))


def _peft_merge(shape: Shape, device: str, original: Tensor, A: Tensor, B: Tensor, expected: bounds.Expected) -> Side:
    layer = peers.peft_layer(plain_linear(shape.K, shape.N, shape.torch_dtype, device), {"default": (A, B)}, SCALING)
    weight = layer.base_layer.weight.detach()

    def error() -> float:
        layer.merge()
        return bounds.error(weight, expected, fused=False)

    def reset() -> None:
        weight.copy_(original)
        layer.merged_adapters.clear()

    return Side(PEFT, layer.merge, error, reset)


def _peft_unmerge(shape: Shape, device: str, original: Tensor, A: Tensor, B: Tensor, expected: bounds.Expected) -> Side:
    layer = peers.peft_layer(plain_linear(shape.K, shape.N, shape.torch_dtype, device), {"default": (A, B)}, SCALING)
    layer.merge()
    weight = layer.base_layer.weight.detach()
    merged = weight.clone()
    # subtraction may restore W only up to the roundings of the merge and of the unmerge
    back = expected._replace(value=original.double(), base=expected.value)

    def error() -> float:
        layer.unmerge()
        return bounds.error(weight, back, fused=False)

    def reset() -> None:
        weight.copy_(merged)
        layer.merged_adapters[:] = ["default"]

    return Side(PEFT, layer.unmerge, error, reset)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return bool(torch.equal(one.view(integer), other.view(integer)))
