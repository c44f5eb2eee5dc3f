"""How pages draw the grid: each seed with its interval over questions, and the mean with Student's over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from iclgd_helpers.experiments.arms import CHOSEN, kind
from iclgd_helpers.experiments.arms import label as label
from iclgd_helpers.pages import figures, quantities, selection


def draw(
    long: pd.DataFrame,
    arms: Mapping[str, str],
    xlabel: str,
    marks: pd.DataFrame | None = None,
    line: float | None = None,
) -> Figure:
    """
    One panel a model, one row a task: every quantity of `long` in the style of its arm (`arms`: quantity to arm).

    Small marks are seeds, thick bars their 95 % intervals over questions. The large mark is the mean over seeds, and
    the thin line Student's 95 % interval (cut off at the frame; absent for one seed). Hollow: at the chosen rate.
    `marks` has a reference value for each quantity, drawn as an upright stroke (mean over seeds); `line` is drawn
    throughout.
    """
    marks = None if marks is None else marks[marks["quantity"].isin(arms)]
    models = list(dict.fromkeys(long["model"])) or ["no record"]
    n_rows = max([long.loc[long["model"] == model, "task"].nunique() for model in models] + [1])
    figure, panels = figures.axes(len(models), 0.55 + n_rows * (0.14 * len(arms) + 0.12), squeeze=False, sharex=True)
    for ax, model in zip(panels[:, 0], models, strict=True):
        mine = long[long["model"] == model]
        _rows(ax, mine, arms, None if marks is None else marks[marks["model"] == model])
        if line is not None:
            ax.axvline(line, color=figures.GREY, linestyle="--", linewidth=1, zorder=1)
        ax.set_title(model)
    _frame(panels[0, 0], long, line, marks)
    panels[-1, 0].set_xlabel(xlabel, loc="right")
    keys = [Line2D([], [], ls="", ms=6, label=name, **_look(arm)) for name, arm in arms.items()]
    figure.legend(handles=keys, loc="outside lower left", ncols=2)
    return figure


def _rows(ax: Axes, long: pd.DataFrame, arms: Mapping[str, str], marks: pd.DataFrame | None) -> None:
    tasks = [task for task in selection.TASKS if task in set(long["task"])]
    step = 0.84 / len(arms)
    means = quantities.by_task(long).set_index(["quantity", "task"])
    strokes = None if marks is None else quantities.by_task(marks).set_index(["quantity", "task"])["value"]
    for (name, task), rows in long.dropna(subset="value").groupby(["quantity", "task"], sort=False):
        look, place = _look(arms[name]), tasks.index(task) + (list(arms).index(name) - (len(arms) - 1) / 2) * step
        heights = place + (np.arange(len(rows)) - (len(rows) - 1) / 2) * step * min(0.28, 0.84 / len(rows))
        ax.hlines(heights, rows["low"], rows["high"], color=look["color"], lw=2, alpha=0.35, zorder=2)
        ax.plot(rows["value"], heights, ls="", ms=3.2, alpha=0.7, zorder=3, **look | {"mew": 0.5})
        mean = means.loc[(name, task)]
        ax.hlines(place, mean["seeds_low"], mean["seeds_high"], color=look["color"], lw=0.8, zorder=2)
        ax.plot(mean["value"], place, ls="", ms=6, zorder=4, label=name, **look)
        if strokes is not None and (name, task) in strokes.index:
            ax.plot(strokes[name, task], place, "|", color="black", ms=9, mew=1.6, zorder=5)
    ax.hlines(np.arange(1, len(tasks)) - 0.5, 0, 1, color="#dddddd", lw=0.8, transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(tasks)), [selection.TASKS[task] for task in tasks])
    ax.set_ylim(max(len(tasks), 1) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def _look(arm: str) -> dict[str, Any]:
    style = kind(arm)
    face, edge = ("white", style.colour) if arm.endswith(CHOSEN) else (style.colour, "white")
    width = 1.2 if face == "white" else 0.5
    return {"marker": style.marker, "color": style.colour, "mfc": face, "mec": edge, "mew": width}


def _frame(ax: Axes, long: pd.DataFrame, line: float | None, marks: pd.DataFrame | None) -> None:
    """Limits from values and intervals over questions: Student's interval from few seeds can be very wide."""
    parts = [long[name].to_numpy(float) for name in ("value", "low", "high")]
    parts += [] if marks is None else [marks["value"].to_numpy(float)]
    values = np.concatenate([*parts, [] if line is None else [line]])
    values = values[np.isfinite(values)]
    if len(values):
        room = 0.06 * max(np.ptp(values), 0.02)
        ax.set_xlim(values.min() - room, values.max() + room)
