"""One cell = (model, task, seed): observe every arm on the same queries, compare, and return a record."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from iclgd_helpers import checkpoints, finetune, identity, metrics, models, paths, records, statistics, storage
from iclgd_helpers.arms import CHOSEN, METHODS
from iclgd_helpers.errors import InputError
from iclgd_helpers.models import KVUpdate, LanguageModel
from iclgd_helpers.observe import Arm, Observation, observe
from iclgd_helpers.parameters import ExperimentParameters
from iclgd_helpers.records import Record
from iclgd_helpers.sequences import Layout, Query
from iclgd_helpers.tasks import Example, reordered, select_demonstrations, shuffle_labels, task_data

# A comparison asks how alike two ways of changing a model are: (unchanged, in context, finetuned).
COMPARISONS = {name: ("zero_shot", "in_context", name) for name in (
    "standard", "joint", "sequential", "standard_chosen", "joint_chosen", "sequential_chosen", "standard_shuffled",
    "random_update", "norm_matched",
)} | {"untrained_standard": ("untrained_zero_shot", "untrained_in_context", "untrained_standard")}  # fmt: skip
# Conditioning: relative change of the starting weights (that of one float32 rounding), and queries it is read on.
PERTURBATION, N_PERTURBED_QUERIES = 2.0**-23, 16
PER_LAYER_IN_EXAMPLES = ("standard", "joint", "sequential")  # the others keep their mean over layers a query


@dataclass(frozen=True)
class Plan:
    """What a cell will run, before any weights are loaded."""

    parameters: ExperimentParameters
    identity: str
    data_checksum: str
    model_content: str
    config: PretrainedConfig
    layout: Layout
    demonstrations: list[Example]
    training: list[Example]
    queries: list[Query]

    @property
    def n_compared(self) -> int:
        """Number of queries, from the first, that every arm sees; zero-shot and in-context see all."""
        return min(self.parameters.max_compared or len(self.queries), len(self.queries))


@dataclass(frozen=True)
class Cell(Plan):
    """A plan with its model: token layout, demonstrations that fit, queries."""

    model: LanguageModel


def plan(given: ExperimentParameters) -> Plan:
    """
    Load data, tokenizer and configuration, and lay out the tokens.

    Raises
    ------
    InputError
        if anything named in the parameters is missing, damaged, or does not fit together.
    """
    data = task_data(given)
    drawn = select_demonstrations(data.train, given.n_demonstrations, given.seed, given.balanced)
    drawn = reordered(drawn, given.order)
    tokenizer, config = models.tokenizer_and_config(given.model)
    layout = Layout.make(tokenizer, data.task, given.separator)
    everything = [layout.query(example, given.token_read) for example in data.evaluation]
    limit = min(given.max_context, models.context(config))
    fitting = layout.fitting(drawn, max(len(query.tokens) for query in everything), limit)
    training = fitting if given.equal_demonstrations else drawn
    for example in training:
        if (length := len(layout.training_sequence(example))) > limit:
            raise InputError(
                f"the demonstration in row {example.row + 1} has {length} tokens, the context holds {limit}: shorten "
                "it, or pass equal_demonstrations=True, which leaves out what does not fit"
            )
    model_content = checkpoints.content(given.model)
    return Plan(
        parameters=given,
        identity=records.run_id(given, data.checksum, model_content),
        data_checksum=data.checksum,
        model_content=model_content,
        config=config,
        layout=layout,
        demonstrations=fitting,
        training=training,
        queries=everything[: given.max_examples],
    )


def prepare(given: ExperimentParameters) -> Cell:
    """The plan with its model loaded; errors as for `plan` and `models.load_model`."""
    planned = plan(given)
    parts = {field.name: getattr(planned, field.name) for field in fields(planned)}
    tokenizer = planned.layout.tokenizer
    return Cell(**parts, model=models.load_model(given.model, given.dtype, given.device, tokenizer))


def run_cell(given: ExperimentParameters, progress: bool = True) -> Record:
    """The record of the cell: the stored one if there is one, else computed now and stored. Says what has diverged."""
    record = records.find(records.record_id(given))
    if record is None:
        storage.require_writable(paths.records_folder())
        record = compute(prepare(given), progress)
        records.save(record)
    if record.diverged:
        print("Diverged, so without accuracy, similarities and verdict: " + ", ".join(record.diverged))
    return record


def compute(cell: Cell, progress: bool = True) -> Record:
    """Finetune, observe and compare all arms of a cell; rows beyond those compared are seen by two arms only."""
    clock = _Clock()
    table = _Table(cell)
    compared, rest = cell.queries[: cell.n_compared], cell.queries[cell.n_compared :]
    seeds = {"control": cell.parameters.seed + 1000}
    tuned, arms = _trained_arms(cell, clock, progress, seeds["control"])
    with clock("observe"):
        table.fill(cell, compared, arms, progress)
        table.fill(cell, rest, {name: arms[name] for name in ("zero_shot", "in_context")}, progress)
    arms.clear()  # the updates are as large as the K/V weights, and the untrained weights need the room
    if cell.parameters.controls:
        with cell.model.untrained(seeds["control"], cell.parameters.untrained):
            more, untrained = _untrained_arms(cell, clock, progress)
            tuned |= more
            with clock("observe_untrained"):
                table.fill(cell, compared, untrained, progress)
    return Record(_summary(cell, table, tuned, clock), table.frame())


# --------------------------------------------------------------------------------------------------------------- arms
def _trained_arms(cell: Cell, clock: _Clock, progress: bool, seed: int) -> tuple[dict, dict[str, Arm]]:
    """Arms of the pretrained model; with controls, those of shuffled labels and of random or rescaled updates."""
    layout, model = cell.layout, cell.model
    shuffled = {"in_context": cell.demonstrations, "training": cell.training}
    if cell.parameters.controls:
        shuffled = {name: shuffle_labels(examples, seed) for name, examples in shuffled.items()}
    updates, tuned = {}, {}
    for method in METHODS:
        of_method = _finetuned(cell, method, shuffled["training"], clock, progress, seed)
        for name, result in of_method.items():
            updates[name] = result.pop("update")
            tuned[name] = result
        if f"{method}_perturbed" in updates:
            del tuned[f"{method}_perturbed"]
            again = updates.pop(f"{method}_perturbed")
            tuned[method]["conditioning"] = _largest_difference(cell, updates[method], again)
    bare = layout.prefix()
    arms = {"zero_shot": Arm(bare), "in_context": Arm(layout.prefix(cell.demonstrations))}
    arms |= {name: Arm(bare, update) for name, update in updates.items()}
    if cell.parameters.controls:
        norm = finetune.update_norm(model, updates["standard"])
        arms["in_context_shuffled"] = Arm(layout.prefix(shuffled["in_context"]))
        arms["random_update"] = Arm(bare, finetune.random_update(model, seed, norm))
        arms["norm_matched"] = Arm(bare, finetune.scaled_to(model, updates["joint"], norm))
    return tuned, arms


def _untrained_arms(cell: Cell, clock: _Clock, progress: bool) -> tuple[dict, dict[str, Arm]]:
    """The same three arms for a model with random weights (the caller has put them in place)."""
    learner = {"untrained_standard": _learner(cell, "standard", cell.training)}
    tuned = _run_learners(cell, "standard", learner, "untrained_standard", clock, progress)["untrained_standard"]
    bare = cell.layout.prefix()
    arms = {
        "untrained_zero_shot": Arm(bare),
        "untrained_in_context": Arm(cell.layout.prefix(cell.demonstrations)),
        "untrained_standard": Arm(bare, tuned.pop("update")),
    }
    return {"untrained_standard": tuned}, arms


def settings(given: ExperimentParameters, method: str) -> finetune.Settings:
    """Finetuning settings; `sequential` has no global norm, so `global` clips each of its layers instead."""
    per_layer = method == "sequential" and given.clip == "global"
    return finetune.Settings(
        given.learning_rate, given.loss, "per_layer" if per_layer else given.clip, given.clip_value
    )


def _finetuned(
    cell: Cell, method: str, shuffled: Sequence[Example], clock: _Clock, progress: bool, seed: int
) -> dict[str, dict[str, Any]]:
    """
    All finetunings by `method`, side by side: at the given rate, at the chosen one, with shuffled labels, and from
    perturbed weights (below float32 the result always depends on the machine, so that is not asked).
    """
    given = cell.parameters
    learners = {method: _learner(cell, method, cell.training)}
    if method in (given.chosen_rates or {}):
        changed = replace(learners[method].settings, learning_rate=given.chosen_rates[method])
        learners[method + CHOSEN] = replace(learners[method], settings=changed)
    if method == "standard" and given.controls:
        learners["standard_shuffled"] = _learner(cell, method, shuffled)
    if given.conditioning and cell.model.dtype.itemsize >= 4:
        start = finetune.perturbed(cell.model, seed, PERTURBATION)
        learners[f"{method}_perturbed"] = replace(learners[method], start=start)
    return _run_learners(cell, method, learners, method, clock, progress)


def _learner(cell: Cell, method: str, examples: Sequence[Example]) -> finetune.Learner:
    sequences = [cell.layout.training_sequence(example) for example in examples]
    return finetune.Learner(sequences, settings(cell.parameters, method))


def _run_learners(
    cell: Cell, method: str, learners: Mapping[str, finetune.Learner], name: str, clock: _Clock, progress: bool
) -> dict[str, dict[str, Any]]:
    n_steps = sum(len(learner.sequences) for learner in learners.values())
    with clock(f"finetune_{name}"), tqdm(total=n_steps, desc=name, disable=not progress, leave=False) as bar:
        results = finetune.finetune_together(
            cell.model, list(learners.values()), cell.layout.labels, method, bar.update
        )
    return {
        name: {
            "update": result.update,
            "learning_rate": learner.settings.learning_rate,
            "diverged": result.diverged,
            "losses": result.losses.tolist(),
            "gradient_norms": result.gradient_norms.tolist(),
            "drift": finetune.drift(cell.model, result.update).tolist(),
            "kept_by_rounding": finetune.kept_by_rounding(cell.model, result.update),
        }
        for (name, learner), result in zip(learners.items(), results, strict=True)
    }


def _largest_difference(cell: Cell, update: KVUpdate, again: KVUpdate) -> float:
    """
    Conditioning: how far label log-probabilities after finetuning move (largest difference, nats) when the starting
    K/V weights move by one float32 rounding. Far above rounding, the result depends on the machine.
    """
    bare = cell.layout.prefix()
    arms = {"update": Arm(bare, update), "again": Arm(bare, again)}
    differences = [
        (seen["update"].label_log_probabilities - seen["again"].label_log_probabilities).abs().max()
        for _indices, seen in observe(cell.model, cell.queries[:N_PERTURBED_QUERIES], arms, cell.layout.labels)
    ]
    return float(torch.stack(differences).max())  # NaN where either has diverged


# -------------------------------------------------------------------------------------------------------- comparisons
class _Table:
    """Per-example results, filled batch by batch: the observations themselves are never kept."""

    def __init__(self, cell: Cell) -> None:
        self.labels = np.array([query.label for query in cell.queries])
        self.rows = [query.row for query in cell.queries]
        # ("log_probability", arm) -> [example, class]; ("lens", arm) -> [example, layer], predicted class;
        # (metric, comparison) -> [example, layer]. Columns are shorter where only the first queries were compared.
        self.columns: dict[tuple[str, str], NDArray] = {}

    def fill(self, cell: Cell, queries: Sequence[Query], arms: Mapping[str, Arm], progress: bool) -> None:
        """Observe `arms` on `queries`, compare them, and append the results to the columns."""
        compared = {name: triple for name, triple in COMPARISONS.items() if set(triple) <= set(arms)}
        new: dict[tuple[str, str], NDArray] = {}

        def put(key: tuple[str, str], indices: list[int], values: torch.Tensor) -> None:
            array = values.cpu().numpy()
            new.setdefault(key, np.zeros((len(queries), *array.shape[1:]), array.dtype))[indices] = array

        with tqdm(total=len(queries), desc="queries", disable=not progress, leave=False) as bar:
            for indices, seen in observe(cell.model, queries, arms, cell.layout.labels):
                for arm, observation in seen.items():
                    put(("log_probability", arm), indices, observation.label_log_probabilities)
                    put(("lens", arm), indices, observation.lens_log_odds.argmax(-1))
                rows = [queries[i].row for i in indices]
                for name, triple in compared.items():
                    for metric, value in similarities(*(seen[arm] for arm in triple), cell, rows).items():
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
            elif name in PER_LAYER_IN_EXAMPLES and kind in ("sim_aou", "sim_am_direct", "sim_am_delta"):
                columns[f"{kind}/{name}"] = list(values.astype(np.float16))
            elif kind != "lens":
                columns[f"{kind}/{name}"] = _row_means(values).astype(np.float16)
        return pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})


def similarities(
    zero_shot: Observation, in_context: Observation, finetuned: Observation, cell: Cell, rows: list[int]
) -> dict[str, torch.Tensor]:
    """Every attention metric of one comparison on one batch; each `[query, layer]`."""
    outputs = [arm.attention_output for arm in (zero_shot, in_context, finetuned)]
    scores = [arm.attention_scores for arm in (zero_shot, in_context, finetuned)]
    return {
        "sim_aou": metrics.sim_aou(*outputs),
        "sim_aou_null": metrics.sim_aou_null(*outputs),
        "sim_aou_raw": metrics.sim_aou(*outputs, normalise=False),
        "sim_aou_random": metrics.sim_aou_random(*outputs[:2], rows, cell.parameters.seed),
        "sim_am_zero_shot": metrics.sim_am(scores[1], scores[0]),
        "sim_am_direct": metrics.sim_am(scores[1], scores[2]),
        "sim_am_delta": metrics.sim_am_delta(*scores, cell.model.first_layer_sees_the_prompt),
    }


def _row_means(values: NDArray) -> NDArray:
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(1) / defined.sum(1)


# ------------------------------------------------------------------------------------------------------------ summary
def _summary(cell: Cell, table: _Table, tuned: Mapping[str, dict], clock: _Clock) -> dict[str, Any]:
    """The record's JSON."""
    arms, lens = table.of("log_probability"), table.of("lens")
    parameters = cell.parameters.model_dump(exclude={"data_folder", "data_file"})
    return {
        "id": cell.identity,
        "parameters": parameters | {"model": checkpoints.label(cell.parameters.model)},
        "engine": identity.engine_hash(),
        "data_checksum": cell.data_checksum,
        "model_content": cell.model_content,
        "n_examples": len(cell.queries),
        "n_compared": cell.n_compared,
        "n_demonstrations": len(cell.demonstrations),
        "n_training_demonstrations": len(cell.training),
        "prefix_tokens": len(cell.layout.prefix(cell.demonstrations)),
        "verbalizers": list(cell.layout.task.verbalizers),
        "n_layers": cell.model.n_layers,
        "arms": {arm: arm_summary(values, lens[arm], table.labels[: len(values)]) for arm, values in arms.items()},
        "comparisons": {name: _comparison(table, name) for name, (_z, _c, f) in COMPARISONS.items() if f in arms},
        "finetuning": dict(tuned),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "timings": clock.seconds,
        "environment": environment(cell.model),
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
        "accuracy_interval": statistics.over_examples(np.mean, right),
        "predicted": np.bincount(predictions, minlength=n_classes).tolist(),
        "prediction_entropy_bits": metrics.prediction_entropy(predictions, n_classes),
        "label_log_probability": float(log_probabilities[np.arange(len(labels)), labels].mean()),
        "lens_accuracy": (lens == labels[:, None]).mean(0).tolist(),
    }


def _comparison(table: _Table, name: str) -> dict[str, Any]:
    """Similarities and indices of one comparison; of an arm that has diverged, all undefined."""
    compared = table.similarities(name)
    n = len(next(iter(compared.values())))
    columns = [table.of("log_probability")[arm][:n] for arm in COMPARISONS[name]]
    diverged = any(map(is_diverged, columns))
    predictions = (*(values.argmax(-1) for values in columns), table.labels[:n])
    result: dict[str, Any] = {"diverged": diverged}
    for metric, values in compared.items():
        result[metric] = statistics.layer_means(np.full_like(values, np.nan) if diverged else values)
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
    return {"value": statistic(*columns), "interval": statistics.over_examples(statistic, *columns)}


class _Clock:
    """Seconds spent in named stages: `with clock("observe"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> _Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = round(time.perf_counter() - self._start, 2)


def environment(model: LanguageModel) -> dict[str, Any]:
    """Versions, device, threads and peak memory (MiB, of this process) behind a record."""
    packages: Iterable[str] = ("torch", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "helpers": identity.source_hash(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
