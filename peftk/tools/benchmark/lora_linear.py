"""lora_linear: the forward of one layer with one adapter, compared with nn.Linear without one and with HF PEFT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftk.adapters.adapter import adapter_of
from peftk.backends import choice
from peftk.backends.call import LORA_LINEAR, Call
from peftk.nn import LoRALinear
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

TOKENS = (1, 16, 256)
RANKS = (1, 4, 16, 64)
DIMS = ((768, 768), (4096, 4096))


def shapes(dtype: str, dims: tuple[int, int], tokens: Sequence[int], ranks: Sequence[int]) -> list[Shape]:
    return [Shape("lora_linear", dtype, M, *dims, rank, 1) for M in tokens for rank in ranks]


def case(shape: Shape, device: str, requested: Sequence[str]) -> Case:
    dtype = shape.torch_dtype
    x, linear, base, base_magnitude = layer(shape.M, shape.K, shape.N, dtype, device)
    A, B = factors(shape.K, shape.N, shape.rank, dtype, device)
    expected = bounds.with_adapter(x, base, base_magnitude, A, B, SCALING)
    base_only = bounds.Expected(base, base_magnitude, shape.K, base, torch.zeros_like(base))
    sides = [Side(LINEAR, lambda: linear(x), lambda: bounds.error(linear(x), base_only, fused=False))]
    if peers.has_peft():
        peft = peers.peft_layer(linear, {"default": (A, B)}, SCALING)
        sides.append(Side(PEFT, lambda: peft(x), lambda: bounds.error(peft(x), expected, fused=False)))
    for name in backends_to_time(shape, device, requested):
        sides.append(
            _side(name, peftk_layer(linear, A, B, name, shape.M), x, expected, rounds_once(shape, device, name))
        )
    return Case(shape, tuple(sides), bounds.sensitivity(expected, dtype))


def _side(name: str, module: nn.Module, x: Tensor, expected: bounds.Expected, fused: bool) -> Side:
    return Side(f"peftk {name}", lambda: module(x), lambda: bounds.error(module(x), expected, fused=fused))


def peftk_layer(linear: nn.Linear, A: Tensor, B: Tensor, backend: str, M: int) -> LoRALinear:
    """The public layer, run by `backend`; adapters in fp32, as is its and PEFT's default."""
    layer_class = LoRALinear if _is_default(linear, A, backend, M) else _forced_layer_class(backend)
    module = layer_class.from_linear(linear, r=A.shape[0], lora_alpha=SCALING * A.shape[0])
    with torch.no_grad():
        module.lora_A.copy_(A)
        module.lora_B.copy_(B)
    return module.eval()


def _is_default(linear: nn.Linear, A: Tensor, backend: str, M: int) -> bool:
    weight = linear.weight
    N, K = weight.shape
    call = Call(
        op=LORA_LINEAR,
        device=weight.device.type,
        x_dtype=weight.dtype,
        weight_dtype=weight.dtype,
        adapter_dtype=A.dtype,
        M=M,
        K=K,
        N=N,
        rank=A.shape[0],
        adapters=1,
    )
    return choice.choose(call).backend == backend


def _forced_layer_class(backend: str) -> type[LoRALinear]:
    class Forced(LoRALinear):
        """LoRALinear whose forward forces the backend."""

        def forward(self, x: Tensor) -> Tensor:
            adapter = adapter_of(self.lora_A, self.lora_B, self.scaling)
            return layer_calls.lora_linear(x, self.weight, self.bias, adapter, backend=backend)

    return Forced
