"""One look for all figures; one colour, marker, dash and hatch for each arm."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import SVG, Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

from iclgd_helpers.experiments.arms import ARMS as ARMS
from iclgd_helpers.experiments.arms import GREY as GREY
from iclgd_helpers.experiments.arms import METHODS as METHODS
from iclgd_helpers.pages import alt_texts

WIDTH = 5.2  # inches: at the width of a phone, 9 pt text is still read
DOTS_PER_INCH = 192
LOOK = {
    "axes.labelsize": 9, "axes.titlesize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "font.size": 9,
    "legend.fontsize": 8.5, "legend.frameon": False, "axes.titlelocation": "left", "axes.axisbelow": True,
    "lines.linewidth": 1.5, "lines.markersize": 4.5, "hatch.linewidth": 0.6, "font.family": "DejaVu Sans",
    "figure.facecolor": "white", "savefig.facecolor": "white", "grid.color": "#e4e4e4", "axes.edgecolor": "#444444",
}  # fmt: skip
DIVERGED = "diverged"  # stands for the accuracy of an arm that no longer gives numbers


def style() -> None:
    """Set the look of all figures that follow; `axes()` does it by itself."""
    sns.set_theme(style="whitegrid", rc=LOOK)


def axes(rows: int = 1, height: float = 2.2, width: float = WIDTH, **options: Any) -> tuple[Figure, Any]:
    """
    A figure of `rows` panels above one another, each `height` inches high; one Axes, or an array `[rows]`.

    `options` go to `plt.subplots` (`sharex=True`, …).
    """
    style()
    return plt.subplots(rows, 1, figsize=(width, rows * height), layout="constrained", **options)


def _take_literally(figure: Figure) -> None:
    """No text is a formula because it holds dollars, but what matplotlib itself writes at a logarithmic axis."""
    written = {
        label
        for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis))
        for kind in ("major", "minor")
        for label in axis.get_ticklabels(which=kind)  # this makes them
        if isinstance(getattr(axis, f"get_{kind}_formatter")(), LogFormatter)
    }
    for text in figure.findobj(Text):
        text.set_parse_math(text in written)


def png(figure: Figure, dots_per_inch: int = DOTS_PER_INCH, formulas: bool = False) -> bytes:
    """
    `figure` as one opaque PNG, compressed well below the slowest level; the figure is closed.

    Only with `formulas` is text between dollars set as mathematics: elsewhere it is part of somebody's name.
    """
    if not formulas:
        _take_literally(figure)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dots_per_inch)
    image = PIL.Image.open(drawn).convert("RGB")  # 256 colours look the same and take a quarter of the space
    image = image.quantize(256, PIL.Image.Quantize.MAXCOVERAGE, dither=PIL.Image.Dither.NONE)
    image.save(small, "png", compress_level=7)
    plt.close(figure)
    return small.getvalue()


def show(figure: Figure, formulas: bool = False) -> None:
    """
    Display `figure` as one opaque PNG, sharp on dense screens, and close it; `formulas` as in `png`.

    Its alternative text says what the marks say; the book puts the cell's own text on the layout before it.
    """
    display(image(figure, formulas))


def image(figure: Figure, formulas: bool = False) -> Image:
    """What `show` displays; the figure is closed."""
    alt, width = alt_texts.in_numbers(figure), round(figure.get_figwidth() * 96)
    return Image(png(figure, formulas=formulas), width=width, alt=alt or None)


def svg(figure: Figure) -> str:
    """`figure` as SVG, text as shapes and the same bytes each time; it is closed. Dollars are mathematics."""
    drawn = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "iclgd", "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return drawn.getvalue()


def show_vector(figure: Figure) -> None:
    """Display a drawing as `svg` makes it."""
    display(SVG(svg(figure)))


def legend_below(figure: Figure, columns: int = 2) -> None:
    """One legend below all panels, with each label of any panel once."""
    found: dict[str, Any] = {}
    for panel in figure.axes:
        found |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(list(found.values()), list(found), loc="outside lower left", ncols=columns, handlelength=3.2)


def interval_points(
    ax: Axes,
    labels: Sequence[str],
    values: Sequence[float | None],
    intervals: Sequence[Sequence[float | None]],
    arms: Sequence[str] | None = None,
    missing: str = "undefined",
) -> None:
    """A dot with its interval in each row, first row on top; `arms` gives the styles. None is written as `missing`."""
    for row, (value, interval) in enumerate(zip(values, intervals, strict=True)):
        drawn = ARMS[arms[row]] if arms else ARMS["in_context"]
        if value is None or pd.isna(value):
            ax.text(0.98, row, missing, color=GREY, transform=ax.get_yaxis_transform(), ha="right", va="center")
            continue
        ends = [end for end in interval if end is not None and not pd.isna(end)]
        if len(ends) == 2:
            ax.plot(ends, [row, row], color=drawn.colour, linewidth=2, solid_capstyle="butt", zorder=2)
        size = 9 if drawn.marker in "*PX" else 6.5
        ax.plot(value, row, drawn.marker, color=drawn.colour, ms=size, mec="white", mew=0.5, zorder=3)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def layer_lines(ax: Axes, comparison: Mapping[str, Any], metric: str, arm: str, label: str | None = None) -> None:
    """Mean of `metric` by layer in the style of `arm`, its 95 % interval as a band; a gap where undefined."""
    mean, low, high = (
        np.array(comparison[metric][key], float) for key in ("per_layer", "per_layer_low", "per_layer_high")
    )
    drawn, layers = ARMS[arm], np.arange(len(mean))
    ax.fill_between(layers, low, high, color=drawn.colour, alpha=0.18, linewidth=0)
    ax.plot(layers, mean, color=drawn.colour, marker=drawn.marker, linestyle=drawn.linestyle,
            markevery=max(1, len(layers) // 8), label=label or drawn.label)  # fmt: skip
    ax.locator_params(axis="x", integer=True)


FRAMES = """<div id="{id}" style="display:inline-block;width:{width}px;max-width:100%">
<img src="{first}" alt="{still}" width="{width}" style="max-width:100%;height:auto">
<div style="display:none">
<input type="range" min="0" max="{last}" value="0" step="1" aria-label="{alt}" aria-valuetext="{label}"
 style="width:100%;margin:0;min-height:2em"><output style="display:block;min-height:3em">{label}</output></div>
<script>(function () {{
  var box = document.getElementById("{id}"), image = box.querySelector("img"), slider = box.querySelector("input");
  var labels = {labels}, told = {told}, sources = {sources};
  slider.parentNode.style.display = "block";
  slider.oninput = function () {{
    image.src = sources[slider.value];
    box.querySelector("output").textContent = labels[slider.value];
    slider.setAttribute("aria-valuetext", labels[slider.value]);
    image.alt = told[slider.value];
  }};{start}
}})();</script></div>"""


def _source(image: bytes, kind: str) -> str:
    """An image inside a page."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _webp(image: bytes) -> bytes:
    """The same picture, without loss, in three quarters of the bytes; not every reader of ePubs shows it."""
    small = io.BytesIO()
    PIL.Image.open(io.BytesIO(image)).convert("RGB").save(small, "webp", lossless=True)
    return small.getvalue()


def _script(texts: list[str]) -> str:
    """Texts as a list in a script, which no text can end."""
    return json.dumps(texts).replace("<", "\\u003c")


def frames(drawn: Sequence[Figure], labels: Sequence[str], alt: str, still: tuple[Figure, str] | None = None) -> None:
    """
    Display figures of one size as one picture with a slider and one of `labels` for each, and close them.

    It needs no kernel, and in the notebook it loads nothing. Where no script runs, in a PDF and in an ePub, only the
    first frame is shown, or `still`: a figure and what it shows. The alternative text of each is `alt`, its label and
    what its marks say. Raises ValueError unless there are as many labels as figures, and at least one.
    """
    if not drawn or len(drawn) != len(labels):
        raise ValueError(f"{len(drawn)} frames and {len(labels)} labels: need as many of each, and at least one")
    width = round(drawn[0].get_figwidth() * 96)
    pairs = [*([still] if still else []), *zip(drawn, labels, strict=True)]
    told = [f"{alt}. {label}. {alt_texts.in_numbers(figure)}".strip() for figure, label in pairs]
    images = [png(figure, dots_per_inch=144) for figure, _ in pairs]
    sources = [_source(images[0], "png"), *(_source(_webp(image), "webp") for image in images[1:])]
    others = json.dumps(sources[1:])
    page = FRAMES.format(
        id="frames-" + hashlib.sha256(images[0] + alt.encode()).hexdigest()[:12],
        first=sources[0], sources=others if still else f"[image.src].concat({others})", width=width,
        alt=html.escape(alt), label=html.escape(labels[0]), still=html.escape(told[0]),
        start="\n  slider.oninput();" if still else "", last=len(drawn) - 1,
        labels=_script(list(labels)), told=_script(told[1 if still else 0 :]),
    )  # fmt: skip
    display({"text/html": page, "image/png": images[0]}, metadata={"image/png": {"width": width}}, raw=True)
