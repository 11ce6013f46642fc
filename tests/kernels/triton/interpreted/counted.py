"""The closed forms of `peftk bench --counted` equal the counts in the interpreter, byte by byte."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.counted import lora_linear as closed
from bench.counted import lora_wgrad as closed_wgrad
from bench.counted.batch import Batch, of_ids, one_adapter
from bench.counted.work import Launch
from peftk.adapters import table
from peftk.adapters.adapter import Adapter, Wanted
from peftk.backends import triton as backend
from peftk.triton_kernels import config, lora_wgrad, tuned
from peftk.triton_kernels import lora_linear as kernels
from peftk.triton_kernels.segments import segments
from tests.support.counting import counting
from tests.support.tiers import spread

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WANTED = Wanted(lora_A=True, lora_B=True, bias_A=False, bias_B=False)


class Tensors:
    """Tensors with the sizes of a batch. Counts do not depend on their values."""

    def __init__(self, batch: Batch, ids: Sequence[int] | None) -> None:
        def normal(*shape: int, dtype: torch.dtype = batch.adapter_dtype) -> Tensor:
            return torch.randn(*shape).to(dtype)

        self.x = normal(batch.M, batch.K, dtype=batch.dtype)
        self.dy = normal(batch.M, batch.N, dtype=batch.dtype)
        self.weight = normal(batch.N, batch.K, dtype=batch.dtype)
        self.bias = normal(batch.N, dtype=batch.dtype) if batch.bias else None
        self.A = [normal(rank, batch.K) for rank in batch.ranks]
        self.B = [normal(batch.N, rank) for rank in batch.ranks]
        self.bias_A = [normal(rank) for rank in batch.ranks] if batch.adapter_biases else []
        self.bias_B = [normal(batch.N) for _ in batch.ranks] if batch.adapter_biases else []
        biases = zip(self.bias_A, self.bias_B, strict=True) if batch.adapter_biases else [(None, None)] * len(self.A)
        self.adapters = tuple(
            Adapter((A,), (B,), 0.5, "identity", *pair) for A, B, pair in zip(self.A, self.B, biases, strict=True)
        )
        self.segments = None
        if ids is not None:
            self.segments = segments(torch.tensor(ids, dtype=torch.int32), len(batch.ranks))
            full = table.build(self.adapters, dtype=batch.adapter_dtype, device=torch.device("cpu"))
            self.source = backend._build_table_adapters(full)
        else:
            self.source, self.tensors = backend._one_adapter(self.adapters[0])

    def names(self) -> dict[str, Tensor | Sequence[Tensor]]:
        found = {
            "weight": self.weight, "lora_A": self.A, "lora_B": self.B, "bias_A": self.bias_A, "bias_B": self.bias_B,
            "x": self.x, "dy": self.dy,
        }  # fmt: skip
        return found if self.bias is None else {**found, "bias": self.bias}


@contextlib.contextmanager
def gpu_plans(**changes: object) -> Iterator[None]:
    """Makes the launcher and the closed form use a GPU's plans instead of the interpreter's."""
    original = config.lora_linear
    tuned.derived.clear()
    with mock.patch.object(config, "lora_linear", lambda *args: original(*args)._replace(**changes)):
        yield
    tuned.derived.clear()


def assert_equal_counts(seen: list[Launch], expected: list[Launch]) -> None:
    assert len(seen) == len(expected)
    for launch, other in zip(seen, expected, strict=True):
        # the parts of shrink and expand share a tensor
        names = {name: "partials" if name.endswith("_partials") else name for name in launch.tensors}
        assert {names[name]: traffic for name, traffic in launch.tensors.items()} == dict(other.tensors)
        assert (launch.kernel, launch.flops, launch.atomics) == (other.kernel, other.flops, other.atomics)


def make(K: int, N: int, ranks: Sequence[int], ids: Sequence[int] | None, M: int = 40, **more: object) -> Batch:
    return one_adapter(M, K, N, ranks[0], **more) if ids is None else of_ids(K, N, ranks, ids, **more)


def forward(batch: Batch, ids: Sequence[int] | None, *, save_z: bool = False) -> None:
    made = Tensors(batch, ids)
    with counting(**made.names()) as seen:
        kernels.forward(made.x, made.weight, made.bias, made.source, made.segments, save_z=save_z)
    assert_equal_counts(seen, closed.forward(batch, closed.plan(batch, "interpreter"), dense=save_z, processors=4))


PATTERNS = {
    "one": None,
    "one adapter of many": (2,) * 40,
    "base only": (-1,) * 40,
    "sorted": tuple(sorted(i % 8 for i in range(40))),
    "random": tuple(random.Random(0).randrange(-1, 8) for _ in range(40)),
    "long": (5,) * 18 + (-1,) * 4 + (2,) * 18,
    "by row": tuple(random.Random(1).randrange(0, 8) for _ in range(11)),
}
RANKS = (33, 16, 8, 7, 20, 1, 4, 64)


@pytest.mark.parametrize(("pattern", "save_z"), spread(itertools.product(PATTERNS, (False, True)), default=2))
def test_forward(pattern: str, save_z: bool) -> None:
    ids = PATTERNS[pattern]
    forward(make(96, 80, RANKS, ids, adapter_biases=save_z, bias=save_z), ids, save_z=save_z)


SHAPES = [(1, 300, 40), (3, 1100, 33), (17, 70, 37), (50, 40, 130)]


@pytest.mark.parametrize(("many", "shape"), spread(itertools.product((False, True), SHAPES), default=2))
def test_shapes_and_splits(many: bool, shape: tuple[int, int, int]) -> None:
    M, K, N = shape
    ids = tuple(i % 4 - 1 for i in range(M)) if many else None
    forward(make(K, N, (20, 5, 16), ids, M), ids)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), spread([(F32, BF16), (BF16, F32), (F16, F16), (F32, F32), (F16, F32)], default=1)
)
def test_dtypes(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    for ids in (None, (0, 1, 1, -1) * 5):
        forward(make(70, 37, (17, 9), ids, 20, dtype=dtype, adapter_dtype=adapter_dtype), ids)


PLANS = {
    "two launches": {"once": False},
    "splits": {"shrink_splits": 3, "expand_splits": 2},
    "tiles": {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 64, "SHRINK_M": 32, "SHRINK_K": 64, "BY_ROW": False},
    "descriptors": {"descriptors": True},
    "blocks that stay": {"per_processor": 1},
}


@pytest.mark.parametrize(("pattern", "change"), spread(itertools.product(("random", "one"), PLANS), default=3))
def test_plans(change: str, pattern: str) -> None:
    with gpu_plans(**PLANS[change]):
        forward(make(96, 80, RANKS, PATTERNS[pattern]), PATTERNS[pattern])


@pytest.mark.parametrize("pattern", spread(PATTERNS, default=2))
def test_backward(pattern: str) -> None:
    ids = PATTERNS[pattern]
    batch = make(96, 80, RANKS, ids)
    made = Tensors(batch, ids)
    z = torch.randn(batch.M, batch.z_width)
    with counting(**made.names()) as seen:
        kernels.backward(made.dy, made.weight, batch.K, made.source, made.segments, z)
    for launch in seen:  # the kernel's own names are those of the forward
        for forwards, name in (("y", "dx"), ("z", "u")):
            if forwards in launch.tensors:
                launch.tensors[name] = launch.tensors.pop(forwards)
    assert_equal_counts(seen, closed.backward(batch, closed.plan(batch.swapped(), "interpreter", backward=True)))


@pytest.mark.parametrize("pattern", spread(["long ranges", *PATTERNS], default=2))
def test_wgrad(pattern: str) -> None:
    ids = (1,) * 30 + (0,) * 150 + (3,) * 20 if pattern == "long ranges" else PATTERNS[pattern]
    batch = make(48, 40, (20, 4, 16, 33, 8, 1, 7, 50), ids)
    made = Tensors(batch, ids)
    z, u = torch.randn(batch.M, batch.z_width), torch.randn(batch.M, batch.z_width)
    plan = lora_wgrad.plan(
        batch.ranks, [WANTED] * len(batch.ranks), (0, made.dy.shape[1]), BF16, made.x.device, many=batch.many
    )
    with counting(**made.names()) as seen:
        lora_wgrad.wgrad(made.dy, made.x, z, u, made.source, made.segments, plan)
    assert_equal_counts(seen, closed_wgrad.wgrad(batch, closed_wgrad.tiling(batch, "interpreter")))
