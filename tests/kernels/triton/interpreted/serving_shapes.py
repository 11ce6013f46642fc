"""The shapes and cases of vLLM's own LoRA kernel tests, at the bounds of `tests/support/numerics.py`.

From vllm-project/vllm, tests/lora/test_punica_ops.py (commit 046d2b1): hidden size 2049 with 1-32 sequences, 1-128
adapters, ranks 1-256 and 1-3 slices; and the hidden sizes of the models it supports, with tensor parallelism, 4
sequences, 4 adapters and rank 32. There the tolerance is 6e-2 and sequences have 128 tokens; here, in an interpreter,
they have three. Their shrink tests have the hidden size as K and few columns, their expand tests the reverse.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from peftk import functional
from peftk.adapters import table
from peftk.adapters.adapter import Adapter
from tests.support import numerics
from tests.support.cases import Case, expected, normal
from tests.support.tiers import spread
from tests.support.triton_cases import BF16, F16

TOKENS = 3
FEW = 24  # the other side of a layer
HIDDEN = [896, 1216, 2368, 3712, 5504]


def check(
    batches: int, adapters: int, rank: int, hidden: int, slices: int, dtype: torch.dtype, shrink: bool, seed: int = 0
) -> None:
    rng = random.Random(f"{batches} {adapters} {rank} {hidden} {slices} {seed}")
    K, N = (hidden, FEW) if shrink else (FEW, hidden)
    per_sequence = torch.tensor([rng.randrange(-1, adapters) for _ in range(batches)], dtype=torch.int32)
    ids = per_sequence.repeat_interleave(TOKENS)
    used = set(ids.tolist())
    M = ids.shape[0]
    x, weight = normal(M, K, dtype=dtype, seed=1), normal(slices * N, K, dtype=dtype, seed=2, scale=K**-0.5)
    tables = []
    for j in range(slices):
        made = [
            Adapter(
                (normal(rank, K, dtype=dtype, seed=100 * j + i, scale=K**-0.5),),
                (normal(N, rank, dtype=dtype, seed=100 * j + i + 50, scale=rank**-0.5),),
                0.5,
            )
            if i in used
            else None
            for i in range(adapters)
        ]
        tables.append(table.build(tuple(made), dtype=dtype, device=torch.device("cpu")))
    packed = table.pack(tables, [N] * slices) if slices > 1 else tables[0]
    y = functional.multi_lora_linear(x, weight, None, packed, ids, backend="triton")
    for j, each in enumerate(tables):
        case = Case(x, weight[j * N : (j + 1) * N], None, each.adapters, ids)
        numerics.check(y[:, j * N : (j + 1) * N], *expected(case))


THEIRS = itertools.product((1, 4, 16, 32), (1, 8, 32, 128), (1, 4, 8, 16, 32, 64, 128, 256), (1, 2, 3))
SOME = [(4, 8, 16, 2), (1, 1, 1, 1), *itertools.islice(THEIRS, 0, None, 33)]


@pytest.mark.parametrize(("case", "shrink"), spread(itertools.product(SOME, (True, False)), default=1, full=9))
def test_hidden_size_2049(case: tuple[int, int, int, int], shrink: bool) -> None:
    batches, adapters, rank, slices = case
    hidden = 2049 if batches * rank <= 256 else 257  # an interpreter takes minutes for the largest
    check(batches, adapters, rank, hidden, slices, BF16 if (batches + rank) % 2 else F16, shrink)


@pytest.mark.parametrize(
    ("hidden", "parts", "shrink"), spread(itertools.product(HIDDEN, (2, 8, 64), (True, False)), default=0, full=4)
)
def test_hidden_sizes(hidden: int, parts: int, shrink: bool) -> None:
    check(4, 4, 32, hidden // parts, 1 + hidden % 3, F16 if parts % 16 else BF16, shrink)
