"""Learning rates of a model and task, chosen on labelled training rows; and whether in-context learning helps there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.tasks import TaskData
from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.finetune import METHODS, Learner, Settings
from iclgd_helpers.engine.observe import Arm
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import parameters, protocol, runs, sweeps
from iclgd_helpers.experiments.runs import Run
from iclgd_helpers.measures import intervals


def best(points: Sequence[Mapping[str, Any]]) -> float:
    """
    The rate with the highest log-probability of the right label among the labels; the smaller one in a tie.

    Raises
    ------
    InputError
        if every rate ended in undefined numbers.
    """
    defined = [point for point in points if point["class_log_probability"] is not None]
    if not defined:
        raise InputError("no learning rate gave finite log-probabilities: try smaller ones")
    return float(
        max(defined, key=lambda point: (point["class_log_probability"], -point["learning_rate"]))["learning_rate"]
    )


def choice(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Method -> its best rate."""
    return {method: best([point for point in points if point["method"] == method]) for method in METHODS}


def is_whole(sweep: Mapping[str, Any]) -> bool:
    """Whether a stored comparison tried the protocol's rates on its rows, and chose by its rule."""
    tried = {(point["method"], point["learning_rate"]) for point in sweep["points"]}
    every = {(method, rate) for method in METHODS for rate in protocol.LEARNING_RATES}
    n_gate_rows = sweep["gate"]["in_context_minus_zero_shot"]["n"]
    enough = len(sweep["rows"]) == protocol.N_RATE_ROWS and n_gate_rows <= protocol.N_GATE_ROWS
    return enough and tried == every and sweep["chosen"] == choice(sweep["points"])


def compare(run: Run, data: TaskData) -> dict[str, Any]:
    """Every method at every rate, read on training rows behind the demonstrations; the choice, and the gate."""
    given = run.parameters
    whole = parameters.resolve({"preset": "quick", "task": given.task}).n_demonstrations
    drawn = select_demonstrations(
        data.train, min(len(data.train), whole + protocol.N_GATE_ROWS), given.seed, given.balanced
    )
    queries = [run.layout.query(example, given.token_read) for example in drawn[whole:]]
    examples = [run.layout.training_sequence(example) for example in run.training]
    updates = {}
    for method in METHODS:
        learners = [Learner(examples, Settings(rate, given.loss)) for rate in protocol.LEARNING_RATES]
        tuned = finetune.finetune_together(run.model, learners, run.layout.labels, method)
        updates |= {(method, rate): one.update for rate, one in zip(protocol.LEARNING_RATES, tuned, strict=True)}
    found = sweeps.compare(run, queries[: protocol.N_RATE_ROWS], updates)
    points = [
        {"method": method, "learning_rate": rate, "clip": "none", "clip_value": None} | point
        for (method, rate), point in found.items()
    ]
    shown = runs.plan(given.model_copy(update={"n_demonstrations": whole}), data).demonstrations
    return sweeps.content("rates", run, points) | {
        "rows": [query.row for query in queries[: protocol.N_RATE_ROWS]],
        "chosen": choice(points),
        "gate": gate(run, queries, run.layout.prefix(shown)),
    }


def gate(run: Run, queries: Sequence[Query], prefix: tuple[int, ...]) -> dict[str, Any]:
    """By how much in-context learning beats zero-shot on training rows."""
    labels = np.array([query.label for query in queries])
    arms = {"zero_shot": Arm(run.layout.prefix()), "in_context": Arm(prefix)}
    scores = sweeps.label_scores(run.model, run.layout.labels, queries, arms)
    right = {arm: (values.argmax(-1) == labels).astype(float) for arm, values in scores.items()}
    difference = right["in_context"] - right["zero_shot"]
    interval = intervals.over_examples(np.mean, difference)
    accuracies = {arm: float(values.mean()) for arm, values in right.items()}
    found = {"value": float(difference.mean()), "interval": interval, "n": len(queries)}
    return {"in_context_minus_zero_shot": found, "accuracy": accuracies}
