"""The checks that only the triage has: the same bits 200 times, graphs while adapters come and go, reduce-overhead."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftk.backends.call import BackendError
from peftk.nn import MultiLoRALinear
from peftk.tools.selftest import behaviour, parity
from peftk.tools.selftest.behaviour import Results
from peftk.tools.selftest.check import Check, Found, NotRunError, Target, WrongError, bits, require_same_bits
from peftk.tools.selftest.work import Work, build_case

ROWS: tuple[int, ...] = (17, 300, 1100)
RUNS, RUNS_INTERPRETED = 200, 3
MIXED = (1, 8, None, 17, 0, 64, 16, 128)
BF16, FP32 = torch.bfloat16, torch.float32
# backend, dtype of x and W, dtype of the adapters
KINDS = [(backend, BF16, adapters) for backend in ("triton", "gemm") for adapters in (BF16, FP32)]

Capture = Callable[[Callable[[], Results]], tuple[Results, Callable[[], object]]]


def repeats(target: Target, *, many: bool) -> Iterator[Check]:
    """Forward, dX and the gradients of one adapter or many, at each height of tiles."""
    ranks: tuple[int | None, ...] = MIXED if many else (16,)
    rows, (K, N), kinds = ROWS, (1024, 2048), KINDS
    if target.is_rehearsal:
        rows, (K, N), ranks = ROWS[:1], (40, 24), (1, 17, 0, None) if many else (16,)
        kinds = [("triton", FP32, FP32), ("gemm", FP32, FP32)]
    for M, (backend, dtype, adapters) in itertools.product(rows, kinds):

        def make(M: int = M, backend: str = backend, dtype: Any = dtype, adapters: Any = adapters) -> Work:
            case = build_case((M, K, N), ranks, dtype, target.device, many=many, biases=True, adapter_dtype=adapters)
            return Work(case, backend)

        name = f"M={M} K={K} N={N} {_name(dtype)}, factors {_name(adapters)}"
        op = "many adapters" if many else "one adapter"
        yield Check("triage", backend, op, name, functools.partial(_repeat, make, target))


def decode(target: Target) -> Iterator[Check]:
    """100 random decode steps of the CUDA C++ kernels, then calls of every kind repeated."""
    if "cuda" not in target.backends:
        yield Check("triage", "cuda", "decode", "random steps", lambda: _absent("cuda", target))
        return
    yield from parity.decode(target, 100)
    for name, make in behaviour.decode_works(target):
        yield Check("triage", "cuda", "repeated", name, functools.partial(_repeat, make, target))


def merge(target: Target) -> Iterator[Check]:
    """Merge, another merge, and back to every bit, by each compiled backend."""
    for backend in ("triton", "cuda"):
        if backend in target.backends:
            yield from parity.sweeps(backend, target, ops=("merge",))
        else:
            yield Check("triage", backend, "merge", "every dtype", functools.partial(_absent, backend, target))


def graphs(target: Target) -> Iterator[Check]:
    """Captured graphs, replayed with other inputs and ids, and after adapters were removed and loaded."""
    capture = behaviour.tools(target).capture
    for backend, name, make in _works(target):
        run = functools.partial(_replay, make, capture)
        yield Check("triage", backend, "CUDA graph, other inputs and ids", name, run)
    for backend in ("triton", "cuda"):
        loaded = functools.partial(check_replay_after_loading, target, backend, capture=capture)
        yield Check("triage", backend, "CUDA graph, other adapters", "removed and loaded after the capture", loaded)


def reduce_overhead(target: Target) -> Iterator[Check]:
    """torch.compile(mode="reduce-overhead"), which captures CUDA graphs of its own."""
    options: dict[str, Any] = {"backend": "aot_eager"} if target.is_rehearsal else {"mode": "reduce-overhead"}
    for many in (False, True):
        run = functools.partial(check_reduce_overhead, target, many, options=options)
        yield Check("triage", "torch.compile", "reduce-overhead", "many adapters" if many else "one adapter", run)


def streams(target: Target) -> Iterator[Check]:
    """Four streams at once."""
    makers = [make for _, _, make in _works(target)]
    run = functools.partial(behaviour.check_streams, makers, behaviour.tools(target).streams, 8)
    yield Check("triage", ",".join(target.backends), "streams", "4 at once", run)


def _works(target: Target) -> Iterator[tuple[str, str, Callable[[], Work]]]:
    """Calls of several kinds, by backend and name."""
    for name, make in behaviour.works(target):
        if name.startswith(("one adapter, dropout", "many adapters, dropout")):
            yield "triton", name, make
    if "cuda" in target.backends:
        for name, make in behaviour.decode_works(target):
            yield "cuda", name, make


def _absent(backend: str, target: Target) -> float:
    raise NotRunError(parity.cannot_run(backend, "lora_linear", target.device) or "does not run here")


def _repeat(make: Callable[[], Work], target: Target) -> Found:
    return check_repeats(make(), RUNS_INTERPRETED if target.is_rehearsal else RUNS)


def check_repeats(work: Work, runs: int) -> Found:
    """The first run is right, all others have its bits, and the counters are at zero after them."""
    first = work.run()
    error = work.error(first)
    expected = [bits(tensor).clone() for tensor in first]
    differing = [torch.zeros((), dtype=torch.int32, device=tensor.device) for tensor in first]
    for _ in range(runs - 1):  # without waiting for the device in between
        for count, tensor, one in zip(differing, work.run(), expected, strict=True):
            count += (bits(tensor) != one).any()
    for name, count in zip(work.names(), differing, strict=True):
        if count:
            raise WrongError(f"{name}: other bits than in the first run in {int(count)} of {runs - 1} runs")
    behaviour.require_zero_counters()
    return Found(error, {"runs": runs})


def _replay(make: Callable[[], Work], capture: Capture | None) -> float:
    if capture is None:
        raise NotRunError("needs a GPU")
    behaviour.check_replay(make(), capture=capture)
    return 0.0


def check_replay_after_loading(target: Target, backend: str, *, capture: Capture | None) -> float:
    """A captured graph sees the adapters that were removed and loaded since; what it cannot see is refused."""
    if capture is None:
        raise NotRunError("needs a GPU")
    if backend not in target.backends:
        _absent(backend, target)
    tiny = target.device == "cpu"
    M, K, N, dtype = (9, 40, 24, FP32 if target.is_rehearsal else BF16) if tiny else (48, 1024, 768, BF16)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(target.device, dtype)

    linear = nn.Linear(K, N, device=target.device, dtype=dtype).requires_grad_(False)
    layer = MultiLoRALinear.from_linear(linear, max_adapters=4)
    x, ids = random(M, K), torch.tensor([m % 3 - 1 for m in range(M)], device=target.device)

    def load(name: str, slot: int, rank: int) -> None:
        layer.add_adapter(name, random(rank, K), random(N, rank), slot=slot)

    def replace(old: str, new: str, rank: int) -> None:
        layer.remove_adapter(old)
        load(new, 0, rank)

    def remove() -> None:
        layer.remove_adapter("b")
        if target.device == "cpu":  # where the id of a free slot raises; on a GPU it counts as -1
            ids.masked_fill_(ids == 1, -1)

    def load_again() -> None:
        load("d", 1, 33)
        ids.copy_(all_ids)

    def run() -> Results:
        return [layer(x, ids)]

    all_ids = ids.clone()
    load("a", 0, 8)
    load("b", 1, 40)
    steps: tuple[tuple[str, Callable[[], object]], ...] = (
        ("ids changed in place", lambda: ids.copy_(all_ids.flip(0))),
        ("an adapter replaced in its slot", lambda: replace("a", "c", 20)),
        ("an adapter removed", remove),
        ("an adapter loaded in a free slot", load_again),
        ("an adapter of more ranks than any at the capture", lambda: replace("c", "e", 80)),
    )
    with torch.no_grad(), behaviour.forced_backend(backend):
        [y], replay = capture(run)
        for what, change in steps:
            before = y.clone()
            try:
                change()
            except (BackendError, RuntimeError, ValueError):
                if "more ranks" in what:
                    break
                raise
            replay()
            require_same_bits(f"replay after {what}", y, run()[0])
            if torch.equal(y, before):
                raise WrongError(f"replay after {what}: the same y as before")
    return 0.0


def check_reduce_overhead(target: Target, many: bool, *, options: dict[str, Any]) -> float:
    """The compiled layer has the eager layer's bits in every call, with other x, ids and dY; and in every gradient."""
    torch._dynamo.reset()
    layer, inputs, dy = behaviour.small_layer(target, 17, many)
    leaves = [inputs[0], *(p for p in layer.parameters() if p.requires_grad)]
    compiled = torch.compile(layer, fullgraph=True, **options)

    def infer(module: Callable[..., Tensor]) -> Results:
        with torch.no_grad():
            return [module(*inputs).clone()]

    def train(module: Callable[..., Tensor]) -> Results:
        y = module(*inputs)
        return [y.detach().clone(), *(grad.clone() for grad in torch.autograd.grad(y, leaves, dy))]

    steps: Sequence[Callable[..., Results]] = (infer, train)
    for what, (number, step) in itertools.product(range(5), enumerate(steps)):
        _refill(inputs, dy, seed=2 * what + number)
        torch.compiler.cudagraph_mark_step_begin()
        for place, (one, other) in enumerate(zip(step(compiled), step(layer), strict=True)):
            require_same_bits(f"result {place} of {step.__name__} {what + 1}, compiled and eager", one, other)
    behaviour.require_zero_counters()
    return 0.0


def _refill(inputs: tuple[Tensor, ...], dy: Tensor, *, seed: int) -> None:
    """Other values in x and dY, and the ids in another order, in place."""
    generator = torch.Generator().manual_seed(seed)
    x, *rest = inputs
    with torch.no_grad():
        for tensor in (x, dy):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for ids in rest:
            ids.copy_(ids[torch.randperm(len(ids), generator=generator).to(ids.device)].clone())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
