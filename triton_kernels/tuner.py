"""`peftk tune` on a GPU: times the candidates of `config` for each class of shapes and keeps the fastest (`tuned`).

A candidate must give the same result as the shipped plan, up to rounding. One that does not is an error.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftk.adapters import table
from peftk.adapters.adapter import Adapter, Wanted
from peftk.launch.segments import Segments

from . import config, lora_linear, lora_wgrad, tuned
from .segments import PAGE, segments

Run = Callable[[], Sequence[Tensor | None]]
Timer = Callable[[Mapping[str, Run]], dict[str, float]]

DIM = 4096  # K and N
RANK = 16
ADAPTERS = 8  # in a batch with many adapters
TOKENS = config.ROW_LIMITS
_CLEARED = 256 << 20  # bytes written between two runs to clear the L2: more than any GPU's L2 holds


def layers_of(sizes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]) -> list[config.Layer]:
    """Layers of the sizes (N, K): one adapter with fp32 factors, as a new layer has it, and many in W's dtype."""
    return [
        config.Layer(N, K, dtype, factors, many)
        for dtype in dtypes
        for factors, many in ((torch.float32, False), (dtype, True))
        for N, K in sizes
    ]


_16_BIT = (torch.bfloat16, torch.float16)
LAYERS = [*layers_of([(DIM, DIM)], _16_BIT), *(config.Layer(DIM, DIM, dtype, dtype, False) for dtype in _16_BIT)]


class TuningResult(NamedTuple):
    """The fastest plan for a class of shapes, and the times in µs."""

    shipped_us: float
    best_us: float
    plan: config.Plan | config.Wgrad
    name: str  # the fields in which the plan differs from the shipped one, such as "num_stages=3"; or "shipped"


def cuda_timer(sides: Mapping[str, Run]) -> dict[str, float]:
    """The time of each side in µs, by CUDA events: median of 21 rounds in rotating order, each from a cold L2."""
    scratch = torch.empty(_CLEARED, dtype=torch.int8, device="cuda")
    names = list(sides)
    samples: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for round in range(21):
        shift = round % len(names)
        for name in names[shift:] + names[:shift]:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            scratch.zero_()
            before.record()
            sides[name]()
            after.record()
            samples[name].append((before, after))
    torch.cuda.synchronize()
    return {name: 1000 * statistics.median(b.elapsed_time(a) for b, a in pairs) for name, pairs in samples.items()}


class Tuned(NamedTuple):
    """The fastest plans by their key, and how many there was no time for."""

    best: dict[str, TuningResult]
    left: int


def tune(
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
    *,
    layers: Sequence[config.Layer] = LAYERS,
    tokens: Sequence[int] = TOKENS,
    of_sizes: bool = False,
    timer: Timer = cuda_timer,
    seconds: float = math.inf,
) -> Tuned:
    """Measures all candidates, saves the fastest for later processes, and uses them in this process.

    of_sizes: each layer's plans are for calls of its N and K only, and few are tried. seconds: no measurement begins
    later than that. Raises OSError if the cache cannot be written; this process then uses the same plans as before.
    """
    until = time.monotonic() + seconds
    found: dict[str, TuningResult] = {}
    left: set[str] = set()
    for M in tokens:
        for layer in layers:
            for key, plans, run in _cases(M, layer, device, of_sizes):
                if key in found:
                    continue
                if time.monotonic() > until:
                    left.add(key)
                    continue
                progress(key)
                found[key] = _best(key, plans, run, timer)
    tuned.save(tuned.gpu(device), {key: best.plan for key, best in found.items()})
    return Tuned(found, len(left))


def _best(
    key: str, plans: Sequence[config.Plan | config.Wgrad], run: Callable[..., list[Tensor]], timer: Timer
) -> TuningResult:
    by_name = {", ".join(_changed_fields(plan, plans[0])) or "shipped": plan for plan in plans}
    expected = run(plans[0])
    for name, plan in by_name.items():
        for got, want in zip(run(plan), expected, strict=True):
            _check_same_result(f"{key}: {name}", got, want)
    times = timer({name: functools.partial(run, plan) for name, plan in by_name.items()})
    best = min(by_name, key=times.__getitem__)
    return TuningResult(times["shipped"], times[best], by_name[best], best)


def _changed_fields(plan: config.Plan | config.Wgrad, shipped: config.Plan | config.Wgrad) -> tuple[str, ...]:
    pairs = zip(plan._fields, plan, shipped, strict=True)
    return tuple(f"{field}={value}" for field, value, other in pairs if value != other)


def _check_same_result(what: str, got: Tensor, want: Tensor) -> None:
    """Raises RuntimeError if got and want differ by more than another order of their fp32 sums and one rounding."""
    got, exact = got.double(), want.double()
    allowed = torch.finfo(want.dtype).eps * exact.abs() + 2.0**-12 * exact.abs().max()
    off = (got - exact).abs()
    if not bool((off <= allowed).all()):
        raise RuntimeError(f"{what}: differs from the shipped plan's result by up to {off.max().item():g}")


Case = tuple[str, Sequence[config.Plan | config.Wgrad], Callable[..., list[Tensor]]]


def _cases(M: int, layer: config.Layer, device: torch.device, of_sizes: bool) -> Iterator[Case]:
    """For forward, dX and gradients: the plan's key, its candidates, and a function that runs one."""
    N, K, dtype, factors, many = layer
    compile_target, count = tuned.target(device), ADAPTERS if many else 1
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(K**-0.5).to(dtype)

    x, dy, weight = random(M, K), random(M, N), random(N, K)
    A, B = random(count * RANK, K, dtype=factors), random(N, count * RANK, dtype=factors)
    adapters, order = _adapters(A, B, M, many, device)
    pages = adapters.z_width // PAGE.value
    call = config.CallShape(M, N, K, many, False, False, True, dtype, dtype, factors, False, pages)

    def forward(plan: config.Plan) -> list[Tensor]:
        return [lora_linear.forward(x, weight, None, adapters, order, plan=plan)[0]]

    def backward(plan: config.Plan) -> list[Tensor]:
        dx, u = lora_linear.backward(dy, weight, K, adapters, order, None, plan=plan)
        return [u] if dx is None else [dx, u]

    for shape, run in ((call, forward), (call._replace(N=K, K=N, backward=True), backward)):
        of_class = shape.shape_class()
        key = of_class.key((shape.N, shape.K) if of_sizes else None)
        yield key, config.candidates(of_class, compile_target, few=of_sizes), run

    z = random(M, adapters.z_width, dtype=torch.float32)
    wanted = Wanted(True, True, False, False)
    gradients = lora_wgrad.plan([RANK] * count, [wanted] * count, (0, N), dtype, device, many=many)

    def wgrad(block: config.Wgrad) -> list[Tensor]:
        grads = lora_wgrad.wgrad(dy, x, z, z, adapters, order, gradients, block=block)
        return [t for g in grads if g is not None for t in (g.lora_A, g.lora_B) if t is not None]

    of_wgrad = tuned.WgradShape(gradients.pages, many, True, dtype)
    yield of_wgrad.key(), config.wgrad_candidates(*of_wgrad, compile_target), wgrad


def _adapters(
    A: Tensor, B: Tensor, M: int, many: bool, device: torch.device
) -> tuple[lora_linear.Adapters, Segments | None]:
    """One adapter, or many that alternate row by row."""
    if not many:
        one = lora_linear.AdapterArgs(
            A.data_ptr(), A.stride(0), B.data_ptr(), B.stride(0), B.stride(1), 0, 0, RANK, 0, 1.0
        )
        return lora_linear.Adapters(one, A.dtype, RANK, "k16", "r16"), None
    pairs = zip(A.split(RANK), B.split(RANK, dim=1), strict=True)
    built = table.build(
        tuple(Adapter((a,), (b,), 1.0, "identity", None, None) for a, b in pairs), dtype=A.dtype, device=device
    )
    source = lora_linear.ManyAdapters(built.pages, built.rows, built.scaling, built.biases, None, ADAPTERS)
    ids = torch.arange(M, dtype=torch.int32, device=device) % ADAPTERS
    return lora_linear.Adapters(source, A.dtype, built.z_width, "k16", "any"), segments(ids, ADAPTERS)
