"""
Records with planted effects, to see what the rule of `measures.hierarchical` decides before it meets real ones.

Two classes. An arm's log-odds of the right class are a strength, a difficulty of the question that all arms share, and
noise of its own. Its log-odds of class 1 have a bias that differs from seed to seed. So answers are correlated over
arms and over seeds, raw predictions follow the bias, and calibrated ones should not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from iclgd_helpers.experiments import protocol, readings
from iclgd_helpers.experiments.readings import READINGS
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import calibration, hierarchical
from iclgd_helpers.measures.hierarchical import Estimate
from iclgd_helpers.pages.statements import BY_ID

Floats = NDArray[np.float64]
N_TEXTS = protocol.N_CALIBRATION_ROWS
SHORT = {task: 56 for task in protocol.ALL_ROWS_TASKS}  # rows of an evaluation split that has no more
STATEMENTS = ("R1", "R3", "R5", "R8", "R13")  # answers of every kind, and a similarity
WORDS = (hierarchical.REPRODUCED, hierarchical.REFUTED, hierarchical.EQUIVALENT, hierarchical.UNDECIDED)
COLUMNS = ("scenario", "draw", "statement", "reading", "effect", "low", "high", "p", "verdict")


@dataclass(frozen=True)
class Scenario:
    """
    A world to draw records from.

    Parameters
    ----------
    name : as the page calls it.
    strength : arm -> mean log-odds of the right class, before difficulty and noise.
    bias : arm -> mean, and standard deviation over seeds, of its log-odds of class 1.
    between_seeds : standard deviation over seeds of an arm's strength; zero-shot sees no demonstrations and has none.
    similarity : mean SimAOU of joint minus standard finetuning.
    """

    name: str
    strength: Mapping[str, float]
    bias: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"zero_shot": (1.0, 0.0), "in_context": (0.5, 1.0), "standard": (1.0, 0.5)}
    )
    between_seeds: float = 0.2
    similarity: float = 0.0


SCENARIOS = (
    Scenario("no effect", {"zero_shot": 0.8, "in_context": 0.8, "standard": 0.8}),
    Scenario("a tenth of the paper's", {"zero_shot": 0.8, "in_context": 0.93, "standard": 0.85}, similarity=0.01),
    Scenario("half of the paper's", {"zero_shot": 0.8, "in_context": 1.5, "standard": 1.05}, similarity=0.04),
    Scenario("the paper's size", {"zero_shot": 0.8, "in_context": 2.6, "standard": 1.3}, similarity=0.09),
)


def answers(
    scenario: Scenario, n_seeds: int, n: int, generator: np.random.Generator
) -> tuple[dict[str, Floats], NDArray[np.int64]]:
    """Log-odds of class 1 of each arm, `[seed, question]`, and the labels, `[question]`."""
    labels = generator.integers(0, 2, n)
    sign, difficulty = 2 * labels - 1, generator.normal(0, 1.2, n)
    found = {}
    for arm, strength in scenario.strength.items():
        alike = arm == "zero_shot"  # the same answers whatever the seed
        shape = (1 if alike else n_seeds, n)
        strengths = strength + (0 if alike else generator.normal(0, scenario.between_seeds, (n_seeds, 1)))
        mean, spread = scenario.bias[arm]
        bias = mean + generator.normal(0, 1, (shape[0], 1)) * spread
        own = generator.normal(0, 0.8, shape)
        found[arm] = np.broadcast_to(sign * (strengths + difficulty + own) + bias, (n_seeds, n))
    return found, labels


def records(
    scenario: Scenario, generator: np.random.Generator, n_seeds: int, n: int = protocol.N_CONFIRMATORY_ROWS
) -> list[Record]:
    """The records of one task, with texts for their priors, as far as the statements read them."""
    log_odds, labels = answers(scenario, n_seeds, n + N_TEXTS, generator)
    question = generator.normal(0, 0.05, n)
    made = []
    for seed in range(n_seeds):
        scores = {arm: _log_probabilities(values[seed]) for arm, values in log_odds.items()}
        columns = {f"log_probability/{arm}": list(values[:n]) for arm, values in scores.items()}
        texts = {f"log_probability/{arm}": list(values[n:]) for arm, values in scores.items()}
        for name, level in (("joint", scenario.similarity), ("standard", 0.0)):
            similar = 0.3 + level + question + generator.normal(0, 0.03) + generator.normal(0, 0.05, n)
            columns[f"sim_aou/{name}"] = list(similar[:, None])
        priors = {arm: {"log_prior": calibration.log_prior(values[n:])} for arm, values in scores.items()}
        content = {
            "n_compared": n,
            "arms": {arm: {} for arm in scores},
            "comparisons": {"standard": {}, "joint": {}},
            "calibrated": {"arms": priors, "comparisons": {}},
        }
        examples = pd.DataFrame({"row": np.arange(n), "label": labels[:n], **columns})
        calibration_table = pd.DataFrame({"row": np.arange(n, n + N_TEXTS), "label": labels[n:], **texts})
        made.append(Record(content, examples, calibration_table))
    return made


def _log_probabilities(log_odds: Floats) -> Floats:
    """`[question, class]`, nats, of two classes."""
    return np.stack([-np.logaddexp(0, log_odds), -np.logaddexp(0, -log_odds)], -1)


def grid(scenario: Scenario, generator: np.random.Generator) -> dict[str, list[Record]]:
    """Task -> its records, with the seeds and rows of the protocol: one drawing of the confirmatory part."""
    sizes = {task: (len(seeds), SHORT.get(task, protocol.N_CONFIRMATORY_ROWS))
             for task, seeds in protocol.CONFIRMATORY_SEEDS.items()}  # fmt: skip
    return {task: records(scenario, generator, *size) for task, size in sizes.items()}


def estimates(found: Mapping[str, Sequence[Record]]) -> Iterator[tuple[str, str, Estimate]]:
    """Statement, reading and estimate of one drawing, each where it is defined; no gate is asked."""
    for reading in READINGS:
        read = {task: readings.of(several, reading) for task, several in found.items()}
        for name in STATEMENTS:
            runs = {task: [BY_ID[name].effect(record, "") for record in several] for task, several in read.items()}
            runs = {task: [run for run in several if run is not None] for task, several in runs.items()}
            if (one := hierarchical.over_tasks(runs)) is not None:
                yield name, reading, one


def simulate(scenario: Scenario, draws: Sequence[int]) -> pd.DataFrame:
    """The verdicts of some drawings of a scenario, numbered by their seeds; in `COLUMNS`."""
    rows = []
    for draw in draws:
        found = list(estimates(grid(scenario, np.random.default_rng([draw, SCENARIOS.index(scenario)]))))
        adjusted = hierarchical.false_discovery([one.p for *_, one in found])
        for (name, reading, one), p in zip(found, adjusted, strict=True):
            said = hierarchical.verdict(one, float(p), BY_ID[name].bound)
            rows.append((scenario.name, draw, name, reading, one.value, one.low, one.high, one.p, said))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def truth(scenario: Scenario, n_tasks: int = 60, n_seeds: int = 20, n: int = 2000) -> dict[tuple[str, str], float]:
    """The effects themselves, (statement, reading) -> value: the mean over many tasks of many seeds and questions."""
    generator = np.random.default_rng(1)
    found: dict[tuple[str, str], list[float]] = {}
    for _task in range(n_tasks):
        for name, reading, one in estimates({"": records(scenario, generator, n_seeds, n)}):
            found.setdefault((name, reading), []).append(one.value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def summary(draws: pd.DataFrame, truths: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """
    How the rule does in drawings: a row for each scenario, statement and reading.

    Columns: true effect; share of 95 % intervals that hold it (`coverage`); share of drawings with each verdict; n.
    """
    true = {(row["scenario"], row["statement"], row["reading"]): row["effect"] for row in truths}
    rows = []
    for key, mine in draws.groupby(["scenario", "statement", "reading"], sort=False):
        effect = true[key]
        covered = ((mine["low"] <= effect) & (effect <= mine["high"])).mean()
        words = {word: (mine["verdict"] == word).mean() for word in WORDS}
        rows.append((*key, effect, covered, *words.values(), len(mine)))
    return pd.DataFrame(rows, columns=["scenario", "statement", "reading", "true effect", "coverage", *WORDS, "n"])
