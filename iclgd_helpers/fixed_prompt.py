"""
Finetuning behind a fixed prompt: `python -m iclgd_helpers.fixed_prompt` computes what page 74 shows. It says what it
costs, can be stopped at any moment, and skips what is recorded.

What is run was written down here before any result of it was seen
-------------------------------------------------------------------
Arms: examples alone (`plain`); behind an instruction that names the classes and solves nothing (`instruction`); behind
`N_DEMONSTRATIONS` solved examples, as many of each class (`demonstrations`); behind the same with permuted labels
(`shuffled`). The prompt stands before every training example, and before every question of the evaluation.

Training: one stochastic gradient step on K and V for each of the first `STEPS[-1]` training rows in the protocol's
order that are no demonstrations; the loss is the negative log-likelihood of the label token alone. Gradients reach the
weights through the prompt's tokens too, so that a step processes prompt and example. Three seeds a task: they determine
demonstrations and training rows.

Evaluation: the first `N_ROWS` rows in the protocol's order, after each number of steps in `STEPS`.

Rates: for each task with its first seed, one for each of `plain`, `instruction` and `demonstrations`; `shuffled` takes
the one of `demonstrations`, so that the two differ in labels alone. Chosen is the rate, of `RATES`, with the highest
mean log-probability of the right label among the labels (renormalised over the classes) on the `CHOICE_ROWS` training
rows behind those trained on, after `CHOICE_STEPS` steps; ties go to the smaller rate.

Everything was started again twice. At first `RATES` had three entries, and the first task's choices fell on both ends;
two points of one seed had been seen. Then the log-probability was still that over the whole vocabulary, which on the
first task's training rows preferred rates at which every answer is the same word; the grid's rule was taken instead.
"""

from __future__ import annotations

if __name__ == "__main__":
    from iclgd_helpers.start import start

    start("iclgd_helpers.commands", "fixed_prompt")

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from iclgd_helpers import checkpoints, commands, cost, identity, models, parameters, paths, storage
from iclgd_helpers.finetune import Learner, Settings, finetune_together
from iclgd_helpers.models import KVUpdate, LanguageModel
from iclgd_helpers.observe import Arm
from iclgd_helpers.plans import PROMPT_SEEDS as SEEDS
from iclgd_helpers.rates import best_rate, label_scores, score_summary
from iclgd_helpers.sequences import Layout, Query
from iclgd_helpers.sweep import device_rate, duration
from iclgd_helpers.tasks import Example, TaskData, select_demonstrations, shuffle_labels, task_data

ARMS = ("plain", "instruction", "demonstrations", "shuffled")
N_DEMONSTRATIONS, N_ROWS, STEPS = 4, 48, (0, 4, 10, 20)
RATES, CHOICE_STEPS, CHOICE_ROWS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 10, 16
RECORDS = "results/prompts"

main = partial(commands.main, "fixed_prompt")


@dataclass(frozen=True)
class Material:
    """What one seed determines: the prompt of each arm, rows to train on, rows to choose rates on."""

    prompts: dict[str, tuple[int, ...]]
    training: list[Example]
    choice: list[Example]


def prompts(layout: Layout, demonstrations: Sequence[Example], seed: int) -> dict[str, tuple[int, ...]]:
    """The tokens before every example, by arm; BOS alone for `plain`."""
    instruction = f"Answer with one of these words: {', '.join(layout.task.verbalizers)}."
    words = layout.tokenizer(instruction, add_special_tokens=False)["input_ids"]
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
    demonstrations = select_demonstrations(train, N_DEMONSTRATIONS, seed, balanced=True)
    shown = {example.row for example in demonstrations}
    needed = STEPS[-1] + CHOICE_ROWS
    rows = select_demonstrations(train, N_DEMONSTRATIONS + needed, seed, balanced=False)
    rest = [example for example in rows if example.row not in shown][:needed]
    return Material(prompts(layout, demonstrations, seed), rest[: STEPS[-1]], rest[STEPS[-1] :])


def sequences(layout: Layout, prompt: Sequence[int], rows: Sequence[Example]) -> list[tuple[int, ...]]:
    """What each step sees: the prompt (which begins with BOS), an example, its label."""
    return [(*prompt, *layout.demonstration(row)) for row in rows]


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
    updates = {}
    by_length = sorted(arms, key=lambda arm: len(arms[arm][0]))
    for _length, group in itertools.groupby(by_length, key=lambda arm: len(arms[arm][0])):
        group = list(group)
        learners = [
            Learner(sequences(layout, prompt, rows), Settings(rate, loss="label"), start)
            for prompt, rate, start in map(arms.__getitem__, group)
        ]
        tuned = finetune_together(model, learners, layout.labels, "standard")
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
    Accuracy and operations of every arm after each number of `steps` (increasing, from 0).

    Returns
    -------
    points: `arm`, `step`, `tflop` (of the steps so far, by `cost.standard_step`), `right` (one character a row),
    `accuracy` (value, interval over rows), `label_log_probability` (mean, of the right label, nats),
    `class_log_probability` (the same, renormalised over the classes).
    """
    shape = cost.Shape.of(model.model.config)
    labels = np.array([query.label for query in queries])
    updates: dict[str, KVUpdate | None] = dict.fromkeys(prompts)
    points = []
    for before, step in itertools.pairwise((0, *steps)):
        if step > before:
            arms = {arm: (prompts[arm], rates[arm], updates[arm]) for arm in prompts}
            updates = train_on(model, layout, training[before:step], arms)
        arms = {arm: Arm(tuple(prompts[arm]), updates[arm]) for arm in prompts}
        for arm, scores in label_scores(model, layout.labels, queries, arms).items():
            seen = sequences(layout, prompts[arm], training[:step])
            flops = sum(cost.standard_step(shape, len(tokens), 1).total for tokens in seen)
            points.append({"arm": arm, "step": step, "tflop": flops / 1e12} | _summary(scores, labels))
        reached = ((p["arm"], p["accuracy"]["value"]) for p in points[-len(prompts) :])
        say(f"step {step}: " + ", ".join(f"{arm} " + ("diverged" if v is None else f"{v:.2f}") for arm, v in reached))
    return points


def _summary(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    found, right = score_summary(scores, labels), scores.argmax(-1) == labels
    # Kept row by row: arms are compared on the same questions. One that has diverged has no answers.
    return {"right": "" if found["diverged"] else "".join("01"[int(one)] for one in right)} | found


def choose_rates(model: LanguageModel, layout: Layout, given: Material) -> dict[str, Any]:
    """Each arm's rate by the rule of the module's text, and the points that it was chosen from."""
    queries = [layout.query(example, "label") for example in given.choice]
    labels = np.array([query.label for query in queries])
    tried = {(arm, rate): (given.prompts[arm], rate, None) for arm in ARMS[:3] for rate in RATES}
    updates = train_on(model, layout, given.training[:CHOICE_STEPS], tried)
    arms = {key: Arm(tried[key][0], update) for key, update in updates.items()}
    points = [
        {"arm": arm, "learning_rate": rate} | _summary(scores, labels)
        for (arm, rate), scores in label_scores(model, layout.labels, queries, arms).items()
    ]
    chosen = {arm: best_rate([point for point in points if point["arm"] == arm]) for arm in ARMS[:3]}
    return {"points": points, "chosen": chosen | {"shuffled": chosen["demonstrations"]}}


# ------------------------------------------------------------------------------------------------------------- record
def record_file(model: str, task: str, part: str | int) -> Path:
    """`results/prompts/<model>-<task>-<part>.json`; a part is a seed, or `rates`. No two runs write the same seed."""
    return paths.resolve_path(RECORDS) / f"{checkpoints.file_name(model)}-{task}-{part}.json"


def sizes() -> dict[str, Any]:
    """What a record has to agree with, to be current."""
    names = "N_DEMONSTRATIONS N_ROWS STEPS RATES CHOICE_STEPS CHOICE_ROWS".split()
    return storage.plain(
        {name.lower(): globals()[name] for name in names}
        | {"loss": "label", "separator": "eos", "rates_by": "class_log_probability"}
    )


def _head(model: str, task: str) -> dict[str, Any]:
    """What every part of a task's record begins with."""
    data = _task(task)
    return {
        "kind": "prompts",
        "model": checkpoints.label(model),
        "model_content": checkpoints.content(model),
        "task": task,
        "engine": identity.engine_hash(),
        "parameters": sizes(),
        "data_checksum": data.checksum,
        "rows": [example.row for example in data.evaluation[:N_ROWS]],
    }


def stored(model: str, task: str, part: str | int) -> dict[str, Any] | None:
    """A part of a task's record; None if there is none of this model, this engine, these data and these sizes."""
    path = record_file(model, task, part)
    content = storage.read_json(path) if path.is_file() else {}
    found = {"model_content": content.get("model")} | content  # a built-in model is its name
    return content if all(found.get(name) == value for name, value in _head(model, task).items()) else None


def load_all(folder: str | Path | None = None) -> list[dict[str, Any]]:
    """
    Every task's record in `folder` (`RECORDS`), current or not: its head, `rates`, and `seeds` by their names.

    Parts that agree in their heads are of one record.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(paths.resolve_path(folder or RECORDS).glob("*.json")):
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


def run_task(model: LanguageModel, task: str, seeds: Sequence[int], say: Callable[[str], object]) -> None:
    """Compute those of `seeds` that are not stored, with the first also the rates; each is stored when it is done."""
    data, name = _task(task), model.name
    layout = Layout.make(model.tokenizer, data.task, "eos")
    queries = [layout.query(example, "label") for example in data.evaluation[:N_ROWS]]
    rates = stored(name, task, "rates")
    if rates is None:
        rates = _head(name, task) | {"rates": choose_rates(model, layout, material(layout, data.train, SEEDS[task][0]))}
        storage.write_json(record_file(name, task, "rates"), rates)
        say(f"{task}: chosen rates {rates['rates']['chosen']}")
    for seed in (seed for seed in seeds if stored(name, task, seed) is None):
        start, given = time.perf_counter(), material(layout, data.train, seed)
        points = curves(model, layout, given.prompts, given.training, queries, rates["rates"]["chosen"], STEPS,
                        say=lambda line, seed=seed: say(f"{task}, seed {seed}, {line}"))  # fmt: skip
        lengths = {arm: len(prompt) for arm, prompt in given.prompts.items()}
        run = {"prompt_tokens": lengths, "points": points, "seconds": round(time.perf_counter() - start, 1)}
        storage.write_json(record_file(name, task, seed), _head(name, task) | {"seed": seed, "run": run})


def flops(model: str, task: str) -> float:
    """Counted operations of everything that is not stored of a task."""
    tokenizer, config = models.tokenizer_and_config(model)
    data, shape = _task(task), cost.Shape.of(config)
    layout = Layout.make(tokenizer, data.task, "eos")
    rates = stored(model, task, "rates")
    queries = [layout.query(example, "label") for example in data.evaluation[:N_ROWS]]

    def work(given: Material, arms: Sequence[str], n_steps: int, read: Sequence[Query], times: int) -> float:
        total = 0.0
        for prompt in map(given.prompts.__getitem__, arms):
            tokens = sequences(layout, prompt, given.training[:n_steps])
            total += sum(cost.standard_step(shape, len(one), 1).total for one in tokens)
            total += times * sum(cost.forward(shape, len(q.tokens), len(prompt), 1).total for q in read)
        return total

    whole = 0.0
    if rates is None:
        given = material(layout, data.train, SEEDS[task][0])
        read = [layout.query(example, "label") for example in given.choice]
        whole += len(RATES) * work(given, ARMS[:3], CHOICE_STEPS, read, 1)
    waiting = [seed for seed in SEEDS[task] if stored(model, task, seed) is None]
    return whole + sum(work(material(layout, data.train, s), ARMS, STEPS[-1], queries, len(STEPS)) for s in waiting)


# ------------------------------------------------------------------------------------------------------------ command
def estimate(model: str, tasks: Sequence[str], rate: float) -> Iterator[str]:
    """Operations and time of what is to be computed, by task."""
    found = {task: flops(model, task) for task in tasks}
    for name, one in (found | {"all": sum(found.values())}).items():
        yield f"{name:<12}{one / 1e12:>9.1f} TFLOP{duration(one / rate):>12}"


def work(model_name: str, tasks: Sequence[str], rate: float | None, cost_only: bool) -> None:
    """Say what is not yet recorded and what it costs at a rate in TFLOP/s, and compute it, into `results/prompts`."""
    identity.source_hash()  # kept from now on: that of the code as it was loaded
    flops = rate * 1e12 if rate else device_rate("auto", "float32") / 2
    print("\n".join(estimate(model_name, tasks, flops)), flush=True)
    if cost_only:
        return
    storage.require_writable(paths.resolve_path(RECORDS))
    model, start = models.load_model(model_name, "float32", "auto"), time.perf_counter()

    def say(line: str) -> None:
        print(f"{duration(time.perf_counter() - start)}  {line}", flush=True)

    for number, task in itertools.product(range(3), tasks):  # first seeds first
        run_task(model, task, SEEDS[task][number : number + 1], say)
