"""The drawing of the landing page: `python -m tools.idea_drawing` writes `book/_static/idea.svg`."""

from __future__ import annotations

from matplotlib.figure import Figure

from iclgd_helpers import storage
from iclgd_helpers.pages import drawings as draw
from iclgd_helpers.pages import figures
from tools.book_pages import ROOT

FILE = ROOT / "book" / "_static" / "idea.svg"


def drawn() -> Figure:
    """Two ways to one matrix: attending to demonstrations, and one gradient step on pairs made of them."""
    figure, ax = draw.canvas(58)
    draw.text(ax, 2, 54, "read examples", align="left", weight="bold")
    for i in range(3):
        draw.box(ax, 2 + 11 * i, 40, 10, 9, f"$x'_{i + 1}$", "demonstration")
    draw.box(ax, 37, 40, 10, 9, "$x$", "asks")
    draw.text(ax, 2, 35, "linear attention", align="left")
    draw.text(ax, 2, 24, "train on examples", align="left", weight="bold")
    for i in range(3):
        draw.box(ax, 2 + 15 * i, 10, 14, 9, rf"$\xi_{i + 1}\to y_{i + 1}$", "demonstration")
    draw.text(ax, 2, 4, "one step of gradient descent", align="left")
    draw.arrow(ax, (49, 43), (64, 36), kind="demonstration")
    draw.arrow(ax, (49, 15), (64, 22), kind="demonstration")
    draw.cells(ax, 67, 20, 6, [["added"] * 3] * 3)
    draw.text(ax, 76, 42.5, r"$\Delta W$")
    draw.text(ax, 76, 14, "the same matrix")
    draw.text(ax, 76, 9, "is added")
    return figure


if __name__ == "__main__":
    storage.write_text(FILE, figures.svg(drawn()))
