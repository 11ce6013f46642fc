"""Random cases of series adapters, checked on any backend."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from peftk import functional
from peftk.adapters import table
from peftk.adapters.adapter import Adapter
from peftk.adapters.dropout import dropout_from
from peftk.adapters.flat import flat_tensors
from tests.support import numerics
from tests.support.cases import Case, expected, expected_grads
from tests.support.gradients import flatten

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check(seed: int, backend: str | None, *, max_rows: int = 40, min_width: int = 1, max_width: int = 80) -> None:
    """y and all gradients of a random case within the bounds, with W = identity."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    M, K = rng.choice([0, 1, rng.randint(1, max_rows)]), rng.randint(min_width, max_width)
    dtype, adapter_dtype = rng.choice([(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)])

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(adapter_dtype)

    def adapter() -> Adapter:
        if rng.random() < 0.1:
            return Adapter((), (), 1.0, "identity", None, normal(K))
        R = rng.choice([1, 8, 16, 17, 40])
        biases = normal(R), normal(K)
        A, B = normal(R, K, scale=K**-0.5), normal(K, R, scale=R**-0.5)
        kept = [bias if rng.random() < 0.5 else None for bias in biases]
        return Adapter((A,), (B,), rng.choice([1.0, -0.5]), rng.choice(["relu", "gelu", "silu", "identity"]), *kept)

    many = rng.random() < 0.6
    adapters = tuple(adapter() for _ in range(rng.choice([1, 5, 20]) if many else 1))
    x = torch.randn(M, K, generator=generator).to(dtype).requires_grad_()
    dropout_p, key = (0.25, torch.tensor([seed])) if rng.random() < 0.3 else (0.0, None)
    ids = torch.tensor([rng.randrange(-1, len(adapters)) for _ in range(M)], dtype=torch.int32) if many else None
    for tensor in flat_tensors(adapters):
        tensor.requires_grad_()
    if ids is None:
        [a] = adapters
        tensors = (a.lora_A, a.lora_B, a.scaling)
        rest = {"activation": a.activation, "bias_A": a.bias_A, "bias_B": a.bias_B}
        y = functional.adapter_block(x, *tensors, **rest, dropout_p=dropout_p, seed=key, backend=backend)
    else:
        made = table.build(adapters, dtype=adapter_dtype, device=x.device)
        y = functional.multi_adapter_block(x, made, ids, dropout_p=dropout_p, seed=key, backend=backend)
    assert y.dtype == dtype
    dy = torch.randn(M, K, generator=generator).to(dtype)
    y.backward(dy)
    case = Case(x.detach(), None, None, adapters, ids)
    if not dropout_p:
        numerics.check(y, *expected(case))
    dx, grads, dx_magnitude, magnitudes, terms = expected_grads(case, dy, dropout=dropout_from(dropout_p, key))
    numerics.check(x.grad, dx, dx_magnitude, terms)
    tensors, wanted, bounds = flat_tensors(adapters), flatten(adapters, grads), flatten(adapters, magnitudes)
    for tensor, grad, bound in zip(tensors, wanted, bounds, strict=True):
        numerics.check(tensor.grad, grad, bound, terms)
