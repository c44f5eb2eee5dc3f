"""How much of "this arm changes predictions" is a shift of its prior over the labels, and how much is evidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from iclgd_helpers.experiments import arms, readings
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import calibration, resampling
from iclgd_helpers.pages import figures
from iclgd_helpers.pages.selection import TASKS, cell, mark

COLUMNS = ("model", "task", "seed", "arm", "cause", "value", "low", "high", "n", "id")


def shares(found: Sequence[Record]) -> pd.DataFrame:
    """
    Share of answers that an arm changes, by cause: a row for each record with priors, arm, and cause; see `COLUMNS`.

    The two causes add up to the changes that are seen. Intervals are 95 %, over questions, with the priors as they are.
    """
    rows = []
    for record in filter(readings.has_priors, found):
        priors, n = readings.log_priors(record), record.json["n_compared"]
        questions = record.examples.iloc[:n]
        for arm in (name for name in record.arms if name != "zero_shot" and not name.startswith("untrained")):
            before, after = (readings.scores(questions, name) for name in ("zero_shot", arm))
            exchanged = calibration.shifted(before, after, priors["zero_shot"], priors[arm])
            by_cause = {
                "prior": resampling.of_means(calibration.by_prior, *exchanged),
                "evidence": resampling.of_means(calibration.by_prior, *exchanged[[1, 0, 2]]),
            }
            key = (mark(record), *cell(record)[1:], arm)
            rows += [(*key, cause, *effect, n, record.json["id"]) for cause, effect in by_cause.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def draw(table: pd.DataFrame) -> Figure:
    """One bar an arm: the striped part is by the prior, the other by evidence, with the interval of the striped one."""
    names = list(dict.fromkeys(table["arm"]))
    figure, ax = figures.axes(height=0.34 * max(1, len(names)) + 1.2)
    wide = table.groupby(["arm", "cause"], sort=False)[["value", "low", "high"]].mean().unstack()
    for place, arm in enumerate(names):
        prior, evidence = wide.loc[arm, ("value", "prior")], wide.loc[arm, ("value", "evidence")]
        colour = arms.kind(arm).colour
        ax.barh(place, prior, 0.6, 0, color="white", edgecolor=colour, hatch="////")
        ax.barh(place, evidence, 0.6, max(prior, 0) if evidence > 0 else 0, color=colour, edgecolor=colour)
        ax.plot([wide.loc[arm, (end, "prior")] for end in ("low", "high")], [place] * 2, color="#222222", lw=1.2)
    ax.set_yticks(range(len(names)), [arms.label(arm) for arm in names])
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="share of answers that differ from zero-shot's")
    ax.axvline(0, color="#222222", linewidth=0.8)
    ax.grid(axis="y", visible=False)
    keys = [Patch(facecolor="white", edgecolor="#444444", hatch="////", label="by a shift of the prior"),
            Patch(color="#444444", label="by a change of evidence"),
            Line2D([], [], color="#222222", lw=1.2, label="95 % interval of the striped part")]  # fmt: skip
    figure.legend(handles=keys, loc="outside lower left", ncols=1)
    return figure


def said(table: pd.DataFrame, arm: str = "in_context") -> str:
    """One line on an arm of one record: what it changes, and how much of that is by the prior."""
    mine = table[table["arm"] == arm].set_index("cause")
    if mine.empty:
        return f"No priors were read, so nothing is said of {arms.label(arm)}."
    prior, whole = mine.loc["prior"], mine["value"].sum()
    of_whole = f", {prior['value'] / whole:.0%} of these" if whole > 0 else ""
    return (
        f"{arms.label(arm).capitalize()} changes {whole:.0%} of {prior['n']} zero-shot answers; a shift of the prior "
        f"accounts for {prior['value']:.2f} [{prior['low']:.2f}, {prior['high']:.2f}]{of_whole}."
    )


def by_task(table: pd.DataFrame) -> pd.DataFrame:
    """The part by the prior of all changes, in percent: a row a model and task, a column an arm; mean over seeds."""
    sums = table.groupby(["model", "task", "seed", "arm", "cause"], sort=False)["value"].sum().unstack("cause")
    part = (sums["prior"] / sums.sum(axis=1).replace(0, np.nan)).groupby(["model", "task", "arm"], sort=False).mean()
    wide = part.mul(100).round(0).unstack("arm").rename(columns=arms.label, index=TASKS)
    return wide.map(lambda value: "–" if pd.isna(value) else f"{value:.0f}")
