"""
Comparisons of settings, stored whole in `results/sweeps`: of learning rates, and of bounds of clipping.

A stored one answers for its model, data, settings and helpers alone; anything else is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iclgd_helpers import paths, storage
from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine import checkpoints
from iclgd_helpers.engine.models import KVUpdate, LanguageModel
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.experiments import comparison, protocol, provenance
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.runs import Run
from iclgd_helpers.measures import intervals, metrics

SIMILARITIES = ("sim_aou", "sim_am_direct", "sim_am_delta")
Point = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- files
def path(kind: str, model: str, task: str) -> Path:
    """`results/sweeps/<kind>-<model>-<task>.json`; a kind is `rates` or `clips`."""
    return paths.resolve_path(protocol.SWEEPS) / f"{kind}-{checkpoints.file_name(model)}-{task}.json"


def head(kind: str, model: str, task: str, parameters: Mapping[str, Any], data: str, content: str) -> dict[str, Any]:
    """What a stored file begins with, and agrees with if it is current; `data` and `content` are of data and model."""
    return {
        "kind": kind,
        "model": checkpoints.label(model),
        "model_content": content,
        "task": task,
        "engine": provenance.engine_hash(),
        "parameters": parameters,
        "data_checksum": data,
    }


def _head(kind: str, given: ExperimentParameters, data: str, content: str) -> dict[str, Any]:
    described = provenance.identifying(given.model_dump(exclude={"data_folder", "data_file", "task_file"}))
    parameters = described | {"model": checkpoints.label(given.model)}
    return head(kind, given.model, given.task, parameters, data, content)


def stored(kind: str, given: ExperimentParameters, data_checksum: str, model_content: str) -> dict[str, Any] | None:
    """The stored comparison of these settings; None if there is none, or one of other helpers, data or models."""
    return current(path(kind, given.model, given.task), _head(kind, given, data_checksum, model_content))


def current(file: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a file holds; None if it is not there, or does not begin with what is wanted."""
    if not file.is_file():
        return None
    content = storage.read_json(file)
    found = {"model_content": content.get("model"), **content}  # a built-in model is its name
    return content if all(found.get(name) == value for name, value in storage.plain(dict(wanted)).items()) else None


def content(kind: str, run: Run, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A comparison as it is stored: its head and its points."""
    found = _head(kind, run.parameters, run.data_checksum, run.model_content)
    return {**found, "n_demonstrations": len(run.demonstrations), "points": list(points)}


# --------------------------------------------------------------------------------------------------------- comparison
def label_scores(
    model: LanguageModel, queries: Sequence[Query], arms: Mapping[Any, Arm]
) -> dict[Any, NDArray[np.float64]]:
    """Score of each class's label (`Layout.label_score`) for every arm, `[query, class]`, nats."""
    scores = {arm: np.zeros((len(queries), len(queries[0].labels))) for arm in arms}
    for indices, seen in observe(model, queries, arms):
        for arm, observation in seen.items():
            scores[arm][indices] = observation.label_log_probabilities.double().cpu().numpy()
    return scores


def score_summary(scores: NDArray[np.float64], classes: NDArray[np.int64]) -> Point:
    """
    What label log-probabilities say of labelled rows.

    Parameters
    ----------
    scores
        `[query, class]`, nats.
    classes
        `[query]`, the right class of each row.

    Returns
    -------
    dict
        `n`; `diverged`; `accuracy` (value, interval over rows); `label_log_probability`: mean of the right label's,
        nats; `class_log_probability`: the same, renormalised over the classes. The last three are None where a score is
        no finite number.
    """
    if not np.isfinite(scores).all():
        undefined = dict.fromkeys(("label_log_probability", "class_log_probability"))
        return {"n": len(classes), "diverged": True, "accuracy": {"value": None, "interval": (None, None)}, **undefined}
    right, of_label = scores.argmax(-1) == classes, scores[np.arange(len(classes)), classes]
    return {
        "n": len(classes),
        "diverged": False,
        "accuracy": {"value": float(right.mean()), "interval": intervals.over_examples(np.mean, right)},
        "label_log_probability": float(of_label.mean()),
        "class_log_probability": float((of_label - np.logaddexp.reduce(scores, -1)).mean()),
    }


def compare(run: Run, queries: Sequence[Query], updates: Mapping[Any, KVUpdate]) -> dict[Any, Point]:
    """For each update: its `score_summary`, and its similarity to in-context learning, on the same queries."""
    bare, labels = run.layout.prefix(), np.array([query.label for query in queries])
    arms = {"zero_shot": Arm(bare), "in_context": Arm(run.layout.prefix(run.demonstrations))}
    arms |= {key: Arm(bare, update) for key, update in updates.items()}
    columns = comparison.observed(run, queries, arms, {key: ("zero_shot", "in_context", key) for key in updates})
    scores = {key: columns["log_probability", key].astype(np.float64) for key in arms}
    predicted = {key: values.argmax(-1) for key, values in scores.items()}
    found = {}
    for key in updates:
        predictions = (predicted["zero_shot"], predicted["in_context"], predicted[key], labels)
        similarity = {metric: columns[metric, key].astype(np.float64) for metric in SIMILARITIES}
        found[key] = _point(score_summary(scores[key], labels), predictions, similarity)
    return found


def _point(summary: Point, predictions: Sequence[NDArray[np.int64]], similarity: Mapping[str, NDArray[Any]]) -> Point:
    """`summary` with the similarities of one update, undefined where it has diverged."""
    if summary["diverged"]:
        return summary | {name: {"value": None, "interval": (None, None)} for name in ("jaccard", *similarity)}
    zero_shot, in_context, updated, labels = predictions
    value = metrics.jaccard(zero_shot, in_context, updated, labels)
    point = summary | {"jaccard": {"value": value, "interval": intervals.over_examples(metrics.jaccard, *predictions)}}
    for metric, values in similarity.items():
        mean = intervals.layer_means(values)
        point[metric] = {"value": mean["mean"], "interval": mean["interval"]}
    return point
