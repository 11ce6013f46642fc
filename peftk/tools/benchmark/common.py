"""What all benchmarks share: a shape, its sides, how they are checked and timed, what is written down.

An op's file (`lora_linear.py`, `multi_lora_linear.py`, `train.py`, `merge.py`) has `shapes(...)`, the rows it measures,
and `case(shape, ...)`, the sides of one row. Inputs are random but the same in every run; W is one tensor that all
sides read; factors are exact in every dtype they are held in, so every side computes the same function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk.backends import choice
from peftk.backends.call import LORA_LINEAR, MERGE, UNMERGE, BackendError, Call, Op
from peftk.reference import bounds
from peftk.system.timing import Clock, Run, Times, interleave
from peftk.tools.benchmark import peers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LINEAR, PEFT, COPY = "nn.Linear", "HF PEFT", "copy of W"
SCALING = 1.0
DETECTABLE = 4.0


class Shape(NamedTuple):
    op: str
    dtype: str
    M: int  # tokens; 0 for merge, unmerge and a whole model
    K: int
    N: int
    rank: int  # the largest of the batch
    adapters: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        tokens = f" M{self.M}" if self.M else ""
        adapters = f" n{self.adapters}" if self.op == "multi_lora_linear" else ""
        return f"{self.op} {self.dtype}{tokens} {self.K}x{self.N} r{self.rank}{adapters}"


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to do the work. error: of its result, as a multiple of what is allowed; ≤ 1 passes."""

    name: str
    run: Run
    error: Callable[[], float]
    reset: Run = lambda: None


@dataclasses.dataclass(frozen=True)
class Case:
    """The sides of one row. The first is what ratios refer to. detects: see `agree`."""

    shape: Shape
    sides: tuple[Side, ...]
    detects: float
    inference: bool = True


@dataclasses.dataclass(frozen=True)
class Record:
    """One side of one row, as JSON and CSV have it. over_…: how many times faster; None where a side failed."""

    op: str
    dtype: str
    device: str
    M: int
    K: int
    N: int
    rank: int
    adapters: int
    side: str
    passed: bool
    error: float
    median_us: float | None
    p10_us: float | None
    p90_us: float | None
    repeats: int
    baseline: str
    over_baseline: float | None
    over_peft: float | None


def measure(case: Case, *, device: str, seconds: float, repeats: int, clock: Clock | None = None) -> list[Record]:
    """Checks every side, then times those that are right, together. clock: else the time that passes."""
    with torch.inference_mode(case.inference):
        if case.detects < DETECTABLE:
            raise AssertionError(f"{case.shape}: an adapter {case.detects:.1f} times the bound could go unnoticed")
        errors = {}
        for side in case.sides:
            errors[side.name] = side.error()
            side.reset()
        right = [side for side in case.sides if errors[side.name] <= 1.0]
        times = interleave(
            {side.name: side.run for side in right},
            seconds=seconds,
            repeats=repeats,
            reset={side.name: side.reset for side in right},
            synchronize=torch.cuda.synchronize if device == "cuda" else None,
            clock=clock,
        )
    return [_record(case, device, side.name, errors[side.name], times) for side in case.sides]


def _record(case: Case, device: str, name: str, error: float, times: dict[str, Times]) -> Record:
    mine, baseline = times.get(name), case.sides[0].name

    def over(other: str) -> float | None:
        return times[other].median_us / mine.median_us if mine is not None and other in times else None

    return Record(
        **case.shape._asdict(),
        device=device,
        side=name,
        passed=mine is not None,
        error=error,
        median_us=None if mine is None else mine.median_us,
        p10_us=None if mine is None else mine.p10_us,
        p90_us=None if mine is None else mine.p90_us,
        repeats=0 if mine is None else mine.repeats,
        baseline=baseline,
        over_baseline=over(baseline),
        over_peft=over(PEFT),
    )


class Layer(NamedTuple):
    """x [M, K], a frozen nn.Linear, and its exact output with the sum of the absolute values of its terms."""

    x: Tensor
    linear: nn.Linear
    base: Tensor
    base_magnitude: Tensor


@functools.lru_cache(maxsize=1)
def layer(M: int, K: int, N: int, dtype: torch.dtype, device: str) -> Layer:
    """The last one is kept: the ranks of a shape share it."""
    linear = plain_linear(K, N, dtype, device)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return Layer(x, linear, *bounds.linear(x, linear.weight, linear.bias))


def plain_linear(K: int, N: int, dtype: torch.dtype, device: str) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype, device=device).requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_((2 * torch.rand(N, K, generator=generator) - 1) / K**0.5)
        linear.bias.copy_((2 * torch.rand(N, generator=generator) - 1) / K**0.5)
    return linear.eval()


def factors(K: int, N: int, rank: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R] with values of `dtype`, held in fp32; they add about as much as the base layer gives."""
    generator = torch.Generator().manual_seed(seed)
    A = (2 * torch.rand(rank, K, generator=generator) - 1) / K**0.5
    B = torch.randn(N, rank, generator=generator) / rank**0.5
    return A.to(dtype).float().to(device), B.to(dtype).float().to(device)


# The calls of peftk's that an op makes.
_CALLS = {
    "lora_linear": (LORA_LINEAR,),
    "multi_lora_linear": (Op("lora_linear", many=True),),
    "train": (LORA_LINEAR, Op("lora_linear", backward=True)),
    "merge": (MERGE,),
    "unmerge": (UNMERGE, MERGE),
}


def serving(shape: Shape, device: str, asked: Sequence[str]) -> list[str]:
    """The peftk backends to time: those asked for, else on a CPU the one that is chosen, on a GPU every compiled one.

    The reference is a specification and Triton's interpreter a debugger: they are timed only where asked for.

    Raises BackendError where one that was asked for cannot run, or none can.
    """
    calls = _calls(shape, device)
    candidates = asked or ((choice.choose(calls[0]).backend,) if device == "cpu" else ("cuda", "triton"))
    refused = {}
    for name in candidates:
        reasons = [choice.cannot_run(name, call) for call in calls]
        refused[name] = next(filter(None, reasons), None)
    able = [name for name, reason in refused.items() if reason is None]
    if not able or (asked and len(able) < len(refused)):
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items() if reason is not None)
        raise BackendError(f"{shape}: {why} (--backend reference times the specification in plain torch)")
    return able


def rounds_once(shape: Shape, device: str, name: str) -> bool:
    """Whether peftk's side `name` is held to one rounding; where `gemm` serves one of its calls, it is not."""
    return all(map(choice.rounds_once, {name, *(choice.choose(call).backend for call in _calls(shape, device))}))


def _calls(shape: Shape, device: str) -> list[Call]:
    dtype = shape.torch_dtype
    adapter_dtype = dtype if shape.op == "multi_lora_linear" else torch.float32  # the layers' defaults
    M = shape.N if shape.op in ("merge", "unmerge") else shape.M
    return [
        Call(
            op=op,
            device=device,
            x_dtype=dtype,
            weight_dtype=dtype,
            adapter_dtype=adapter_dtype,
            M=M,
            K=shape.K,
            N=shape.N,
            rank=shape.rank,
            adapters=shape.adapters,
        )
        for op in _CALLS[shape.op]
    ]


def side_names(shape: Shape, device: str, asked: Sequence[str]) -> list[str]:
    """The names of the sides that the shape's case will have, without building it."""
    first = COPY if shape.op in ("merge", "unmerge") else LINEAR
    return [first, *([PEFT] if peers.has_peft() else []), *(f"peftk {name}" for name in serving(shape, device, asked))]


def to_json(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Of dataclasses."""
    return [dataclasses.asdict(record) for record in records]
