"""Runs `peftk bench`: turns the options into rows, measures them and prints the tables."""

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
    """What to measure. None: the default of the op. With all defaults a run takes less than two minutes."""

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
    """Every shape to measure, in order, and the function that builds its case."""
    device, requested = options.device, options.backends
    planned_rows: list[tuple[Shape, Callable[[], Case]]] = []
    for op in options.ops:
        module = MODULES[op]
        ranks = options.ranks or module.RANKS
        for dtype in options.dtypes:
            for dims in options.dims or module.DIMS:
                for shape in _shapes(op, dtype, dims, ranks, options):
                    planned_rows.append((shape, _builder(shape, device, requested, ranks)))
    return planned_rows


def measure_all(console: Console, options: Options, env: dict[str, Any]) -> list[Record]:
    """Measures one row after another, and prints each table when it is complete.

    Raises BackendError if a requested backend cannot run, or if none can.
    """
    console.print(
        f"[bold]peftk {env['peftk']}[/] {env['gpu'] or env['cpu']}, {torch.get_num_threads()} threads · "
        f"torch {env['torch']}" + (f" · peft {env['peft']}" if env["peft"] else " · HF PEFT is not installed"),
        highlight=False,
    )
    console.print(
        "[dim]nn.Linear is torch's layer without any adapter; all others have one.\n"
        "Every side is first checked against fp64 arithmetic. Then the sides take turns; medians.\n"
        "×: how many times faster.[/]\n",
        highlight=False,
    )
    if warning := busy(env):
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


def _builder(shape: Shape, device: str, requested: tuple[str, ...], ranks: tuple[int, ...]) -> Callable[[], Case]:
    if shape.op == "multi_lora_linear":
        return lambda: multi_lora_linear.case(shape, device, requested, ranks)
    return lambda: MODULES[shape.op].case(shape, device, requested)
