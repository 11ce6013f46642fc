"""The performance targets of the CPU backend, which `peftk bench --suite cpu` measures.

peftk's side has a rank-16 adapter unless the row has a different rank; nn.Linear and torch.compile have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from peftk.tools.benchmark import batch_invariant
from peftk.tools.benchmark.common import COPY, LINEAR, PEFT, Shape
from peftk.tools.benchmark.engines import ONNX_RUNTIME, OPENVINO

COMPILE, FMA_PEAK, READ = "torch.compile", "FMA peak", "read of W"
BASE, ONE_ADAPTER, PLAIN_MODEL, PEFTK = "peftk base layer", "peftk 1 adapter", "plain model", "peftk"
ONE_BY_ONE = f"{PEFT}, one by one"
DROPOUT = 0.05
WITH_DROPOUT = f", dropout {DROPOUT:g}"

NOISE = 0.03  # allowed by "never slower": medians of equal sides differ by this much

# Sections, in the order in which they are printed.
FORWARD = "Forward, 4096 → 4096"
COMPILED = "Forward compared with torch.compile of the plain layer, 4096 → 4096"
SIZES = "Forward at other sizes: never slower than nn.Linear"
TRAIN = "Training step: forward and backward, 4096 → 4096"
ADAPTER = "Cost of adapters on top of peftk's own base layer, 4096 → 4096"
MERGE = "Merge and unmerge, 4096 → 4096"
MERGE_MODEL = "Merge of all-MiniLM-L6-v2, every linear layer; merged_context: in and out again"
MODEL = "all-MiniLM-L6-v2 in inference, every linear layer adapted"
MODEL_COMPILED = "The same under torch.compile; ONNX Runtime and OpenVINO run the plain model"
MODEL_TRAIN = "all-MiniLM-L6-v2, training step: forward, backward, optimizer"
MODEL_MEMORY = "Peak of the memory that such a step allocates"
DECODE = "A small Llama, one token of each sequence, each with an adapter of its own"
OVERHEAD = "Cost of a call, 64 → 64"
CONTENDED = "Beside busy processes: mean time over that alone, compared with nn.Linear's, 1024 → 1024"

INVARIANT = "Batch-invariant mode compared with the default mode, 4096 → 4096"

BUSY = (1, 2)  # processes


def beside(processes: int) -> str:
    """The peer of a target: nn.Linear beside so many busy processes."""
    return f"{LINEAR} beside {processes}"


class Target(NamedTuple):
    """peftk must be at least `value` times faster than the peer; with at_most, take at most `value` times its time.

    net: peftk's time counts without that of the adapter's own multiply-adds, which a peer without adapter has not.
    """

    section: str
    shape: Shape
    peer: str
    value: float
    at_most: bool = False
    noise: float = 0.0
    net: bool = False

    def met(self, ratio: float) -> bool:
        return ratio <= self.value * (1 + self.noise) if self.at_most else ratio >= self.value * (1 - self.noise)

    def __str__(self) -> str:
        noise = f" (−{self.noise:.0%})" if self.noise else ""
        return f"{'≤' if self.at_most else '≥'} {self.value:g}{noise}{' net' if self.net else ''}"


def _forward(dtype: str, M: int, K: int = 4096, N: int = 4096, op: str = "lora_linear") -> Shape:
    return Shape(op, dtype, M, K, N, 16, 1)


def _square(op: str, dtype: str, M: int, rank: int = 16, adapters: int = 1) -> Shape:
    return Shape(op, dtype, M, 4096, 4096, rank, adapters)


DTYPES = ("bf16", "fp32")
TOKENS = (1, 4, 16, 64, 256, 512)
_SHARES = {16: 0.65, 64: 0.80, 256: 0.85, 512: 0.85}  # of the FMA peak, by tokens
_SIZES = ((384, 384), (768, 768), (1024, 1024), (4096, 11008))
_COPIES = {"fp32": 2.0, "bf16": 4.0, "fp16": 4.0}

TOKENS_OF_A_SENTENCE = 21
_SENTENCES = (1, 16, 64)
_OVER_ENGINES = {1: 0.8, 16: 1.0, 64: 1.0}  # by sentences


def _minilm(op: str, dtype: str, sentences: int, adapters: int = 1) -> Shape:
    """K × N: of most of its layers."""
    return Shape(op, dtype, sentences * TOKENS_OF_A_SENTENCE, 384, 384, 16, adapters)


def _targets() -> Iterable[Target]:
    for dtype in DTYPES:
        for M in TOKENS:
            yield Target(FORWARD, _forward(dtype, M), LINEAR, 1.0, noise=NOISE, net=True)
        yield Target(FORWARD, _forward(dtype, 1), READ, 0.85)
        for M, share in _SHARES.items():
            yield Target(FORWARD, _forward(dtype, M), FMA_PEAK, share)
    for dtype in DTYPES:
        for M in TOKENS:
            yield Target(COMPILED, _forward(dtype, M, op="compile"), COMPILE, 1.0)
    for K, N in _SIZES:
        for dtype in DTYPES:
            for M in (1, 16, 256):
                yield Target(SIZES, _forward(dtype, M, K, N), LINEAR, 1.0, noise=NOISE, net=True)
    for dtype in DTYPES:
        yield Target(TRAIN, _square("train", dtype, 256), PEFT, 1.0)
    for dtype in DTYPES:
        for M in (1, 16, 64, 256):
            for rank, value in ((16, 1.03), (64, 1.08)):
                yield Target(ADAPTER, _square("adapter_cost", dtype, M, rank), BASE, value, at_most=True)
        yield Target(ADAPTER, _square("adapter_cost", dtype, 64, adapters=64), ONE_ADAPTER, 1.10, at_most=True)
    for dtype, copies in _COPIES.items():
        yield Target(MERGE, _square("merge", dtype, 0), COPY, copies, at_most=True)
        yield Target(MERGE, _square("unmerge", dtype, 0), COPY, copies, at_most=True)
    for op, passes in (("merge_model", 1), ("merged_context", 2)):
        for dtype in ("fp32", "bf16"):
            shape = Shape(op, dtype, 0, 384, 384, 16, 1)
            yield Target(MERGE_MODEL, shape, COPY, passes * _COPIES[dtype], at_most=True)
    yield from _model_targets()
    for dtype in DTYPES:
        yield Target(OVERHEAD, _forward(dtype, 1, 64, 64), LINEAR, 1.5, at_most=True)
        yield Target(OVERHEAD, Shape("multi_lora_linear", dtype, 8, 64, 64, 16, 8), LINEAR, 2.0, at_most=True)
    for M in (1, 16):
        for processes in BUSY:
            yield Target(CONTENDED, _forward("fp32", M, 1024, 1024, "contended"), beside(processes), 1.3, at_most=True)

    for dtype in ("bf16", "fp32"):
        for M in TOKENS:
            shape, value = _square(batch_invariant.OP, dtype, M), 1.05 if M >= 64 else 1.15
            yield Target(INVARIANT, shape, batch_invariant.DEFAULT, value, at_most=True)


def _model_targets() -> Iterable[Target]:
    for dtype in DTYPES:
        for sentences in _SENTENCES:
            shape = _minilm("model", dtype, sentences)
            yield Target(MODEL, shape, PLAIN_MODEL, 1.0, noise=NOISE, net=True)
            yield Target(MODEL, shape, PEFT, 1.0, noise=NOISE)
    for dtype in DTYPES:
        for sentences in _SENTENCES:
            shape = _minilm("model_compiled", dtype, sentences)
            yield Target(MODEL_COMPILED, shape, PEFTK, 1.0, noise=NOISE)
            yield Target(MODEL_COMPILED, shape, COMPILE, 1.0, noise=NOISE, net=True)
            if dtype == "fp32":
                for engine in (ONNX_RUNTIME, OPENVINO):
                    yield Target(MODEL_COMPILED, shape, engine, _OVER_ENGINES[sentences])
    for dtype in DTYPES:
        yield Target(MODEL_TRAIN, _minilm("model_train", dtype, 16), PEFT, 1.0)
    yield Target(MODEL_TRAIN, _minilm("model_train", "fp32", 16, adapters=8), ONE_BY_ONE, 2.5)
    for dtype, sentences in (("bf16", 4), ("fp32", 16)):  # PEFT's bf16 step takes a second a sentence on some machines
        shape = _minilm("model_memory", dtype, sentences)
        # in fp32 and without dropout both save the same; in bf16 PEFT saves fp32 copies of its layers' inputs
        yield Target(MODEL_MEMORY, shape, PEFT, 1.0 if dtype == "fp32" else 0.8, at_most=True)
        yield Target(MODEL_MEMORY, shape, PEFT + WITH_DROPOUT, 0.8, at_most=True)
    for dtype in DTYPES:
        for sequences in (1, 8, 64):
            shape = Shape("decode", dtype, sequences, 512, 512, 8, sequences)
            yield Target(DECODE, shape, PLAIN_MODEL, 0.95)
            if sequences == 8:
                yield Target(DECODE, shape, PEFT, 1.0)


TARGETS = tuple(_targets())
