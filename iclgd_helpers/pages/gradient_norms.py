"""Figure 3 of the paper for the grid: norms of the key and value gradients, by layer and by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from iclgd_helpers.experiments.protocol import NORMS_TASK
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.pages import figures
from iclgd_helpers.pages.selection import TASKS, cell, mark

METHODS = ("standard", "joint")
COLUMNS = ("model", "task", "seed", "method", "layer", "median", "first_quarter", "last_quarter", "id")
_LINES: tuple[Any, ...] = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", (0, (6, 1.5))), ("P", (0, (1, 1))))
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#222222")
LOOKS = {task: (*line, colour) for task, line, colour in zip(TASKS, _LINES, _COLOURS, strict=True)}


def norms(record: Record, arm: str) -> NDArray[np.float64]:
    """`[step, layer]`, each of one step alone and before clipping."""
    return np.array(record.json["finetuning"][arm]["gradient_norms"], float)


def by_layer(found: Sequence[Record]) -> pd.DataFrame:
    """A row for each record, method and layer: median over all steps, over the first and the last quarter of them."""
    rows = []
    for record in found:
        for method in METHODS:
            for layer, column in enumerate(norms(record, method).T):
                quarter = max(1, len(column) // 4)
                medians = (np.median(part) for part in (column, column[:quarter], column[-quarter:]))
                rows.append((mark(record), *cell(record)[1:], method, layer, *medians, record.json["id"]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def draw_lines(gradients: pd.DataFrame) -> Figure:
    """The medians of `by_layer`: one panel for each model and method, one line a task with a band over its seeds."""
    pairs = [(model, method) for model in dict.fromkeys(gradients["model"]) for method in METHODS]
    figure, panels = figures.axes(max(1, len(pairs)), height=1.9, squeeze=False)
    for ax, (model, method) in zip(panels[:, 0], pairs, strict=False):
        chosen = gradients[(gradients["model"] == model) & (gradients["method"] == method)]
        for task, group in chosen.groupby("task"):
            seeds = group.pivot_table(index="layer", columns="seed", values="median")
            marker, line, colour = LOOKS[task]
            ax.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=colour, alpha=0.2, lw=0)
            look = {"marker": marker, "linestyle": line, "color": colour, "markevery": 4}
            ax.plot(seeds.index, seeds.mean(axis=1), label=TASKS[task], **look)
        ax.set(title=f"{model}: {figures.ARMS[method].label}", yscale="log", ylabel="gradient norm")
        ax.locator_params(axis="x", integer=True)
    panels[-1, 0].set_xlabel("layer, lowest first")
    figures.legend_below(figure, 3)
    return figure


def first_of(found: Sequence[Record], task: str = NORMS_TASK) -> dict[str, Record]:
    """Model -> its record with the lowest seed of that task, or else of the first task that is recorded."""
    place = [task, *TASKS].index
    first: dict[str, Record] = {}
    for record in sorted(found, key=lambda record: (place(cell(record)[1]), cell(record)[2])):
        first.setdefault(mark(record), record)
    return first


def draw_maps(found: Sequence[Record]) -> Figure:
    """Norms by step and layer in the paper's layout: a map for each model (the record of `first_of`) and method."""
    jobs = [(model, record, method) for model, record in first_of(found).items() for method in METHODS]
    figure, panels = figures.axes(max(1, len(jobs)), height=1.7, squeeze=False)
    for ax, (model, record, method) in zip(panels[:, 0], jobs, strict=False):
        values = np.log10(np.maximum(norms(record, method), 1e-12))
        extent = (0.5, len(values) + 0.5, -0.5, values.shape[1] - 0.5)
        image = ax.imshow(values.T, cmap="Greys", origin="lower", aspect="auto", interpolation="nearest", extent=extent)
        ax.set(title=f"{model}, {TASKS[cell(record)[1]]}: {figures.ARMS[method].label}", ylabel="layer")
        ax.grid(visible=False)
        figure.colorbar(image, ax=ax, label="log10 of norm")
    panels[-1, 0].set_xlabel("step (one demonstration each)")
    return figure
