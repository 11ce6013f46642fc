"""How the study's figures look: readable on light and dark pages and in print, each with its message as the title."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

INK, GROUND, FAINT = "#1f2329", "#fdfdfd", "#d3d7dc"
DARK = {INK: "#e6e9ee", GROUND: "#14171c", FAINT: "#3a414b"}
# colour and marker of a method, clear of both grounds
LOOKS = {
    "full fine-tuning": (INK, "o"),
    "head only": ("#7b8794", "x"),
    "top layers": ("#17967a", "s"),
    "BitFit": ("#8a63d2", "D"),
    "series adapters": ("#d97a12", "^"),
    "parallel adapters": ("#c2479b", "v"),
    "LoRA": ("#2f7de1", "o"),
    "LLaMA-Adapter": ("#d0443e", "P"),
}
ANY = tuple(zip(("#2f7de1", "#d97a12", "#17967a", "#c2479b", "#8a63d2", "#d0443e"), "^sDvoP", strict=True))

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": GROUND,
    "axes.facecolor": "none",
    "savefig.facecolor": GROUND,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "svg.fonttype": "none",
    "svg.hashsalt": "peftk study",
}


class Curve(NamedTuple):
    """ys: for every x the values of all seeds."""

    label: str
    xs: Sequence[float]
    ys: Sequence[Sequence[float]]
    look: tuple[str, str]


def style() -> Any:
    """A context manager in which all of a figure is drawn and written."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new(message: str, columns: int = 1, size: tuple[float, float] = (7.2, 3.9)) -> tuple[Any, list[Any]]:
    """A figure with its message as the title, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    message = message.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    lines = [line for text in message.split("\n") for line in textwrap.wrap(text, int(13 * size[0]))]
    figure.suptitle("\n".join(lines), fontsize=10.5, ha="left", x=0.01)
    return figure, list(axes)


def curves(axis: Any, lines: Sequence[Curve]) -> None:
    """Means over seeds as lines, the range over seeds as a band."""
    for line in lines:
        colour, marker = line.look
        means = [sum(values) / len(values) for values in line.ys]
        axis.plot(line.xs, means, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=line.label)
        if any(len(values) > 1 for values in line.ys):
            low, high = [min(values) for values in line.ys], [max(values) for values in line.ys]
            axis.vlines(line.xs, low, high, color=colour, linewidth=3, alpha=0.35)


def log_axis(axis: Any, ticks: Sequence[float], base: int = 2) -> None:
    """A logarithmic x axis with these ticks only, written as numbers."""
    axis.set_xscale("log", base=base)
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axis.minorticks_off()


def legend_below(figure: Any, axis: Any, columns: int = 4) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(labels)), fontsize=8.5)


def svg(figure: Any) -> str:
    """The figure's SVG: the same bytes every time, and in dark colours where the reader's page is dark."""
    file = io.StringIO()
    with style():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    rules = "".join(
        f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }} '
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    dark = f"<style>@media (prefers-color-scheme: dark) {{ {rules}text {{ fill: {DARK[INK]} }} }}</style>"
    text = re.sub(r"(<svg [^>]*>)", lambda found: found[1] + dark, file.getvalue(), count=1)
    return re.sub(r"[ \t]+$", "", text, flags=re.M)


def png(figure: Any, file: Any) -> None:
    with style():
        figure.savefig(file, format="png", dpi=130)
