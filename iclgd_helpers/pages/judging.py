"""
The counting rule, a second opinion: from records to a status for each task and a verdict for each model.

The rule that is applied is that of `measures.verdicts`; the first opinion is that of `pages.decisions`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from iclgd_helpers.experiments.arms import CHOSEN
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import verdicts
from iclgd_helpers.measures.resampling import UNDEFINED, Effect
from iclgd_helpers.pages import gates, selection
from iclgd_helpers.pages.selection import TASKS, cell
from iclgd_helpers.pages.statements import Statement

SUFFIX = {"protocol": "", "chosen": CHOSEN}  # of the finetuned arms, for each of their learning rates
VERDICTS = ("id", "model", "rate", "verdict", "without_the_gate", "states")
EFFECTS = ("id", "model", "rate", "task", "status", "effect", "low", "high", "runs")

Sweeps = Mapping[tuple[str, str], Mapping[str, Any]]  # by (model, task)


@dataclass(frozen=True)
class Stored:
    """
    What is stored of the reproduction.

    `found` is judged: records as drawn. Beside them: exploratory ones, for statements that ask for these; records in
    other orders; sweeps of learning rates, and of clips.
    """

    found: Sequence[Record]
    reordered: Sequence[Record] = ()
    rates: Sweeps = field(default_factory=dict)
    clips: Sweeps = field(default_factory=dict)
    exploratory: Sequence[Record] = ()


class Judged(NamedTuple):
    """Status of one task behind the gate, and without it; the effects, each with the ids of its runs."""

    state: str
    seen: str
    effects: list[tuple[Effect, str]]


def judge(statements: Sequence[Statement], stored: Stored) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    Verdicts on all statements by the rule of `measures.verdicts`. Records of random weights or text are left out.

    Returns
    -------
    A row for each statement, model and learning rate (`VERDICTS`; `states` is task -> status), and a row for each
    effect behind them (`EFFECTS`).
    """
    evidence = dataclasses.replace(stored, found=[record for record in stored.found if selection.is_evidence(record)])
    models = dict.fromkeys(cell(record)[0] for record in evidence.found)
    said, effects = [], []
    for statement, model in itertools.product(statements, models):
        for rate in statement.rates:
            tasks = {task: judged(statement, (model, task), rate, evidence) for task in TASKS}
            states = zip(*(t[:2] for t in tasks.values()), strict=True)
            words = [verdicts.verdict(list(one), statement.fewest) for one in states]
            key = (statement.id, selection.short(model), rate)
            said.append((*key, *words, {task: found.state for task, found in tasks.items()}))
            effects += [(*key, task, t.state, *effect, runs) for task, t in tasks.items() for effect, runs in t.effects]
    return pd.DataFrame(said, columns=list(VERDICTS)), pd.DataFrame(effects, columns=list(EFFECTS))


def judged(statement: Statement, key: tuple[str, str], rate: str, stored: Stored) -> Judged:
    """What one (model, task) says of a statement at one learning rate; `missing` where nothing was recorded."""
    effects = effects_of(statement, key, rate, stored)
    if not effects:
        return Judged("missing", "missing", [])
    seen = verdicts.status([effect for effect, _runs in effects], least=2 if statement.unit == "seeds" else 1)
    helps = selection.gate(stored.rates, *key) if statement.gated else True
    return Judged(gates.state(seen, helps), seen, effects)


def effects_of(statement: Statement, key: tuple[str, str], rate: str, stored: Stored) -> list[tuple[Effect, str]]:
    """The effect of each seed, or the one of the whole task, with the ids of its runs."""
    if statement.unit == "clips":
        return [(statement.effect(stored.clips[key]), "sweep of clips")] if key in stored.clips else []
    mine = selection.of_cell(stored.exploratory if statement.exploratory else stored.found, *key)
    if statement.unit == "seeds":
        found = ((_effect(statement, record, SUFFIX[rate]), record.json["id"]) for record in mine)
        return [(effect, run) for effect, run in found if effect is not None]
    if statement.unit == "orders":
        mine = selection.in_all_orders(mine, selection.of_cell(stored.reordered, *key))
    runs = " ".join(record.json["id"] for record in mine)
    return [(statement.effect(mine), runs)] if len(mine) > 1 else []


def _effect(statement: Statement, record: Record, suffix: str) -> Effect | None:
    """Undefined if an arm of the record has diverged, None if the record was made without it."""
    try:
        effect = statement.effect(record, suffix)
        return UNDEFINED if effect is None else effect.interval()
    except KeyError as missing:
        return UNDEFINED if missing.args[0] in record.json["arms"] else None
