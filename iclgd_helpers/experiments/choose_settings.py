"""
Choose the default task's settings on its training split, by a rule written down here before any result was seen.

Rule
----
1. 120 training rows (drawn with seed 100) are set aside; demonstrations come from the other training rows.
2. Demonstrations: every combination of number, balance and separator below, with three demonstration seeds each. The
   combination with the highest mean in-context accuracy on the rows set aside is taken; ties go to fewer
   demonstrations, then to the order below. If none beats zero-shot, the best is taken all the same, and pages say so.
3. Seed: of the seeds 0 to 7, the one whose demonstrations reach the highest in-context accuracy on the rows set aside.
   Demonstrations are drawn as a run draws them, and left out of the rows; ties go to the smaller seed. This step was
   added after a first run, with seed 0. It had shown that one draw can make every answer the same whatever the settings
   are.
4. Learning rate: of those below, those at which standard finetuning on the demonstrations of that seed is well
   conditioned. That is: label log-probabilities of a float32 and of a float64 run differ by at most 0.01 nats on ten
   of the rows. Among these the one with the highest mean label log-probability on the rows after standard finetuning.

No row of the evaluation split is read. `iclgd settings` repeats the choice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from iclgd_helpers import paths, storage
from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.sources import load_task
from iclgd_helpers.data.tasks import Example, TaskData
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import finetune, models
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm
from iclgd_helpers.experiments import parameters
from iclgd_helpers.experiments.sweeps import label_scores

N_DEMONSTRATIONS = (4, 8, 16, 32)
BALANCED = (False, True)
SEPARATORS = ("eos", "newline")
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
RUN_SEEDS = tuple(range(8))
N_ROWS, ROWS_SEED, MAX_DIFFERENCE = 120, 100, 0.01
Trial = dict[str, Any]  # what was tried, and what it reached


def label_log_probabilities(
    model: LanguageModel, layout: Layout, examples: Sequence[Example], arm: Arm
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log-probabilities of the verbalizers `[example, class]` under `arm`, and the labels `[example]`."""
    queries = [layout.query(example, "label") for example in examples]
    scores = label_scores(model, queries, {"arm": arm})["arm"]
    return scores, np.array([query.label for query in queries])


def accuracy(model: LanguageModel, layout: Layout, examples: Sequence[Example], arm: Arm) -> float:
    """Share of `examples` labelled correctly under `arm`."""
    values, labels = label_log_probabilities(model, layout, examples, arm)
    return float((values.argmax(1) == labels).mean())


def split_rows(data: TaskData) -> tuple[list[Example], list[Example]]:
    """The training rows set aside for choosing, and those that demonstrations come from."""
    order = np.random.default_rng(ROWS_SEED).permutation(len(data.train))
    return [data.train[i] for i in order[:N_ROWS]], [data.train[i] for i in sorted(order[N_ROWS:])]


def compare_demonstrations(model: LanguageModel, data: TaskData) -> list[Trial]:
    """Accuracy of every combination and seed on the rows set aside."""
    held_out, pool = split_rows(data)
    bare = Layout.make(model.tokenizer, data.task, "eos")
    zero_shot = accuracy(model, bare, held_out, Arm(bare.prefix()))
    trials = []
    for k, balanced, separator in tqdm(list(itertools.product(N_DEMONSTRATIONS, BALANCED, SEPARATORS))):
        layout = Layout.make(model.tokenizer, data.task, separator)
        drawn = [select_demonstrations(pool, k, seed, balanced) for seed in SEEDS]
        reached = [accuracy(model, layout, held_out, Arm(layout.prefix(examples))) for examples in drawn]
        trials.append({
            "n_demonstrations": k, "balanced": balanced, "separator": separator,
            "in_context": reached, "mean": float(np.mean(reached)), "zero_shot": zero_shot,
        })  # fmt: skip
    return trials


def compare_seeds(model: LanguageModel, data: TaskData, chosen: Mapping[str, Any]) -> list[Trial]:
    """Accuracy on the rows set aside with the demonstrations that a run with each seed draws."""
    held_out, _pool = split_rows(data)
    layout = Layout.make(model.tokenizer, data.task, chosen["separator"])
    trials = []
    for seed in tqdm(RUN_SEEDS):
        drawn = select_demonstrations(data.train, chosen["n_demonstrations"], seed, chosen["balanced"])
        rows = [example for example in held_out if example not in drawn]
        trials.append({"seed": seed, "in_context": accuracy(model, layout, rows, Arm(layout.prefix(drawn)))})
    return trials


def compare_rates(
    model: LanguageModel, precise: LanguageModel, data: TaskData, chosen: Mapping[str, Any]
) -> list[Trial]:
    """Label log-probability after standard finetuning at every learning rate, and how far float32 is from float64."""
    layout = Layout.make(model.tokenizer, data.task, chosen["separator"])
    drawn = select_demonstrations(data.train, chosen["n_demonstrations"], chosen["seed"], chosen["balanced"])
    held_out = [example for example in split_rows(data)[0] if example not in drawn]
    sequences = [layout.training_sequence(example) for example in drawn]

    def after(which: LanguageModel, rate: float, rows: list[Example]) -> NDArray[np.float64]:
        tuned = finetune.finetune(which, sequences, "standard", finetune.Settings(rate))
        values, labels = label_log_probabilities(which, layout, rows, Arm(layout.prefix(), tuned.update))
        right: NDArray[np.float64] = values[np.arange(len(labels)), labels]
        return right

    trials = []
    for rate in tqdm(LEARNING_RATES):
        ours = after(model, rate, held_out)
        few = [after(which, rate, held_out[:10]) for which in (model, precise)]
        difference = float(np.abs(few[0] - few[1]).max())
        trials.append(
            {"learning_rate": rate, "float32_float64": difference, "label_log_probability": float(ours.mean())}
        )
    return trials


def choose(trials: Sequence[Trial], seeds: Sequence[Trial] = (), rates: Sequence[Trial] = ()) -> dict[str, Any]:
    """Apply the rule to the trials so far: steps 2, 3 and 4. With no learning rate well conditioned, the smallest."""
    best = max(trials, key=lambda trial: (round(trial["mean"], 9), -trial["n_demonstrations"]))
    chosen = {name: best[name] for name in ("n_demonstrations", "balanced", "separator")}
    if seeds:
        chosen["seed"] = max(seeds, key=lambda trial: (round(trial["in_context"], 9), -trial["seed"]))["seed"]
    if rates:
        sound = [trial for trial in rates if trial["float32_float64"] <= MAX_DIFFERENCE] or rates[:1]
        chosen["learning_rate"] = max(sound, key=lambda trial: trial["label_log_probability"])["learning_rate"]
    return chosen


def work() -> None:
    """Compare, choose, and write `results/settings/snippets.json`."""
    given = parameters.resolve({"preset": "quick"})
    target = paths.resolve_path(f"results/settings/{given.task}.json")
    storage.require_writable(target.parent)
    data = load_task(given.task, given.data_source)
    model = models.load_model(given.model, "float32", "cpu")
    demonstrations = compare_demonstrations(model, data)
    seeds = compare_seeds(model, data, choose(demonstrations))
    precise = models.load_model(given.model, "float64", "cpu")
    rates = compare_rates(model, precise, data, choose(demonstrations, seeds))
    chosen = choose(demonstrations, seeds, rates)
    result = {
        "model": given.model, "task": given.task, "data_checksum": data.checksum, "rows": N_ROWS,
        "demonstrations": demonstrations, "seeds": seeds, "rates": rates, "chosen": chosen,
    }  # fmt: skip
    storage.write_json(target, result)
    print(json.dumps(chosen))
