"""The arms of a run that are finetuned or otherwise updated: their K/V weights, and what was seen on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from iclgd_helpers.data.demonstrations import shuffle_labels
from iclgd_helpers.data.tasks import Example
from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.models import KVUpdate
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.experiments.arms import CHOSEN, METHODS
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.runs import Run
from iclgd_helpers.progress import Bar

# Conditioning: relative change of the starting weights (that of one float32 rounding), and queries it is read on.
PERTURBATION, N_PERTURBED_QUERIES = 2.0**-23, 16
PERTURBED = "perturbed"  # the learner that begins there; it is no arm


Tuned = dict[str, dict[str, Any]]  # of each finetuned arm: learning rate, losses, norms and what else was seen


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note in `seconds` how long the block took."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


def control_seed(given: ExperimentParameters) -> int:
    """Seed of everything that a control draws: permuted labels, random updates and weights, perturbations."""
    return given.seed + 1000


def trained_arms(run: Run, seconds: dict[str, float], progress: bool) -> tuple[Tuned, dict[str, Arm]]:
    """
    Arms of the pretrained model; with controls, those of shuffled labels and of random or rescaled updates.

    Parameters
    ----------
    run : with its model.
    seconds : takes up how long each finetuning took.
    progress : whether bars are shown.

    Returns
    -------
    tuple
        what was seen of each finetuning, and the arms by name.
    """
    layout, model, seed, wanted = run.layout, run.model, control_seed(run.parameters), run.arms
    demonstrations, training = run.demonstrations, run.training
    if run.parameters.controls:
        demonstrations, training = shuffle_labels(demonstrations, seed), shuffle_labels(training, seed)
    updates: dict[str, KVUpdate] = {}
    tuned: Tuned = {}
    for method in (method for method in METHODS if method in wanted):
        learners = _learners(run, method, training)
        new, seen = _finetuned(run, method, learners, method, seconds, progress)
        if (again := new.pop(PERTURBED, None)) is not None:
            del seen[PERTURBED]
            seen[method]["conditioning"] = _largest_difference(run, new[method], again)
        updates |= new
        tuned |= seen
    bare = layout.prefix()
    arms = {"zero_shot": Arm(bare), "in_context": Arm(layout.prefix(run.demonstrations))}
    arms |= {name: Arm(bare, update) for name, update in updates.items()}
    if "in_context_shuffled" in wanted:
        arms["in_context_shuffled"] = Arm(layout.prefix(demonstrations))
    if {"random_update", "norm_matched"} & set(wanted):
        norm = finetune.update_norm(model, updates["standard"])
    if "random_update" in wanted:
        arms["random_update"] = Arm(bare, finetune.random_update(model, seed, norm))
    if "norm_matched" in wanted:
        arms["norm_matched"] = Arm(bare, finetune.scaled_to(model, updates["joint"], norm))
    return tuned, arms


def untrained_arms(run: Run, seconds: dict[str, float], progress: bool) -> tuple[Tuned, dict[str, Arm]]:
    """The same three arms for a model with random weights (the caller has put them in place)."""
    name, bare = "untrained_standard", run.layout.prefix()
    arms = {"untrained_zero_shot": Arm(bare)}
    if "untrained_in_context" in run.arms:
        arms["untrained_in_context"] = Arm(run.layout.prefix(run.demonstrations))
    if name not in run.arms:
        return {}, arms
    learner = {name: _learner(run, "standard", run.training)}
    updates, tuned = _finetuned(run, "standard", learner, name, seconds, progress)
    return tuned, arms | {name: Arm(bare, updates[name])}


def settings(given: ExperimentParameters, method: str) -> finetune.Settings:
    """Finetuning settings; `sequential` has no global norm, so `global` clips each of its layers instead."""
    per_layer = method == "sequential" and given.clip == "global"
    return finetune.Settings(
        given.learning_rate, given.loss, "per_layer" if per_layer else given.clip, given.clip_value
    )


def _learners(run: Run, method: str, shuffled: Sequence[Example]) -> dict[str, finetune.Learner]:
    """
    All finetunings by `method`, side by side: at the given rate, at the chosen one, with shuffled labels, and from
    perturbed weights. Below float32 the last is left out: the result always depends on the machine.
    """
    given = run.parameters
    learners = {method: _learner(run, method, run.training)}
    for chosen, rate in (given.chosen_rates or {}).items():
        if chosen == method:  # of a method that is run
            changed = replace(learners[method].settings, learning_rate=rate)
            learners[method + CHOSEN] = replace(learners[method], settings=changed)
    if method == "standard" and "standard_shuffled" in run.arms:
        learners["standard_shuffled"] = _learner(run, method, shuffled)
    if given.conditioning and run.model.dtype.itemsize >= 4:
        start = finetune.perturbed(run.model, control_seed(given), PERTURBATION)
        learners[PERTURBED] = replace(learners[method], start=start)
    return learners


def _learner(run: Run, method: str, examples: Sequence[Example]) -> finetune.Learner:
    sequences = [run.layout.training_sequence(example) for example in examples]
    return finetune.Learner(sequences, settings(run.parameters, method))


def _finetuned(
    run: Run, method: str, learners: Mapping[str, finetune.Learner], stage: str, seconds: dict[str, float],
    progress: bool,
) -> tuple[dict[str, KVUpdate], Tuned]:  # fmt: skip
    """The weights of each learner, and what was seen of it."""
    n_steps = sum(len(learner.sequences) for learner in learners.values())
    with timed(seconds, f"finetune_{stage}"), Bar(total=n_steps, desc=stage, disable=not progress, leave=False) as bar:
        results = finetune.finetune_together(run.model, list(learners.values()), method, bar.update)
    updates = {name: result.update for name, result in zip(learners, results, strict=True)}
    tuned = {
        name: {
            "learning_rate": learner.settings.learning_rate,
            "diverged": result.diverged,
            "losses": result.losses.tolist(),
            "gradient_norms": result.gradient_norms.tolist(),
            "drift": finetune.drift(run.model, result.update).tolist(),
            "kept_by_rounding": finetune.kept_by_rounding(run.model, result.update),
        }
        for (name, learner), result in zip(learners.items(), results, strict=True)
    }
    return updates, tuned


def _largest_difference(run: Run, update: KVUpdate, again: KVUpdate) -> float:
    """
    Conditioning: how far label log-probabilities after finetuning move (largest difference, nats) when the starting
    K/V weights move by one float32 rounding. Far above rounding, the result depends on the machine.
    """
    bare = run.layout.prefix()
    arms = {"update": Arm(bare, update), "again": Arm(bare, again)}
    differences = [
        (seen["update"].label_log_probabilities - seen["again"].label_log_probabilities).abs().max()
        for _indices, seen in observe(run.model, run.queries[:N_PERTURBED_QUERIES], arms)
    ]
    return float(torch.stack(differences).max())  # NaN where either has diverged
