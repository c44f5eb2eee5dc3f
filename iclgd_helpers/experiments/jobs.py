"""What one job of a grid does: plain data in, a line and plain data out; what is stored is looked for first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iclgd_helpers import storage
from iclgd_helpers.data.tasks import TaskData
from iclgd_helpers.engine import checkpoints, models
from iclgd_helpers.experiments import arms, clipping, experiment, fixed_prompt, learning_rates, runs, sweeps
from iclgd_helpers.experiments.inputs import task_data
from iclgd_helpers.experiments.parameters import ExperimentParameters, half_on_a_gpu
from iclgd_helpers.experiments.performing import STORED

Done = tuple[str, Any]  # what is worth saying, and what jobs after this one need of it


def run(given: Mapping[str, Any], folder: str, needed: Mapping[str, Any] | None = None) -> Done:
    """One run with its record in `folder`, at the learning rates that a job before it has chosen, if there is one."""
    for chosen in (needed or {}).values():
        given = {**given, "chosen_rates": arms.among(chosen, given.get("arms"))}
    record, is_new = experiment.record_of(ExperimentParameters(**given), progress=False, folder=Path(folder))
    if not is_new:
        return STORED, None
    accuracies = ", ".join(map(_accuracy, list(record.json["arms"].items())[:5]))
    memory = record.json["environment"]["peak_memory_mib"] / 1024
    return " ".join([f"{accuracies}, peak {memory:.1f} GiB, record {record.json['id']}", *record.remarks]), None


def _accuracy(arm: tuple[str, Mapping[str, Any]]) -> str:
    name, found = arm
    return f"{name} diverged" if found["diverged"] else f"{name} {found['accuracy']:.2f}"


def compare_learning_rates(given: Mapping[str, Any], n_shown: int) -> Done:
    """Every method at every rate of the protocol, see `learning_rates.compare`; the value is method -> chosen rate."""
    message, found = _sweep(
        "rates", given, learning_rates.is_whole, lambda run, data: learning_rates.compare(run, data, n_shown)
    )
    return message or f"chosen {found['chosen']}", found["chosen"]


def compare_clips(given: Mapping[str, Any]) -> Done:
    """Joint finetuning under every kind and bound of clipping."""
    message, _found = _sweep("clips", given, clipping.is_whole, lambda run, _data: clipping.compare(run))
    return message or "stored", None


def _sweep(
    kind: str,
    given: Mapping[str, Any],
    is_whole: Callable[[dict[str, Any]], bool],
    compare: Callable[[runs.Run, TaskData], dict[str, Any]],
) -> tuple[str, dict[str, Any]]:
    """The stored comparison, which the message names as stored, or one that is made and stored now."""
    parameters = ExperimentParameters(**given)
    data = task_data(parameters)
    found = sweeps.stored(kind, parameters, data.checksum, checkpoints.content(parameters.model))
    if found is not None and is_whole(found):
        return STORED, found
    found = compare(runs.prepare(parameters, data), data)
    storage.write_json(sweeps.path(kind, parameters.model, parameters.task), found)
    return "", found


def choose_prompt_rates(model: str, task: str, device: str) -> Done:
    """Learning rates of finetuning behind each prompt; the value is the choice: arm -> rate."""
    found = fixed_prompt.stored(model, task, "rates")
    if found is None:
        found = fixed_prompt.compute_rates(models.load_model(model, "float32", device), task)
        message = f"chosen {found['rates']['chosen']}"
    else:
        message = STORED
    return message, found["rates"]["chosen"]


def finetune_behind_prompts(
    model: str, task: str, seed: int, device: str, needed: Mapping[str, Mapping[str, float]]
) -> Done:
    """Finetuning behind each prompt with one seed, at the learning rates that the job before it has chosen."""
    if fixed_prompt.stored(model, task, seed) is not None:
        return STORED, None
    (chosen,) = needed.values()
    return fixed_prompt.compute_seed(models.load_model(model, "float32", device), task, seed, chosen), None


def automatic_dtype(device: str) -> str:
    """What `dtype=auto` means on this worker."""
    return half_on_a_gpu(models.choose_device(device))
