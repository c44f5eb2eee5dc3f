"""Verdicts as tables, and in a few lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from iclgd_helpers.measures import hierarchical
from iclgd_helpers.pages import tables
from iclgd_helpers.pages.statements import BY_ID, Statement

AT_THRESHOLD = "at its threshold"
COLUMNS = ("id", "statement", "kind", "model", "rate", "verdict", "tasks", "without_the_gate")


def counted(states: Iterable[str]) -> str:
    """How many tasks are in which state, in the order in which they come: `5 for, 1 missing`."""
    values = list(states)
    return ", ".join(f"{values.count(state)} {state}" for state in dict.fromkeys(values))


def spread_out(table: pd.DataFrame, rows: Sequence[str], columns: str | list[str], missing: str = "") -> pd.DataFrame:
    """
    The column `found` of a long table, spread out; an empty table stays as it is.

    Parameters
    ----------
    rows : names of the columns that name a row. The first holds ids, a letter and a number, which order the rows.
    columns : the column or columns that name a column.
    missing : the entry where nothing was found.
    """
    if not len(table):
        return table
    spread = table.pivot(index=list(rows), columns=columns, values="found")
    return spread.reindex(sorted(spread.index, key=lambda key: _number(key[0]))).fillna(missing)


def _number(name: str) -> tuple[int, str]:
    """An id in its order: R2 before R10, R18 before R18b."""
    digits = "".join(filter(str.isdigit, name))
    return int(digits), name


def statements_table(statements: Sequence[Statement]) -> pd.DataFrame:
    """Statements, and what a positive effect is for each."""
    rows = [
        (one.id, one.kind, one.says, one.source, one.test, one.bound, "yes" if one.gated else "no")
        for one in statements
    ]
    return pd.DataFrame(rows, columns=["id", "kind", "statement", "source", "positive effect", "bound", "gated"])


def in_a_word(row: Mapping[str, Any]) -> str:
    """The verdict; an effect as good as none of a statement with a threshold is at that threshold."""
    is_at_threshold = row["verdict"] == hierarchical.EQUIVALENT and BY_ID[row["id"]].threshold
    return AT_THRESHOLD if is_at_threshold else str(row["verdict"])


def decided(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The verdicts of `decisions.decide`, one row each, as a page shows them."""
    shown = [
        {
            "id": row["id"],
            "model": row["model"],
            "rate": row["rate"],
            "reading": row["reading"],
            "verdict": in_a_word(row),
            "effect": tables.with_interval(row["effect"], (row["low"], row["high"]), missing="–"),
            "adjusted p": "–" if row["adjusted_p"] is None else f"{row['adjusted_p']:.2g}",
            "rows": row["part"],
            "tasks": row["n_tasks"],
            "new seeds alone": tables.with_interval(*_parts(row["new_seeds"]), missing="–"),
            "unseen rows alone": tables.with_interval(*_parts(row["unseen_rows"]), missing="–"),
            "would decide": _needed(row["needed"]),
        }
        for row in rows
    ]
    return pd.DataFrame(shown)


def _parts(found: Sequence[float] | None) -> tuple[float | None, Sequence[float]]:
    return (None, ()) if found is None else (found[0], found[1:])


def _needed(found: Mapping[str, int | None] | None) -> str:
    """What would decide an effect, in words."""
    if found is None:
        return "–"
    words = {"n_seeds": "seeds", "n_questions": "questions"}
    ways = [f"{n} {words[name]}" for name, n in found.items() if n is not None]
    return " or ".join(ways) + " a task" if ways else "no larger number of one alone"


def long(verdicts: pd.DataFrame, statements: Sequence[Statement]) -> pd.DataFrame:
    """The verdicts of `judging.judge`, one row each, with the words of their statements (`COLUMNS`)."""
    said = {one.id: one for one in statements}
    rows = [
        (v.id, said[v.id].says, said[v.id].kind, v.model, v.rate, v.verdict, counted(sorted(v.states.values())))
        + (v.without_the_gate,)
        for v in verdicts.itertuples()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def by_model(table: pd.DataFrame, statements: Sequence[Statement]) -> pd.DataFrame:
    """The table of `long` with a row for each statement, and a column for each model and learning rate."""
    ungated = ("\nwithout the gate: " + table["without_the_gate"]).where(_gated(table, statements), "")
    found = table.assign(found=table["verdict"] + "\n" + table["tasks"] + ungated)
    shown = spread_out(found, ("id", "kind", "statement"), ["model", "rate"])
    return shown.sort_index(axis=1, ascending=[True, False]) if len(table) else shown  # the protocol's rate first


def _gated(table: pd.DataFrame, statements: Sequence[Statement]) -> pd.Series:
    return table["id"].isin([one.id for one in statements if one.gated])
