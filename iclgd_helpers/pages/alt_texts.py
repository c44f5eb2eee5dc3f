"""What the marks of a figure say, in numbers: the part of its alternative text that nobody can write beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.category import StrCategoryFormatter, StrCategoryLocator
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter

LONGEST = 700  # characters; a screen reader reads them all
NAMED = 3  # values that are read out one by one

Series = list[tuple[float, float]]  # points in the order drawn


def in_numbers(figure: Figure) -> str:
    """
    One sentence a panel: of each labelled series where it begins and ends and its extremes, of a map its range.

    Where one axis has names (tasks, arms), values are told by name. Panels beyond `LONGEST` characters are counted.
    """
    sentences = list(filter(None, map(_panel, figure.axes)))
    said = 0
    while said < len(sentences) and len(" ".join(sentences[: said + 1])) <= LONGEST:
        said += 1
    left = len(sentences) - said
    return " ".join(sentences[:said] + ([f"{left} more panel{'s' if left > 1 else ''}."] if left else []))


def _panel(ax: Axes) -> str:
    rows, columns = _names(ax.yaxis), _names(ax.xaxis)
    names, upright = (rows, False) if rows else (columns, True)
    series = {} if rows and columns else _series(ax, bool(names))  # between two names a mark has no number
    told = [f"{label} {_told(points, names, upright)}".strip() for label, points in series.items() if points]
    maps = [*ax.images, *(drawn for drawn in ax.collections if isinstance(drawn, QuadMesh))]
    told += [_range(entries.get_array()) for entries in maps]
    title = ax.get_title("left") or ax.get_title() or (ax.get_ylabel() if upright else ax.get_xlabel())
    return f"{title}: {'; '.join(told)}.".removeprefix(": ") if told and ax.get_label() != "<colorbar>" else ""


def _names(axis: Axis) -> dict[float, str]:
    """What stands at the ticks in place of numbers."""
    fixed = isinstance(axis.get_major_locator(), FixedLocator | StrCategoryLocator)
    if not (fixed and isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter | StrCategoryFormatter)):
        return {}
    return {place: label.get_text() for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)}


def _series(ax: Axes, named: bool) -> dict[str, Series]:
    """Points by label; where nothing has a label, the marks beside names, or the only line that there is."""
    found: dict[str, Series] = {}
    for artist, label in zip(*ax.get_legend_handles_labels(), strict=True):
        found.setdefault(label, []).extend(_points(artist))
    if found:
        return found
    alone = len(ax.lines) == 1
    told = [line for line in ax.lines if alone or (named and line.get_marker() not in ("None", None, "", " "))]
    return {"": [point for line in told for point in _points(line)]}


def _points(artist: Any) -> Series:
    """Where a line, dots, bars or their like are drawn."""
    if isinstance(artist, BarContainer):
        boxes = [patch.get_bbox() for patch in artist.patches]
        if artist.orientation == "horizontal":
            return [(box.width, box.y0 + box.height / 2) for box in boxes]
        return [(box.x0 + box.width / 2, box.height) for box in boxes]
    if isinstance(artist, ErrorbarContainer):
        artist = artist.lines[0]
    if isinstance(artist, Line2D):
        return list(zip(*(np.asarray(part, float) for part in artist.get_data()), strict=True))
    return list(map(tuple, np.asarray(artist.get_offsets(), float))) if isinstance(artist, PathCollection) else []


def _told(points: Series, names: Mapping[float, str], upright: bool) -> str:
    """Values of a series: by name, or along its course."""
    places, values = zip(*((x, y) if upright or not names else (y, x) for x, y in points), strict=True)
    drawn = [(place, value) for place, value in zip(places, values, strict=True) if np.isfinite(value)]
    if not drawn:
        return "undefined"
    low, high = (choose(drawn, key=lambda point: point[1]) for choose in (min, max))
    if low[1] == high[1]:
        return f"{low[1]:.3g}"
    if names:
        told, between = (drawn, ", ") if len(drawn) <= NAMED else ([low, high], " to ")
        return between.join(f"{value:.3g} ({names.get(round(place), '')})" for place, value in told)
    first, last = drawn[0][1], drawn[-1][1]
    ends = f"from {first:.3g} to {last:.3g}"
    lowest = f", lowest {low[1]:.3g}" if low[1] < min(first, last) else ""
    highest = f", highest {high[1]:.3g}" if high[1] > max(first, last) else ""
    return ends + lowest + highest


def _range(entries: Any) -> str:
    """Smallest and largest entry of a map."""
    finite: np.ndarray = np.ma.masked_invalid(np.ma.asarray(entries, float)).compressed()
    return f"entries from {finite.min():.3g} to {finite.max():.3g}" if finite.size else "no entries"
