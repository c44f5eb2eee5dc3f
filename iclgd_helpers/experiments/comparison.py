"""What a run observes and compares: numbers of every query, and their summary, the record's JSON."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine import checkpoints
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm, Observation, observe
from iclgd_helpers.experiments import provenance
from iclgd_helpers.experiments.arms import COMPARISONS, METHODS
from iclgd_helpers.experiments.runs import Run
from iclgd_helpers.measures import calibration, intervals, metrics
from iclgd_helpers.progress import Bar

Column = tuple[str, Any]  # what it holds, and of which arm or comparison
Columns = dict[Column, NDArray[Any]]


def observed(
    run: Run,
    queries: Sequence[Query],
    arms: Mapping[Any, Arm],
    compared: Mapping[Any, tuple[Any, Any, Any]],
    progress: bool = False,
    n_compared: int | None = None,
) -> Columns:
    """
    Observe every arm on the queries, and compare arms with one another, batch by batch.

    The observations themselves, which are large, are not kept.

    Parameters
    ----------
    run : its model observes.
    queries : all have the run's layout.
    arms : by any name.
    compared : by any name, three of the arms: unchanged, in context, updated.
    progress : whether a bar is shown.
    n_compared : on how many queries, from the first, arms are compared; by default on all.

    Returns
    -------
    dict
        `("log_probability", arm)`: `[query, class]`, nats; `("lens", arm)`: `[query, layer]`, the class that the logit
        lens predicts; `(metric, comparison)`: `[query, layer]`, see `similarities`.
    """
    columns: Columns = {}

    def put(column: Column, indices: list[int], values: torch.Tensor) -> None:
        array = values.cpu().numpy()
        if column not in columns:
            columns[column] = np.zeros((len(queries), *array.shape[1:]), array.dtype)
        columns[column][indices] = array

    with Bar(total=len(queries), desc="queries", disable=not progress, leave=False) as bar:
        for indices, seen in observe(run.model, queries, arms):
            for arm, observation in seen.items():
                put(("log_probability", arm), indices, observation.label_log_probabilities)
                put(("lens", arm), indices, observation.lens_log_odds.argmax(-1))
            inside = [place for place, i in enumerate(indices) if n_compared is None or i < n_compared]
            if 0 < len(inside) < len(indices):
                seen = {arm: observation.of(inside) for arm, observation in seen.items()}
            rows, places = [queries[indices[place]].row for place in inside], [indices[place] for place in inside]
            for name, (zero_shot, in_context, updated) in compared.items() if inside else ():
                values = similarities(seen[zero_shot], seen[in_context], seen[updated], run, rows)
                for metric, value in values.items():
                    put((metric, name), places, value)
            bar.update(len(indices))
    return columns


def split(columns: Columns, n: int) -> tuple[Columns, Columns]:
    """The columns of the first n queries, and the scores of the rest."""
    rest = {column: values[n:] for column, values in columns.items() if column[0] == "log_probability"}
    return {column: values[:n] for column, values in columns.items()}, rest


def comparisons_of(arms: Collection[str]) -> dict[str, tuple[str, str, str]]:
    """The comparisons, by name, of which every arm is there."""
    return {name: triple for name, triple in COMPARISONS.items() if set(triple) <= set(arms)}


def of_kind(columns: Columns, kind: str) -> dict[str, NDArray[Any]]:
    """The columns of one kind, by arm or comparison."""
    return {name: values for (of_kind, name), values in columns.items() if of_kind == kind}


def frame(queries: Sequence[Query], columns: Columns) -> pd.DataFrame:
    """
    A record's examples: one row a query, without any text.

    Log-probabilities in float32. Similarities in float16: `[layer]` of the methods' own, else the mean over layers.
    Cells are empty where only the first queries were compared.
    """
    labels = np.array([query.label for query in queries], np.int8)
    series: dict[str, Any] = {"row": [query.row for query in queries], "label": labels}
    for (kind, name), values in columns.items():
        if kind == "log_probability":
            series[f"{kind}/{name}"] = list(values.astype(np.float32))
        elif name in METHODS and kind in ("sim_aou", "sim_am_direct", "sim_am_delta"):
            series[f"{kind}/{name}"] = list(values.astype(np.float16))
        elif kind != "lens":
            series[f"{kind}/{name}"] = _row_means(values).astype(np.float16)
    return pd.DataFrame({name: pd.Series(values) for name, values in series.items()})


def similarities(
    zero_shot: Observation, in_context: Observation, finetuned: Observation, run: Run, rows: list[int]
) -> dict[str, torch.Tensor]:
    """
    Every attention metric of one comparison on one batch.

    Parameters
    ----------
    zero_shot, in_context, finetuned : of the same queries.
    run : its seed draws the random control of `sim_aou_random`.
    rows : `[query]`, the rows of the queries in their split.

    Returns
    -------
    dict
        by metric, `[query, layer]`; NaN where it is undefined.
    """
    arms = (zero_shot, in_context, finetuned)
    without, shown, tuned = (arm.attention_output for arm in arms)
    maps_without, maps_shown, maps_tuned = (arm.attention_scores for arm in arms)
    sees = run.model.first_layer_sees_the_prompt
    return {
        "sim_aou": metrics.sim_aou(without, shown, tuned),
        "sim_aou_null": metrics.sim_aou_null(without, shown, tuned),
        "sim_aou_raw": metrics.sim_aou(without, shown, tuned, normalise=False),
        "sim_aou_random": metrics.sim_aou_random(without, shown, rows, run.parameters.seed),
        "sim_am_zero_shot": metrics.sim_am(maps_shown, maps_without),
        "sim_am_direct": metrics.sim_am(maps_shown, maps_tuned),
        "sim_am_delta": metrics.sim_am_delta(maps_without, maps_shown, maps_tuned, sees),
    }


def _row_means(values: NDArray[np.floating[Any]]) -> NDArray[Any]:
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means: NDArray[Any] = np.where(defined, values, 0).sum(1) / defined.sum(1)
    return means


# ------------------------------------------------------------------------------------------------------------ summary
def summary(
    run: Run,
    columns: Columns,
    priors: Columns,
    tuned: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """
    The record's JSON.

    Parameters
    ----------
    columns : as `observed` has them; shorter ones are of the first queries.
    priors : scores of the queries of `run.calibration`.
    tuned : what was seen of each finetuning, as `updates` has it.
    seconds : of each stage.
    """
    scores, lens = of_kind(columns, "log_probability"), of_kind(columns, "lens")
    labels = np.array([query.label for query in run.queries])
    parameters = run.parameters.model_dump(exclude={"data_folder", "data_file", "task_file"})
    return {
        "id": run.identity,
        "parameters": parameters | {"model": checkpoints.label(run.parameters.model)},
        "engine": provenance.engine_hash(),
        "data_checksum": run.data_checksum,
        "model_content": run.model_content,
        "n_examples": len(run.queries),
        "n_compared": run.n_compared,
        "n_demonstrations": len(run.demonstrations),
        "n_training_demonstrations": len(run.training),
        "prefix_tokens": len(run.layout.prefix(run.demonstrations)),
        "verbalizers": list(run.layout.task.verbalizers),
        **({"template": run.layout.task.template} if run.parameters.task_file else {}),
        **run.counts,
        "n_layers": run.model.n_layers,
        "arms": {arm: arm_summary(values, lens[arm], labels[: len(values)]) for arm, values in scores.items()},
        "comparisons": {name: _comparison(name, columns, labels) for name in comparisons_of(scores)},
        **_calibrated(run, scores, of_kind(priors, "log_probability"), labels),
        "finetuning": dict(tuned),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "timings": dict(seconds),
        "environment": environment(run.model),
    }


def _calibrated(
    run: Run, scores: Mapping[str, NDArray[Any]], priors: Mapping[str, NDArray[Any]], labels: NDArray[np.int64]
) -> dict[str, Any]:
    """The entries `arms` and `comparisons` in the calibrated reading; nothing without texts for a prior."""
    is_training = np.array([query.row >= 0 for query in run.calibration], bool)
    if not is_training.any():
        return {}
    log_prior = {arm: calibration.log_prior(values[is_training]) for arm, values in priors.items()}
    evidence = {arm: calibration.calibrated(values, log_prior[arm]) for arm, values in scores.items()}
    arms = {arm: {**answers(values, labels[: len(values)]), "log_prior": log_prior[arm].tolist()}
            for arm, values in evidence.items()}  # fmt: skip
    comparisons = {name: indices([evidence[arm] for arm in triple], labels)
                   for name, triple in comparisons_of(scores).items()}  # fmt: skip
    return {"n_calibration_texts": int(is_training.sum()), "calibrated": {"arms": arms, "comparisons": comparisons}}


def is_diverged(log_probabilities: NDArray[Any]) -> bool:
    """Whether an arm no longer gives numbers: its arg-max would be class 0 for every query."""
    return not bool(np.isfinite(log_probabilities).all())


def arm_summary(log_probabilities: NDArray[Any], lens: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, Any]:
    """`answers`, and `lens_accuracy` by layer; `lens` is the class that the logit lens predicts, `[query, layer]`."""
    found = answers(log_probabilities, labels)
    accuracies = (lens == labels[:, None]).mean(0).tolist()
    return found | {"lens_accuracy": [None] * lens.shape[1] if found["diverged"] else accuracies}


def answers(log_probabilities: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, Any]:
    """
    What one arm answers; of one that has diverged, only that and `n` are told, and everything else is undefined.

    Parameters
    ----------
    log_probabilities : `[query, class]`, nats.
    labels : `[query]`, the right class.

    Returns
    -------
    dict
        `accuracy` (share of queries) and its interval; `predicted`: how often each class is; its entropy in bits;
        `label_log_probability`: mean of the right label's, nats.
    """
    if is_diverged(log_probabilities):
        undefined = dict.fromkeys(("accuracy", "prediction_entropy_bits", "label_log_probability"))
        lists = {"accuracy_interval": (None, None), "predicted": []}
        return {"n": len(labels), "diverged": True, **undefined, **lists}
    predictions, n_classes = log_probabilities.argmax(-1), log_probabilities.shape[1]
    right = predictions == labels
    return {
        "n": len(labels),
        "diverged": False,
        "accuracy": float(right.mean()),
        "accuracy_interval": intervals.over_examples(np.mean, right),
        "predicted": np.bincount(predictions, minlength=n_classes).tolist(),
        "prediction_entropy_bits": metrics.prediction_entropy(predictions, n_classes),
        "label_log_probability": float(log_probabilities[np.arange(len(labels)), labels].mean()),
    }


def _comparison(name: str, columns: Columns, labels: NDArray[np.int64]) -> dict[str, Any]:
    """Similarities and indices of one comparison; of an arm that has diverged, all undefined."""
    compared = {kind: values for (kind, of), values in columns.items() if of == name and kind.startswith("sim_")}
    found = indices([columns["log_probability", arm] for arm in COMPARISONS[name]], labels)
    for metric, values in compared.items():
        found[metric] = intervals.layer_means(np.full_like(values, np.nan) if found["diverged"] else values)
    return found


def indices(three: Sequence[NDArray[Any]], labels: NDArray[np.int64]) -> dict[str, Any]:
    """
    Partition and indices of three arms' predictions, with intervals; of an arm that has diverged, all undefined.

    Parameters
    ----------
    three : log-probabilities of the unchanged, the in-context and the updated arm, `[query, class]`; the first queries.
    labels : `[query]`, the right class.
    """
    n = min(map(len, three))
    scores = [values[:n] for values in three]
    diverged = any(map(is_diverged, scores))
    predictions = (*(values.argmax(-1) for values in scores), labels[:n])
    result: dict[str, Any] = {"diverged": diverged}
    parts = metrics.partition(*predictions)
    result["partition"] = dict.fromkeys(parts) if diverged else parts
    for index, statistic in _INDICES.items():
        if diverged:
            result[index] = {"value": None, "interval": (None, None)}
        else:
            interval = intervals.over_examples(statistic, *predictions)
            result[index] = {"value": statistic(*predictions), "interval": interval}
    return result


_INDICES: dict[str, Callable[..., float]] = {"rec2ftp": metrics.rec2ftp} | {
    f"jaccard_{which}_{rule}": partial(metrics.jaccard, which=which, rule=rule)
    for rule in ("code", "set")
    for which in ("all", "correct", "incorrect")
}


def environment(model: LanguageModel) -> dict[str, Any]:
    """Versions, device, threads and peak memory (MiB, of this process) behind a record."""
    packages = ("torch", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "helpers": provenance.source_hash(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
