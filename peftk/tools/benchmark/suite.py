"""`peftk bench --suite cpu`: every target of the CPU backend measured in one run, with the machine's limit beside it.

ratio and target: how many times faster than the peer (≥), or how many times its time (≤). limit: the best ratio that
the peer's time in this run leaves room for: the work at the speed of the slower of this machine's two bounds,
multiply-adds and reading (`roofline.py`). A target beyond its limit is out of reach here, for any kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from peftk.system import extras
from peftk.tools.benchmark import peers, suite_cases
from peftk.tools.benchmark.common import PEFT, Record, Shape, measure
from peftk.tools.benchmark.environment import busy
from peftk.tools.benchmark.roofline import Roofline, Row, Work, measure_roofline
from peftk.tools.benchmark.targets import COMPILED, FMA_PEAK, TARGETS, Target

PASS, SHORT, WRONG, NOT_MEASURED = "pass", "short", "WRONG", "not measured"
_COLOURS = {PASS: "green", SHORT: "yellow", WRONG: "bold red", NOT_MEASURED: "dim"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One target, as JSON and CSV have it."""

    section: str
    op: str
    dtype: str
    M: int
    K: int
    N: int
    rank: int
    adapters: int
    side: str
    peer: str
    ratio: float | None
    at_most: bool  # ratio: this side's time over the peer's, not the peer's over this side's
    target: float
    noise: float
    limit: float | None
    beyond_limit: bool | None  # the target: no kernel can reach it on this machine
    mark: str
    median_us: float | None
    peer_us: float | None
    peft: float | None  # HF PEFT's time over the peer's, where it was measured too
    note: str


@dataclasses.dataclass(frozen=True)
class Options:
    """Which targets, and for how long. None: all."""

    ops: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    dims: tuple[tuple[int, int], ...] | None = None
    tokens: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None
    adapters: tuple[int, ...] | None = None
    compile: bool = True
    seconds: float = 1.5
    repeats: int = 1000

    def asks_for(self, target: Target) -> bool:
        shape = target.shape
        wanted = (
            (self.ops, shape.op),
            (self.dtypes, shape.dtype),
            (self.dims, (shape.K, shape.N)),
            (self.tokens, shape.M),
            (self.ranks, shape.rank),
            (self.adapters, shape.adapters),
        )
        return all(values is None or value in values for values, value in wanted)


@dataclasses.dataclass(frozen=True)
class Outcome:
    roofline: Roofline
    results: list[Result]
    records: list[Record]

    @property
    def right(self) -> bool:
        """No side is wrong. (Slow is no error.)"""
        return all(record.passed for record in self.records)


def run(console: Console, options: Options, where: dict[str, Any], targets: Sequence[Target] = TARGETS) -> Outcome:
    """Measures shape after shape and shows each section as soon as it is complete."""
    wanted = [target for target in targets if options.asks_for(target)]
    roofline = measure_roofline(min(options.seconds, 0.5))
    _introduce(console, where, roofline)
    results: list[Result] = []
    records: list[Record] = []
    shapes = list(dict.fromkeys(target.shape for target in wanted))
    with console.status("") as status:
        for section in dict.fromkeys(target.section for target in wanted):
            mine = [target for target in wanted if target.section == section]
            found: list[Result] = []
            for shape in dict.fromkeys(target.shape for target in mine):
                status.update(f"[dim]{shapes.index(shape) + 1} of {len(shapes)}: {shape}")
                measured, taken = _measure(shape, [t for t in mine if t.shape == shape], options)
                found += measured
                records += taken
            results += found
            console.print(table(section, found))
            for mark, note in dict.fromkeys((result.mark, result.note) for result in found if result.note):
                console.print(f"[{_COLOURS[mark]}]{mark}: {note}[/]", highlight=False)
    console.print(summary(results), highlight=False)
    return Outcome(roofline, results, records)


def _introduce(console: Console, where: dict[str, Any], roofline: Roofline) -> None:
    console.print(f"[bold]peftk {where['peftk']}[/] {where['cpu']} · torch {where['torch']}", highlight=False)
    console.print(f"{roofline} (measured)\n", highlight=False)
    console.print(
        "[dim]Every side is checked against fp64 arithmetic first; then all sides of a row take turns, medians.\n"
        "peftk has its adapters; nn.Linear, torch.compile and the plain model have none.\n"
        "≥: how many times faster than the peer; ≤: how many times its time. limit: the best ratio that this\n"
        "machine's multiply-adds and reading, measured in the same row, leave room for. “short: limit”: the target\n"
        "lies beyond it.[/]\n",
        highlight=False,
    )
    if warning := busy(where):
        console.print(f"[yellow]{warning}[/]\n", highlight=False)


def _measure(shape: Shape, targets: list[Target], options: Options) -> tuple[list[Result], list[Record]]:
    if targets[0].section == COMPILED and not options.compile:
        return [_unmeasured(target, "left out by --no-compile") for target in targets], []
    try:
        row = suite_cases.build(shape)
    except (peers.UnavailableError, extras.MissingExtraError) as error:
        return [_unmeasured(target, str(error)) for target in targets], []
    records = measure(row.case, device=suite_cases.DEVICE, seconds=options.seconds, repeats=options.repeats)
    return [_result(target, row, records) for target in targets], records


def _unmeasured(target: Target, why: str) -> Result:
    return Result(
        target.section,
        *target.shape,
        side="peftk",
        peer=target.peer,
        ratio=None,
        at_most=target.at_most,
        target=target.value,
        noise=target.noise,
        limit=None,
        beyond_limit=None,
        mark=NOT_MEASURED,
        median_us=None,
        peer_us=None,
        peft=None,
        note=why,
    )


def _result(target: Target, row: Row, records: list[Record]) -> Result:
    ours = next(record for record in records if record.side.startswith("peftk") and record.side != target.peer)
    peer = next((record for record in records if record.side == target.peer), None)
    if peer is None:
        return _unmeasured(target, f"{target.peer} is not installed: pip install 'peftk[bench]'")
    blank = dataclasses.replace(
        _unmeasured(target, ""), side=ours.side, median_us=ours.median_us, peer_us=peer.median_us
    )
    if ours.median_us is None or peer.median_us is None:
        wrong = "; ".join(f"{r.side} is wrong by {r.error:.3g} × what is allowed" for r in (ours, peer) if not r.passed)
        return dataclasses.replace(blank, mark=WRONG, note=wrong)
    times = {record.side: record.median_us for record in records if record.median_us is not None}
    ratio = ours.median_us / peer.median_us if target.at_most else peer.median_us / ours.median_us
    limit = _limit(target, row, times)
    return dataclasses.replace(
        blank,
        ratio=ratio,
        limit=limit,
        beyond_limit=None if limit is None else not target.met(limit),
        mark=PASS if target.met(ratio) else SHORT,
        peft=times[PEFT] / peer.median_us if PEFT in times and target.peer != PEFT else None,
    )


def _limit(target: Target, row: Row, times: dict[str, float]) -> float | None:
    """The best ratio to the peer's measured time, whatever the kernel."""
    bound, peer = row.bound, times[target.peer]
    if bound is None:
        return None
    if row.extra is not None:  # the peer's own work stays as it is
        return 1 + bound.least_us(row.extra, times) / peer
    # beside the peak of multiply-adds only these count
    work = bound.work if target.peer != FMA_PEAK else Work(bound.work.multiply_adds, 0)
    least = bound.least_us(work, times) + (times[row.rest] if row.rest is not None else 0.0)
    return least / peer if target.at_most else peer / least


def table(section: str, results: Sequence[Result]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, title=section, title_style="bold", title_justify="left", pad_edge=False)
    columns = _columns(results)
    for header in columns:
        made.add_column(header, justify="left" if header in ("against", "") else "right", no_wrap=True)
    for number, result in enumerate(results):
        cells = [cells[number] for cells in columns.values()]
        made.add_row(*cells[:-1], f"[{_COLOURS[result.mark]}]{cells[-1]}[/]")
    return made


def _columns(results: Sequence[Result]) -> dict[str, list[str]]:
    """Header and cells. Columns that would say nothing in this section are left out."""
    columns = {
        "dtype": [r.dtype for r in results],
        "layer": [f"{r.K}×{r.N}" for r in results],
        "tokens": [str(r.M or "") for r in results],
        "adapter": [f"r{r.rank}" if r.adapters == 1 else f"{r.adapters} of r{r.rank}" for r in results],
        "peftk, µs": [_number(r.median_us, 1) for r in results],
        "against": [r.peer for r in results],
        "its µs": [_number(r.peer_us, 1) for r in results],
        "PEFT": [_number(r.peft, 1) if r.peft is not None else "" for r in results],
        "ratio": [_number(r.ratio, 3 if r.at_most else 2) for r in results],
        "target": [str(_target(r)) for r in results],
        "limit": [_number(r.limit, 3 if r.at_most else 2) for r in results],
        "": [_mark(r) for r in results],
    }
    if len(set(columns["layer"])) == 1:
        del columns["layer"]
    return {header: cells for header, cells in columns.items() if any(cells)}


def _target(result: Result) -> Target:
    shape = Shape(*(getattr(result, name) for name in Shape._fields))
    return Target(result.section, shape, result.peer, result.target, result.at_most, result.noise)


def _mark(result: Result) -> str:
    return f"{SHORT}: limit" if result.mark == SHORT and result.beyond_limit else result.mark


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}" if value < 1000 else f"{value:,.0f}"


def summary(results: Sequence[Result]) -> str:
    counts = {mark: sum(result.mark == mark for result in results) for mark in _COLOURS}
    beyond = sum(result.mark == SHORT and bool(result.beyond_limit) for result in results)
    said = [f"{counts[PASS]} of {len(results)} targets met"]
    if counts[SHORT]:
        said.append(f"{counts[SHORT]} short" + (f", {beyond} of them beyond this machine's limit" if beyond else ""))
    said += [f"{counts[mark]} {mark}" for mark in (WRONG, NOT_MEASURED) if counts[mark]]
    return "; ".join(said)


def markdown(outcome: Outcome, where: dict[str, Any]) -> str:
    """The tables, to be pasted into a page."""
    parts = [f"{where['cpu']}; {outcome.roofline}; torch {where['torch']}; peftk {where['peftk']}. "]
    parts[0] += f"{summary(outcome.results)}."
    for section in dict.fromkeys(result.section for result in outcome.results):
        columns = _columns([result for result in outcome.results if result.section == section])
        rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append(f"**{section}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"
