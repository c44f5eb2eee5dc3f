"""The gate: statements about what in-context learning does are judged only on tasks where it helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures.resampling import Effect
from iclgd_helpers.pages import selection, tables
from iclgd_helpers.pages.selection import TASKS, cell

CLOSED, NOT_MEASURED = "no in-context effect", "gate not measured"
COLUMNS = ("model", "task", "gate", "gain on training rows", "n", "gain on evaluation rows")


def state(seen: str, helps: bool | None) -> str:
    """
    What a task counts as behind the gate.

    Parameters
    ----------
    seen : its status by the rule.
    helps : whether in-context learning helps there (`selection.gate`); None where that was not measured.
    """
    if helps is None:
        return NOT_MEASURED
    return seen if helps else CLOSED


def table(
    rates: Mapping[tuple[str, str], Mapping[str, Any]], found: Sequence[Record], gain: Callable[[Record], Effect]
) -> pd.DataFrame:
    """
    One row for each model and task whose gate was measured.

    Parameters
    ----------
    rates : the comparisons of learning rates, which hold the gain on training rows.
    found : records with trained weights and real text.
    gain : in-context minus zero-shot accuracy of a record on its evaluation rows, with its interval.

    Returns
    -------
    The columns of `COLUMNS`; `n` is the number of training rows.
    """
    rows = []
    for model, task in sorted(rates, key=lambda key: (key[0], list(TASKS).index(key[1]))):
        helps = selection.gate(rates, model, task)
        if helps is None:
            continue
        trained = rates[model, task]["gate"]["in_context_minus_zero_shot"]
        gains = [(cell(record)[2], *gain(record)) for record in found if cell(record)[:2] == (model, task)]
        seeds = [f"seed {seed}: {tables.with_interval(value, ends, 2)}" for seed, value, *ends in gains]
        shown = tables.with_interval(trained["value"], trained["interval"], 2)
        word = "open" if helps else "closed"
        rows.append((selection.short(model), TASKS[task], word, shown, trained["n"], "; ".join(seeds)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def n_open(gates: pd.DataFrame) -> pd.Series:
    """Model -> on how many of its tasks the gate is open, as `2 of 6`."""
    return gates.groupby("model")["gate"].agg(lambda words: f"{(words == 'open').sum()} of {len(words)}")
