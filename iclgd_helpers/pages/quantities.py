"""A quantity of many records as tables: each seed with its interval over questions, and the mean over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import HTML

from iclgd_helpers.experiments import arms, readings
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import intervals
from iclgd_helpers.pages import questions, tables
from iclgd_helpers.pages.selection import TASKS, cell, mark

LONG = ("model", "task", "seed", "value", "low", "high", "n", "id")
OVER_SEEDS = "model task value seeds_low seeds_high n_seeds examples_low examples_high n ids".split()
CELL = (
    "Mean over seeds; s: Student's 95 % interval over seeds; q: 95 % interval over questions, its ends averaged over "
    "seeds. Last lines: seeds times questions."
)
CELL_OF_STEPS = CELL.replace("questions", "steps")
MAIN = ("zero_shot", "in_context", "in_context_shuffled", *arms.METHODS)
# What is read from a record: (value, low, high, n), the interval being over questions.
Quantity = Callable[[Record], tuple[float | None, float | None, float | None, int]]


def quantity(name: str) -> Quantity:
    """
    The reader of `accuracy/<arm>` or `<metric>/<comparison>` (`sim_aou/joint`, `jaccard_all_code/standard`, …).

    It raises KeyError for a record without that arm or comparison.
    """
    metric, _, arm = name.partition("/")

    def read(record: Record) -> tuple[float | None, float | None, float | None, int]:
        if metric == "accuracy":
            found = record.json["arms"][arm]
            return found["accuracy"], *found["accuracy_interval"], found["n"]
        found = record.json["comparisons"][arm][metric]
        return found.get("mean", found.get("value")), *found["interval"], record.json["n_compared"]

    return read


def table(found: Iterable[Record], what: str | Quantity) -> pd.DataFrame:
    """
    Long table of one quantity: a row for each record that has it, with its 95 % interval over questions.

    Columns: model (as `mark` names it), task, seed, value, low, high, n (questions), id (of the run).
    """
    read, rows = quantity(what) if isinstance(what, str) else what, []
    for record in found:
        try:
            values = read(record)
        except KeyError:
            continue  # this run was made without that arm
        _model, task, seed = cell(record)
        rows.append((mark(record), task, seed, *values, record.json["id"]))
    frame = pd.DataFrame(rows, columns=list(LONG))
    return frame.astype({name: float for name in ("value", "low", "high")})


def over_seeds(long: pd.DataFrame) -> pd.DataFrame:
    """
    One row for each model and task of a long table.

    Columns: value (mean over seeds), seeds_low, seeds_high (Student's t over seeds; NaN for one seed), n_seeds,
    examples_low, examples_high, n (fewest questions of a seed), ids. The ends of the intervals over examples are
    averaged over seeds: what one seed's questions leave open. The two intervals are never pooled.
    """
    rows = []
    for (model, task), group in long.dropna(subset="value").groupby(["model", "task"], sort=False):
        seeds: dict[str, Any] = intervals.over_seeds(group["value"].tolist())
        rows.append({
            "model": model, "task": task, "value": seeds["mean"],
            "seeds_low": seeds["interval"][0], "seeds_high": seeds["interval"][1], "n_seeds": seeds["n"],
            "examples_low": group["low"].mean(), "examples_high": group["high"].mean(),
            "n": int(group["n"].min()), "ids": " ".join(group["id"]),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=OVER_SEEDS)


def collect(found: Sequence[Record], named: Mapping[str, str | Quantity]) -> pd.DataFrame:
    """Long table of several quantities: that of `table`, with a first column `quantity`."""
    parts = [table(found, what).assign(quantity=name) for name, what in named.items()]
    return pd.concat(parts, ignore_index=True)[["quantity", *LONG]]


def by_task(long: pd.DataFrame) -> pd.DataFrame:
    """`over_seeds` of each quantity: one row a (quantity, model, task)."""
    parts = [over_seeds(rows).assign(quantity=name) for name, rows in long.groupby("quantity", sort=False)]
    empty = over_seeds(long.iloc[:0]).assign(quantity=pd.Series(dtype=str))
    return pd.concat(parts, ignore_index=True) if parts else empty


def show(long: pd.DataFrame, name: str, digits: int = 3, caption: str = CELL) -> HTML:
    """
    The table of `collect` as a page shows it, above a link to all its seeds and run ids as `<name>.csv`.

    A row is a model and task, a column a quantity; the caption explains the cells.
    """
    summary = by_task(long)
    summary["task"] = summary["task"].map(TASKS)
    summary["cell"] = [_cell(row, digits) for _, row in summary.iterrows()]
    wide = summary.pivot_table(index=["model", "task"], columns="quantity", values="cell", aggfunc="first", sort=False)
    wide = wide.reindex(columns=list(dict.fromkeys(long["quantity"]))).fillna("–").rename_axis(columns=None)
    return tables.table(wide, (long, name), caption=caption)


def _cell(row: pd.Series, digits: int) -> str:
    pairs = {"s": (row["seeds_low"], row["seeds_high"]), "q": (row["examples_low"], row["examples_high"])}
    shown = [f"{key} [{low:.{digits}f}, {high:.{digits}f}]" for key, (low, high) in pairs.items() if low == low]
    return "\n".join([f"{row['value']:.{digits}f}", *shown, f"n {row['n_seeds']:.0f} × {row['n']:.0f}"])


def by_prior(found: Sequence[Record]) -> pd.DataFrame:
    """
    Accuracy of the main arms, raw and by each source of the prior: a row for each model and source, mean over tasks.

    A task's accuracy is the mean over its seeds.
    """
    rows = []
    for record in filter(readings.has_priors, found):
        sources = {"none (raw)": record} | {name: readings.with_prior(record, name) for name in readings.SOURCES}
        for name, read in sources.items():
            values = {arm: questions.right(read, arm).mean() for arm in MAIN if arm in read.arms}
            rows.append({"model": mark(record), "task": cell(record)[1], "prior": name, **values})
    frame = pd.DataFrame(rows, columns=["model", "task", "prior", *MAIN])
    of_tasks = frame.groupby(["model", "prior", "task"], sort=False)[list(MAIN)].mean()
    means = of_tasks.groupby(["model", "prior"], sort=False).mean().round(3)
    return means.rename(columns=arms.label).reset_index()
