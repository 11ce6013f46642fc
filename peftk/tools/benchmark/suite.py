"""`peftk bench --suite cpu`: measures every target of the CPU backend in one run, and the limit that the machine sets.

ratio and target: how many times faster than the peer (≥), or how many times its time (≤). limit: the best possible
ratio to the peer's time in this run, if the work ran at the slower of the machine's two bounds, multiply-adds and
reading (`roofline.py`). No kernel can reach a target beyond its limit on this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from peftk.system import extras
from peftk.tools.benchmark import contended, engines, peak_memory, peers, suite_cases
from peftk.tools.benchmark.common import PEFT, Record, Shape, measure
from peftk.tools.benchmark.environment import busy
from peftk.tools.benchmark.quiet import MOST, Watch, is_quiet
from peftk.tools.benchmark.roofline import Roofline, Row, Work, measure_roofline
from peftk.tools.benchmark.targets import (
    COMPILED,
    CONTENDED,
    FMA_PEAK,
    MODEL_COMPILED,
    MODEL_MEMORY,
    PEFTK,
    READ,
    TARGETS,
    Target,
)

PASS, SHORT, NOT_QUIET, WRONG, NOT_MEASURED = "pass", "short", "not quiet", "WRONG", "not measured"
COLOURS = {PASS: "green", SHORT: "yellow", NOT_QUIET: "dim", WRONG: "bold red", NOT_MEASURED: "dim"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One target, as written to JSON and CSV."""

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
    at_most: bool  # ratio is this side's time over the peer's; else the peer's over this side's
    target: float
    noise: float
    net: bool  # ratio without the time of the adapter's own multiply-adds
    limit: float | None
    beyond_limit: bool | None  # no kernel can reach the target on this machine
    mark: str
    median_us: float | None
    peer_us: float | None
    peft: float | None  # HF PEFT's time over the peer's, if it was measured
    not_run: float | None  # share of time in which a thread that was ready did not run (quiet.py), if it is known
    note: str
    peak_bytes: int | None = None  # of the memory that a step allocates; such a row has no times
    peer_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """Which targets to measure (None: all), and for how long."""

    ops: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    dims: tuple[tuple[int, int], ...] | None = None
    tokens: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None
    adapters: tuple[int, ...] | None = None
    compile: bool = True
    seconds: float = 1.5
    repeats: int = 1000

    def selects(self, target: Target) -> bool:
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
    def all_correct(self) -> bool:
        """Whether every side passed its check. A missed target is not an error."""
        return all(record.passed for record in self.records)


def run(console: Console, options: Options, env: dict[str, Any], targets: Sequence[Target] = TARGETS) -> Outcome:
    """Measures one shape after another, and prints each section when it is complete."""
    wanted = [target for target in targets if options.selects(target)]
    roofline = measure_roofline(min(options.seconds, 0.5))
    _print_header(console, env, roofline)
    results: list[Result] = []
    records: list[Record] = []
    shapes = list(dict.fromkeys(target.shape for target in wanted))
    with console.status("") as status:
        for section in dict.fromkeys(target.section for target in wanted):
            section_targets = [target for target in wanted if target.section == section]
            section_results: list[Result] = []
            for shape in dict.fromkeys(target.shape for target in section_targets):
                status.update(f"[dim]{shapes.index(shape) + 1} of {len(shapes)}: {shape}")
                measured, shape_records = _measure(shape, [t for t in section_targets if t.shape == shape], options)
                section_results += measured
                records += shape_records
            results += section_results
            console.print(table(section, section_results))
            for mark, note in dict.fromkeys((result.mark, result.note) for result in section_results if result.note):
                console.print(f"[{COLOURS[mark]}]{mark}: {note}[/]", highlight=False)
    console.print(summary(results), highlight=False)
    return Outcome(roofline, results, records)


def _print_header(console: Console, env: dict[str, Any], roofline: Roofline) -> None:
    console.print(f"[bold]peftk {env['peftk']}[/] {env['cpu']} · torch {env['torch']}", highlight=False)
    console.print(f"{roofline} (measured)\n", highlight=False)
    console.print(
        "[dim]Every side is first checked against fp64 arithmetic. Then the sides of a row take turns; medians.\n"
        "peftk has its adapters; nn.Linear, torch.compile and the plain model have none.\n"
        "≥: how many times faster than the peer; ≤: how many times its time; net: peftk's time without that of the\n"
        "adapter's own multiply-adds, at the measured speed of multiply-adds. limit: the best possible ratio, from\n"
        "this machine's speed of multiply-adds and of reading, measured in the same row. “short: limit”: the target\n"
        "is beyond it. “not quiet 9%”: for 9 % of the time a thread that was ready had no core, so no verdict.[/]\n",
        highlight=False,
    )
    if warning := busy(env):
        console.print(f"[yellow]{warning}[/]\n", highlight=False)


def _measure(shape: Shape, targets: list[Target], options: Options) -> tuple[list[Result], list[Record]]:
    if targets[0].section in (COMPILED, MODEL_COMPILED) and not options.compile:
        return [_not_measured(target, "skipped by --no-compile") for target in targets], []
    try:
        row = suite_cases.build(shape)
    except (peers.UnavailableError, extras.MissingExtraError) as error:
        return [_not_measured(target, str(error)) for target in targets], []
    if targets[0].section == CONTENDED:
        outcome = contended.measure(row.case, options.seconds)
        return [_contended_result(target, outcome) for target in targets], outcome.records
    if targets[0].section == MODEL_MEMORY:
        peaks = peak_memory.measure(row.case)
        return [_memory_result(target, peaks) for target in targets], peaks.records
    watch = Watch()
    records = measure(row.case, device=suite_cases.DEVICE, seconds=options.seconds, repeats=options.repeats)
    not_run = watch.not_run()
    return [_result(target, row, records, not_run) for target in targets], records


def _not_measured(target: Target, why: str) -> Result:
    return Result(
        target.section,
        *target.shape,
        side="peftk",
        peer=target.peer,
        ratio=None,
        at_most=target.at_most,
        target=target.value,
        noise=target.noise,
        net=target.net,
        limit=None,
        beyond_limit=None,
        mark=NOT_MEASURED,
        median_us=None,
        peer_us=None,
        peft=None,
        not_run=None,
        note=why,
    )


def _contended_result(target: Target, outcome: contended.Contended) -> Result:
    """The times are means, the ratio is that of the slowdowns."""
    peer, ours = outcome.records[:2]
    blank = dataclasses.replace(_not_measured(target, ""), side=ours.side)
    if not (ours.passed and peer.passed):
        return _wrong(blank, ours, peer)
    slowdown = outcome.slowdowns[target.peer]
    return dataclasses.replace(
        blank,
        ratio=slowdown.ratio,
        mark=_verdict(target, slowdown.ratio, outcome.not_run),
        median_us=slowdown.ours_us,
        peer_us=slowdown.peer_us,
        not_run=outcome.not_run,
    )


def _memory_result(target: Target, peaks: peak_memory.Peaks) -> Result:
    """Bytes do not depend on what else the machine does, so there is always a verdict."""
    peer, ours = (
        next(record for record in peaks.records if record.side == name)
        for name in (target.peer, target.peer.replace(PEFT, PEFTK))
    )
    blank = dataclasses.replace(_not_measured(target, ""), side=ours.side)
    if not (ours.passed and peer.passed):
        return _wrong(blank, ours, peer)
    bytes_ours, bytes_peer = peaks.bytes[ours.side], peaks.bytes[peer.side]
    ratio = bytes_ours / bytes_peer
    return dataclasses.replace(
        blank, ratio=ratio, mark=_verdict(target, ratio, None), peak_bytes=bytes_ours, peer_bytes=bytes_peer
    )


def _verdict(target: Target, ratio: float, not_run: float | None) -> str:
    return NOT_QUIET if not is_quiet(not_run) else PASS if target.met(ratio) else SHORT


def _wrong(blank: Result, *records: Record) -> Result:
    wrong = "; ".join(f"{r.side} is wrong by {r.error:.3g} × the bound" for r in records if not r.passed)
    return dataclasses.replace(blank, mark=WRONG, note=wrong)


def _result(target: Target, row: Row, records: list[Record], not_run: float | None) -> Result:
    ours = next(record for record in records if record.side.startswith(PEFTK) and record.side != target.peer)
    peer = next((record for record in records if record.side == target.peer), None)
    if peer is None:
        return _not_measured(target, _how_to_install(target.peer))
    blank = dataclasses.replace(
        _not_measured(target, ""), side=ours.side, median_us=ours.median_us, peer_us=peer.median_us
    )
    if ours.median_us is None or peer.median_us is None:
        return _wrong(blank, ours, peer)
    times = {record.side: record.median_us for record in records if record.median_us is not None}
    own_us = ours.median_us - _excused_us(target, row, times)
    ratio = own_us / peer.median_us if target.at_most else peer.median_us / own_us
    limit = _limit(target, row, times)
    return dataclasses.replace(
        blank,
        ratio=ratio,
        limit=limit,
        beyond_limit=None if limit is None else not target.met(limit),
        mark=_verdict(target, ratio, not_run),
        not_run=not_run,
        peft=times[PEFT] / peer.median_us if PEFT in times and target.peer != PEFT else None,
    )


def _how_to_install(peer: str) -> str:
    extra = engines.EXTRA if peer in (engines.ONNX_RUNTIME, engines.OPENVINO) else "bench"
    return f"{peer} is not installed: pip install 'peftk[{extra}]'"


def _excused_us(target: Target, row: Row, times: dict[str, float]) -> float:
    """The time of the adapter's own multiply-adds at the measured speed, if the target is net of it."""
    if not target.net or row.bound is None or row.adapter is None:
        return 0.0
    return row.bound.min_time_us(Work(row.adapter.multiply_adds, 0), times)


def _limit(target: Target, row: Row, times: dict[str, float]) -> float | None:
    """The best possible ratio to the peer's measured time, for any kernel."""
    bound, peer = row.bound, times[target.peer]
    if bound is None:
        return None
    if row.extra is not None:  # only the additional work counts: the peer is peftk's too
        return 1 + bound.min_time_us(row.extra, times) / peer
    # compared with one of the probes, only what it does counts
    work = Work(
        0 if target.peer == READ else bound.work.multiply_adds, 0 if target.peer == FMA_PEAK else bound.work.bytes
    )
    least = bound.min_time_us(work, times) + (times[row.rest] if row.rest is not None else 0.0)
    least -= _excused_us(target, row, times)
    return least / peer if target.at_most else peer / least


def table(section: str, results: Sequence[Result]) -> Table:
    section_table = Table(box=box.SIMPLE_HEAD, title=section, title_style="bold", title_justify="left", pad_edge=False)
    columns = _columns(results)
    for header in columns:
        section_table.add_column(header, justify="left" if header in ("against", "") else "right", no_wrap=True)
    for number, result in enumerate(results):
        cells = [cells[number] for cells in columns.values()]
        section_table.add_row(*cells[:-1], f"[{COLOURS[result.mark]}]{cells[-1]}[/]")
    return section_table


def _columns(results: Sequence[Result]) -> dict[str, list[str]]:
    """Headers and cells, without columns that are empty, the same in all rows of the section, or said by rows of it."""
    has_peft_rows = any(r.peer == PEFT for r in results)
    columns = {
        "op": [r.op for r in results],
        "dtype": [r.dtype for r in results],
        "layer": [f"{r.K}×{r.N}" for r in results],
        "tokens": [str(r.M or "") for r in results],
        "adapter": [f"r{r.rank}" if r.adapters == 1 else f"{r.adapters} of r{r.rank}" for r in results],
        "peftk, µs": [_number(r.median_us, 1) if r.peak_bytes is None else "" for r in results],
        "peftk, MB": [_megabytes(r.peak_bytes) for r in results],
        "against": [r.peer for r in results],
        "its µs": [_number(r.peer_us, 1) if r.peer_bytes is None else "" for r in results],
        "its MB": [_megabytes(r.peer_bytes) for r in results],
        "PEFT": [_number(r.peft, 1) if r.peft is not None and not has_peft_rows else "" for r in results],
        "ratio": [_number(r.ratio, 3 if r.at_most else 2) for r in results],
        "target": [str(_target(r)) for r in results],
        "limit": [_number(r.limit, 3 if r.at_most else 2) for r in results],
        "": [_mark(r) for r in results],
    }
    for header in ("op", "layer"):
        if len(set(columns[header])) == 1:
            del columns[header]
    return {header: cells for header, cells in columns.items() if any(cells)}


def _target(result: Result) -> Target:
    shape = Shape(*(getattr(result, name) for name in Shape._fields))
    return Target(result.section, shape, result.peer, result.target, result.at_most, result.noise, result.net)


def _mark(result: Result) -> str:
    if result.mark == NOT_QUIET:
        return f"{NOT_QUIET} {result.not_run:.0%}"
    return f"{SHORT}: limit" if result.mark == SHORT and result.beyond_limit else result.mark


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}" if value < 1000 else f"{value:,.0f}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f}"


def summary(results: Sequence[Result]) -> str:
    counts = {mark: sum(result.mark == mark for result in results) for mark in COLOURS}
    beyond = sum(result.mark == SHORT and bool(result.beyond_limit) for result in results)
    parts = [f"{counts[PASS]} of {len(results)} targets met"]
    if counts[SHORT]:
        parts.append(f"{counts[SHORT]} short" + (f", {beyond} of them beyond this machine's limit" if beyond else ""))
    parts += [f"{counts[mark]} {mark}" for mark in (NOT_QUIET, WRONG, NOT_MEASURED) if counts[mark]]
    return f"{'; '.join(parts)}. {_quietness(results)}"


def _quietness(results: Sequence[Result]) -> str:
    shares = sorted(result.not_run for result in results if result.not_run is not None)
    if not shares:
        return "How quiet the machine was is not known"
    return (
        f"A thread that was ready did not run for {shares[len(shares) // 2]:.1%} of the time in the middle row and "
        f"{shares[-1]:.1%} in the worst; no verdict above {MOST:.0%}"
    )


def markdown(outcome: Outcome, env: dict[str, Any]) -> str:
    """The tables in Markdown."""
    parts = [f"{env['cpu']}; {outcome.roofline}; torch {env['torch']}; peftk {env['peftk']}. "]
    parts[0] += f"{summary(outcome.results)}."
    for section in dict.fromkeys(result.section for result in outcome.results):
        columns = _columns([result for result in outcome.results if result.section == section])
        rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append(f"**{section}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"
