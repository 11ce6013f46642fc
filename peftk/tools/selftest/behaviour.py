"""What the GPU backends promise beside their results: the same bits, CUDA graphs, streams, no wait, few launches.

What only a GPU has comes as an argument (`Tools`), so that the code of every check runs anywhere.
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
from peftk.tools.selftest.check import Check, NotRunError, Target, WrongError, same_bits
from peftk.tools.selftest.work import Form, Work, made

Enter = Callable[[], contextlib.AbstractContextManager[Any]]
Results = list[Tensor]


class Tools(NamedTuple):
    """capture: what a run returned, and what runs it again into the same tensors. streams: as many as asked. Both and
    forbid_sync are None where there is no GPU. kernels: the names of the kernels that a run launches."""

    compiler: str
    kernels: Callable[[Callable[[], object]], list[str]]
    capture: Callable[[Callable[[], Results]], tuple[Results, Callable[[], object]]] | None = None
    streams: Callable[[int], Sequence[Enter]] | None = None
    forbid_sync: Enter | None = None


def tools(target: Target) -> Tools:
    if target.device != "cuda":
        return Tools("aot_eager", launches.interpreted)
    return Tools("inductor", launches.on_gpu, captured, streams, sync_forbidden)


def checks(target: Target, given: Tools) -> Iterator[Check]:
    """Of every backend for GPUs that runs here."""
    if "cuda" in target.backends:
        yield from _of("cuda", dict(decode_works(target)), target, given)
    if "triton" in target.backends:
        yield from _of("triton", dict(works(target)), target, given)
        yield from _of_torch(target, given)


def _of(backend: str, kinds: dict[str, Callable[[], Work]], target: Target, given: Tools) -> Iterator[Check]:
    for name, make in kinds.items():

        def check(op: str, run: Callable[[Work], object], name: str = name, make: Callable[[], Work] = make) -> Check:
            return Check("behaviour", backend, op, name, lambda: (run(make()), 0.0)[1])

        yield check("same bits twice", repeats)
        yield check("counters at zero", leaves_counters)
        yield check("launches", functools.partial(launched, count=given.kernels))
        yield check("no waiting", functools.partial(waits_for_nothing, forbid_sync=given.forbid_sync))
        yield check("CUDA graph", functools.partial(replays, capture=given.capture))
    makers, rounds = list(kinds.values()), 1 if target.rehearses else 8
    yield Check("behaviour", backend, "streams", "4 at once", lambda: side_by_side(makers, given.streams, rounds))


def _of_torch(target: Target, given: Tools) -> Iterator[Check]:
    for rank in (17,) if target.rehearses else (1, 8, 17):
        for many in (False, True):
            name = f"{'many adapters up to' if many else 'one adapter of'} rank {rank}"
            run = functools.partial(compiles, target, rank, many, compiler=given.compiler)
            yield Check("behaviour", "triton", "torch.compile", name, run)
    for many in (False, True):
        name = "many adapters" if many else "one adapter"
        yield Check("behaviour", "triton", "opcheck", name, functools.partial(opchecks, target.device, many))


def decode_works(target: Target) -> Iterator[tuple[str, Callable[[], Work]]]:
    """A decode step of every kind, which CUDA C++ serves: forward alone."""
    shapes: tuple[tuple[int, int, int], ...] = ((1, 1024, 768), (16, 4096, 1024), (64, 1000, 520))
    if target.device == "cpu":  # on the host, in tests
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
                case = made(shape, ranks, dtype, target.device, many=many, form=form, activation="silu", biases=True)
                return Work(case, "cuda", trains=False)

            yield f"{kind}, M={shape[0]} K={shape[1]} N={shape[2]}", make


def works(target: Target) -> Iterator[tuple[str, Callable[[], Work]]]:
    """A call of every kind."""
    shapes = ((17, 40, 24),) if target.rehearses else ((8, 1024, 768), (600, 1024, 2048), (3000, 1000, 520))
    dtype = torch.float32 if target.rehearses else torch.bfloat16
    mixed = (1, 17, 0, None) if target.rehearses else (1, 8, None, 17, 0, 64, 16, 128)
    kinds: tuple[tuple[str, Form, tuple[int | None, ...], bool, float], ...] = (
        ("base layer alone", "linear", (None,), False, 0.0),
        ("one adapter, dropout", "linear", (8,), False, 0.25),
        ("many adapters, dropout", "linear", mixed, True, 0.25),
        ("many series adapters", "series", mixed, True, 0.0),
        ("packed outputs", "packed", mixed, True, 0.0),
    )
    if not target.rehearses:
        kinds += (
            ("one adapter", "linear", (17,), False, 0.0),
            ("many adapters", "linear", mixed, True, 0.0),
            ("one series adapter, dropout", "series", (17,), False, 0.25),
            ("packed outputs, dropout", "packed", mixed, True, 0.25),
        )
    for shape in shapes:
        for kind, form, ranks, many, dropout_p in kinds:

            def make(shape=shape, form=form, ranks=ranks, many=many, dropout_p=dropout_p) -> Work:  # type: ignore[no-untyped-def]
                case = made(shape, ranks, dtype, target.device, many=many, form=form, activation="silu", biases=True)
                return Work(case, "triton", dropout_p=dropout_p)

            yield f"{kind}, M={shape[0]} K={shape[1]} N={shape[2]}", make


def repeats(work: Work) -> None:
    """Also after other calls, which leave counters and memory behind."""
    first = work.run()
    work.refill(1)
    work.run()
    work.refill(2)
    second, third = work.run(), work.run()
    _same(work, "a second run", third, second)
    if torch.equal(first[0], second[0]):
        raise WrongError("other inputs gave the same y")


def leaves_counters(work: Work) -> None:
    """Every counter of a launch is zero after it."""
    from peftk.launch import workspace

    work.run()
    for kept in (*workspace._of_stream.values(), *workspace._slabs.values()):
        if kept.any():
            raise WrongError(f"{int(kept.count_nonzero())} counters are left")


def launched(work: Work, *, count: Callable[[Callable[[], object]], list[str]]) -> None:
    """One launch forward, two backward; Triton sorts ids that no route holds before each."""
    ranks = [a.rank for a in work.case.adapters if a is not None]
    sort = [] if work.case.ids is None or work.backend == "cuda" else launches.of_segments(work.case.x.shape[0])
    forward = [*sort, "lora_linear_kernel"]
    backward = [*sort, "lora_linear_kernel", *(["wgrad_kernel"] if ranks else [])]
    work.run()  # what is compiled and copied once is no launch of this call
    runs: list[tuple[str, Callable[[], object], list[str]]] = [("forward", work.forward, forward)]
    if work.leaves:
        runs.append(("forward and backward", work.run, forward + backward))
    for name, run, expected in runs:
        found = count(run)
        if collections.Counter(found) != collections.Counter(expected):
            raise WrongError(f"{name}: expected the launches {expected}, got {found}")


def waits_for_nothing(work: Work, *, forbid_sync: Enter | None) -> None:
    """The host never waits for the device, so that it can be ahead of it."""
    if forbid_sync is None:
        raise NotRunError("needs a GPU")
    work.run()
    with forbid_sync():
        work.run()


def replays(
    work: Work, *, capture: Callable[[Callable[[], Results]], tuple[Results, Callable[[], object]]] | None
) -> None:
    """A graph of forward and backward follows x, dY, ids and seed that change in place, with the bits of a call."""
    if capture is None:
        raise NotRunError("needs a GPU")
    results, replay = capture(work.run)
    before = None
    for number in (1, 2, 3):
        work.refill(number)
        replay()
        replayed = [t.clone() for t in results]
        _same(work, f"replay {number}", replayed, work.run())
        work.error(replayed)
        if before is not None and torch.equal(before, replayed[0]):
            raise WrongError("a replay with other inputs gave the same y")
        before = replayed[0]


def side_by_side(
    makers: Sequence[Callable[[], Work]], streams: Callable[[int], Sequence[Enter]] | None, rounds: int
) -> float:
    """Calls on several streams at once, each with the bits that it has alone."""
    if streams is None:
        raise NotRunError("needs a GPU")
    several = [make() for make in makers]
    alone = [work.run() for work in several]
    for first in range(0, len(several), 4):
        group = several[first : first + 4]
        enter = streams(len(group))
        found: list[list[Results]] = [[] for _ in group]
        for _ in range(rounds):
            for work, stream, results in zip(group, enter, found, strict=True):
                with stream():
                    results.append(work.run())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for work, expected, results in zip(group, alone[first:], found, strict=False):
            for one in results:
                _same(work, "beside other streams", one, expected)
    return 0.0


def compiles(target: Target, rank: int, many: bool, *, compiler: str) -> float:
    """torch.compile without a graph break: the bits of the eager layer, y and every gradient."""
    torch._dynamo.reset()
    layer, inputs, dy = _layer(target, rank, many)
    leaves = [inputs[0], *(p for p in layer.parameters() if p.requires_grad)]
    with _served_by("triton"):
        y = layer(*inputs)
        eager = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        y = torch.compile(layer, fullgraph=True, backend=compiler)(*inputs)
        found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for number, (one, other) in enumerate(zip(found, eager, strict=True)):
        same_bits(f"result {number} compiled and eager", one, other)
    return 0.0


def opchecks(device: str, many: bool) -> float:
    """torch's own examination of a custom op: schema, fake tensors, autograd."""
    M, K, N = 4, 32, 16
    ranks = (3, 17, 0, None) if many else (17,)
    case = made((M, K, N), ranks, torch.float32, device, many=many, biases=True)
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


def captured(run: Callable[[], Results]) -> tuple[Results, Callable[[], object]]:
    """A CUDA graph of the run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is compiled, allocated or copied once is not of the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


def streams(count: int) -> Sequence[Enter]:
    torch.cuda.synchronize()
    return [functools.partial(torch.cuda.stream, torch.cuda.Stream()) for _ in range(count)]


@contextlib.contextmanager
def sync_forbidden() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _layer(target: Target, rank: int, many: bool) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    M, K, N = (7, 40, 24) if target.rehearses else (64, 512, 256)
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


def _same(work: Work, when: str, ones: Results, others: Results) -> None:
    for name, one, other in zip(work.names(), ones, others, strict=True):
        same_bits(f"{name}, {when}", one, other)


@contextlib.contextmanager
def _served_by(backend: str) -> Iterator[None]:
    before = os.environ.get("PEFTK_BACKEND")
    os.environ["PEFTK_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["PEFTK_BACKEND"]
        else:
            os.environ["PEFTK_BACKEND"] = before
