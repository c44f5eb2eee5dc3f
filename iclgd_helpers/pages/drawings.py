"""Conceptual drawings: tokens, matrices, masks and arrows on an empty canvas, as vector graphics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from iclgd_helpers.pages import figures

WIDTH = 100.0  # units of a canvas across; a text of 10 points is about 2.7 units high
TEXT = 10.0  # points: at 375 px it is still 9 px high
KINDS = {  # what is drawn -> face, edge, line style, hatch: readable without colour
    "demonstration": ("#fbe3d3", "#D55E00", "-", ""),
    "prompt": ("#d8e9f5", "#0072B2", "-", ""),
    "asks": ("#ffffff", "#0072B2", "--", ""),
    "added": ("#fbe3d3", "#D55E00", "-", "///"),
    "constant": ("#eeeeee", "#444444", "-", ""),
    "moves": ("#ffffff", "#444444", "--", ""),
    "empty": ("#ffffff", "#bbbbbb", "-", ""),
}


def canvas(height: float) -> tuple[Figure, Axes]:
    """An empty drawing, 100 units wide and `height` high, with its origin at the lower left."""
    figures.style()
    figure = plt.figure(figsize=(figures.WIDTH, figures.WIDTH * height / WIDTH))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.set_axis_off()
    return figure, ax


def text(ax: Axes, x: float, y: float, words: str, size: float = TEXT, align: str = "center", **style: Any) -> None:
    """`words` with their middle (`align` left or right: that end) at (x, y); between dollars they are mathematics."""
    ax.text(x, y, words, fontsize=size, ha=align, va="center", color=style.pop("color", "#111111"), **style)


def box(ax: Axes, x: float, y: float, width: float, height: float, words: str = "", kind: str = "constant") -> None:
    """A rounded box with its lower left corner at (x, y): a token, or a step of a computation. `kind` as in KINDS."""
    face, edge, line, hatch = KINDS[kind]
    shape = FancyBboxPatch(
        (x + 0.8, y + 0.8), width - 1.6, height - 1.6, boxstyle="round,pad=0.8", facecolor=face, edgecolor=edge,
        linestyle=line, hatch=hatch, linewidth=1.2,
    )  # fmt: skip
    ax.add_patch(shape)
    if words:
        text(ax, x + width / 2, y + height / 2, words)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, kind: str = "constant"
) -> None:
    """An arrow from `start` to `end`; `bend` curves it (a fraction of its length, positive to the right)."""
    _, edge, line, _ = KINDS[kind]
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=edge, linestyle=line, linewidth=1.3,
                        connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0)
    )  # fmt: skip


def cells(
    ax: Axes,
    x: float,
    y: float,
    size: float,
    kinds: Sequence[Sequence[str]],
    words: Callable[[int, int], str] | None = None,
) -> None:
    """
    A matrix or mask of square cells, `size` units each, with its lower left corner at (x, y).

    kinds: of each row, from the top, the kind of each cell; words: what stands in a cell, by row and column.
    """
    for row, line in enumerate(kinds):
        for column, kind in enumerate(line):
            face, edge, style, hatch = KINDS[kind]
            corner = (x + column * size, y + (len(kinds) - 1 - row) * size)
            ax.add_patch(
                Rectangle(
                    corner, size, size, facecolor=face, edgecolor=edge, linestyle=style, hatch=hatch, linewidth=0.8
                )
            )
            if words and (said := words(row, column)):
                text(ax, corner[0] + size / 2, corner[1] + size / 2, said)
