"""From options to rows: which shapes an op measures, and one case for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from peftk.tools.benchmark import lora_linear, merge, multi_lora_linear, report, train
from peftk.tools.benchmark.common import Case, Record, Shape, measure
from peftk.tools.benchmark.environment import busy

MODULES = {
    "lora_linear": lora_linear,
    "multi_lora_linear": multi_lora_linear,
    "train": train,
    "merge": merge,
    "unmerge": merge,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure. None: the op's own default, which together take less than two minutes."""

    ops: tuple[str, ...] = ("lora_linear", "multi_lora_linear", "train", "merge")
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    dims: tuple[tuple[int, int], ...] | None = None
    tokens: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None
    adapters: tuple[int, ...] | None = None
    backends: tuple[str, ...] = ()
    device: str = "cpu"
    seconds: float = 0.7
    repeats: int = 1000


def rows(options: Options) -> list[tuple[Shape, Callable[[], Case]]]:
    """Every shape to measure, in order, and what builds its case."""
    device, asked = options.device, options.backends
    found: list[tuple[Shape, Callable[[], Case]]] = []
    for op in options.ops:
        module = MODULES[op]
        ranks = options.ranks or module.RANKS
        for dtype in options.dtypes:
            for dims in options.dims or module.DIMS:
                for shape in _shapes(op, dtype, dims, ranks, options):
                    found.append((shape, _builder(shape, device, asked, ranks)))
    return found


def measure_all(console: Console, options: Options, where: dict[str, Any]) -> list[Record]:
    """Measures row after row and shows each table as soon as it is complete.

    Raises BackendError where a backend that was asked for cannot run, or none can.
    """
    console.print(
        f"[bold]peftk {where['peftk']}[/] {where['gpu'] or where['cpu']}, {torch.get_num_threads()} threads · "
        f"torch {where['torch']}" + (f" · peft {where['peft']}" if where["peft"] else " · HF PEFT is not installed"),
        highlight=False,
    )
    console.print(
        "[dim]nn.Linear is torch's layer without any adapter; all others are with one.\n"
        "Every side is checked against fp64 arithmetic first; then they take turns, medians.\n"
        "×: how many times faster.[/]\n",
        highlight=False,
    )
    if warning := busy(where):
        console.print(f"[yellow]{warning}[/]\n", highlight=False)
    planned = rows(options)
    records: list[Record] = []
    table: list[list[Record]] = []
    with console.status("") as status:
        for number, (shape, build) in enumerate(planned):
            if number == 0 or planned[number - 1][0].op != shape.op:
                console.print(f"[bold]{shape.op}[/]: {report.NOTES[shape.op]}", highlight=False)
            status.update(f"[dim]{number + 1} of {len(planned)}: {shape}")
            measured = measure(build(), device=options.device, seconds=options.seconds, repeats=options.repeats)
            table.append(measured)
            records += measured
            if number + 1 == len(planned) or _title(planned[number + 1][0]) != _title(shape):
                console.print(report.table(table))
                table = []
    return records


def _title(shape: Shape) -> tuple[str, str, int, int]:
    return shape.op, shape.dtype, shape.K, shape.N


def _shapes(op: str, dtype: str, dims: tuple[int, int], ranks: tuple[int, ...], options: Options) -> list[Shape]:
    if op in ("merge", "unmerge"):
        return merge.shapes(op, dtype, dims, ranks)
    if op == "multi_lora_linear":
        tokens, adapters = options.tokens or multi_lora_linear.TOKENS, options.adapters or multi_lora_linear.ADAPTERS
        return multi_lora_linear.shapes(dtype, dims, tokens, ranks, adapters)
    if op == "train":
        return train.shapes(dtype, dims, options.tokens or train.TOKENS, ranks)
    return lora_linear.shapes(dtype, dims, options.tokens or lora_linear.TOKENS, ranks)


def _builder(shape: Shape, device: str, asked: tuple[str, ...], ranks: tuple[int, ...]) -> Callable[[], Case]:
    if shape.op == "multi_lora_linear":
        return lambda: multi_lora_linear.case(shape, device, asked, ranks)
    return lambda: MODULES[shape.op].case(shape, device, asked)
