"""The arms of a run that are finetuned or otherwise updated: their K/V weights, and what was seen on the way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from iclgd_helpers.data.demonstrations import shuffle_labels
from iclgd_helpers.data.tasks import Example
from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.models import KVUpdate
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.experiments.arms import CHOSEN, METHODS
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.runs import Run

# Conditioning: relative change of the starting weights (that of one float32 rounding), and queries it is read on.
PERTURBATION, N_PERTURBED_QUERIES = 2.0**-23, 16


class Clock:
    """Seconds spent in named stages: `with clock("observe"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = round(time.perf_counter() - self._start, 2)


def control_seed(given: ExperimentParameters) -> int:
    """Seed of everything that a control draws: permuted labels, random updates and weights, perturbations."""
    return given.seed + 1000


def trained_arms(run: Run, clock: Clock, progress: bool) -> tuple[dict, dict[str, Arm]]:
    """Arms of the pretrained model; with controls, those of shuffled labels and of random or rescaled updates."""
    layout, model, seed = run.layout, run.model, control_seed(run.parameters)
    shuffled = {"in_context": run.demonstrations, "training": run.training}
    if run.parameters.controls:
        shuffled = {name: shuffle_labels(examples, seed) for name, examples in shuffled.items()}
    updates, tuned = {}, {}
    for method in METHODS:
        of_method = _finetuned(run, method, shuffled["training"], clock, progress)
        for name, result in of_method.items():
            updates[name] = result.pop("update")
            tuned[name] = result
        if f"{method}_perturbed" in updates:
            del tuned[f"{method}_perturbed"]
            again = updates.pop(f"{method}_perturbed")
            tuned[method]["conditioning"] = _largest_difference(run, updates[method], again)
    bare = layout.prefix()
    arms = {"zero_shot": Arm(bare), "in_context": Arm(layout.prefix(run.demonstrations))}
    arms |= {name: Arm(bare, update) for name, update in updates.items()}
    if run.parameters.controls:
        norm = finetune.update_norm(model, updates["standard"])
        arms["in_context_shuffled"] = Arm(layout.prefix(shuffled["in_context"]))
        arms["random_update"] = Arm(bare, finetune.random_update(model, seed, norm))
        arms["norm_matched"] = Arm(bare, finetune.scaled_to(model, updates["joint"], norm))
    return tuned, arms


def untrained_arms(run: Run, clock: Clock, progress: bool) -> tuple[dict, dict[str, Arm]]:
    """The same three arms for a model with random weights (the caller has put them in place)."""
    learner = {"untrained_standard": _learner(run, "standard", run.training)}
    tuned = _run_learners(run, "standard", learner, "untrained_standard", clock, progress)["untrained_standard"]
    bare = run.layout.prefix()
    arms = {
        "untrained_zero_shot": Arm(bare),
        "untrained_in_context": Arm(run.layout.prefix(run.demonstrations)),
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
    run: Run, method: str, shuffled: Sequence[Example], clock: Clock, progress: bool
) -> dict[str, dict[str, Any]]:
    """
    All finetunings by `method`, side by side: at the given rate, at the chosen one, with shuffled labels, and from
    perturbed weights (below float32 the result always depends on the machine, so that is not asked).
    """
    given = run.parameters
    learners = {method: _learner(run, method, run.training)}
    if method in (given.chosen_rates or {}):
        changed = replace(learners[method].settings, learning_rate=given.chosen_rates[method])
        learners[method + CHOSEN] = replace(learners[method], settings=changed)
    if method == "standard" and given.controls:
        learners["standard_shuffled"] = _learner(run, method, shuffled)
    if given.conditioning and run.model.dtype.itemsize >= 4:
        start = finetune.perturbed(run.model, control_seed(given), PERTURBATION)
        learners[f"{method}_perturbed"] = replace(learners[method], start=start)
    return _run_learners(run, method, learners, method, clock, progress)


def _learner(run: Run, method: str, examples: Sequence[Example]) -> finetune.Learner:
    sequences = [run.layout.training_sequence(example) for example in examples]
    return finetune.Learner(sequences, settings(run.parameters, method))


def _run_learners(
    run: Run, method: str, learners: Mapping[str, finetune.Learner], name: str, clock: Clock, progress: bool
) -> dict[str, dict[str, Any]]:
    n_steps = sum(len(learner.sequences) for learner in learners.values())
    with clock(f"finetune_{name}"), tqdm(total=n_steps, desc=name, disable=not progress, leave=False) as bar:
        results = finetune.finetune_together(run.model, list(learners.values()), run.layout.labels, method, bar.update)
    return {
        name: {
            "update": result.update,
            "learning_rate": learner.settings.learning_rate,
            "diverged": result.diverged,
            "losses": result.losses.tolist(),
            "gradient_norms": result.gradient_norms.tolist(),
            "drift": finetune.drift(run.model, result.update).tolist(),
            "kept_by_rounding": finetune.kept_by_rounding(run.model, result.update),
        }
        for (name, learner), result in zip(learners.items(), results, strict=True)
    }


def _largest_difference(run: Run, update: KVUpdate, again: KVUpdate) -> float:
    """
    Conditioning: how far label log-probabilities after finetuning move (largest difference, nats) when the starting
    K/V weights move by one float32 rounding. Far above rounding, the result depends on the machine.
    """
    bare = run.layout.prefix()
    arms = {"update": Arm(bare, update), "again": Arm(bare, again)}
    differences = [
        (seen["update"].label_log_probabilities - seen["again"].label_log_probabilities).abs().max()
        for _indices, seen in observe(run.model, run.queries[:N_PERTURBED_QUERIES], arms, run.layout.labels)
    ]
    return float(torch.stack(differences).max())  # NaN where either has diverged
