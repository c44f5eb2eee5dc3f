"""Statements by tasks as a picture: a mark for each task's status, the verdict at the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from iclgd_helpers.pages import figures
from iclgd_helpers.pages.gates import CLOSED, NOT_MEASURED
from iclgd_helpers.pages.selection import TASKS

PALE, DARK, NOT_OPEN = "#8d8d8d", "#333333", "#9a9a9a"
SIGNS = {  # status -> marker, face, size
    "for": ("^", "#0072B2", 7), "against": ("v", "#D55E00", 7), "open": ("o", "white", 5), "undefined": ("x", PALE, 5),
    CLOSED: (".", PALE, 4), NOT_MEASURED: ("_", PALE, 6),
}  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """A task's status for the statement in a row (from 0); `dimmed`: small and grey, since it takes no part."""

    row: int
    task: str
    status: str
    dimmed: bool = False


@dataclass(frozen=True)
class Panel:
    """The marks of one model, and its verdict on each row."""

    marks: Sequence[Mark]
    verdicts: Mapping[int, str]


def draw(
    panels: Mapping[str, Panel], rows: Sequence[str], height: float, room: float, fontsize: float, dimmed: str = ""
) -> Figure:
    """
    One panel for each title, one row for each label.

    Parameters
    ----------
    height : of a panel, inches.
    room : for the verdicts, in widths of a column.
    fontsize : of the labels at both axes.
    dimmed : what small and grey marks mean, for the legend, which then leaves out the signs of a closed gate.
    """
    figure, axes = figures.axes(max(1, len(panels)), height=height, squeeze=False)
    for ax, (title, panel) in zip(axes[:, 0], panels.items(), strict=False):
        for mark in panel.marks:
            _draw_mark(ax, mark)
        for row, verdict in panel.verdicts.items():
            ax.text(len(TASKS) - 0.4, row, verdict, va="center", fontsize=8)
        ax.set_yticks(range(len(rows)), rows, fontsize=fontsize)
        ax.set_xticks(range(len(TASKS)), list(TASKS.values()), fontsize=fontsize)
        ax.set(title=title, xlim=(-0.5, len(TASKS) - 0.5 + room), ylim=(len(rows) - 0.5, -0.5))
    figure.legend(handles=_legend(dimmed), loc="outside lower left", ncols=2)
    return figure


def _draw_mark(ax: Axes, mark: Mark) -> None:
    """A status that has no sign (`missing`) is not drawn."""
    if mark.status not in SIGNS:
        return
    marker, face, size = SIGNS[mark.status]
    edge = DARK if face == "white" else face
    if mark.dimmed:
        face, edge = ("white" if face == "white" else NOT_OPEN), NOT_OPEN
    place = list(TASKS).index(mark.task)
    ax.plot(place, mark.row, marker, mfc=face, mec=edge, ms=0.6 * size if mark.dimmed else size)


def _legend(dimmed: str) -> list[Line2D]:
    signs = {name: sign for name, sign in SIGNS.items() if not dimmed or name not in (CLOSED, NOT_MEASURED)}
    keys = [
        Line2D([], [], marker=marker, mfc=face, mec=DARK if face == "white" else face, ms=size, ls="", label=name)
        for name, (marker, face, size) in signs.items()
    ]
    return keys + ([Line2D([], [], marker="^", color=NOT_OPEN, ms=4, ls="", label=dimmed)] if dimmed else [])


def of_statements(verdicts: pd.DataFrame, ids: Sequence[str]) -> Figure:
    """The verdicts of `judging.judge`, one panel for each model and learning rate at which anything was run."""
    run = verdicts[verdicts["verdict"] != "not run"]
    panels = {}
    for model, rate in dict.fromkeys(zip(run["model"], run["rate"], strict=True)):
        mine = list(verdicts[(verdicts["model"] == model) & (verdicts["rate"] == rate)].itertuples())
        marks = [Mark(ids.index(v.id), task, status) for v in mine for task, status in v.states.items()]
        panels[f"{model}, {rate} rate"] = Panel(marks, {ids.index(v.id): v.verdict for v in mine})
    return draw(panels, ids, height=4.6, room=2.1, fontsize=9)
