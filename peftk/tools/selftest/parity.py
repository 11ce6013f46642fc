"""Every backend and operation against the reference in fp64, with the bounds of `peftk.reference.bounds`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peftk import functional
from peftk.adapters import activations
from peftk.adapters.bank import AdapterBank
from peftk.backends import choice, reference, registry
from peftk.backends.call import Call, Op
from peftk.backends.contract import require
from peftk.reference import bounds
from peftk.tools.selftest.cases import Case, decode_case, random_case
from peftk.tools.selftest.check import Check, NotRunError, Target, WrongError, require_same_bits
from peftk.tools.selftest.plans import PLANS, override_plan, ways
from peftk.tools.selftest.work import Form, Work, build_case, can_run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 64, 48), (5, 33, 17), (16, 128, 256), (70, 96, 200))
RANKS = (1, 3, 16, 40)
SCALING = 0.5
TINY = ((5, 33, 17),)  # for the interpreter
DECODE = ((1, 64, 48), (5, 40, 17), (33, 128, 256), (64, 96, 200))  # for CUDA C++, which runs only such shapes

Sweep = Callable[[str, str, torch.dtype, "Shapes"], Iterator[Check]]
Shapes = tuple[tuple[int, int, int], ...]


def checks(target: Target) -> Iterator[Check]:
    for backend in target.backends:
        yield from sweeps(backend, target)
        if choice.rounds_once(backend) and cannot_run(backend, "lora_linear_backward", target.device) is None:
            yield from _random(backend, target)
            yield from _forms(backend, target)
        if backend == "triton" and target.device == ("cpu" if target.is_rehearsal else "cuda"):
            yield from _tiles(target)
            yield from _launches(target)
        if backend == "cuda":
            yield from decode(target)
        if backend != "reference" and cannot_run(backend, "segments", target.device) is None:
            yield from _segments(backend, target)


def cannot_run(backend: str, op: str, device: str, dtype: torch.dtype = torch.bfloat16, M: int = 16) -> str | None:
    call = Call(
        op=Op.parse(op),
        device=device,
        x_dtype=dtype,
        weight_dtype=dtype,
        adapter_dtype=dtype,
        M=M,
        K=128,
        N=256,
        rank=16,
        adapters=1,
    )
    return choice.cannot_run(backend, call)


def sweeps(backend: str, target: Target, *, ops: Collection[str] | None = None) -> Iterator[Check]:
    """Every dtype and shape of every operation of the backend, or of those named in `ops`."""
    for op, of_op in _SWEEPS.items():
        if ops is not None and op not in ops:
            continue
        for dtype in DTYPES:
            if cannot_run(backend, op, target.device, dtype) is None:
                shapes = TINY if target.is_rehearsal else DECODE if backend == "cuda" and op != "merge" else SHAPES
                for sweep in of_op:
                    yield from sweep(backend, target.device, dtype, shapes)


class _Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor


def _check_each_shape(
    op: str, backend: str, device: str, dtype: torch.dtype, shapes: Shapes, run: Callable[..., float]
) -> Iterator[Check]:
    """A check with one adapter per shape; each shape has a different rank."""
    for shape, rank in zip(shapes, RANKS, strict=False):
        name = f"{_dtype_name(dtype)} M={shape[0]} K={shape[1]} N={shape[2]} R={rank}"
        yield Check("parity", backend, op, name, lambda s=shape, r=rank: run(backend, _inputs(s, r, device, dtype)))  # type: ignore[misc]


def _inputs(shape: tuple[int, int, int], rank: int, device: str, dtype: torch.dtype) -> _Inputs:
    M, K, N = shape
    generator = torch.Generator().manual_seed(M * K)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

    return _Inputs(random(M, K), random(N, K), random(N), random(rank, K), random(N, rank), random(M, N))


def _forward(backend: str, inputs: _Inputs) -> float:
    x, weight, bias, A, B, _ = inputs
    first, second = (functional.lora_linear(x, weight, bias, A, B, SCALING, backend=backend) for _ in range(2))
    require_same_bits("y of two runs", first, second)
    return bounds.error(first, bounds.forward(x, weight, bias, A, B, SCALING), fused=choice.rounds_once(backend))


def _backward(backend: str, inputs: _Inputs) -> float:
    x, weight, bias, A, B, dy = inputs
    wanted = [tensor.clone().requires_grad_() for tensor in (x, A, B)]

    def gradients() -> tuple[Tensor, ...]:
        y = functional.lora_linear(wanted[0], weight, bias, wanted[1], wanted[2], SCALING, backend=backend)
        return torch.autograd.grad(y, wanted, dy)

    run_1, run_2 = gradients(), gradients()
    for first, second in zip(run_1, run_2, strict=True):
        require_same_bits("gradients of two runs", first, second)
    expected = bounds.backward(dy, x, weight, A, B, SCALING).values()
    return max(bounds.error(g, e, fused=choice.rounds_once(backend)) for g, e in zip(run_1, expected, strict=True))


def _mixed(backend: str, device: str, dtype: torch.dtype, shapes: Shapes) -> Iterator[Check]:
    """All ranks in one batch, with rows of the base layer between them and ids in random order."""
    for M, K, N in shapes:
        name = f"{_dtype_name(dtype)} M={M} K={K} N={N}"
        yield Check(
            "parity",
            backend,
            "multi_lora_linear",
            name,
            lambda s=(M, K, N): _mixed_batch_error(backend, device, dtype, *s),  # type: ignore[misc]
        )


def _mixed_batch_error(backend: str, device: str, dtype: torch.dtype, M: int, K: int, N: int) -> float:
    generator = torch.Generator().manual_seed(M + K)
    bank = AdapterBank(K, N, len(RANKS), dtype, torch.device(device))

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

    adapters = [(random(rank, K), random(N, rank)) for rank in RANKS]
    for index, (A, B) in enumerate(adapters):
        bank.add(str(index), A, B, SCALING)
    x, weight, bias = random(M, K), random(N, K), random(N)
    ids = torch.randint(-1, len(RANKS), (M,), generator=generator).to(device, torch.int32)
    first, second = (functional.multi_lora_linear(x, weight, bias, bank, ids, backend=backend) for _ in range(2))
    require_same_bits("y of two runs", first, second)
    error = 0.0
    nothing = (torch.zeros(1, K, device=device), torch.zeros(N, 1, device=device))
    for index in range(-1, len(RANKS)):
        rows = (ids == index).nonzero().flatten()
        A, B = adapters[index] if index >= 0 else nothing
        expected = bounds.forward(x[rows], weight, bias, A, B, SCALING)
        error = max(error, bounds.error(first[rows], expected, fused=choice.rounds_once(backend)))
    return error


def _no_rows(backend: str, device: str, dtype: torch.dtype, shapes: Shapes) -> Iterator[Check]:
    def run() -> float:
        x = torch.empty(0, 64, device=device, dtype=dtype)
        weight = torch.ones(32, 64, device=device, dtype=dtype)
        y = functional.lora_linear(x, weight, backend=backend)
        if y.shape != (0, 32):
            raise WrongError(f"expected shape [0, 32], got {list(y.shape)}")
        return 0.0

    if cannot_run(backend, "lora_linear", device, dtype, M=0) is None:
        yield Check("parity", backend, "lora_linear", f"{_dtype_name(dtype)} without rows", run)


def _merge(backend: str, inputs: _Inputs) -> float:
    """The reference's bits after a merge and a remerge; the bits of W after unmerging."""
    weight, A, B = inputs.weight, inputs.lora_A, inputs.lora_B
    ours, theirs = weight.clone(), weight.clone()
    receipt = functional.merge_(ours, A, B, SCALING, backend=backend)
    functional.merge_(theirs, A, B, SCALING, backend="reference")
    require_same_bits("merged, against the reference", ours, theirs)
    error = bounds.error(ours, bounds.merged(weight, A, B, SCALING), fused=True)
    receipt = functional.remerge_(ours, receipt, [B.t()[:1] @ weight, A], [B[:, :1], B], [1.0, -0.25], backend=backend)
    theirs.copy_(weight)
    functional.merge_(theirs, [B.t()[:1] @ weight, A], [B[:, :1], B], [1.0, -0.25], backend="reference")
    require_same_bits("remerged, against the reference", ours, theirs)
    functional.unmerge_(ours, receipt, backend=backend)
    require_same_bits("unmerged, against W before", ours, weight)
    return error


def _sweep_of(op: str, run: Callable[..., float]) -> Sweep:
    return lambda backend, device, dtype, shapes: _check_each_shape(op, backend, device, dtype, shapes, run)


_SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "lora_linear": (_sweep_of("lora_linear", _forward), _no_rows),
    "lora_linear_backward": (_sweep_of("backward", _backward),),
    "multi_lora_linear": (_mixed,),
    "merge": (_sweep_of("merge", _merge),),
}


def _random(backend: str, target: Target) -> Iterator[Check]:
    """Random calls: forward and every gradient."""
    count = 2 if target.is_rehearsal else 60 if target.device == "cpu" else 400
    draw = functools.partial(random_case, max_rows=17, max_width=40) if target.is_rehearsal else random_case
    for seed in range(count):
        dropout_p = 0.3 if seed % 3 == 0 else 0.0
        if can_run(backend, draw(seed), target.device, dropout_p):

            def run(seed: int = seed, dropout_p: float = dropout_p) -> float:
                return Work(draw(seed).to(target.device), backend, dropout_p=dropout_p).error()

            yield Check("parity", backend, "random cases", f"random case {seed}", run)


def decode(target: Target, count: int = 400) -> Iterator[Check]:
    """Random decode steps for CUDA C++: forward only."""
    for seed in range(count):

        def run(seed: int = seed) -> float:
            return Work(decode_case(seed).to(target.device), "cuda", trains=False).error()

        yield Check("parity", "cuda", "random decode steps", f"random decode step {seed}", run)


def _forms(backend: str, target: Target) -> Iterator[Check]:
    """Series adapters and packed outputs, which random cases do not have: forward and every gradient."""
    kinds: tuple[tuple[Form, bool], ...] = (("series", False), ("series", True), ("packed", True))
    shapes = TINY if target.is_rehearsal else SHAPES if target.device == "cpu" else TILES
    mixed = (1, 17, 0, None, 40)
    for (form, many), shape, dtype, dropout_p in itertools.product(kinds, shapes, DTYPES, (0.0, 0.25)):
        ranks = mixed if many else (17,)
        make = functools.partial(build_case, shape, ranks, dtype, many=many, form=form, activation="gelu", biases=True)
        if can_run(backend, make(device="cpu"), target.device, dropout_p):

            def run(make: Callable[..., Case] = make, dropout_p: float = dropout_p) -> float:
                return Work(make(device=target.device), backend, dropout_p=dropout_p).error()

            name = f"{_dtype_name(dtype)} M={shape[0]} K={shape[1]} N={shape[2]} ranks {_ranks(ranks)}"
            op = "packed outputs" if form == "packed" else "multi_adapter_block" if many else "adapter_block"
            yield Check("parity", backend, op, name + (" dropout" if dropout_p else ""), run)


# M, K and N for every kind of tile: decode, small batch, prefill; aligned or not
TILES = ((1, 1024, 1536), (16, 4096, 512), (48, 1000, 520), (200, 1024, 768), (300, 520, 264), (1100, 1024, 2048))
TINY_TILES = ((17, 40, 24),)
ALONE = ((1,), (8,), (17,), (64,), (512,), (0,), (None,))
TOGETHER = ((8,) * 40, (1, 8, None, 16, 0, 17, 64, 256), (16,))


def _tiles(target: Target) -> Iterator[Check]:
    """Forward and every gradient with each kind of tile, alternating biases, activations and dropout."""
    codes = list(activations.CODES)
    shapes = TINY_TILES if target.is_rehearsal else TILES
    mixes = ((17,), (0,), (None,), (1, 8, None, 16, 0, 17)) if target.is_rehearsal else (*ALONE, *TOGETHER)
    for number, (shape, dtype, ranks) in enumerate((s, d, r) for s in shapes for d in DTYPES for r in mixes):
        many, dropout_p = len(ranks) > 1 or ranks == (16,), 0.25 if number % 3 == 1 else 0.0
        wide = torch.float32 if number % 4 == 2 else dtype
        name = (
            f"{_dtype_name(dtype)} M={shape[0]} K={shape[1]} N={shape[2]} ranks {_ranks(ranks)} of {_dtype_name(wide)}"
        )

        def case(number: int = number, shape=shape, dtype=dtype, ranks=ranks, many=many, wide=wide) -> Case:  # type: ignore[no-untyped-def]
            return build_case(
                shape, ranks, dtype, target.device,
                many=many, activation=codes[number % len(codes)], biases=number % 2 == 0, adapter_dtype=wide,
            )  # fmt: skip

        def run(case: Callable[[], Case] = case, dropout_p: float = dropout_p) -> float:
            return Work(case(), "triton", dropout_p=dropout_p).error()

        yield Check("parity", "triton", "every tile", name + (" dropout" if dropout_p else ""), run)


def _launches(target: Target) -> Iterator[Check]:
    """Forward and every gradient, launched in each way of `PLANS`."""
    shapes = TINY_TILES if target.is_rehearsal else ((8, 1024, 768), (700, 1024, 1536))
    for plan, changes in PLANS.items():
        for shape in shapes:
            for many in (True,) if target.is_rehearsal else (False, True):
                ranks = (17, 1, 40) if many else (17,)

                def run(plan=plan, changes=changes, shape=shape, many=many, ranks=ranks) -> float:  # type: ignore[no-untyped-def]
                    if plan not in ways(target.device):
                        raise NotRunError("needs a GPU of compute capability 9.0 or later")
                    dtype = torch.float32 if target.is_rehearsal else torch.bfloat16
                    case = build_case(shape, ranks, dtype, target.device, many=many, activation="gelu", biases=True)
                    with override_plan(**changes):
                        return Work(case, "triton", dropout_p=0.25).error()

                name = f"{plan}, M={shape[0]} K={shape[1]} N={shape[2]} ranks {_ranks(ranks)}"
                yield Check("parity", "triton", "every way to launch", name, run)


def _segments(backend: str, target: Target) -> Iterator[Check]:
    """The sorted segments are exactly those of the reference."""
    segments = require(registry.backend(backend).sort).segments
    sizes = (1, 70) if target.is_rehearsal else (1, 64, 65, 256, 1024, 1025, 4097, 131072)
    for M in sizes:
        for adapters in (0, 1, 40) if target.is_rehearsal else (0, 1, 64, 5000):

            def run(M: int = M, adapters: int = adapters) -> float:
                ids = torch.randint(-2, adapters + 2, (M,), generator=torch.Generator().manual_seed(M))
                found = segments(ids.to(target.device), adapters)
                for name, tensor, expected in zip(found._fields, found, reference.segments(ids, adapters), strict=True):
                    if not torch.equal(tensor.cpu(), expected):
                        raise WrongError(f"{name}: expected {expected}, got {tensor}")
                return 0.0

            yield Check("parity", backend, "segments", f"M={M}, {adapters} adapters", run)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ranks(ranks: tuple[int | None, ...]) -> str:
    alike = len(ranks) > 1 and len(set(ranks)) == 1
    return f"{len(ranks)}×{ranks[0]}" if alike else ",".join("–" if r is None else str(r) for r in ranks)
