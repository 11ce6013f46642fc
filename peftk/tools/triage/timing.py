"""The timing groups: the ways to compute a layer with one adapter, side by side, each checked before it is timed.

GPU time is between two CUDA events, from a cold L2 (`peftk.system.timing.cuda_events`). Host time is what a call takes
to return.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk import functional
from peftk.adapters.adapter import adapter_of
from peftk.backends.call import BackendError
from peftk.nn import LoRALinear, MultiLoRALinear
from peftk.reference import bounds
from peftk.system.precision import precision
from peftk.system.timing import Clock, Run, cuda_events, interleave
from peftk.tools.benchmark.common import DTYPES, LINEAR, Case, Shape, Side, factors, measure, plain_linear
from peftk.tools.selftest.check import Check, Found, Target
from peftk.tools.selftest.plans import override_plan, ways

K = 4096
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 4096)
SCALING = 1.0
LIBRARY = "nn.Linear + two addmm"
OTHERS = (LINEAR, LIBRARY)  # sides that are not ours


class Series(NamedTuple):
    """The rows of a group: a layer [N, K] in `dtype`, and an adapter of `rank`, whose factors have their own dtype."""

    N: int
    rank: int
    dtype: str = "bf16"
    factors: str = "bf16"
    K: int = K
    tokens: tuple[int, ...] = TOKENS
    seconds: float = 0.25
    repeats: int = 100

    def tiny(self) -> Series:
        """For the interpreter."""
        return self._replace(N=40, rank=2, dtype="fp32", factors="fp32", K=48, tokens=(3,), seconds=0.01, repeats=1)


class _Layer(NamedTuple):
    linear: nn.Linear
    A: Tensor
    B: Tensor


def gpu_time(target: Target, series: Series) -> Iterator[Check]:
    """A check per number of tokens. Its figures: µs of every side."""
    series = series.tiny() if target.is_rehearsal else series
    linear = plain_linear(series.K, series.N, DTYPES[series.dtype], target.device)
    exact = factors(series.K, series.N, series.rank, linear.weight.dtype, target.device)
    A, B = (t.to(DTYPES[series.factors]) for t in exact)
    clock = cuda_events() if target.device == "cuda" else None
    for M in series.tokens:
        name = f"M={M} K={series.K} N={series.N} r={series.rank} {series.dtype}, factors {series.factors}"

        def run(M: int = M) -> Found:
            return measure_sides(series, _Layer(linear, A, B), M, target.device, clock)

        yield Check("triage", ",".join(target.backends), "GPU time", name, run)


def measure_sides(series: Series, layer: _Layer, M: int, device: str, clock: Clock | None) -> Found:
    """Times the sides that run and are right. Fails for a side of ours that raises or has an error above its bound."""
    shape = Shape("lora_linear", series.dtype, M, series.K, series.N, series.rank, 1)
    x = torch.randn(M, series.K, generator=torch.Generator().manual_seed(1)).to(device, layer.linear.weight.dtype)
    base = bounds.linear(x, layer.linear.weight, layer.linear.bias)
    expected = bounds.with_adapter(x, *base, layer.A, layer.B, SCALING)
    figures: dict[str, Any] = {
        "row": f"M={M}",
        "M": M,
        "N": series.N,
        "rank": series.rank,
        "factors": series.factors,
        "us": {},
    }
    problems: dict[str, str] = {}
    sound = []
    for side in _sides(layer, x, expected, base):
        try:
            with torch.inference_mode():
                side.error()  # compiles, too
        except BackendError as refused:
            figures.setdefault("not_run", {})[side.name] = str(refused)
        except Exception as raised:
            if side.name not in OTHERS and torch.cuda.is_available():
                torch.cuda.synchronize()  # raises if the GPU is lost, which the worker then finds too
            problems[side.name] = f"{type(raised).__name__}: {raised}"
        else:
            sound.append(side)
    case = Case(shape, tuple(sound), bounds.sensitivity(expected, x.dtype))
    timed = {"seconds": series.seconds, "repeats": series.repeats, "clock": clock}
    records = measure(case, device=device, **timed) if sound else []  # type: ignore[arg-type]
    for record in records:
        figures["us"][record.side] = record.times()
        if not record.passed:
            problems[record.side] = f"error {record.error:.2f}× the bound"
    ours = [record.error for record in records if record.side not in OTHERS and record.passed]
    wrong = "; ".join(f"{name}: {why}" for name, why in problems.items() if name not in OTHERS)
    return Found(max(ours, default=0.0), {**figures, "problems": problems}, wrong or None)


def _sides(layer: _Layer, x: Tensor, expected: bounds.Expected, base: tuple[Tensor, Tensor]) -> Iterator[Side]:
    from peftk.backends import triton

    (linear, A, B), weight, bias = layer, layer.linear.weight, layer.linear.bias
    base_only = bounds.Expected(base[0], base[1], x.shape[1], base[0], torch.zeros_like(base[0]))
    v, v_terms = bounds.linear(x, A, None)
    hidden = bounds.Expected(v, v_terms, x.shape[1], v, torch.zeros_like(v))
    adapter = adapter_of(A, B, SCALING)

    def ours(backend: str, **plan: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with override_plan(**plan):
                return functional.lora_linear(x, weight, bias, A, B, SCALING, backend=backend)

        return run

    def library() -> Tensor:
        y = linear(x)
        if A.dtype == x.dtype:
            return torch.addmm(y, x @ A.t(), B.t(), alpha=SCALING)
        return torch.addmm(y.to(A.dtype), x.to(A.dtype) @ A.t(), B.t(), alpha=SCALING).to(x.dtype)

    def shrink() -> Tensor:
        nothing = x.new_empty(x.shape[0], 0)
        z = triton.lora_linear(x, None, None, adapter, save_z=True, base=nothing)[1]
        assert z is not None
        return z

    def field() -> Tensor:
        with precision("field"):
            return functional.lora_linear(x, weight, bias, A, B, SCALING, backend="triton")

    def side(
        name: str, run: Callable[[], Tensor], exact: bounds.Expected, fused: bool, more: Tensor | float = 0.0
    ) -> Side:
        return Side(name, run, lambda: bounds.error(run(), exact, fused=fused, more=more))

    yield side(LINEAR, lambda: linear(x), base_only, False)
    yield side(LIBRARY, library, expected, False)
    alone = functional.lora_linear
    yield side("base only", lambda: alone(x, weight, bias, backend="triton"), base_only, True)
    for name, plan in ways(x.device.type).items():
        if name != "staying":
            yield side(name, ours("triton", **plan), expected, True)
    yield side("field", field, expected, True, bounds.of_field(x, A, B, SCALING))
    yield side("gemm", ours("gemm"), expected, False)
    yield side("cuda", ours("cuda"), expected, True)
    yield side("shrink alone", shrink, hidden, True)


def host_time(target: Target) -> Iterator[Check]:
    """µs that the host takes for a call, of a layer so small that the GPU never keeps it waiting."""
    calls, seconds, repeats = (2, 0.01, 1) if target.is_rehearsal else (50, 1.0, 60)
    for M in (3,) if target.is_rehearsal else (1, 16, 300):

        def run(M: int = M) -> Found:
            wait = torch.cuda.synchronize if target.device == "cuda" else lambda: None
            sides, refused = _host_sides(target, M)
            with torch.inference_mode():
                times = interleave(sides, seconds=seconds, repeats=repeats, clock=_until_it_returns(wait, calls))
            us = {name: {"median": t.median_us, "p10": t.p10_us, "p90": t.p90_us} for name, t in times.items()}
            return Found(0.0, {"row": f"M={M}", "M": M, "N": 256, "us": us, "not_run": refused})

        yield Check("triage", ",".join(target.backends), "host time", f"M={M} K=256 N=256 r=16", run)


def _until_it_returns(wait: Run, calls: int) -> Clock:
    """The mean time of several calls until they return; before and after, the device has nothing to do."""

    def clock(run: Run) -> float:
        wait()
        before = time.perf_counter_ns()
        for _ in range(calls):
            run()
        after = time.perf_counter_ns()
        wait()
        return (after - before) / 1000 / calls

    return clock


def _host_sides(target: Target, M: int) -> tuple[dict[str, Run], dict[str, str]]:
    """The sides that run here, and why the others do not."""
    dtype, size = (torch.float32, 48) if target.is_rehearsal else (torch.bfloat16, 256)
    linear = plain_linear(size, size, dtype, target.device)
    A, B = (t.to(dtype) for t in factors(size, size, 16, dtype, target.device))
    x = torch.ones(M, size, dtype=dtype, device=target.device)
    one = LoRALinear.from_linear(plain_linear(size, size, dtype, target.device), r=16, lora_alpha=16)
    many = MultiLoRALinear.from_linear(linear, max_adapters=2)
    many.add_adapter("one", A, B)
    ids = torch.zeros(M, dtype=torch.int32, device=target.device)

    def library() -> Tensor:
        return torch.addmm(linear(x), x @ A.t(), B.t())

    sides: dict[str, Run] = {LINEAR: lambda: linear(x), LIBRARY: library}
    sides |= {"LoRALinear": lambda: one(x), "MultiLoRALinear": lambda: many(x, ids)}
    for name in ("triton", "gemm", "cuda"):
        sides[name] = lambda name=name: functional.lora_linear(x, linear.weight, linear.bias, A, B, backend=name)  # type: ignore[misc]
    refused: dict[str, str] = {}
    for name, run in list(sides.items()):
        try:
            with torch.inference_mode():
                run()
        except BackendError as reason:
            refused[name] = str(reason)
            del sides[name]
    return sides, refused
