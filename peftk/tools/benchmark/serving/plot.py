"""The plots of `peftk bench --suite serving`: one message each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftk.tools.benchmark.serving import targets
from peftk.tools.benchmark.serving.suite import Load, Outcome
from peftk.tools.benchmark.serving.traffic import POPULARITIES

_COLOURS = {targets.ENGINE: "#1f6feb", targets.NO_ADAPTERS: "#8a8f98", targets.UNMODIFIED: "#b9c3d0"}
_OTHER = "#d98e32"
_POPULARITY_COLOURS = dict(zip(POPULARITIES, ("#1f6feb", "#2ea043", "#8957e5"), strict=True))


def write(file: Path, outcome: Outcome, environment: dict[str, Any]) -> None:
    """A PNG, SVG or PDF with four panels."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 7), layout="constrained")
        axes = figure.subplots(2, 2)
        for axis, count in zip(axes[0], (8, 64), strict=True):
            _throughput(axis, outcome, count)
        _popularity(axes[1][0], [load for load in outcome.loads if load.loop == "closed"])
        _latency(axes[1][1], [load for load in outcome.loads if load.loop == "open"])
        figure.suptitle(
            f"peftk {environment['peftk']} serves {outcome.model} · {environment['cpu']}, {environment['threads']} "
            f"threads · torch {environment['torch']}, transformers {environment['transformers']}",
            fontsize=10,
        )
        figure.savefig(file, dpi=150)


def _throughput(axis: Any, outcome: Outcome, count: int) -> None:
    found = [side for side in outcome.throughput if side.adapters == count and side.wall is not None]
    names = [side.side for side in found]
    bars = axis.barh(names, [side.wall for side in found], color=[_COLOURS.get(name, _OTHER) for name in names])
    axis.bar_label(bars, fmt="%.1f", padding=2)
    axis.invert_yaxis()
    rates = {side.side: side.wall or 0.0 for side in found}
    without = max((rates.get(name, 0.0) for name in (targets.NO_ADAPTERS, targets.UNMODIFIED)), default=0.0)
    share = f"{rates.get(targets.ENGINE, 0.0) / without:.0%}" if without else "?"
    axis.set(title=f"{count} adapters in one batch: {share} of the throughput without", xlabel="tokens / s")


def _popularity(axis: Any, loads: list[Load]) -> None:
    counts = sorted({load.adapters for load in loads})
    for popularity in POPULARITIES:
        points = [load for load in loads if load.popularity == popularity]
        axis.plot(
            [counts.index(load.adapters) for load in points],
            [load.tokens_per_second for load in points],
            marker="o",
            color=_POPULARITY_COLOURS[popularity],
            label=popularity,
        )
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    axis.set_ylim(bottom=0)
    axis.set(title="Closed loop: does it matter how many adapters are in use?", xlabel="adapters", ylabel="tokens / s")
    axis.legend(frameon=False)


def _latency(axis: Any, loads: list[Load]) -> None:
    labels = [f"{load.adapters}, {load.popularity}" for load in loads]
    for number, (percentile, alpha) in enumerate((("p50", 0.45), ("p95", 0.7), ("p99", 1.0))):
        places = [place + (number - 1) * 0.27 for place in range(len(loads))]
        axis.bar(
            places, [load.first_token_ms.get(percentile, 0.0) for load in loads], 0.25, color="#1f6feb", alpha=alpha,
            label=percentile,
        )  # fmt: skip
    axis.set_xticks(range(len(loads)), labels)
    axis.set(title="Open loop at 70 %: how long until the first token?", xlabel="adapters, popularity", ylabel="ms")
    axis.legend(frameon=False)
