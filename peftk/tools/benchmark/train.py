"""train: forward and backward of one layer; gradients of x, A and B.

It is compared with an nn.Linear with a frozen weight and no adapter, whose backward computes only the gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftk.reference import bounds
from peftk.tools.benchmark import peers
from peftk.tools.benchmark.common import (
    LINEAR,
    PEFT,
    SCALING,
    Case,
    Shape,
    Side,
    backends_to_time,
    factors,
    layer,
    rounds_once,
)
from peftk.tools.benchmark.lora_linear import peftk_layer

TOKENS = (256,)
RANKS = (16,)
DIMS = ((768, 768),)  # torch's bf16 backward takes half a minute at 4096 on some machines


def shapes(dtype: str, dims: tuple[int, int], tokens: Sequence[int], ranks: Sequence[int]) -> list[Shape]:
    return [Shape("train", dtype, M, *dims, rank, 1) for M in tokens for rank in ranks]


def case(shape: Shape, device: str, requested: Sequence[str]) -> Case:
    dtype = shape.torch_dtype
    base = layer(shape.M, shape.K, shape.N, dtype, device)
    linear = base.linear
    x = base.x.clone().requires_grad_()
    dy = torch.randn(shape.M, shape.N, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    A, B = factors(shape.K, shape.N, shape.rank, dtype, device)
    expected = bounds.backward(dy, x, linear.weight, A, B, SCALING)
    base_only = bounds.backward(dy, x, linear.weight, torch.zeros_like(A), torch.zeros_like(B), SCALING)["x"]
    sides = [_side(LINEAR, linear, x, dy, (), {"x": base_only}, fused=False)]
    if peers.has_peft():
        peft = peers.peft_layer(linear, {"default": (A, B)}, SCALING)
        trained = (peft.lora_A["default"].weight, peft.lora_B["default"].weight)
        sides.append(_side(PEFT, peft, x, dy, trained, expected, fused=False))
    for name in backends_to_time(shape, device, requested):
        ours = peftk_layer(linear, A, B, name, shape.M)
        fused = rounds_once(shape, device, name)
        sides.append(_side(f"peftk {name}", ours, x, dy, (ours.lora_A, ours.lora_B), expected, fused=fused))
    return Case(shape, tuple(sides), bounds.sensitivity(expected["x"], dtype), inference=False)


def _side(
    name: str,
    module: nn.Module,
    x: Tensor,
    dy: Tensor,
    trained: tuple[Tensor, ...],
    expected: dict[str, bounds.Expected],
    *,
    fused: bool,
) -> Side:
    for parameter in trained:
        parameter.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), (x, *trained), dy)

    def error() -> float:
        return max(bounds.error(g, e, fused=fused) for g, e in zip(run(), expected.values(), strict=True))

    return Side(name, run, error)
