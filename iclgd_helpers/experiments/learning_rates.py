"""Learning rates of a model and task, chosen on labelled training rows; and whether in-context learning helps there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.tasks import TaskData
from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.finetune import METHODS, Learner, Settings
from iclgd_helpers.engine.models import KVUpdate
from iclgd_helpers.engine.observe import Arm
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import protocol, runs, sweeps
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
    every = set(itertools.product(METHODS, protocol.LEARNING_RATES))
    n_gate_rows = sweep["gate"]["in_context_minus_zero_shot"]["n"]
    enough = len(sweep["rows"]) == protocol.N_RATE_ROWS and n_gate_rows <= protocol.N_GATE_ROWS
    return enough and tried == every and sweep["chosen"] == choice(sweep["points"])


def compare(run: Run, data: TaskData, n_shown: int) -> dict[str, Any]:
    """
    Every method at every rate of the protocol, read on training rows behind the demonstrations.

    Parameters
    ----------
    run : finetunes on its own demonstrations.
    data : the run's.
    n_shown : demonstrations of the task's runs; the training rows that are read come after these, and the gate shows
        as many of them as fit.

    Returns
    -------
    dict
        as it is stored: `points`, the `rows` that they were read on, the `chosen` rates, the `gate`.
    """
    given = run.parameters
    n_drawn = min(len(data.train), n_shown + protocol.N_GATE_ROWS)
    drawn = select_demonstrations(data.train, n_drawn, given.seed, given.balanced)
    queries = [run.layout.query(example, given.token_read) for example in drawn[n_shown:]]
    examples = [run.layout.training_sequence(example) for example in run.training]
    updates: dict[Any, KVUpdate] = {}
    for method in METHODS:
        learners = [Learner(examples, Settings(rate, given.loss)) for rate in protocol.LEARNING_RATES]
        tuned = finetune.finetune_together(run.model, learners, method)
        updates |= {(method, rate): one.update for rate, one in zip(protocol.LEARNING_RATES, tuned, strict=True)}
    read = queries[: protocol.N_RATE_ROWS]
    points = [
        {"method": method, "learning_rate": rate, "clip": "none", "clip_value": None, **point}
        for (method, rate), point in sweeps.compare(run, read, updates).items()
    ]
    shown = runs.plan(given.model_copy(update={"n_demonstrations": n_shown}), data).demonstrations
    return {
        **sweeps.content("rates", run, points),
        "rows": [query.row for query in read],
        "chosen": choice(points),
        "gate": gate(run, queries, run.layout.prefix(shown)),
    }


def gate(run: Run, queries: Sequence[Query], prefix: tuple[int, ...]) -> dict[str, Any]:
    """By how much in-context learning beats zero-shot on training rows."""
    labels = np.array([query.label for query in queries])
    arms = {"zero_shot": Arm(run.layout.prefix()), "in_context": Arm(prefix)}
    scores = sweeps.label_scores(run.model, queries, arms)
    right = {arm: (values.argmax(-1) == labels).astype(float) for arm, values in scores.items()}
    difference = right["in_context"] - right["zero_shot"]
    interval = intervals.over_examples(np.mean, difference)
    accuracies = {arm: float(values.mean()) for arm, values in right.items()}
    found = {"value": float(difference.mean()), "interval": interval, "n": len(queries)}
    return {"in_context_minus_zero_shot": found, "accuracy": accuracies}
