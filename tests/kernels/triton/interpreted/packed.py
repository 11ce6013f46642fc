"""Packed outputs: slices of W's rows with their own adapters, in one launch."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from peftk import functional
from peftk.adapters import table
from peftk.adapters.adapter import Adapter
from peftk.adapters.dropout import dropout_from
from peftk.adapters.flat import flat_tensors
from peftk.adapters.table import AdapterTable
from peftk.backends import triton as backend
from tests.support import numerics
from tests.support.cases import Case, expected, expected_grads, normal
from tests.support.gradients import flatten
from tests.support.tiers import spread
from tests.support.triton_cases import BF16, F16, F32, adapter, far_apart


def packed_case(
    seed: int, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, AdapterTable, Tensor]:
    rng = random.Random(seed)
    M, K = rng.choice([1, 7, 19, 40]), rng.choice([33, 64, 96])
    sizes = rng.choice([(64, 16, 16), (37, 20), (5, 6, 7, 8), (48, 96)])
    count = rng.choice([1, 3, 12])
    tables = []
    for j, N in enumerate(sizes):
        made: list[Adapter | None] = []
        for i in range(count):
            rank = rng.choice([0, 1, 8, 16, 20, 40]) if j != 1 or seed % 3 else 0
            activation = rng.choice(["identity", "gelu", "silu"])
            one = adapter(rank, K, N, adapter_dtype, activation, seed * 100 + j * 20 + i, rng.random() < 0.5)
            made.append(None if rng.random() < 0.15 else one)
        tables.append(table.build(tuple(made), dtype=adapter_dtype, device=torch.device("cpu")))
    x, weight = normal(M, K, dtype=dtype, seed=seed), normal(sum(sizes), K, dtype=dtype, seed=seed + 1, scale=K**-0.5)
    bias = normal(sum(sizes), dtype=dtype, seed=seed + 2) if rng.random() < 0.5 else None
    packed = table.pack(tables, sizes)
    taken = [i for i in range(count) if any(packed.adapters[j * count + i] is not None for j in range(len(sizes)))]
    ids = torch.tensor([rng.choice([-1, *taken, *taken]) for _ in range(M)], dtype=torch.int32)
    return x, weight, bias, packed, ids


DTYPES = [(F32, F32), (BF16, BF16), (F16, F32)]


@pytest.mark.parametrize(("dtypes", "seed"), spread(itertools.product(DTYPES, range(16)), default=2, full=14), ids=str)
def test_forward_and_gradients(seed: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight, bias, packed, ids = packed_case(seed, *dtypes)
    dropout_p, key = (0.25, torch.tensor([seed])) if seed % 3 == 0 else (0.0, None)
    x.requires_grad_()
    for tensor in flat_tensors(packed.adapters):
        tensor.requires_grad_()
    y = functional.multi_lora_linear(x, weight, bias, packed, ids, dropout_p=dropout_p, seed=key, backend="triton")
    dy = normal(*y.shape, dtype=y.dtype, seed=seed + 9)
    y.backward(dy)

    # a slice is like a separate layer, except that dX is the sum over the slices
    dx_star, dx_magnitude, terms = 0.0, 0.0, 0
    for j, (start, end) in enumerate(itertools.pairwise(packed.columns)):
        adapters = packed.adapters[j * packed.count : (j + 1) * packed.count]
        case = Case(x.detach(), weight[start:end], None if bias is None else bias[start:end], adapters, ids)
        dx, grads, magnitude, magnitudes, width = expected_grads(
            case, dy[:, start:end], dropout=dropout_from(dropout_p, key)
        )
        dx_star, dx_magnitude, terms = dx_star + dx, dx_magnitude + magnitude, max(terms, width)
        if not dropout_p:
            numerics.check(y[:, start:end], *expected(case))
        found = [t.grad for a in adapters if a is not None for t in a.tensors()]
        wanted, bounds = flatten(adapters, grads), flatten(adapters, magnitudes)
        assert len(found) == len(wanted)
        for grad, star, bound in zip(found, wanted, bounds, strict=True):
            numerics.check(grad, star, bound, width)
    numerics.check(x.grad, dx_star, dx_magnitude, terms + weight.shape[0])


@pytest.mark.parametrize("far", spread(["columns", "rows"], default=1))
def test_a_packed_dy_beyond_32_bits(far: str) -> None:
    """Rows, or columns, that begin at multiples of 2³⁰ elements: the same bits as of a dY in one piece."""
    sizes, K, M = (2, 3), 18, 4
    tables = [
        table.build(
            (adapter(3, K, N, BF16, "silu", N), adapter(20, K, N, BF16, "identity", 7)),
            dtype=BF16,
            device=torch.device("cpu"),
        )
        for N in sizes
    ]
    packed, ids = table.pack(tables, sizes), torch.tensor([1, 0, -1, 1], dtype=torch.int32)
    x, weight = normal(M, K, dtype=BF16, seed=1), normal(sum(sizes), K, dtype=BF16, seed=2)
    near = normal(M, sum(sizes), dtype=BF16, seed=3)
    _, z = backend.multi_lora_linear(x, weight, None, packed, ids, save_z=True)
    dy = far_apart(near) if far == "rows" else far_apart(near.t().contiguous()).t()
    assert max(dy.stride()) >= 2**30
    dx, grads = backend.multi_lora_linear_backward(dy, x, weight, packed, ids, z)
    same_dx, same = backend.multi_lora_linear_backward(near, x, weight, packed, ids, z)
    assert dx is not None
    assert torch.equal(dx, same_dx)
    for one, other in zip(grads, same, strict=True):
        for found, expected_grad in zip(one or (), other or (), strict=True):
            assert found is expected_grad or torch.equal(found, expected_grad)
