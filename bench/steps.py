"""Steps of finetuning: seconds beside counted operations, on the task's own examples and as sizes grow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, cycle, islice
from typing import Any

import numpy as np

from bench.setting import Bench
from iclgd_helpers.data.token_layout import TrainingSequence
from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.experiments import cost, updates
from iclgd_helpers.experiments.parameters import ExperimentParameters


def finetune_step(bench: Bench) -> dict[str, Any]:
    """One step of each method: seconds, counted operations, share of the peak."""
    cell = bench.cell
    sequences = [cell.layout.training_sequence(example) for example in cell.training[: bench.setting.steps]]
    seconds: dict[str, list[list[float]]] = {method: [] for method in finetune.METHODS}
    for _round in range(bench.setting.rounds):
        for method in finetune.METHODS:
            seconds[method].append(step_seconds(cell.model, sequences, cell.parameters, method))
    result = {}
    for method, rounds in seconds.items():
        lengths = [len(sequence.tokens) for sequence in sequences]
        flops = [cost.STEPS[method](bench.shape, n, n - 1).total for n in lengths]
        typical = [statistics.median(values) for values in zip(*rounds, strict=True)]  # of each sequence
        result[method] = {
            "seconds": statistics.fmean(typical),
            "flops": statistics.fmean(flops),
            "share_of_peak": sum(flops) / sum(typical) / bench.peak,
            "mean_tokens": statistics.fmean(lengths),
        }
    rows = {f"{method}_step_seconds": found["seconds"] for method, found in result.items()}
    return {"finetune_step": result, "rounds": bench.setting.rounds} | rows


def step_seconds(
    model: LanguageModel,
    sequences: Sequence[TrainingSequence],
    given: ExperimentParameters,
    method: str,
    n_learners: int = 1,
) -> list[float]:
    """Seconds of the step of all learners on each of `sequences`; a first one, on the last of them, is not counted."""
    times = [time.perf_counter()]
    learner = finetune.Learner([sequences[-1], *sequences], updates.settings(given, method))
    finetune.finetune_together(model, [learner] * n_learners, method, lambda: times.append(time.perf_counter()))
    return np.diff(times[::n_learners])[1:].tolist()


def point(bench: Bench, method: str, tokens: int, n_learners: int = 1, **shorter: Any) -> dict[str, Any]:
    """
    One measured step beside its count: the smallest of a few, for what disturbs the machine only adds.

    `shorter` may have a `model` and its `shape` in place of the bench's own.
    """
    model, shape = shorter.get("model", bench.cell.model), shorter.get("shape", bench.shape)
    sequences = [sequence_of(bench, tokens)] * bench.setting.rounds
    seconds = step_seconds(model, sequences, bench.cell.parameters, method, n_learners)
    flops = n_learners * cost.STEPS[method](shape, tokens, tokens - 1).total
    return {"method": method, "seconds": min(seconds), "flops": flops, "tokens": tokens, "learners": n_learners}


def sequence_of(bench: Bench, tokens: int) -> TrainingSequence:
    """A training sequence of so many tokens: the task's prompts one behind the other, and a label."""
    layout = bench.cell.layout
    sequences = [layout.training_sequence(example) for example in bench.cell.training]
    first, words = sequences[0], cycle(chain.from_iterable(sequence.trunk[1:] for sequence in sequences))
    return replace(first, trunk=(first.trunk[0], *islice(words, tokens - 1 - len(first.answer))))
