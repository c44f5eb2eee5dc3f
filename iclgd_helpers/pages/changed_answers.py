"""Figure 1 of the paper for the grid: who changes the zero-shot answer, and how much the changes overlap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import metrics
from iclgd_helpers.pages import figures, paper_tables, published, quantities, questions
from iclgd_helpers.pages.selection import TASKS, mark

PARTS = ("in_context_correct", "in_context_incorrect", "both_correct", "both_incorrect", "both_different",
         "finetuned_correct", "finetuned_incorrect")  # fmt: skip
FACES = {
    "in_context": figures.ARMS["in_context"].colour,
    "both": "#8d8d8d",
    "finetuned": figures.ARMS["standard"].colour,
}
NAMES = {"in_context": "in-context only", "both": "both", "finetuned": "finetuned only"}
HATCHES = {"correct": "", "incorrect": "////", "different": "xxxx"}
JACCARD = {"jaccard": "all changes", "jaccard_correct": "correct changes", "jaccard_incorrect": "incorrect changes"}
LOOKS = (("s", "#0072B2"), ("^", "#D55E00"), ("D", "#009E73"), ("v", "#CC79A7"))  # of models


def shares(found: Sequence[Record]) -> pd.DataFrame:
    """The share of questions in each part of Figure 1 (column `part`): a row for each record and part, no interval."""

    def reader(part: str) -> quantities.Quantity:
        def read(record: Record) -> tuple[float, None, None, int]:
            n = record.json["n_compared"]
            return record.json["comparisons"]["standard"]["partition"][part] / n, None, None, n

        return read

    return pd.concat([quantities.table(found, reader(part)).assign(part=part) for part in PARTS], ignore_index=True)


def draw(partition: pd.DataFrame) -> Figure:
    """The shares of `shares`, mean over seeds: one panel a model, one bar a task."""
    models = list(dict.fromkeys(partition["model"]))
    figure, panels = figures.axes(max(1, len(models)), height=2.3, sharex=True, squeeze=False)
    for ax, model in zip(panels[:, 0], models, strict=False):
        mean = partition[partition["model"] == model].groupby(["task", "part"])["value"].mean().unstack()
        tasks = [task for task in TASKS if task in mean.index]
        for row, task in enumerate(tasks):
            _bar(ax, row, mean.loc[task])
        ax.set_yticks(range(len(tasks)), [TASKS[task] for task in tasks])
        ax.set(title=model, ylim=(len(tasks) - 0.5, -0.5))
        ax.grid(axis="y", visible=False)
    panels[-1, 0].set_xlabel("share of test questions whose answer changes")
    keys = [Patch(color=face, label=NAMES[who]) for who, face in FACES.items()]
    keys.append(Patch(facecolor="white", edgecolor="#666666", hatch="////", label="striped: to a wrong label"))
    figure.legend(handles=keys, loc="outside lower left", ncols=2)
    return figure


def _bar(ax: Axes, row: int, mean: pd.Series) -> None:
    left = 0.0
    for part in PARTS:
        who, outcome = part.rsplit("_", 1)
        face, edge = ("white", "#666666") if outcome == "different" else (FACES[who], "white")
        ax.barh(row, mean[part], 0.7, left, color=face, hatch=HATCHES[outcome], edgecolor=edge)
        left += mean[part]


def draw_jaccard(found: Sequence[Record]) -> Figure:
    """The Jaccard indices of Table 1, in percent: published, and ours with both intervals for each model."""
    figure, panels = figures.axes(len(JACCARD), height=2.5, sharex=True)
    styles = dict(zip(dict.fromkeys(map(mark, found)), cycle(LOOKS), strict=False))
    for ax, (quantity, title) in zip(panels, JACCARD.items(), strict=True):
        cells = published.table(1)
        printed = cells[cells["quantity"] == quantity].set_index("task")["value"]
        rows = paper_tables.ours(quantity, "standard", found, 100.0)
        for place, task in enumerate(TASKS):
            ax.plot(printed[task], place, "o", mfc="none", mec=figures.GREY, ms=7, label="published (one seed)")
            for shift, (model, look) in enumerate(styles.items(), 1):
                _point(ax, place + 0.22 * shift, rows[(rows["task"] == task) & (rows["model"] == model)], look)
        ax.set_yticks(range(len(TASKS)), list(TASKS.values()))
        ax.set(title=title, ylim=(len(TASKS) - 0.3, -0.5), xlim=(-2, 102))
    panels[-1].set_xlabel("Jaccard index of changed predictions, percent")
    figures.legend_below(figure, 1)
    return figure


def _point(ax: Axes, height: float, rows: pd.DataFrame, look: tuple[str, str]) -> None:
    """The row of a model and task, if there is one."""
    marker, colour = look
    for row in rows.itertuples():
        ax.plot([row.seeds_low, row.seeds_high], [height] * 2, color=colour, lw=0.8)
        ax.plot([row.examples_low, row.examples_high], [height] * 2, color=colour, lw=3, alpha=0.5)
        ax.plot(row.value, height, marker, color=colour, ms=5, label=row.model)


def beside_chance(found: Sequence[Record], calibrated: Sequence[Record]) -> pd.DataFrame:
    """
    The Jaccard index of all changes, and the one of unrelated changes: a row for each record, reading and kind.

    Columns: those of `quantities.table`, `reading`, and `kind`: `seen` or `chance`, which has no interval.
    """
    parts = [
        quantities.table(several, what).assign(reading=reading, kind=kind)
        for reading, several in (("raw", found), ("calibrated", calibrated))
        for kind, what in (("seen", "jaccard_all_code/standard"), ("chance", _by_chance))
    ]
    return pd.concat(parts, ignore_index=True)


def _by_chance(record: Record) -> tuple[float, None, None, int]:
    record.comparisons["standard"]  # KeyError
    predictions = (questions.predicted(record, arm) for arm in ("zero_shot", "in_context", "standard"))
    return metrics.jaccard_by_chance(*predictions), None, None, record.json["n_compared"]


def chance_laid_out(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `beside_chance`: a row a model and task, mean over seeds, in percent."""
    mean = table.groupby(["model", "task", "reading", "kind"], sort=False)["value"].mean().mul(100)
    cells = mean.map(lambda value: "undefined" if pd.isna(value) else f"{value:.0f}")
    wide = cells.unstack(["reading", "kind"])
    order = [(reading, kind) for reading in ("raw", "calibrated") for kind in ("seen", "chance")]
    places = list(TASKS)
    rows = sorted(wide.index, key=lambda key: (key[0], places.index(key[1])))
    wide = wide.reindex(index=rows, columns=pd.MultiIndex.from_tuples(order)).astype(object).fillna("–")
    return wide.rename(index=TASKS, level="task")
