"""Verdicts as tables, and in a few lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from iclgd_helpers.pages.judging import Statement

COLUMNS = ("id", "statement", "kind", "model", "rate", "verdict", "tasks", "without_the_gate")
DECIDED = ("reproduced", "not reproduced")
NEEDED = "they need three tasks on which in-context learning was shown to help on training rows."
DESCRIPTION = "(a description, and no verdict on learning) the rule would say “reproduced” for every model and rate of"


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
    missing : stands where nothing was found.
    """
    if not len(table):
        return table
    spread = table.pivot(index=list(rows), columns=columns, values="found")
    return spread.reindex(sorted(spread.index, key=lambda key: int(key[0][1:]))).fillna(missing)


def statements_table(statements: Sequence[Statement]) -> pd.DataFrame:
    """Statements, and what a positive effect is for each."""
    rows = [(one.id, one.kind, one.says, one.source, one.test, "yes" if one.gated else "no") for one in statements]
    return pd.DataFrame(rows, columns=["id", "kind", "statement", "source", "positive effect", "gated"])


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


def in_short(table: pd.DataFrame, statements: Sequence[Statement], n_open: pd.Series) -> list[tuple[str, str]]:
    """
    The decided verdicts of `long`, and what the gate has to do with the others, as leads with their lines.

    Parameters
    ----------
    n_open : model -> on how many tasks the gate is open, in words.
    """
    n, n_gated = len(statements), sum(one.gated for one in statements)
    others = n - table.loc[table["verdict"].isin(DECIDED), "id"].nunique()
    counts = ", ".join(f"{count} of {model}" for model, count in n_open.items()) or "none measured"
    everywhere = _without_the_gate(table, statements) or "none"
    return [
        *_decided(table, statements),
        ("Inconclusive or not run:", f"the other {others} of {n} statements."),
        ("Gated", f"are {n_gated} statements: {NEEDED} Such tasks: {counts}."),
        ("Without the gate", f"{DESCRIPTION}: {everywhere}."),
    ]


def _gated(table: pd.DataFrame, statements: Sequence[Statement]) -> pd.Series:
    return table["id"].isin([one.id for one in statements if one.gated])


def _decided(table: pd.DataFrame, statements: Sequence[Statement]) -> Iterator[tuple[str, str]]:
    said = {one.id: one for one in statements}
    for kind in DECIDED:
        for name, rows in table[table["verdict"] == kind].groupby("id", sort=False):
            rates = rows.groupby("model", sort=False)["rate"].agg(" and ".join)
            where = "; ".join(f"{model}, {rate} rate{'s' * (' ' in rate)}" for model, rate in rates.items())
            yield f"{kind.capitalize()}:", f"{said[name].says[:-1]} ({name}, {said[name].kind}). {where}."


def _without_the_gate(table: pd.DataFrame, statements: Sequence[Statement]) -> str:
    """The gated statements that the rule would call reproduced everywhere."""
    said = {one.id: one for one in statements}
    words = table[_gated(table, statements)].groupby("id", sort=False)["without_the_gate"].agg(set)
    return "; ".join(f"{said[name].says[:-1]} ({name})" for name, found in words.items() if found == {"reproduced"})
