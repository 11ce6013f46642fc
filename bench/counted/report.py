"""What `python -m bench.counted` shows: launches, bytes and modelled times side by side, and one linear by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.counted.peers import SOURCES
from bench.counted.run import LIMIT, LIMIT_WITH_SPLITS, PEFTK, Counted, Row, by_adapter
from bench.counted.work import H100, Traffic

_SHORT = {"Punica SGMV": "P. SGMV", "Punica BGMV": "P. BGMV", "LoRAFusion": "LoRAFus."}
INTRODUCTION = (
    "Counted, not measured: nothing ran. Bytes ×: through HBM over the compulsory minimum (each input\n"
    "read once, each output written once), where L2 keeps nothing between launches. µs: modelled, on\n"
    f"the roofline of an {H100.name} ({H100.bytes_per_us / 1e6:.2f} TB/s, {H100.flops_per_us / 1e6:.0f} TFLOP/s bf16), "
    "a launch at a time;\nlaunching itself costs nothing in it."
)


def show(console: Console, counted: Sequence[Counted]) -> None:
    console.print(INTRODUCTION, highlight=False)
    console.print(launches(counted))
    for group in groups(counted):
        console.print(beside(group))
    for op in dict.fromkeys(one.op for one in counted):
        console.print(by_tensor([one for one in counted if one.op == op][-1]))
    console.print(summary(counted), highlight=False)


def groups(counted: Sequence[Counted]) -> list[list[Counted]]:
    """Of one op and layer size."""
    found: dict[tuple[str, int, int], list[Counted]] = {}
    for one in counted:
        found.setdefault((one.op, one.batch.K, one.batch.N), []).append(one)
    return list(found.values())


def launches(counted: Sequence[Counted]) -> Table:
    """The most that a linear takes, by number of adapters."""
    sides = _sides(counted)
    made = _table("launches per linear, base product included", ("", "adapters", *map(_short, sides)))
    most: dict[tuple[str, int], dict[str, int]] = {}
    for one in counted:
        for row in one.rows():
            cell = most.setdefault((one.op, row.adapters), {})
            cell[row.side] = max(cell.get(row.side, 0), row.launches)
    for (op, adapters), cells in most.items():
        made.add_row(op, str(adapters), *(str(cells.get(side, "–")) for side in sides))
    return made


def beside(group: Sequence[Counted]) -> Table:
    """Each side's bytes over the compulsory ones, and its modelled time."""
    first, sides = group[0], _sides(group)
    title = f"{first.op} bf16  {first.batch.K} → {first.batch.N}: bytes ×, µs modelled"
    made = _table(title, ("tokens", "n", "rank", "MB", *map(_short, sides)))
    for one in group:
        rows = {row.side: row for row in one.rows()}
        least = sum(one.compulsory.values())
        cells = [_cell(rows.get(side)) for side in sides]
        made.add_row(str(one.batch.M), str(len(one.batch.ranks)), one.rank, f"{least / 1e6:.1f}", *cells)
    return made


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    us = row.modelled_us
    text = f"{row.over_compulsory:.2f} {f'{us:.1f}' if us < 100 else f'{us:.0f}':>4}"
    return f"[bold]{text}[/]" if row.side == PEFTK else text


def by_tensor(one: Counted) -> Table:
    """peftk's bytes of one linear, tensor by tensor, beside the compulsory ones."""
    batch = one.batch
    adapters = f"{len(batch.ranks)} of rank {one.rank}"
    title = f"peftk {one.op} {batch.K} → {batch.N}, M = {batch.M}, {adapters}: MB"
    made = _table(title, ("launch", "tensor", "compulsory", "distinct", "requested"))
    for number, launch in enumerate(one.sides[PEFTK] or (), start=1):
        small = Traffic()
        for name, traffic in by_adapter(launch).items():
            if name not in one.compulsory and traffic.requested < 5e4:
                small = small + traffic
                continue
            least = one.compulsory.get(name)
            made.add_row(f"{number}", name, "–" if least is None else _mb(least), *_traffic(traffic))
        made.add_row(f"{number}", "the rest", "–", *_traffic(small))
        made.add_section()
    return made


def _traffic(traffic: Traffic) -> tuple[str, str]:
    return _mb(traffic.distinct), _mb(traffic.requested)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3f}"


def summary(counted: Sequence[Counted]) -> str:
    lines = []
    for op in dict.fromkeys(one.op for one in counted):
        mine = [one for one in counted if one.op == op]
        met = sum(one.on_target for one in mine)
        worst = max(mine, key=lambda one: one.over_least)
        each = "1 launch" if op == "forward" else "2 launches, each reading its inputs once"
        most = f"at most {worst.over_least:.3f} × the least"
        lines.append(f"{op}: {met} of {len(mine)} on target; {each}; {most}")
    lines.append(f"(target: ≤ {LIMIT} ×, ≤ {LIMIT_WITH_SPLITS} × where sums are split over blocks)")
    return "\n".join(lines)


def markdown(counted: Sequence[Counted]) -> str:
    """All tables, with what L2 could spare the peers, for `docs/`."""
    parts = [INTRODUCTION.replace("\n", " "), summary(counted).replace("\n", "\n\n")]
    sides = _sides(counted)
    for group in groups(counted):
        first = group[0]
        parts.append(f"**{first.op}, {first.batch.K} → {first.batch.N}**")
        here = [side for side in sides if any(one.sides.get(side) is not None for one in group)]
        head = ("tokens", "adapters", "rank", "compulsory MB", "GFLOP", "peftk requested MB", *here)
        parts.append("\n".join([_line(head), _line("---" for _ in head), *(_line(_cells(one, here)) for one in group)]))
    sources = [f"- {name}: {source.repository}: {'; '.join(source.files)}" for name, source in SOURCES.items()]
    return "\n\n".join([*parts, "\n".join(sources)]) + "\n"


def _cells(one: Counted, sides: Sequence[str]) -> list[str]:
    rows = {row.side: row for row in one.rows()}
    ours = rows[PEFTK]
    batch = one.batch
    cells = [str(batch.M), str(len(batch.ranks)), one.rank, f"{ours.compulsory_bytes / 1e6:.1f}"]
    cells += [f"{one.flops / 1e9:.1f}", f"{ours.requested_bytes / 1e6:.1f}"]
    return cells + [_range(rows.get(side)) for side in sides]


def _range(row: Row | None) -> str:
    """Bytes × and µs: if L2 keeps everything between launches, to nothing."""
    if row is None:
        return "–"
    kept = row.kept_bytes / row.compulsory_bytes
    return f"{_span(kept, row.over_compulsory, 2)}; {_span(row.modelled_us_kept, row.modelled_us, 1)} µs"


def _span(low: float, high: float, digits: int) -> str:
    one, other = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return one if one == other else f"{one}–{other}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sides(counted: Sequence[Counted]) -> list[str]:
    return list(dict.fromkeys(side for one in counted for side in one.sides))


def _short(side: str) -> str:
    return _SHORT.get(side, side)


def _table(title: str, columns: Sequence[str]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", title_justify="left", pad_edge=False, padding=0)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made
