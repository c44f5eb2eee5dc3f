"""Tables 1 to 3 of the paper, with our numbers beside the printed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from iclgd_helpers.experiments.records import Record
from iclgd_helpers.pages import published, quantities, selection, tables
from iclgd_helpers.pages.selection import TASKS

LINES = quantities.CELL + " Δ: ours minus published."
NUMBERS = ["value", "seeds_low", "seeds_high", "examples_low", "examples_high"]
# How a record names what the paper's tables call otherwise.
METRIC = {"sim_am": "sim_am_direct", "jaccard": "jaccard_all_code", "jaccard_correct": "jaccard_correct_code",
          "jaccard_incorrect": "jaccard_incorrect_code"}  # fmt: skip
READ = {("sim_am", "zero_shot"): "sim_am_zero_shot/standard", ("sim_aou", "random"): "sim_aou_random/standard"}
# What Table 2 leaves out: quantity -> its title, its arms.
LEFT_OUT = {
    "accuracy": (
        "accuracy",
        ("standard", "joint", "sequential", "standard_chosen", "joint_chosen", "sequential_chosen"),
    ),
    "sim_aou_null": ("null of SimAOU", ("standard", "joint", "standard_chosen", "joint_chosen")),
    "sim_aou": (
        "SimAOU",
        ("untrained_standard", "standard_shuffled", "random_update", "norm_matched", "sequential")
        + ("standard_chosen", "joint_chosen", "sequential_chosen"),
    ),
    "sim_am_delta": ("SimAM, changes", ("standard", "joint", "sequential", "standard_chosen", "joint_chosen")),
    "sim_am": ("SimAM", ("sequential", "standard_chosen", "joint_chosen")),
    "rec2ftp": ("Rec2FTP", ("standard", "joint")),
}
CLIPPED = ("sim_aou", "sim_am_direct", "accuracy")  # measures of Table 3


def ours(quantity: str, arm: str, found: Sequence[Record], scale: float = 1.0) -> pd.DataFrame:
    """One row a (model, task) of a quantity of the paper, as `quantities.over_seeds` gives it, times `scale`."""
    name = READ.get((quantity, arm), f"{METRIC.get(quantity, quantity)}/{arm}")
    rows = quantities.over_seeds(quantities.table(found, name))
    return rows.assign(**{column: rows[column] * scale for column in NUMBERS})


def beside(number: int, found: Sequence[Record]) -> pd.DataFrame:
    """
    Every printed cell of Table 1 or 2 beside ours for each model, as a long table.

    Columns: `row`, `task`, `published` and its `decimals`, those of `ours`, and the `difference`, ours minus published.
    """
    parts, scale = [], 100.0 if number == 1 else 1.0
    for (_row, quantity, arm), cells in published.table(number).groupby(["row", "quantity", "arm"], sort=False):
        printed = cells[["row", "task", "value", "decimals"]].rename(columns={"value": "published"})
        parts.append(printed.merge(ours(quantity, arm, found, scale), on="task", how="left"))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(difference=table["value"] - table["published"])


def with_average(table: pd.DataFrame) -> pd.DataFrame:
    """Fill the paper's average column for models with all six tasks: a mean of means, without intervals."""
    cells = table[table["task"] != "average"]
    complete = cells.dropna(subset="value").groupby(["row", "model"], sort=False)["value"].agg(["mean", "count"])
    mean = complete[complete["count"] == len(TASKS)]["mean"].rename("value").reset_index()
    printed = table[table["task"] == "average"][["row", "task", "published", "decimals"]]
    extra = printed.merge(mean.assign(task="average", n=0, n_seeds=0), on=["row", "task"], how="left")
    return pd.concat([cells, extra.assign(difference=extra["value"] - extra["published"])], ignore_index=True)


def laid_out(table: pd.DataFrame, digits: int) -> pd.DataFrame:
    """A table of `beside` in the paper's layout: for each of its rows the published line, then one line a model."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.itertuples():
        task = TASKS.get(row.task, row.task.capitalize())
        lines.setdefault((row.row, "published"), {})[task] = f"{row.published:.{row.decimals}f}"
        if not pd.isna(row.value):
            lines.setdefault((row.row, row.model), {})[task] = _cell(row, digits)
    order = list(dict.fromkeys(table["row"]))
    keys = sorted(lines, key=lambda key: (order.index(key[0]), key[1] != "published", key[1]))
    return _with_sizes(lines, keys, table)


def _cell(row: Any, digits: int) -> str:
    """One cell of ours: the value with its difference, then both intervals."""
    away = getattr(row, "difference", float("nan"))
    lines = [f"{row.value:.{digits}f}" + ("" if pd.isna(away) else f" Δ {away:+.{digits}f}")]
    if row.n_seeds:  # not for a mean of tasks
        lines += [f"q {_pair(row.examples_low, row.examples_high, digits)}"]
        lines += [f"s {_pair(row.seeds_low, row.seeds_high, digits)}"]
    return "\n".join(lines)


def _with_sizes(
    lines: Mapping[tuple[str, str], Mapping[str, str]], keys: Sequence[tuple[str, str]], table: pd.DataFrame
) -> pd.DataFrame:
    """`lines` in the order of `keys`, and below them how many seeds and questions they have: a line a model."""
    sizes: dict[tuple[str, str], dict[str, str]] = {}
    for (model, task), cells in table[table["n_seeds"] > 0].groupby(["model", "task"], sort=False):
        size = " × ".join(_span(cells[name]) for name in ("n_seeds", "n"))
        sizes.setdefault(("seeds × questions", model), {})[TASKS[task]] = size
    both = [lines[key] for key in keys] + list(sizes.values())
    index = pd.MultiIndex.from_tuples([*keys, *sizes]) if both else None
    return pd.DataFrame(both, index=index).fillna("–")


def _span(numbers: pd.Series) -> str:
    """The number that all are, or the smallest and the largest."""
    return " to ".join(f"{n:.0f}" for n in sorted({numbers.min(), numbers.max()}))


def _pair(low: float, high: float, digits: int) -> str:
    return "–" if pd.isna(low) or pd.isna(high) else f"[{low:.{digits}f}, {high:.{digits}f}]"


def left_out(found: Sequence[Record]) -> pd.DataFrame:
    """What Table 2 leaves out (`LEFT_OUT`): a row for each (`row`, model, task), with the columns of `ours`."""
    parts = [
        ours(quantity, arm, found).assign(row=f"{title}, {arm.replace('_', ' ')}")
        for quantity, (title, arms) in LEFT_OUT.items()
        for arm in arms
    ]
    return pd.concat(parts, ignore_index=True)


def left_out_laid_out(table: pd.DataFrame, digits: int) -> pd.DataFrame:
    """The same with a line for each (`row`, model) and a column for each task."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in table.itertuples():
        lines.setdefault((row.row, row.model), {})[TASKS[row.task]] = _cell(row, digits)
    return _with_sizes(lines, list(lines), table).reindex(columns=list(TASKS.values()), fill_value="–")


def clipping(clips: Mapping[tuple[str, str], Mapping[str, Any]]) -> pd.DataFrame:
    """Every point of the sweeps of clipping: its settings, and each measure of Table 3 with its interval."""
    rows = [
        {"model": selection.short(model), "task": task, "demonstrations": sweep["n_demonstrations"]}
        | {"method": point["method"], "clip": point["clip"], "bound": point["clip_value"], "n": point["n"]}
        | {name: value for measure in CLIPPED if measure in point for name, value in _ends(point, measure).items()}
        for (model, task), sweep in clips.items()
        for point in sweep["points"]
    ]
    columns = [f"{name}{end}" for name in CLIPPED for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["model", "task", "demonstrations", "method", "clip", "bound", "n", *columns])


def _ends(point: Mapping[str, Any], measure: str) -> dict[str, Any]:
    names = (measure, f"{measure}_low", f"{measure}_high")
    return dict(zip(names, selection.point_effect(point, measure), strict=True))


def best_bounds(points: pd.DataFrame) -> pd.DataFrame:
    """Of `clipping` what Table 3 shows: no clipping, and each task's bound of global clipping with the best SimAOU."""
    bounds = points[(points["clip"] == "global") & (points["method"] == "joint")]
    best = bounds.loc[bounds.groupby(["model", "task"])["sim_aou"].idxmax()] if len(bounds) else bounds
    shown = pd.concat([points[points["clip"] == "none"], best]).sort_values(["model", "task", "clip", "method"])
    for name in CLIPPED:
        values = shown[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)
        shown[name] = [tables.with_interval(value, ends) for value, *ends in values]
    return shown[["model", "task", "method", "clip", "bound", *CLIPPED, "demonstrations", "n"]]
