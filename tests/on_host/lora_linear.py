"""csrc/cuda/lora_linear.cu on the host, through peftk.backends.cuda, against the fp64 reference at the error bound."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from peftk import activations, reference
from peftk.backends import cuda as backend
from peftk.backends import workspace
from peftk.table import Adapter
from tests import numerics
from tests.cases import Case, expected
from tests.on_host.conftest import Executor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def shifted(tensor: Tensor) -> Tensor:
    """A copy that starts one element after the beginning of its heap block, which ends where it ends."""
    block = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return block[1:].view(tensor.shape).copy_(tensor)


def adapter(rng: random.Random, N: int, K: int, dtype: torch.dtype, rank: int) -> Adapter:
    """B along its ranks or its rows, any of the tensors at an odd address."""
    seed = rng.getrandbits(30)
    bias_B = normal(N, dtype=dtype, seed=seed) if rng.random() < 0.5 else None
    if rank == 0:
        return Adapter((), (), 1.0, "identity", None, normal(N, dtype=dtype, seed=seed))
    A = normal(rank, K, dtype=dtype, seed=seed + 1, scale=K**-0.5)
    B = normal(N, rank, dtype=dtype, seed=seed + 2, scale=rank**-0.5)
    if rng.random() < 0.4:
        B = normal(rank, N, dtype=dtype, seed=seed + 2, scale=rank**-0.5).t()
    elif rng.random() < 0.3:
        B = normal(N, 2 * rank, dtype=dtype, seed=seed + 2, scale=rank**-0.5)[:, ::2]
    if rng.random() < 0.2:
        A = shifted(A)
    if rng.random() < 0.2:
        B = shifted(B) if B.is_contiguous() else shifted(B.t().contiguous()).t()
    activation = rng.choice(["identity", *activations.CODES])
    bias_A = normal(rank, dtype=dtype, seed=seed + 3) if rng.random() < 0.5 else None
    return Adapter((A,), (B,), rng.choice([0.5, 1.0, -1.5]), activation, bias_A, bias_B)


def decode_case(seed: int, M: int | None = None) -> Case:
    """What a decode step may ask for: 1 to 64 rows, every rank and kind of adapter, ids in any order."""
    rng = random.Random(seed)
    M = M or rng.choice([1, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64])
    K = rng.choice([8, 16, 24, 56, 64, 72, 120, 128, 136, 264, 512, 1032])
    N = rng.choice([1, 2, 7, 15, 16, 17, 63, 64, 65, 96, 129, 192])
    dtype = rng.choice([BF16, F16])
    adapter_dtype = rng.choice([dtype, dtype, F32])
    ranks = [0, 1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 65, 80]
    count = rng.choice([0, 1, 1, 2, 3, 5, 9, 64])
    if count == 64:
        ranks = [0, 1, 4, 16]
    adapters: list[Adapter | None] = [adapter(rng, N, K, adapter_dtype, rng.choice(ranks)) for _ in range(count)]
    ids: Tensor | None = None
    if count == 0:
        adapters = [None]
    elif count > 1 or rng.random() < 0.5:
        if rng.random() < 0.3:
            adapters[rng.randrange(count)] = None
        taken = [-1, *(i for i, a in enumerate(adapters) if a is not None)]
        drawn = [rng.choice(taken) for _ in range(M)]
        ids = torch.tensor(sorted(drawn) if rng.random() < 0.2 else drawn, dtype=torch.int32)
    x = normal(M, K, dtype=dtype, seed=seed + 1)
    if rng.random() < 0.2:
        x = normal(M, K + 8, dtype=dtype, seed=seed + 1)[:, 8:]
    elif rng.random() < 0.2:
        x = shifted(x)
    weight = normal(N, K, dtype=dtype, seed=seed + 2, scale=K**-0.5)
    if rng.random() < 0.2:
        weight = normal(N, K + 16, dtype=dtype, seed=seed + 2, scale=K**-0.5)[:, 8 : K + 8]
    bias = normal(N, dtype=rng.choice([dtype, F32]), seed=seed + 3) if rng.random() < 0.6 else None
    return Case(x, weight, bias, tuple(adapters), ids)


def run(case: Case, *, save_z: bool = False) -> tuple[Tensor, Tensor | None]:
    assert case.weight is not None
    if case.ids is None:
        return backend.lora_linear(case.x, case.weight, case.bias, case.adapters[0], save_z=save_z)
    return backend.multi_lora_linear(case.x, case.weight, case.bias, case.table(), case.ids, save_z=save_z)


def check(case: Case, executor: Executor) -> None:
    executor.reset()
    y, _ = run(case)
    assert executor.statistics.launches == 1
    assert executor.statistics.bank_conflicts == 0
    try:
        numerics.check(y, *expected(case))
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error
    assert not any(counters.any() for counters in workspace._of_stream.values()), f"{case}: a counter was left"


@pytest.mark.parametrize("seed", range(60))
def test_random(executor: Executor, seed: int) -> None:
    executor.seed(seed)
    check(decode_case(seed), executor)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1000, 1300))
def test_random_more(executor: Executor, seed: int) -> None:
    executor.seed(seed)
    check(decode_case(seed), executor)
