"""The performance targets of the CPU backend, which `peftk bench --suite cpu` measures.

peftk's side has a rank-16 adapter unless the row has a different rank; nn.Linear and torch.compile have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from peftk.tools.benchmark import batch_invariant
from peftk.tools.benchmark.common import COPY, LINEAR, PEFT, Shape

COMPILE, FMA_PEAK = "torch.compile", "FMA peak"
BASE, ONE_ADAPTER, PLAIN_MODEL = "peftk base layer", "peftk 1 adapter", "plain model"

NOISE = 0.03  # allowed by "never slower": medians of equal sides differ by this much

# Sections, in the order in which they are printed.
FORWARD = "Forward, 4096 → 4096"
COMPILED = "Forward compared with torch.compile of the plain layer, 4096 → 4096"
SIZES = "Forward at other sizes: never slower than nn.Linear"
TRAIN = "Training step: forward and backward, 4096 → 4096"
ADAPTER = "Cost of adapters on top of peftk's own base layer, 4096 → 4096"
MERGE = "Merge and unmerge, 4096 → 4096"
MERGE_MODEL = "Merge of all-MiniLM-L6-v2, every linear layer; merged_context: in and out again"
MODEL = "all-MiniLM-L6-v2, every linear layer adapted"
OVERHEAD = "Cost of a call, 64 → 64"
CONTENDED = "Beside busy processes: mean time over that alone, compared with nn.Linear's, 1024 → 1024"

INVARIANT = "Batch-invariant mode compared with the default mode, 4096 → 4096"

BUSY = (1, 2)  # processes


def beside(processes: int) -> str:
    """The peer of a target: nn.Linear beside so many busy processes."""
    return f"{LINEAR} beside {processes}"


class Target(NamedTuple):
    """peftk must be at least `value` times faster than the peer; with at_most, take at most `value` times its time."""

    section: str
    shape: Shape
    peer: str
    value: float
    at_most: bool = False
    noise: float = 0.0

    def met(self, ratio: float) -> bool:
        return ratio <= self.value * (1 + self.noise) if self.at_most else ratio >= self.value * (1 - self.noise)

    def __str__(self) -> str:
        noise = f" (−{self.noise:.0%})" if self.noise else ""
        return f"{'≤' if self.at_most else '≥'} {self.value:g}{noise}"


def _forward(dtype: str, M: int, K: int = 4096, N: int = 4096, op: str = "lora_linear") -> Shape:
    return Shape(op, dtype, M, K, N, 16, 1)


def _square(op: str, dtype: str, M: int, rank: int = 16, adapters: int = 1) -> Shape:
    return Shape(op, dtype, M, 4096, 4096, rank, adapters)


TOKENS = (1, 4, 16, 64, 256, 512)
_OVER_LINEAR = {"bf16": (2.5, 5.0, 6.0, 7.0, 7.5, 8.0), "fp32": (1.2, 3.5, 3.0, 1.2, 1.2, 1.2)}
_OVER_COMPILE = {"bf16": (1.0, 1.5, 1.5, 2.5, 2.5, 2.5), "fp32": (1.0,) * 6}
_SIZES = ((384, 384), (768, 768), (1024, 1024), (4096, 11008))
_COPIES = {"fp32": 2.0, "bf16": 4.0, "fp16": 4.0}


def _targets() -> Iterable[Target]:
    for dtype, values in _OVER_LINEAR.items():
        for M, value in zip(TOKENS, values, strict=True):
            yield Target(FORWARD, _forward(dtype, M), LINEAR, value)
        yield Target(FORWARD, _forward(dtype, 512), FMA_PEAK, 0.9)
    for dtype, values in _OVER_COMPILE.items():
        for M, value in zip(TOKENS, values, strict=True):
            yield Target(COMPILED, _forward(dtype, M, op="compile"), COMPILE, value)
    for K, N in _SIZES:
        for dtype in ("bf16", "fp32"):
            for M in (1, 16, 256):
                yield Target(SIZES, _forward(dtype, M, K, N), LINEAR, 1.0, noise=NOISE)
    yield Target(TRAIN, _square("train", "bf16", 256), PEFT, 100.0)
    yield Target(TRAIN, _square("train", "fp32", 256), PEFT, 1.3)
    for dtype in ("bf16", "fp32"):
        for M in (1, 16, 64, 256):
            for rank, value in ((16, 1.03), (64, 1.10)):
                yield Target(ADAPTER, _square("adapter_cost", dtype, M, rank), BASE, value, at_most=True)
        yield Target(ADAPTER, _square("adapter_cost", dtype, 64, adapters=64), ONE_ADAPTER, 1.15, at_most=True)
    for dtype, copies in _COPIES.items():
        yield Target(MERGE, _square("merge", dtype, 0), COPY, copies, at_most=True)
        yield Target(MERGE, _square("merge", dtype, 0), PEFT, 15.0)
        yield Target(MERGE, _square("unmerge", dtype, 0), COPY, copies, at_most=True)
    for op, passes in (("merge_model", 1), ("merged_context", 2)):
        for dtype in ("fp32", "bf16"):
            shape = Shape(op, dtype, 0, 384, 384, 16, 1)
            yield Target(MERGE_MODEL, shape, COPY, passes * _COPIES[dtype], at_most=True)
    yield Target(MODEL, Shape("model", "fp32", 0, 384, 384, 16, 1), PLAIN_MODEL, 1.2)
    yield Target(MODEL, Shape("model", "bf16", 0, 384, 384, 16, 1), PLAIN_MODEL, 3.0)
    for dtype in ("bf16", "fp32"):
        yield Target(OVERHEAD, _forward(dtype, 1, 64, 64), LINEAR, 1.5, at_most=True)
        yield Target(OVERHEAD, Shape("multi_lora_linear", dtype, 8, 64, 64, 16, 8), LINEAR, 2.0, at_most=True)
    for M in (1, 16):
        for processes in BUSY:
            yield Target(CONTENDED, _forward("fp32", M, 1024, 1024, "contended"), beside(processes), 1.3, at_most=True)

    for dtype in ("bf16", "fp32"):
        for M in TOKENS:
            shape, value = _square(batch_invariant.OP, dtype, M), 1.05 if M >= 64 else 1.15
            yield Target(INVARIANT, shape, batch_invariant.DEFAULT, value, at_most=True)


TARGETS = tuple(_targets())
