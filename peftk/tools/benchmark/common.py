"""Shared by all benchmarks: shapes, the sides of a row, checking and timing them, and the records that are written.

The file of an op (`lora_linear.py`, `multi_lora_linear.py`, `train.py`, `merge.py`) has `shapes(...)`, the rows to
measure, and `case(shape, ...)`, the sides of one row. Inputs are random but the same in every run. All sides read the
same W. The factors are exact in every dtype they are stored in, so all sides compute the same function.
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
MIN_SENSITIVITY = 4.0


class Shape(NamedTuple):
    op: str
    dtype: str
    M: int  # tokens; 0 for merge, unmerge and a whole model
    K: int
    N: int
    rank: int  # the largest in the batch
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
    """One implementation in a row. error: of its result, in multiples of the bound; ≤ 1 passes. reset: undoes a run."""

    name: str
    run: Run
    error: Callable[[], float]
    reset: Run = lambda: None


@dataclasses.dataclass(frozen=True)
class Case:
    """The sides of one row; ratios refer to the first. sensitivity: see `peftk.reference.bounds`."""

    shape: Shape
    sides: tuple[Side, ...]
    sensitivity: float
    inference: bool = True


@dataclasses.dataclass(frozen=True)
class Record:
    """One side of one row, as written to JSON and CSV. over_…: how many times faster it is; None if a side failed."""

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

    def times(self) -> dict[str, Any]:
        """What it took, and how far it is from fp64, as JSON values."""
        return {"median": self.median_us, "p10": self.p10_us, "p90": self.p90_us, "error": self.error}


def measure(case: Case, *, device: str, seconds: float, repeats: int, clock: Clock | None = None) -> list[Record]:
    """Checks every side, then times the correct ones side by side. clock: None for wall time."""
    with torch.inference_mode(case.inference):
        if case.sensitivity < MIN_SENSITIVITY:
            raise AssertionError(
                f"{case.shape}: the adapter is only {case.sensitivity:.1f} times the bound: too small for a check"
            )
        errors = {}
        for side in case.sides:
            errors[side.name] = side.error()
            side.reset()
        correct = [side for side in case.sides if errors[side.name] <= 1.0]
        times = interleave(
            {side.name: side.run for side in correct},
            seconds=seconds,
            repeats=repeats,
            reset={side.name: side.reset for side in correct},
            synchronize=torch.cuda.synchronize if device == "cuda" else None,
            clock=clock,
        )
    return [record_of(case, device, side.name, errors, times) for side in case.sides]


def record_of(case: Case, device: str, name: str, errors: dict[str, float], times: dict[str, Times]) -> Record:
    """times: of the sides that were timed."""
    own, baseline = times.get(name), case.sides[0].name

    def over(other: str) -> float | None:
        return times[other].median_us / own.median_us if own is not None and other in times else None

    return Record(
        **case.shape._asdict(),
        device=device,
        side=name,
        passed=errors[name] <= 1.0,
        error=errors[name],
        median_us=None if own is None else own.median_us,
        p10_us=None if own is None else own.p10_us,
        p90_us=None if own is None else own.p90_us,
        repeats=0 if own is None else own.repeats,
        baseline=baseline,
        over_baseline=over(baseline),
        over_peft=over(PEFT),
    )


class Layer(NamedTuple):
    """x [M, K], a frozen nn.Linear, its exact output (fp64), and the sum of the absolute values of its terms."""

    x: Tensor
    linear: nn.Linear
    base: Tensor
    base_magnitude: Tensor


@functools.lru_cache(maxsize=1)
def layer(M: int, K: int, N: int, dtype: torch.dtype, device: str) -> Layer:
    """Caches the last layer, because all ranks of a shape use the same one."""
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
    """A [R, K] and B [N, R] in fp32, with values exact in `dtype`; ΔW is about as large as the base layer's W."""
    generator = torch.Generator().manual_seed(seed)
    A = (2 * torch.rand(rank, K, generator=generator) - 1) / K**0.5
    B = torch.randn(N, rank, generator=generator) / rank**0.5
    return A.to(dtype).float().to(device), B.to(dtype).float().to(device)


# The calls that peftk makes for an op.
_CALLS = {
    "lora_linear": (LORA_LINEAR,),
    "multi_lora_linear": (Op("lora_linear", many=True),),
    "train": (LORA_LINEAR, Op("lora_linear", backward=True)),
    "merge": (MERGE,),
    "unmerge": (UNMERGE, MERGE),
}


def backends_to_time(shape: Shape, device: str, requested: Sequence[str]) -> list[str]:
    """The peftk backends to time: the requested ones, else the chosen one on a CPU and all compiled ones on a GPU.

    The reference is a specification and Triton's interpreter a debugger, so they are timed only if requested.

    Raises BackendError if a requested backend cannot run, or if none can.
    """
    calls = _calls(shape, device)
    candidates = requested or ((_chosen(calls[0]),) if device == "cpu" else ("cuda", "triton"))
    refused = {}
    for name in candidates:
        reasons = [choice.cannot_run(name, call) for call in calls]
        refused[name] = next(filter(None, reasons), None)
    runnable = [name for name, reason in refused.items() if reason is None]
    if not runnable or (requested and len(runnable) < len(refused)):
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items() if reason is not None)
        raise BackendError(f"{shape}: {why} (--backend reference times the specification in plain torch)")
    return runnable


def rounds_once(shape: Shape, device: str, name: str) -> bool:
    """Whether peftk's side `name` must round only once. It need not if `gemm` runs one of its calls."""
    return all(map(choice.rounds_once, {name, *map(_chosen, _calls(shape, device))}))


def _chosen(call: Call) -> str:
    """The backend that runs the call, once what its first use measures is known."""
    choice.backend_for(call)
    return choice.choose(call).backend


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


def side_names(shape: Shape, device: str, requested: Sequence[str]) -> list[str]:
    """The names of the sides of the shape's case, without building it."""
    first = COPY if shape.op in ("merge", "unmerge") else LINEAR
    return [
        first,
        *([PEFT] if peers.has_peft() else []),
        *(f"peftk {name}" for name in backends_to_time(shape, device, requested)),
    ]


def to_json(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Dataclass records as JSON values."""
    return [dataclasses.asdict(record) for record in records]
