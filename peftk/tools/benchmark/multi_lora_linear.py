"""multi_lora_linear: many adapters of mixed ranks in one batch, compared with HF PEFT's `adapter_names`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftk.backends import choice
from peftk.backends.call import Call, Op
from peftk.nn import MultiLoRALinear
from peftk.ops import layer_calls
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

TOKENS = (64,)
RANKS = (4, 8, 16, 64)
ADAPTERS = (1, 8, 64)
DIMS = ((768, 768), (4096, 4096))


def shapes(
    dtype: str, dims: tuple[int, int], tokens: Sequence[int], ranks: Sequence[int], adapters: Sequence[int]
) -> list[Shape]:
    """Adapter i has rank ranks[i mod len(ranks)], with ranks in descending order; the shape has the largest."""
    return [Shape("multi_lora_linear", dtype, M, *dims, max(ranks), n) for M in tokens for n in adapters]


def case(shape: Shape, device: str, requested: Sequence[str], ranks: Sequence[int] = RANKS) -> Case:
    dtype = shape.torch_dtype
    x, linear, base, base_magnitude = layer(shape.M, shape.K, shape.N, dtype, device)
    mixed = sorted(ranks, reverse=True)
    adapters = {
        f"adapter{i}": factors(shape.K, shape.N, mixed[i % len(mixed)], dtype, device, seed=i)
        for i in range(shape.adapters)
    }
    order = torch.randperm(shape.M, generator=torch.Generator().manual_seed(2))
    ids = (order % shape.adapters).to(device, torch.int32)
    expected = _expected(x, base, base_magnitude, adapters, ids)
    base_only = bounds.Expected(base, base_magnitude, shape.K, base, torch.zeros_like(base))
    sides = [Side(LINEAR, lambda: linear(x), lambda: bounds.error(linear(x), base_only, fused=False))]
    if peers.has_peft():
        peft = peers.peft_layer(linear, adapters, SCALING)
        names = [f"adapter{i}" for i in ids.tolist()]

        def run_peft() -> Tensor:
            return peft(x, adapter_names=names)

        sides.append(Side(PEFT, run_peft, lambda: bounds.error(run_peft(), expected, fused=False)))
    for name in backends_to_time(shape, device, requested):
        sides.append(
            _side(name, peftk_layer(linear, adapters, name, shape), x, ids, expected, rounds_once(shape, device, name))
        )
    return Case(shape, tuple(sides), bounds.sensitivity(expected, dtype))


def _side(name: str, module: nn.Module, x: Tensor, ids: Tensor, expected: bounds.Expected, fused: bool) -> Side:
    return Side(f"peftk {name}", lambda: module(x, ids), lambda: bounds.error(module(x, ids), expected, fused=fused))


def _expected(
    x: Tensor, base: Tensor, base_magnitude: Tensor, adapters: dict[str, tuple[Tensor, Tensor]], ids: Tensor
) -> bounds.Expected:
    """The exact result, with each row's own adapter."""
    value, magnitude, part = base.clone(), base_magnitude.clone(), torch.zeros_like(base)
    for index, (A, B) in enumerate(adapters.values()):
        rows = (ids == index).nonzero().flatten()
        one = bounds.with_adapter(x[rows], base[rows], base_magnitude[rows], A, B, SCALING)
        value[rows], magnitude[rows], part[rows] = one.value, one.magnitude, one.adapter
    return bounds.Expected(value, magnitude, x.shape[1], base, part)


def peftk_layer(
    linear: nn.Linear, adapters: dict[str, tuple[Tensor, Tensor]], backend: str, shape: Shape
) -> MultiLoRALinear:
    """The public layer, run by `backend`; adapters in the weight's dtype, as is its default."""
    dtype, device = linear.weight.dtype, linear.weight.device.type
    call = Call(
        op=Op("lora_linear", many=True),
        device=device,
        x_dtype=dtype,
        weight_dtype=dtype,
        adapter_dtype=dtype,
        M=shape.M,
        K=shape.K,
        N=shape.N,
        rank=shape.rank,
        adapters=shape.adapters,
    )
    layer_class = MultiLoRALinear if choice.choose(call).backend == backend else _forced_layer_class(backend)
    module = layer_class.from_linear(linear, max_adapters=len(adapters))
    for name, (A, B) in adapters.items():
        module.add_adapter(name, A, B, SCALING)
    return module.eval()


def _forced_layer_class(backend: str) -> type[MultiLoRALinear]:
    class Forced(MultiLoRALinear):
        """MultiLoRALinear whose forward, with ids, forces the backend."""

        def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
            if ids is None:
                raise TypeError("ids: expected a tensor, got None")
            return layer_calls.multi_lora_linear(x, self.weight, self.bias, self.bank, ids, backend=backend)

    return Forced
