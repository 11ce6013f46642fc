"""`peftk selftest`: in under a minute, does what was built compute what it should on this machine?

Every backend that can run, against the reference in fp64 with the bound of `peftk.benchmark.agree`, on a few shapes of
every kind (ragged, one row, no rows, mixed ranks); twice, for the same bits; and merge against the reference's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peftk import backends, functional
from peftk.backends import Call
from peftk.bank import AdapterBank
from peftk.benchmark import agree
from peftk.processor import cpu_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 64, 48), (5, 33, 17), (16, 128, 256), (70, 96, 200))
RANKS = (1, 3, 16, 40)
SCALING = 0.5


class Outcome(NamedTuple):
    """One case: its error as a multiple of what is allowed (≤ 1 passes), or what went wrong."""

    op: str
    case: str
    error: float
    problem: str | None = None


def run(device: str, console: Console) -> bool:
    """Prints one report; True where everything passed."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    console.print(f"[bold]peftk selftest[/] {device}: {name}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("backend", "operation", "cases", "worst error / allowed", ""):
        table.add_column(column, justify="right" if column in ("cases", "worst error / allowed") else "left")
    failures: list[str] = []
    absent: list[str] = []
    with console.status("") as status:
        for backend in backends.NAMES:
            reasons = {op: backends.cannot_serve(backend, _call(op, device)) for op in ("lora_linear", "merge")}
            if None not in reasons.values():
                why = "; ".join(f"{op}: {reason}" for op, reason in reasons.items())
                absent.append(f"[dim]{backend} does not run here: {why}[/]")
                continue
            status.update(f"[dim]{backend}")
            for op, outcomes in _by_op(backend, device).items():
                worst = max(outcome.error for outcome in outcomes)
                wrong = [o for o in outcomes if o.problem is not None or o.error > 1.0]
                failures += [f"{backend} {op}, {o.case}: {o.problem or f'error {o.error:.2f}× allowed'}" for o in wrong]
                mark = "[bold red]FAIL[/]" if wrong else "[green]pass[/]"
                table.add_row(backend, op, str(len(outcomes)), f"{worst:.2f}", mark)
    console.print(table)
    for line in absent:
        console.print(line, highlight=False)
    for failure in failures[:20]:
        console.print(f"[red]{failure}[/]", highlight=False)
    console.print(f"[bold red]{len(failures)} cases failed.[/]" if failures else "[green]All passed.[/]")
    return not failures


def _call(op: str, device: str, dtype: torch.dtype = torch.float32) -> Call:
    return Call(op, device, dtype, dtype, dtype, 16, 128, 256, 16, 1)


def _by_op(backend: str, device: str) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for op, cases in _SWEEPS.items():
        for dtype in DTYPES:
            if backends.cannot_serve(backend, _call(op, device, dtype)) is None:
                for outcome in cases(backend, device, dtype):
                    found.setdefault(op, []).append(outcome)
    return found


class _Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor


def _inputs(device: str, dtype: torch.dtype) -> Iterator[tuple[str, _Inputs]]:
    for (M, K, N), rank in zip(SHAPES, RANKS, strict=True):
        generator = torch.Generator().manual_seed(M * K)

        def random(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

        name = f"{str(dtype).removeprefix('torch.')} M={M} K={K} N={N} R={rank}"
        yield name, _Inputs(random(M, K), random(N, K), random(N), random(rank, K), random(N, rank), random(M, N))


def _forward(backend: str, device: str, dtype: torch.dtype) -> Iterator[Outcome]:
    for name, (x, weight, bias, A, B, _) in _inputs(device, dtype):
        one, two = (functional.lora_linear(x, weight, bias, A, B, SCALING, backend=backend) for _ in range(2))
        expected = agree.forward(x, weight, bias, A, B, SCALING)
        yield Outcome(
            "lora_linear", name, agree.error(one, expected, fused=backends.rounds_once(backend)), _repeats(one, two)
        )


def _backward(backend: str, device: str, dtype: torch.dtype) -> Iterator[Outcome]:
    for name, (x, weight, bias, A, B, dy) in _inputs(device, dtype):
        wanted = [tensor.clone().requires_grad_() for tensor in (x, A, B)]

        def gradients(
            inputs: tuple[Tensor, ...] = (weight, bias, dy), wanted: list[Tensor] = wanted
        ) -> tuple[Tensor, ...]:
            weight, bias, dy = inputs
            x, A, B = wanted
            return torch.autograd.grad(
                functional.lora_linear(x, weight, bias, A, B, SCALING, backend=backend), wanted, dy
            )

        one, two = gradients(), gradients()
        expected = agree.backward(dy, x, weight, A, B, SCALING).values()
        error = max(agree.error(g, e, fused=backends.rounds_once(backend)) for g, e in zip(one, expected, strict=True))
        problems = [_repeats(first, second) for first, second in zip(one, two, strict=True)]
        yield Outcome("backward", name, error, next(filter(None, problems), None))


def _mixed(backend: str, device: str, dtype: torch.dtype) -> Iterator[Outcome]:
    """All ranks in one batch, rows of the base layer between them, ids in no order."""
    for M, K, N in SHAPES:
        generator = torch.Generator().manual_seed(M + K)
        bank = AdapterBank(K, N, len(RANKS), dtype, torch.device(device))

        def random(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

        adapters = [(random(rank, K), random(N, rank)) for rank in RANKS]
        for index, (A, B) in enumerate(adapters):
            bank.add(str(index), A, B, SCALING)
        x, weight, bias = random(M, K), random(N, K), random(N)
        ids = torch.randint(-1, len(RANKS), (M,), generator=generator).to(device, torch.int32)
        one, two = (functional.multi_lora_linear(x, weight, bias, bank, ids, backend=backend) for _ in range(2))
        error = 0.0
        nothing = (torch.zeros(1, K, device=device), torch.zeros(N, 1, device=device))
        for index in range(-1, len(RANKS)):
            rows = (ids == index).nonzero().flatten()
            A, B = adapters[index] if index >= 0 else nothing
            expected = agree.forward(x[rows], weight, bias, A, B, SCALING)
            error = max(error, agree.error(one[rows], expected, fused=backends.rounds_once(backend)))
        name = f"{str(dtype).removeprefix('torch.')} M={M} K={K} N={N}"
        yield Outcome("multi_lora_linear", name, error, _repeats(one, two))


def _no_rows(backend: str, device: str, dtype: torch.dtype) -> Iterator[Outcome]:
    x = torch.empty(0, 64, device=device, dtype=dtype)
    weight = torch.ones(32, 64, device=device, dtype=dtype)
    y = functional.lora_linear(x, weight, backend=backend)
    problem = None if y.shape == (0, 32) else f"expected shape [0, 32], got {list(y.shape)}"
    yield Outcome("lora_linear", f"{dtype} without rows", 0.0, problem)


def _merge(backend: str, device: str, dtype: torch.dtype) -> Iterator[Outcome]:
    """The reference's bits after merging, W's own bits after unmerging."""
    for name, (_, weight, _, A, B, _) in _inputs(device, dtype):
        ours, reference = weight.clone(), weight.clone()
        receipt = functional.merge_(ours, A, B, SCALING, backend=backend)
        functional.merge_(reference, A, B, SCALING, backend="reference")
        problem = None if _same_bits(ours, reference) else "merged bits differ from the reference's"
        error = agree.error(ours, agree.merged(weight, A, B, SCALING), fused=True)
        functional.unmerge_(ours, receipt, backend=backend)
        if not _same_bits(ours, weight):
            problem = "unmerge did not give back every bit"
        yield Outcome("merge", name, error, problem)


_SWEEPS: dict[str, Callable[[str, str, torch.dtype], Iterator[Outcome]]] = {
    "lora_linear": lambda *where: (outcome for sweep in (_forward, _no_rows) for outcome in sweep(*where)),
    "lora_linear_backward": _backward,
    "multi_lora_linear": _mixed,
    "merge": _merge,
}


def _repeats(one: Tensor, two: Tensor) -> str | None:
    return None if _same_bits(one, two) else "two runs gave different bits"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))
