"""The output of `python -m bench.counted`: launches, bytes and modelled times by side, and one linear by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.counted.peers import SOURCES
from bench.counted.run import LIMIT, LIMIT_WITH_SPLITS, PEFTK, Counted, Row, by_adapter
from bench.counted.work import H100, Traffic
from peftk.triton_kernels import waves

_SHORT = {"Punica SGMV": "P. SGMV", "Punica BGMV": "P. BGMV", "LoRAFusion": "LoRAFus."}
INTRODUCTION = (
    "Counted, not measured: nothing ran. Bytes ×: through HBM over the compulsory minimum (each input\n"
    "read once, each output written once), if L2 keeps nothing between launches. µs: modelled, for an\n"
    f"{H100.name} ({H100.bytes_per_us / 1e6:.2f} TB/s, {H100.flops_per_us / 1e6:.0f} TFLOP/s bf16): "
    "whole waves of tiles, or memory where that\n"
    f"takes longer, and {waves.GAP_US:g} µs before each launch but the first. Efficiencies and gaps are assumed."
)


def show(console: Console, counted: Sequence[Counted]) -> None:
    console.print(INTRODUCTION, highlight=False)
    console.print(launches_table(counted))
    for group in groups(counted):
        console.print(comparison_table(group))
    for op in dict.fromkeys(linear.op for linear in counted):
        console.print(tensor_table([linear for linear in counted if linear.op == op][-1]))
    console.print(summary(counted), highlight=False)


def groups(counted: Sequence[Counted]) -> list[list[Counted]]:
    """Groups of the same op and layer size."""
    groups_by_layer: dict[tuple[str, int, int], list[Counted]] = {}
    for linear in counted:
        groups_by_layer.setdefault((linear.op, linear.batch.K, linear.batch.N), []).append(linear)
    return list(groups_by_layer.values())


def launches_table(counted: Sequence[Counted]) -> Table:
    """The maximum number of launches of a linear layer, by number of adapters."""
    sides = _sides(counted)
    new_table = _table("launches per linear, base product included", ("", "adapters", *map(_column_name, sides)))
    max_launches: dict[tuple[str, int], dict[str, int]] = {}
    for linear in counted:
        for row in linear.rows():
            cell = max_launches.setdefault((linear.op, row.adapters), {})
            cell[row.side] = max(cell.get(row.side, 0), row.launches)
    for (op, adapters), cells in max_launches.items():
        new_table.add_row(op, str(adapters), *(str(cells.get(side, "–")) for side in sides))
    return new_table


def comparison_table(group: Sequence[Counted]) -> Table:
    """For each side, its bytes over the compulsory bytes, and its modelled time."""
    first, sides = group[0], _sides(group)
    title = f"{first.op} bf16  {first.batch.K} → {first.batch.N}: bytes ×, µs modelled"
    new_table = _table(title, ("tokens", "n", "rank", "MB", *map(_column_name, sides)))
    for linear in group:
        rows = {row.side: row for row in linear.rows()}
        minimum = sum(linear.compulsory.values())
        cells = [_cell(rows.get(side)) for side in sides]
        new_table.add_row(
            str(linear.batch.M), str(len(linear.batch.ranks)), linear.rank, f"{minimum / 1e6:.1f}", *cells
        )
    return new_table


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    us = row.modelled_us
    text = f"{row.over_compulsory:.2f} {f'{us:.1f}' if us < 100 else f'{us:.0f}':>4}"
    return f"[bold]{text}[/]" if row.side == PEFTK else text


def tensor_table(linear: Counted) -> Table:
    """peftk's bytes for one linear layer by tensor, compared with the compulsory bytes."""
    batch = linear.batch
    adapters = f"{len(batch.ranks)} of rank {linear.rank}"
    title = f"peftk {linear.op} {batch.K} → {batch.N}, M = {batch.M}, {adapters}: MB"
    new_table = _table(title, ("launch", "tensor", "compulsory", "distinct", "requested"))
    for number, launch in enumerate(linear.sides[PEFTK] or (), start=1):
        small = Traffic()
        for name, traffic in by_adapter(launch).items():
            if name not in linear.compulsory and traffic.requested < 5e4:
                small = small + traffic
                continue
            minimum = linear.compulsory.get(name)
            new_table.add_row(f"{number}", name, "–" if minimum is None else _mb(minimum), *_traffic(traffic))
        new_table.add_row(f"{number}", "the rest", "–", *_traffic(small))
        new_table.add_section()
    return new_table


def _traffic(traffic: Traffic) -> tuple[str, str]:
    return _mb(traffic.distinct), _mb(traffic.requested)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3f}"


def summary(counted: Sequence[Counted]) -> str:
    lines = []
    for op in dict.fromkeys(linear.op for linear in counted):
        op_linears = [linear for linear in counted if linear.op == op]
        met = sum(linear.on_target for linear in op_linears)
        worst = max(op_linears, key=lambda linear: linear.over_minimum)
        each = "1 launch" if op == "forward" else "2 launches, each reading its inputs once"
        bound = f"at most {worst.over_minimum:.3f} × the minimum"
        lines.append(f"{op}: {met} of {len(op_linears)} on target; {each}; {bound}")
    lines.append(f"(target: ≤ {LIMIT} ×, ≤ {LIMIT_WITH_SPLITS} × where sums are split over blocks)")
    return "\n".join(lines)


def markdown(counted: Sequence[Counted]) -> str:
    """All tables in Markdown, for `docs/`, with the range that L2 may save."""
    parts = [INTRODUCTION.replace("\n", " "), summary(counted).replace("\n", "\n\n")]
    sides = _sides(counted)
    for group in groups(counted):
        first = group[0]
        parts.append(f"**{first.op}, {first.batch.K} → {first.batch.N}**")
        group_sides = [side for side in sides if any(linear.sides.get(side) is not None for linear in group)]
        header = ("tokens", "adapters", "rank", "compulsory MB", "GFLOP", "peftk requested MB", *group_sides)
        parts.append(
            "\n".join(
                [_line(header), _line("---" for _ in header), *(_line(_cells(linear, group_sides)) for linear in group)]
            )
        )
    sources = [f"- {name}: {source.repository}: {'; '.join(source.files)}" for name, source in SOURCES.items()]
    return "\n\n".join([*parts, "\n".join(sources)]) + "\n"


def _cells(linear: Counted, sides: Sequence[str]) -> list[str]:
    rows = {row.side: row for row in linear.rows()}
    ours = rows[PEFTK]
    batch = linear.batch
    cells = [str(batch.M), str(len(batch.ranks)), linear.rank, f"{ours.compulsory_bytes / 1e6:.1f}"]
    cells += [f"{linear.flops / 1e9:.1f}", f"{ours.requested_bytes / 1e6:.1f}"]
    return cells + [_range(rows.get(side)) for side in sides]


def _range(row: Row | None) -> str:
    """Bytes × and µs, each from "L2 keeps everything between launches" to "L2 keeps nothing"."""
    if row is None:
        return "–"
    kept = row.kept_bytes / row.compulsory_bytes
    return f"{_span(kept, row.over_compulsory, 2)}; {_span(row.modelled_us_kept, row.modelled_us, 1)} µs"


def _span(low: float, high: float, digits: int) -> str:
    first, second = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return first if first == second else f"{first}–{second}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sides(counted: Sequence[Counted]) -> list[str]:
    return list(dict.fromkeys(side for linear in counted for side in linear.sides))


def _column_name(side: str) -> str:
    return _SHORT.get(side, side)


def _table(title: str, columns: Sequence[str]) -> Table:
    new_table = Table(
        box=box.SIMPLE_HEAD, title=title, title_style="bold", title_justify="left", pad_edge=False, padding=0
    )
    for column in columns:
        new_table.add_column(column, justify="right", no_wrap=True)
    return new_table
