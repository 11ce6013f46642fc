"""Draws the pictures of docs/methods: what each method adds to a layer or block. Frozen grey, trained orange.

python scripts/draw_methods.py            # writes docs/methods/*.svg, the same bytes every time
python scripts/draw_methods.py --png DIR  # writes PNGs into DIR instead
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

matplotlib.use("Agg")

INK, FROZEN, FROZEN_EDGE = "#333333", "#e4e6ea", "#9aa1ab"
TRAINED, TRAINED_EDGE, TRAINED_INK = "#fbd9b5", "#d9731a", "#8a4209"
SIZE = 10.0
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "docs" / "methods"

STYLE = {
    "svg.fonttype": "path",  # independent of installed fonts
    "svg.hashsalt": "peftk",
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "mathtext.fontset": "dejavusans",
}


class Sketch:
    """A drawing of boxes, trapezoids, sums and arrows, in units of inches."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = pyplot.figure(figsize=(width, height), facecolor="white")
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(0, height)
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str, *, trained: bool = False) -> None:
        """A box centred at (x, y)."""
        patch = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=TRAINED if trained else FROZEN,
            edgecolor=TRAINED_EDGE if trained else FROZEN_EDGE,
            linewidth=1.2,
        )
        self.axes.add_patch(patch)
        self.text(x, y, text, colour=TRAINED_INK if trained else INK)

    def funnel(self, x: float, y: float, wide: float, narrow: float, height: float, text: str, *, up: bool) -> None:
        """A trained factor: narrowing (a down-projection) or widening (up), from bottom to top."""
        bottom, top = (narrow, wide) if up else (wide, narrow)
        corners = [
            (x - bottom / 2, y - height / 2),
            (x + bottom / 2, y - height / 2),
            (x + top / 2, y + height / 2),
            (x - top / 2, y + height / 2),
        ]
        self.axes.add_patch(
            Polygon(corners, closed=True, facecolor=TRAINED, edgecolor=TRAINED_EDGE, linewidth=1.2, joinstyle="round")
        )
        self.text(x, y, text, colour=TRAINED_INK)

    def circle(self, x: float, y: float, text: str, *, trained: bool = False) -> None:
        self.axes.plot(
            [x], [y], "o", markersize=17, markerfacecolor="white", markeredgewidth=1.2,
            markeredgecolor=TRAINED_EDGE if trained else INK,
        )  # fmt: skip
        self.text(x, y - 0.005, text, colour=TRAINED_INK if trained else INK)

    def arrow(self, *points: tuple[float, float], trained: bool = False, head: bool = True) -> None:
        """A line through the points, with an arrow head at its end."""
        colour = TRAINED_EDGE if trained else INK
        *rest, last = points
        if len(points) > 2:
            xs, ys = zip(*points[:-1], strict=True)
            self.axes.plot(xs, ys, color=colour, linewidth=1.2, solid_joinstyle="round", solid_capstyle="round")
        self.axes.add_patch(
            FancyArrowPatch(
                rest[-1], last, arrowstyle="-|>" if head else "-", mutation_scale=9, color=colour, linewidth=1.2,
                shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip

    def text(
        self, x: float, y: float, text: str, *, colour: str = INK, size: float = SIZE, align: str = "center"
    ) -> None:
        self.axes.text(x, y, text, ha=align, va="center", color=colour, fontsize=size)

    def formula(self, text: str) -> None:
        width, _ = self.figure.get_size_inches()
        self.text(width / 2, 0.24, text, size=11.5)

    def legend(self, x: float, y: float) -> None:
        for offset, trained, text in ((0.0, False, "frozen"), (0.95, True, "trained")):
            self.box(x + offset, y, 0.2, 0.16, "", trained=trained)
            self.text(x + offset + 0.17, y, text, size=8.5, align="left")


def lora() -> Sketch:
    s = Sketch(4.6, 3.7)
    s.text(2.3, 0.72, "$x$")
    s.arrow((2.3, 0.86), (2.3, 1.06), (1.35, 1.06), (1.35, 1.5))
    s.arrow((2.3, 1.06), (3.25, 1.06), (3.25, 1.28), trained=True)
    s.box(1.35, 2.02, 1.6, 1.04, "$W\\;\\;[N, K]$\n$b\\;\\;[N]$")
    s.funnel(3.25, 1.5, 1.5, 0.6, 0.44, "$A$", up=False)
    s.funnel(3.25, 2.28, 1.5, 0.6, 0.44, "$B = 0$", up=True)
    s.arrow((3.25, 1.72), (3.25, 2.06), trained=True)
    s.text(3.36, 1.89, "$r$", colour=TRAINED_INK, align="left")
    s.arrow((3.25, 2.5), (3.25, 2.92), (2.45, 2.92), trained=True)
    s.text(2.9, 3.06, "$\\times\\, s$", colour=TRAINED_INK, size=9)
    s.arrow((1.35, 2.54), (1.35, 2.92), (2.15, 2.92))
    s.circle(2.3, 2.92, "+")
    s.arrow((2.3, 3.06), (2.3, 3.32))
    s.text(2.3, 3.44, "$y$")
    s.legend(2.8, 3.5)
    s.formula("$y = xW^T + b + s\\cdot(xA^T)B^T$")
    return s


def bottleneck(s: Sketch, x: float, y: float, scale: float = 1.0) -> None:
    """Down-projection, activation, up-projection; from y - 0.62·scale to y + 0.62·scale."""
    s.funnel(x, y - 0.42 * scale, 1.3 * scale, 0.62 * scale, 0.4 * scale, "$A, a$", up=False)
    s.box(x, y, 0.62 * scale, 0.3 * scale, "act", trained=False)
    s.funnel(x, y + 0.42 * scale, 1.3 * scale, 0.62 * scale, 0.4 * scale, "$s\\cdot B, \\beta$", up=True)
    s.arrow((x, y - 0.22 * scale), (x, y - 0.15 * scale), trained=True, head=False)
    s.arrow((x, y + 0.15 * scale), (x, y + 0.22 * scale), trained=True, head=False)


def series_adapter() -> Sketch:
    s = Sketch(4.6, 4.5)
    s.text(2.0, 0.68, "$x$")
    s.arrow((2.0, 0.8), (2.0, 1.0))
    s.box(2.0, 1.2, 1.9, 0.4, "attention or MLP")
    s.arrow((2.0, 1.4), (2.0, 2.02))
    s.text(2.1, 1.56, "$h$", align="left")
    bottleneck(s, 2.0, 2.64)
    s.arrow((2.0, 1.74), (0.95, 1.74), (0.95, 3.68), (1.85, 3.68))
    s.text(0.85, 2.64, "skip", align="right", size=9)
    s.arrow((2.0, 3.26), (2.0, 3.53), trained=True)
    s.circle(2.0, 3.68, "+")
    s.arrow((2.0, 3.82), (2.0, 4.1))
    s.text(2.0, 4.24, "$y$")
    s.arrow((2.0, 0.9), (3.3, 0.9), (3.3, 4.1))
    s.text(3.42, 2.5, "the block's own\nresidual stream", size=8.5, align="left")
    s.legend(2.8, 4.32)
    s.formula("$y = h + s\\cdot\\mathrm{act}(hA^T + a)B^T + \\beta$")
    return s


def parallel_adapter() -> Sketch:
    s = Sketch(4.6, 3.9)
    s.text(2.3, 0.72, "$x$")
    s.arrow((2.3, 0.84), (2.3, 1.04), (1.25, 1.04), (1.25, 1.36))
    s.box(1.25, 1.98, 1.7, 1.24, "a block (MLP)\nor one linear $W, b$")
    s.arrow((2.3, 1.04), (3.35, 1.04), (3.35, 1.36), trained=True)
    bottleneck(s, 3.35, 1.98)
    s.arrow((3.35, 2.6), (3.35, 3.06), (2.45, 3.06), trained=True)
    s.arrow((1.25, 2.6), (1.25, 3.06), (2.15, 3.06))
    s.circle(2.3, 3.06, "+")
    s.arrow((2.3, 3.2), (2.3, 3.46))
    s.text(2.3, 3.6, "$y$")
    s.legend(2.8, 3.7)
    s.formula("$y = f(x) + s\\cdot\\mathrm{act}(xA^T + a)B^T + \\beta$")
    return s


def bitfit() -> Sketch:
    s = Sketch(4.6, 3.2)
    s.text(1.75, 0.68, "$x$")
    s.arrow((1.75, 0.8), (1.75, 1.08))
    s.box(1.75, 1.5, 1.6, 0.84, "$W\\;\\;[N, K]$")
    s.arrow((1.75, 1.92), (1.75, 2.3))
    s.circle(1.75, 2.44, "+")
    s.box(3.35, 2.44, 1.5, 0.4, "$b\\;\\;[N]$", trained=True)
    s.arrow((2.6, 2.44), (1.9, 2.44), trained=True)
    s.text(3.35, 2.06, "every bias, those of\nLayerNorms as well", size=8.5)
    s.arrow((1.75, 2.58), (1.75, 2.84))
    s.text(1.75, 2.98, "$y$")
    s.legend(2.8, 3.0)
    s.formula("$y = xW^T + b,\\qquad b \\leftarrow b + \\beta$")
    return s


def llama_adapter() -> Sketch:
    s = Sketch(5.6, 4.1)
    s.text(1.35, 0.72, "$x$  tokens")
    s.box(4.1, 0.84, 1.7, 0.34, "prompt $P\\;\\;[L, d]$", trained=True)
    s.arrow((1.35, 0.86), (1.35, 1.2))
    s.box(2.1, 1.42, 2.9, 0.44, "$W_q, W_k, W_v$")
    s.arrow((4.1, 1.01), (4.1, 1.42), (3.55, 1.42), trained=True)
    s.arrow((1.35, 1.64), (1.35, 1.98))
    s.text(1.27, 1.81, "$q, k, v$", align="right", size=9)
    s.arrow((2.9, 1.64), (2.9, 1.84), (3.75, 1.84), (3.75, 1.98), trained=True)
    s.text(3.82, 1.74, "$k_P, v_P$", colour=TRAINED_INK, size=9, align="left")
    s.box(1.35, 2.2, 1.7, 0.44, "softmax$(qk^T)v$")
    s.box(3.75, 2.2, 1.8, 0.44, "softmax$(qk_P^T)v_P$")
    s.arrow((2.2, 2.2), (2.85, 2.2))
    s.text(2.52, 2.32, "$q$", size=9)
    s.arrow((3.75, 2.42), (3.75, 2.66), trained=True)
    s.circle(3.75, 2.8, "×", trained=True)
    s.box(4.9, 2.8, 1.1, 0.34, "tanh $g$", trained=True)
    s.arrow((4.35, 2.8), (3.9, 2.8), trained=True)
    s.text(4.9, 3.1, "$g = 0$ at first", size=8.5, colour=TRAINED_INK)
    s.arrow((3.6, 2.8), (1.5, 2.8), trained=True)
    s.arrow((1.35, 2.42), (1.35, 2.66))
    s.circle(1.35, 2.8, "+")
    s.arrow((1.35, 2.94), (1.35, 3.2))
    s.box(1.35, 3.38, 0.9, 0.34, "$W_o$")
    s.arrow((1.35, 3.55), (1.35, 3.82))
    s.text(1.35, 3.94, "$y$")
    s.legend(3.9, 3.84)
    s.formula("$y = (\\mathrm{att}(q, k, v) + \\tanh(g)\\cdot\\mathrm{att}(q, PW_k^T, PW_v^T))\\,W_o^T$")
    return s


def layers() -> Sketch:
    s = Sketch(5.6, 3.5)
    columns = (("head", 0, True), ("top $k$ layers", 2, True), ("full", 4, True))
    for i, (name, top, head) in enumerate(columns):
        x = 1.0 + 1.8 * i
        s.box(x, 0.78, 1.3, 0.28, "embeddings", trained=name == "full")
        for layer in range(4):
            y = 1.16 + 0.38 * layer
            s.arrow((x, y - 0.24), (x, y - 0.14), head=False)
            s.box(x, y, 1.3, 0.28, f"layer {layer + 1}", trained=layer >= 4 - top)
        s.arrow((x, 2.44), (x, 2.54), head=False)
        s.box(x, 2.68, 1.3, 0.28, "head", trained=head)
        s.text(x, 3.0, name, size=11)
    s.legend(2.05, 3.32)
    s.formula("$\\Phi \\subseteq \\Theta$:  nothing is added, part of the model trains in place")
    return s


def overview() -> Sketch:
    """One transformer block, with the places where the methods add something."""
    s = Sketch(8.0, 5.6)
    x = 2.6
    s.text(x, 0.3, "hidden states $[T, d]$")
    s.arrow((x, 0.42), (x, 0.92))
    s.box(x, 1.14, 2.5, 0.44, "attention")
    s.arrow((x, 1.36), (x, 1.64))
    s.funnel(x, 1.74, 0.9, 0.42, 0.2, "", up=False)
    s.funnel(x, 1.94, 0.9, 0.42, 0.2, "", up=True)
    s.arrow((x, 2.04), (x, 2.3))
    s.circle(x, 2.44, "+")
    s.arrow((x, 0.62), (0.75, 0.62), (0.75, 2.44), (x - 0.15, 2.44))
    s.arrow((x, 2.58), (x, 2.98))
    s.box(x, 3.2, 2.5, 0.44, "MLP")
    s.arrow((x, 3.42), (x, 3.7))
    s.funnel(x, 3.8, 0.9, 0.42, 0.2, "", up=False)
    s.funnel(x, 4.0, 0.9, 0.42, 0.2, "", up=True)
    s.arrow((x, 4.1), (x, 4.36))
    s.circle(x, 4.5, "+")
    s.arrow((x, 2.72), (0.75, 2.72), (0.75, 4.5), (x - 0.15, 4.5))
    s.arrow((x, 4.64), (x, 4.9))
    s.box(x, 5.1, 2.5, 0.36, "head", trained=True)
    # next to the projections and the MLP
    notes = (
        (1.14, "LoRA: $+\\, s\\cdot(xA^T)B^T$ on any linear\nBitFit: $b + \\beta$ on any bias\n"
         "LLaMA-Adapter: $+\\tanh(g)$ · attention to a prompt"),
        (1.9, "series adapter behind a block: $h + s\\cdot\\mathrm{act}(hA^T)B^T$"),
        (3.2, "parallel adapter beside a block or a linear:\n$f(x) + s\\cdot\\mathrm{act}(xA^T)B^T$"),
        (3.9, "series adapter"),
        (5.1, "head, top $k$ layers, full: weights in place"),
    )  # fmt: skip
    for y, text in notes:
        s.text(4.35, y, text, align="left", colour=TRAINED_INK, size=9)
        s.arrow((4.28, y), (x + (0.45 if "series" in text else 1.27), y), trained=True, head=False)
    s.legend(5.8, 0.3)
    return s


PICTURES: Sequence[Callable[[], Sketch]] = (
    lora,
    series_adapter,
    parallel_adapter,
    bitfit,
    llama_adapter,
    layers,
    overview,
)


def draw(folder: pathlib.Path, kind: str = "svg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None} if kind == "svg" else None
    with matplotlib.rc_context(STYLE):
        for picture in PICTURES:
            figure = picture().figure
            figure.savefig(folder / f"{picture.__name__}.{kind}", metadata=metadata, dpi=110, facecolor="white")
            pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=pathlib.Path, metavar="DIR", help="write PNGs into this folder instead")
    folder = parser.parse_args().png
    if folder is None:
        draw(FOLDER)
    else:
        draw(folder, "png")
