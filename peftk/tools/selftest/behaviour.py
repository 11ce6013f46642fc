"""Checks of the GPU backends beyond their results: same bits in every run, CUDA graphs, streams, syncs, launches.

What needs a GPU is an argument (`Tools`), so the code of every check can run without one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftk.adapters.flat import pack
from peftk.nn import LoRALinear, MultiLoRALinear
from peftk.ops import custom_ops
from peftk.tools.selftest import launches
from peftk.tools.selftest.check import Check, NotRunError, Target, WrongError, require_same_bits
from peftk.tools.selftest.work import Form, Work, build_case

Enter = Callable[[], contextlib.AbstractContextManager[Any]]
Results = list[Tensor]


class Tools(NamedTuple):
    """Functions that need a GPU, or their replacements.

    compiler: backend of torch.compile. kernels: the names of the kernels that a run launches. capture: captures a run,
    and returns its results and a function that replays it into the same tensors. streams: makes this many streams.
    forbid_sync: makes host syncs raise. The last three are None without a GPU.
    """

    compiler: str
    kernels: Callable[[Callable[[], object]], list[str]]
    capture: Callable[[Callable[[], Results]], tuple[Results, Callable[[], object]]] | None = None
    streams: Callable[[int], Sequence[Enter]] | None = None
    forbid_sync: Enter | None = None


def tools(target: Target) -> Tools:
    if target.device != "cuda":
        return Tools("aot_eager", launches.interpreted_kernels)
    return Tools("inductor", launches.gpu_kernels, capture_graph, streams, forbid_host_sync)


def checks(target: Target, toolset: Tools) -> Iterator[Check]:
    """The checks of every GPU backend that runs here."""
    if "cuda" in target.backends:
        yield from _backend_checks("cuda", dict(decode_works(target)), target, toolset)
    if "triton" in target.backends:
        yield from _backend_checks("triton", dict(works(target)), target, toolset)
        yield from _torch_checks(target, toolset)


def _backend_checks(
    backend: str, kinds: dict[str, Callable[[], Work]], target: Target, toolset: Tools
) -> Iterator[Check]:
    for name, make in kinds.items():

        def check(op: str, run: Callable[[Work], object], name: str = name, make: Callable[[], Work] = make) -> Check:
            return Check("behaviour", backend, op, name, lambda: (run(make()), 0.0)[1])

        yield check("same bits twice", check_repeatable)
        yield check("counters at zero", check_counters)
        yield check("launches", functools.partial(check_launches, count=toolset.kernels))
        yield check("no waiting", functools.partial(check_no_waiting, forbid_sync=toolset.forbid_sync))
        yield check("CUDA graph", functools.partial(check_replay, capture=toolset.capture))
    makers, rounds = list(kinds.values()), 1 if target.is_rehearsal else 8
    yield Check("behaviour", backend, "streams", "4 at once", lambda: check_streams(makers, toolset.streams, rounds))


def _torch_checks(target: Target, toolset: Tools) -> Iterator[Check]:
    for rank in (17,) if target.is_rehearsal else (1, 8, 17):
        for many in (False, True):
            name = f"{'many adapters up to' if many else 'one adapter of'} rank {rank}"
            run = functools.partial(check_compile, target, rank, many, compiler=toolset.compiler)
            yield Check("behaviour", "triton", "torch.compile", name, run)
    for many in (False, True):
        name = "many adapters" if many else "one adapter"
        yield Check("behaviour", "triton", "opcheck", name, functools.partial(check_opcheck, target.device, many))


def decode_works(target: Target) -> Iterator[tuple[str, Callable[[], Work]]]:
    """Decode steps of every kind, forward only, for the CUDA C++ backend."""
    shapes: tuple[tuple[int, int, int], ...] = ((1, 1024, 768), (16, 4096, 1024), (64, 1000, 520))
    if target.device == "cpu":  # tests compile the kernels for the host
        shapes = ((3, 64, 40), (20, 136, 70))
    kinds: tuple[tuple[str, Form, tuple[int | None, ...], bool], ...] = (
        ("base layer alone", "linear", (None,), False),
        ("one adapter", "linear", (17,), False),
        ("many adapters", "linear", (1, 8, None, 17, 0, 64), True),
        ("packed outputs", "packed", (1, 8, None, 17, 0, 64), True),
    )
    for shape in shapes:
        for kind, form, ranks, many in kinds:

            def make(shape=shape, form=form, ranks=ranks, many=many) -> Work:  # type: ignore[no-untyped-def]
                dtype = torch.bfloat16
                case = build_case(
                    shape, ranks, dtype, target.device, many=many, form=form, activation="silu", biases=True
                )
                return Work(case, "cuda", trains=False)

            yield f"{kind}, M={shape[0]} K={shape[1]} N={shape[2]}", make


def works(target: Target) -> Iterator[tuple[str, Callable[[], Work]]]:
    """Calls of every kind, by name."""
    shapes = ((17, 40, 24),) if target.is_rehearsal else ((8, 1024, 768), (600, 1024, 2048), (3000, 1000, 520))
    dtype = torch.float32 if target.is_rehearsal else torch.bfloat16
    mixed = (1, 17, 0, None) if target.is_rehearsal else (1, 8, None, 17, 0, 64, 16, 128)
    kinds: tuple[tuple[str, Form, tuple[int | None, ...], bool, float], ...] = (
        ("base layer alone", "linear", (None,), False, 0.0),
        ("one adapter, dropout", "linear", (8,), False, 0.25),
        ("many adapters, dropout", "linear", mixed, True, 0.25),
        ("many series adapters", "series", mixed, True, 0.0),
        ("packed outputs", "packed", mixed, True, 0.0),
    )
    if not target.is_rehearsal:
        kinds += (
            ("one adapter", "linear", (17,), False, 0.0),
            ("many adapters", "linear", mixed, True, 0.0),
            ("one series adapter, dropout", "series", (17,), False, 0.25),
            ("packed outputs, dropout", "packed", mixed, True, 0.25),
        )
    for shape in shapes:
        for kind, form, ranks, many, dropout_p in kinds:

            def make(shape=shape, form=form, ranks=ranks, many=many, dropout_p=dropout_p) -> Work:  # type: ignore[no-untyped-def]
                case = build_case(
                    shape, ranks, dtype, target.device, many=many, form=form, activation="silu", biases=True
                )
                return Work(case, "triton", dropout_p=dropout_p)

            yield f"{kind}, M={shape[0]} K={shape[1]} N={shape[2]}", make


def check_repeatable(work: Work) -> None:
    """The same bits in every run, also after other calls, which leave counters and memory behind."""
    first = work.run()
    work.refill(1)
    work.run()
    work.refill(2)
    second, third = work.run(), work.run()
    _require_same_results(work, "a second run", third, second)
    if torch.equal(first[0], second[0]):
        raise WrongError("different inputs gave the same y")


def check_counters(work: Work) -> None:
    """All counters are zero after a launch."""
    work.run()
    require_zero_counters()


def require_zero_counters() -> None:
    """Raises WrongError if a counter of any stream, or of those kept for captures, is not zero."""
    from peftk.launch import workspace

    for counters in workspace.all_counters():
        if counters.any():
            raise WrongError(f"{int(counters.count_nonzero())} counters are not zero")


def check_launches(work: Work, *, count: Callable[[Callable[[], object]], list[str]]) -> None:
    """One launch forward, two backward. Without a route, Triton also sorts the ids before each."""
    ranks = [a.rank for a in work.case.adapters if a is not None]
    sort = [] if work.case.ids is None or work.backend == "cuda" else launches.segments_kernels(work.case.x.shape[0])
    forward = [*sort, "lora_linear_kernel"]
    backward = [*sort, "lora_linear_kernel", *(["wgrad_kernel"] if ranks else [])]
    work.run()  # the first run also compiles and copies
    runs: list[tuple[str, Callable[[], object], list[str]]] = [("forward", work.forward, forward)]
    if work.leaves:
        runs.append(("forward and backward", work.run, forward + backward))
    for name, run, expected in runs:
        found = count(run)
        if collections.Counter(found) != collections.Counter(expected):
            raise WrongError(f"{name}: expected the launches {expected}, got {found}")


def check_no_waiting(work: Work, *, forbid_sync: Enter | None) -> None:
    """The host does not wait for the device."""
    if forbid_sync is None:
        raise NotRunError("needs a GPU")
    work.run()
    with forbid_sync():
        work.run()


def check_replay(
    work: Work, *, capture: Callable[[Callable[[], Results]], tuple[Results, Callable[[], object]]] | None
) -> None:
    """A CUDA graph, replayed after x, dY, ids and seed changed in place, gives the bits of an eager call."""
    if capture is None:
        raise NotRunError("needs a GPU")
    results, replay = capture(work.run)
    before = None
    for number in (1, 2, 3):
        work.refill(number)
        replay()
        replayed = [t.clone() for t in results]
        _require_same_results(work, f"replay {number}", replayed, work.run())
        work.error(replayed)
        if before is not None and torch.equal(before, replayed[0]):
            raise WrongError("a replay with different inputs gave the same y")
        before = replayed[0]


def check_streams(
    makers: Sequence[Callable[[], Work]], streams: Callable[[int], Sequence[Enter]] | None, rounds: int
) -> float:
    """Calls on several streams at once give the bits that each gives alone."""
    if streams is None:
        raise NotRunError("needs a GPU")
    all_works = [make() for make in makers]
    expected_results = [work.run() for work in all_works]
    for first in range(0, len(all_works), 4):
        group = all_works[first : first + 4]
        enter = streams(len(group))
        found: list[list[Results]] = [[] for _ in group]
        for _ in range(rounds):
            for work, stream, results in zip(group, enter, found, strict=True):
                with stream():
                    results.append(work.run())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for work, expected, results in zip(group, expected_results[first:], found, strict=False):
            for one in results:
                _require_same_results(work, "next to other streams", one, expected)
    return 0.0


def check_compile(target: Target, rank: int, many: bool, *, compiler: str) -> float:
    """torch.compile without graph breaks gives the eager layer's bits, in y and in every gradient."""
    torch._dynamo.reset()
    layer, inputs, dy = small_layer(target, rank, many)
    leaves = [inputs[0], *(p for p in layer.parameters() if p.requires_grad)]
    with forced_backend("triton"):
        y = layer(*inputs)
        eager = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        y = torch.compile(layer, fullgraph=True, backend=compiler)(*inputs)
        found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for number, (one, other) in enumerate(zip(found, eager, strict=True)):
        require_same_bits(f"result {number} compiled and eager", one, other)
    return 0.0


def check_opcheck(device: str, many: bool) -> float:
    """torch.library.opcheck of the custom ops: schema, fake tensors, autograd."""
    M, K, N = 4, 32, 16
    ranks = (3, 17, 0, None) if many else (17,)
    case = build_case((M, K, N), ranks, torch.float32, device, many=many, biases=True)
    tensors, layout, scalings = pack(case.adapters)
    for tensor in (case.x, *tensors):
        tensor.requires_grad_()
    rest = (0.25, torch.tensor([3], device=device), "triton")
    if case.ids is not None:
        arguments = (case.x, case.weight, case.bias, tensors, layout, scalings, (), case.ids, *rest)
        torch.library.opcheck(custom_ops.multi_lora_linear, arguments)
    else:
        lora_A, lora_B, *biases = tensors
        one = (case.x, case.weight, case.bias, lora_A, lora_B, scalings[0], "gelu", *biases, *rest)
        torch.library.opcheck(custom_ops.lora_linear, one)
    return 0.0


def capture_graph(run: Callable[[], Results]) -> tuple[Results, Callable[[], object]]:
    """Captures a CUDA graph of `run`: its results, and the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, allocates and copies what is not part of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


def streams(count: int) -> Sequence[Enter]:
    torch.cuda.synchronize()
    return [functools.partial(torch.cuda.stream, torch.cuda.Stream()) for _ in range(count)]


@contextlib.contextmanager
def forbid_host_sync() -> Iterator[None]:
    """Raises if the host waits for the GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def small_layer(target: Target, rank: int, many: bool) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """A layer with trainable adapters, its inputs (x, and ids if it has many), and dY."""
    M, K, N = (7, 40, 24) if target.is_rehearsal else (64, 512, 256)
    generator = torch.Generator().manual_seed(rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(target.device)

    linear = nn.Linear(K, N, device=target.device).requires_grad_(False)
    x, dy = random(M, K).requires_grad_(), random(M, N)
    if not many:
        one = LoRALinear.from_linear(linear, r=rank, lora_alpha=2.0 * rank)
        with torch.no_grad():
            one.lora_B.copy_(random(N, rank))
        return one, (x,), dy
    layer = MultiLoRALinear.from_linear(linear, max_adapters=3)
    layer.add_adapter("served", random(max(rank // 2, 1), K), random(N, max(rank // 2, 1)))
    layer.add_adapter("trained", random(rank, K), random(N, rank), trainable=True, bias=random(N), activation="gelu")
    return layer, (x, torch.tensor([i % 3 - 1 for i in range(M)], device=target.device)), dy


def _require_same_results(work: Work, when: str, ones: Results, others: Results) -> None:
    for name, one, other in zip(work.names(), ones, others, strict=True):
        require_same_bits(f"{name}, {when}", one, other)


@contextlib.contextmanager
def forced_backend(backend: str) -> Iterator[None]:
    before = os.environ.get("PEFTK_BACKEND")
    os.environ["PEFTK_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["PEFTK_BACKEND"]
        else:
            os.environ["PEFTK_BACKEND"] = before
