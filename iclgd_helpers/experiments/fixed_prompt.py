"""
Finetuning behind a fixed prompt: one stochastic gradient step on K and V for each row, with a prompt before it.

Arms: examples alone (`plain`), or behind an instruction that names the classes and solves nothing (`instruction`).
Or behind solved examples, as many of each class (`demonstrations`), or the same with permuted labels (`shuffled`). The
prompt comes before every training example, and before every question of the evaluation. Gradients reach the weights
through the prompt's tokens too. Sizes: `protocol`; reasons: `book/protocol.md`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iclgd_helpers import paths, storage
from iclgd_helpers.data.demonstrations import select_demonstrations, shuffle_labels
from iclgd_helpers.data.tasks import Example, TaskData
from iclgd_helpers.data.token_layout import Layout, Query, TrainingSequence
from iclgd_helpers.engine import checkpoints, models
from iclgd_helpers.engine.finetune import Learner, Settings, finetune_together
from iclgd_helpers.engine.models import KVUpdate, LanguageModel
from iclgd_helpers.engine.observe import Arm
from iclgd_helpers.experiments import cost, learning_rates, parameters, protocol, sweeps
from iclgd_helpers.experiments.inputs import task_data
from iclgd_helpers.experiments.sweeps import label_scores, score_summary

ARMS = ("plain", "instruction", "demonstrations", "shuffled")
TUNED = ARMS[:3]  # `shuffled` takes the learning rate of `demonstrations`, so that the two differ in labels alone


@dataclass(frozen=True)
class Material:
    """What one seed determines: the prompt of each arm, rows to train on, rows to choose learning rates on."""

    prompts: dict[str, tuple[int, ...]]
    training: list[Example]
    choice: list[Example]


def prompts(layout: Layout, demonstrations: Sequence[Example], seed: int) -> dict[str, tuple[int, ...]]:
    """The tokens before every example, by arm; BOS alone for `plain`."""
    instruction = f"Answer with one of these words: {', '.join(layout.task.verbalizers)}."
    tokenizer: Any = layout.tokenizer
    words = tokenizer(instruction, add_special_tokens=False)["input_ids"]
    bare = layout.prefix()
    return {
        "plain": bare,
        "instruction": (*bare, *words, *layout.separator),
        "demonstrations": layout.prefix(demonstrations),
        "shuffled": layout.prefix(shuffle_labels(demonstrations, seed)),
    }


def material(layout: Layout, train: Sequence[Example], seed: int) -> Material:
    """
    Demonstrations of each class alike, and the other training rows in the protocol's order.

    Raises
    ------
    InputError
        if the training split is too small.
    """
    demonstrations = select_demonstrations(train, protocol.N_PROMPT_DEMONSTRATIONS, seed, balanced=True)
    shown = {example.row for example in demonstrations}
    needed = protocol.PROMPT_STEPS[-1] + protocol.N_CHOICE_ROWS
    rows = select_demonstrations(train, protocol.N_PROMPT_DEMONSTRATIONS + needed, seed, balanced=False)
    rest = [example for example in rows if example.row not in shown][:needed]
    return Material(
        prompts(layout, demonstrations, seed), rest[: protocol.PROMPT_STEPS[-1]], rest[protocol.PROMPT_STEPS[-1] :]
    )


def sequences(layout: Layout, prompt: Sequence[int], rows: Sequence[Example]) -> list[TrainingSequence]:
    """What each step sees: the prompt (which begins with BOS), an example, its label."""
    return [layout.training_sequence(row, prompt) for row in rows]


def train_on(
    model: LanguageModel,
    layout: Layout,
    rows: Sequence[Example],
    arms: Mapping[Any, tuple[Sequence[int], float, KVUpdate | None]],
) -> dict[Any, KVUpdate]:
    """
    The weights of each arm (prompt, learning rate, weights to start from) after one step for each row.

    Arms whose prompts are equally long run side by side.
    """
    updates: dict[Any, KVUpdate] = {}
    by_length = sorted(arms, key=lambda arm: len(arms[arm][0]))
    for _length, alike in itertools.groupby(by_length, key=lambda arm: len(arms[arm][0])):
        group = list(alike)
        learners = [
            Learner(sequences(layout, prompt, rows), Settings(rate, loss="label"), start)
            for prompt, rate, start in map(arms.__getitem__, group)
        ]
        tuned = finetune_together(model, learners, "standard")
        updates |= {arm: one.update for arm, one in zip(group, tuned, strict=True)}
    return updates


def curves(
    model: LanguageModel,
    layout: Layout,
    prompts: Mapping[str, Sequence[int]],
    training: Sequence[Example],
    queries: Sequence[Query],
    rates: Mapping[str, float],
    steps: Sequence[int],
    say: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """
    Accuracy and operations of every arm after each number of steps.

    Parameters
    ----------
    prompts : by arm, the tokens before every example.
    training : one step on each, in this order.
    rates : by arm, the learning rate.
    steps : numbers of steps, increasing from 0.
    say : takes a line after each of them.

    Returns
    -------
    list
        points: `arm`, `step`, `tflop` (10^12 operations of the steps so far, by `cost.standard_step`), `right` (one
        character a query), and what `sweeps.score_summary` says.
    """
    shape = cost.Shape.of(model.model.config)
    labels = np.array([query.label for query in queries])
    updates: dict[str, KVUpdate] = {}
    points: list[dict[str, Any]] = []
    for before, step in itertools.pairwise((0, *steps)):
        if step > before:
            tuned = {arm: (prompt, rates[arm], updates.get(arm)) for arm, prompt in prompts.items()}
            updates = train_on(model, layout, training[before:step], tuned)
        arms = {arm: Arm(tuple(prompt), updates.get(arm)) for arm, prompt in prompts.items()}
        for arm, scores in label_scores(model, queries, arms).items():
            seen = sequences(layout, prompts[arm], training[:step])
            flops = sum(_step_flops(shape, sequence) for sequence in seen)
            points.append({"arm": arm, "step": step, "tflop": flops / 1e12, **_summary(scores, labels)})
        reached = ((p["arm"], p["accuracy"]["value"]) for p in points[-len(prompts) :])
        say(f"step {step}: " + ", ".join(f"{arm} " + ("diverged" if v is None else f"{v:.2f}") for arm, v in reached))
    return points


def _step_flops(shape: cost.Shape, sequence: TrainingSequence) -> float:
    return cost.standard_step(shape, len(sequence.tokens), len(sequence.labels[sequence.label])).total


def _summary(scores: NDArray[Any], labels: NDArray[Any]) -> dict[str, Any]:
    found, right = score_summary(scores, labels), scores.argmax(-1) == labels
    # Kept row by row: arms are compared on the same questions. One that has diverged has no answers.
    return {"right": "" if found["diverged"] else "".join("01"[int(one)] for one in right)} | found


def choose_rates(model: LanguageModel, layout: Layout, given: Material) -> dict[str, Any]:
    """Each arm's learning rate by the rule of the module's text, and the points that it was chosen from."""
    queries = [layout.query(example, "label") for example in given.choice]
    labels = np.array([query.label for query in queries])
    tried = {(arm, rate): (given.prompts[arm], rate, None) for arm in TUNED for rate in protocol.PROMPT_LEARNING_RATES}
    updates = train_on(model, layout, given.training[: protocol.N_CHOICE_STEPS], tried)
    arms = {key: Arm(tried[key][0], update) for key, update in updates.items()}
    points = [
        {"arm": arm, "learning_rate": rate, **_summary(scores, labels)}
        for (arm, rate), scores in label_scores(model, queries, arms).items()
    ]
    chosen = {arm: learning_rates.best([point for point in points if point["arm"] == arm]) for arm in TUNED}
    return {"points": points, "chosen": chosen | {"shuffled": chosen["demonstrations"]}}


# ------------------------------------------------------------------------------------------------------------- record
def record_file(model: str, task: str, part: str | int) -> Path:
    """`results/prompts/<model>-<task>-<part>.json`; a part is a seed, or `rates`. No two runs write the same seed."""
    return paths.resolve_path(protocol.PROMPTS) / f"{checkpoints.file_name(model)}-{task}-{part}.json"


def sizes() -> dict[str, Any]:
    """What a record has to agree with, to be current."""
    found = {
        "n_demonstrations": protocol.N_PROMPT_DEMONSTRATIONS,
        "n_rows": protocol.N_PROMPT_ROWS,
        "steps": list(protocol.PROMPT_STEPS),
        "rates": list(protocol.PROMPT_LEARNING_RATES),
        "choice_steps": protocol.N_CHOICE_STEPS,
        "choice_rows": protocol.N_CHOICE_ROWS,
    }
    return {**found, "loss": "label", "separator": "eos", "rates_by": "class_log_probability"}


def _head(model: str, task: str) -> dict[str, Any]:
    """What every part of a task's record begins with."""
    data = _task(task)
    head = sweeps.head("prompts", model, task, sizes(), data.checksum, checkpoints.content(model))
    return {**head, "rows": [example.row for example in data.evaluation[: protocol.N_PROMPT_ROWS]]}


def stored(model: str, task: str, part: str | int) -> dict[str, Any] | None:
    """A part of a task's record; None if there is none of this model, this engine, these data and these sizes."""
    return sweeps.current(record_file(model, task, part), _head(model, task))


def load_all(folder: str | Path | None = None) -> list[dict[str, Any]]:
    """
    Every task's record in `folder` (`protocol.PROMPTS`), current or not: its head, `rates`, and `seeds` by their names.

    Parts that agree in their heads are of one record.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(paths.resolve_path(folder or protocol.PROMPTS).glob("*.json")):
        content = storage.read_json(path)
        parts = {name: content.pop(name) for name in ("seed", "run", "rates") if name in content}
        key = storage.checksum(content)
        record = found.setdefault(key, content | {"rates": None, "seeds": {}})
        if "rates" in parts:
            record["rates"] = parts["rates"]
        else:
            record["seeds"][str(parts["seed"])] = parts["run"]
    return [record for record in found.values() if record["rates"]]


@cache
def _task(task: str) -> TaskData:
    return task_data(parameters.resolve({"preset": "quick", "task": task}))


def compute_rates(model: LanguageModel, task: str) -> dict[str, Any]:
    """Choose the task's learning rates with its first seed, and store the choice with the points it was made from."""
    layout = Layout.make(model.tokenizer, _task(task).task, "eos")
    given = material(layout, _task(task).train, protocol.PROMPT_SEEDS[task][0])
    found = _head(model.name, task) | {"rates": choose_rates(model, layout, given)}
    storage.write_json(record_file(model.name, task, "rates"), found)
    return found


def compute_seed(model: LanguageModel, task: str, seed: int, chosen: Mapping[str, float]) -> str:
    """Finetune and evaluate with one seed, and store it; the accuracies after the last step, as a line."""
    start, data = time.perf_counter(), _task(task)
    layout = Layout.make(model.tokenizer, data.task, "eos")
    given = material(layout, data.train, seed)
    queries = [layout.query(example, "label") for example in data.evaluation[: protocol.N_PROMPT_ROWS]]
    said: list[str] = []
    steps = protocol.PROMPT_STEPS
    points = curves(model, layout, given.prompts, given.training, queries, chosen, steps, said.append)
    lengths = {arm: len(prompt) for arm, prompt in given.prompts.items()}
    run = {"prompt_tokens": lengths, "points": points, "seconds": round(time.perf_counter() - start, 1)}
    storage.write_json(record_file(model.name, task, seed), _head(model.name, task) | {"seed": seed, "run": run})
    return said[-1]


def flops(model: str, task: str) -> tuple[float, float]:
    """Counted operations of choosing a task's learning rates, and of one seed (each counts as the first)."""
    tokenizer, config = models.tokenizer_and_config(model)
    data, shape = _task(task), cost.Shape.of(config)
    layout = Layout.make(tokenizer, data.task, "eos")
    given = material(layout, data.train, protocol.PROMPT_SEEDS[task][0])

    def work(arms: Sequence[str], n_steps: int, read: Sequence[Example], times: int) -> float:
        total = 0.0
        for prompt in map(given.prompts.__getitem__, arms):
            tokens = sequences(layout, prompt, given.training[:n_steps])
            total += sum(_step_flops(shape, one) for one in tokens)
            lengths = [len(layout.query(example, "label").tokens) for example in read]
            total += times * sum(cost.forward(shape, length, len(prompt), 1).total for length in lengths)
        return total

    rates = len(protocol.PROMPT_LEARNING_RATES) * work(TUNED, protocol.N_CHOICE_STEPS, given.choice, 1)
    rows, steps = data.evaluation[: protocol.N_PROMPT_ROWS], protocol.PROMPT_STEPS
    return rates, work(ARMS, steps[-1], rows, len(steps))
