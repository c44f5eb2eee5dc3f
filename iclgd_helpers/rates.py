"""How a learning rate is chosen on labelled training rows, from what each trial makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iclgd_helpers import statistics
from iclgd_helpers.errors import InputError
from iclgd_helpers.models import LanguageModel
from iclgd_helpers.observe import Arm, observe
from iclgd_helpers.sequences import Query


def label_scores(
    model: LanguageModel, labels: Sequence[int], queries: Sequence[Query], arms: Mapping[Any, Arm]
) -> dict[Any, np.ndarray]:
    """Log-probability of each class's label (token in `labels`) for every arm, `[query, class]`, nats."""
    scores = {arm: np.zeros((len(queries), len(labels))) for arm in arms}
    for indices, seen in observe(model, queries, arms, labels):
        for arm, observation in seen.items():
            scores[arm][indices] = observation.label_log_probabilities.double().cpu().numpy()
    return scores


def score_summary(scores: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """
    What `scores` (`[query, class]`) say of rows whose classes are `classes`.

    Returns
    -------
    `n`; `diverged`; `accuracy` (value, interval over rows); `label_log_probability`: mean of the right label's, nats;
    `class_log_probability`: the same, renormalised over the classes. The last three are None where a score is no finite
    number.
    """
    if not np.isfinite(scores).all():
        undefined = dict.fromkeys(("label_log_probability", "class_log_probability"))
        return {"n": len(classes), "diverged": True, "accuracy": {"value": None, "interval": (None, None)}, **undefined}
    right, of_label = scores.argmax(-1) == classes, scores[np.arange(len(classes)), classes]
    return {
        "n": len(classes),
        "diverged": False,
        "accuracy": {"value": float(right.mean()), "interval": statistics.over_examples(np.mean, right)},
        "label_log_probability": float(of_label.mean()),
        "class_log_probability": float((of_label - np.logaddexp.reduce(scores, -1)).mean()),
    }


def best_rate(points: Sequence[Mapping[str, Any]]) -> float:
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
    return max(defined, key=lambda point: (point["class_log_probability"], -point["learning_rate"]))["learning_rate"]
