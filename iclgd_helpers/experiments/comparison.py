"""What a run observes and compares: numbers of every question, and their summary, the record's JSON."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine import checkpoints
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm, Observation, observe
from iclgd_helpers.experiments import provenance
from iclgd_helpers.experiments.arms import COMPARISONS, METHODS
from iclgd_helpers.experiments.runs import Run
from iclgd_helpers.experiments.updates import Clock
from iclgd_helpers.measures import intervals, metrics


class Table:
    """Per-example results, filled batch by batch: the observations themselves are never kept."""

    def __init__(self, run: Run) -> None:
        self.labels = np.array([query.label for query in run.queries])
        self.rows = [query.row for query in run.queries]
        # ("log_probability", arm) -> [example, class]; ("lens", arm) -> [example, layer], predicted class;
        # (metric, comparison) -> [example, layer]. Columns are shorter where only the first queries were compared.
        self.columns: dict[tuple[str, str], NDArray] = {}

    def fill(self, run: Run, queries: Sequence[Query], arms: Mapping[str, Arm], progress: bool) -> None:
        """Observe `arms` on `queries`, compare them, and append the results to the columns."""
        compared = {name: triple for name, triple in COMPARISONS.items() if set(triple) <= set(arms)}
        new: dict[tuple[str, str], NDArray] = {}

        def put(key: tuple[str, str], indices: list[int], values: torch.Tensor) -> None:
            array = values.cpu().numpy()
            new.setdefault(key, np.zeros((len(queries), *array.shape[1:]), array.dtype))[indices] = array

        with tqdm(total=len(queries), desc="queries", disable=not progress, leave=False) as bar:
            for indices, seen in observe(run.model, queries, arms, run.layout.labels):
                for arm, observation in seen.items():
                    put(("log_probability", arm), indices, observation.label_log_probabilities)
                    put(("lens", arm), indices, observation.lens_log_odds.argmax(-1))
                rows = [queries[i].row for i in indices]
                for name, triple in compared.items():
                    for metric, value in similarities(*(seen[arm] for arm in triple), run, rows).items():
                        put((metric, name), indices, value)
                bar.update(len(indices))
        for key, values in new.items():
            self.columns[key] = np.concatenate([self.columns[key], values]) if key in self.columns else values

    def of(self, kind: str) -> dict[str, NDArray]:
        """The columns of one kind, by arm or comparison."""
        return {name: values for (of_kind, name), values in self.columns.items() if of_kind == kind}

    def similarities(self, comparison: str) -> dict[str, NDArray]:
        """Metric -> `[example, layer]` of one comparison."""
        return {m: v for (m, name), v in self.columns.items() if name == comparison and m.startswith("sim_")}

    def frame(self) -> pd.DataFrame:
        """One row a query, without any text; per-layer values in half precision; empty where not compared."""
        columns: dict[str, Any] = {"row": self.rows, "label": self.labels.astype(np.int8)}
        for (kind, name), values in self.columns.items():
            if kind == "log_probability":
                columns[f"{kind}/{name}"] = list(values.astype(np.float32))
            elif name in METHODS and kind in ("sim_aou", "sim_am_direct", "sim_am_delta"):
                columns[f"{kind}/{name}"] = list(values.astype(np.float16))
            elif kind != "lens":
                columns[f"{kind}/{name}"] = _row_means(values).astype(np.float16)
        return pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})


def similarities(
    zero_shot: Observation, in_context: Observation, finetuned: Observation, run: Run, rows: list[int]
) -> dict[str, torch.Tensor]:
    """Every attention metric of one comparison on one batch; each `[query, layer]`."""
    outputs = [arm.attention_output for arm in (zero_shot, in_context, finetuned)]
    scores = [arm.attention_scores for arm in (zero_shot, in_context, finetuned)]
    return {
        "sim_aou": metrics.sim_aou(*outputs),
        "sim_aou_null": metrics.sim_aou_null(*outputs),
        "sim_aou_raw": metrics.sim_aou(*outputs, normalise=False),
        "sim_aou_random": metrics.sim_aou_random(*outputs[:2], rows, run.parameters.seed),
        "sim_am_zero_shot": metrics.sim_am(scores[1], scores[0]),
        "sim_am_direct": metrics.sim_am(scores[1], scores[2]),
        "sim_am_delta": metrics.sim_am_delta(*scores, run.model.first_layer_sees_the_prompt),
    }


def _row_means(values: NDArray) -> NDArray:
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(1) / defined.sum(1)


# ------------------------------------------------------------------------------------------------------------ summary
def summary(run: Run, table: Table, tuned: Mapping[str, dict], clock: Clock) -> dict[str, Any]:
    """The record's JSON."""
    arms, lens = table.of("log_probability"), table.of("lens")
    parameters = run.parameters.model_dump(exclude={"data_folder", "data_file"})
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
        "n_layers": run.model.n_layers,
        "arms": {arm: arm_summary(values, lens[arm], table.labels[: len(values)]) for arm, values in arms.items()},
        "comparisons": {name: _comparison(table, name) for name, (_z, _c, f) in COMPARISONS.items() if f in arms},
        "finetuning": dict(tuned),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "timings": clock.seconds,
        "environment": environment(run.model),
    }


def is_diverged(log_probabilities: NDArray) -> bool:
    """Whether an arm no longer gives numbers: its arg-max would be class 0 for every question."""
    return not bool(np.isfinite(log_probabilities).all())


def arm_summary(log_probabilities: NDArray, lens: NDArray, labels: NDArray) -> dict[str, Any]:
    """
    Accuracy (share of examples), how the predictions spread, and logit-lens accuracy by layer.

    Of an arm that has diverged, only that and `n` are told; everything else is undefined.
    """
    if is_diverged(log_probabilities):
        undefined = dict.fromkeys(("accuracy", "prediction_entropy_bits", "label_log_probability"))
        lists = {"accuracy_interval": (None, None), "predicted": [], "lens_accuracy": [None] * lens.shape[1]}
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
        "lens_accuracy": (lens == labels[:, None]).mean(0).tolist(),
    }


def _comparison(table: Table, name: str) -> dict[str, Any]:
    """Similarities and indices of one comparison; of an arm that has diverged, all undefined."""
    compared = table.similarities(name)
    n = len(next(iter(compared.values())))
    columns = [table.of("log_probability")[arm][:n] for arm in COMPARISONS[name]]
    diverged = any(map(is_diverged, columns))
    predictions = (*(values.argmax(-1) for values in columns), table.labels[:n])
    result: dict[str, Any] = {"diverged": diverged}
    for metric, values in compared.items():
        result[metric] = intervals.layer_means(np.full_like(values, np.nan) if diverged else values)
    parts = metrics.partition(*predictions)
    result["partition"] = dict.fromkeys(parts) if diverged else parts
    undefined = {"value": None, "interval": (None, None)}
    for index, statistic in _INDICES.items():
        result[index] = undefined if diverged else _with_interval(statistic, predictions)
    return result


_INDICES: dict[str, Callable[..., float]] = {"rec2ftp": metrics.rec2ftp} | {
    f"jaccard_{which}_{rule}": partial(metrics.jaccard, which=which, rule=rule)
    for rule in ("code", "set")
    for which in ("all", "correct", "incorrect")
}


def _with_interval(statistic: Callable[..., float], columns: Sequence[NDArray]) -> dict[str, Any]:
    return {"value": statistic(*columns), "interval": intervals.over_examples(statistic, *columns)}


def environment(model: LanguageModel) -> dict[str, Any]:
    """Versions, device, threads and peak memory (MiB, of this process) behind a record."""
    packages: Iterable[str] = ("torch", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "helpers": provenance.source_hash(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
