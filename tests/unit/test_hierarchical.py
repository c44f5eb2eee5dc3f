"""One effect from questions within seeds within tasks: its variance, its coverage, and the verdict."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iclgd_helpers.measures import hierarchical
from iclgd_helpers.measures.hierarchical import EQUIVALENT, REFUTED, REPRODUCED, UNDECIDED, Estimate, OfMeans


def runs(shares: np.ndarray) -> list[OfMeans]:
    """A run a seed, whose effect is the mean over `[seed, question]`."""
    return [OfMeans(lambda mean: mean, (row,)) for row in shares]


def crossed(generator: np.random.Generator, shape: tuple[int, int], sizes: tuple[float, float, float]) -> np.ndarray:
    """`[seed, question]` with random seeds, questions and a rest, of these standard deviations."""
    n_seeds, n_questions = shape
    parts = (generator.normal(0, size, of) for size, of in zip(sizes, ((n_seeds, 1), (1, n_questions), shape)))  # noqa: B905
    return sum(parts, np.zeros(shape))


# ----------------------------------------------------------------------------------------------------------- variances
@given(st.integers(2, 6), st.integers(2, 30), st.integers(0, 999))
def test_of_one_task_the_value_is_the_mean_and_columns_are_exchanged(n_seeds: int, n: int, seed: int) -> None:
    shares = np.random.default_rng(seed).normal(size=(n_seeds, n))
    found, turned = hierarchical.of_task(runs(shares)), hierarchical.of_task(runs(shares.T))
    assert found is not None and turned is not None
    assert found.value == pytest.approx(shares.mean())
    by_seed, by_question, rest = found.variances
    assert turned.variances == pytest.approx((by_question, by_seed, rest), rel=1e-6, abs=1e-12)


def test_variances_are_those_that_were_planted() -> None:
    generator, sizes = np.random.default_rng(0), (0.3, 0.5, 1.0)
    found = [hierarchical.of_task(runs(crossed(generator, (6, 80), sizes))) for _ in range(400)]
    means = np.mean([one.variances for one in found if one], 0) * (6, 80, 6 * 80)
    assert means == pytest.approx(np.square(sizes), rel=0.1)


@pytest.mark.parametrize("sizes", [(0.3, 0.0, 1.0), (0.0, 0.6, 1.0), (0.3, 0.5, 1.0), (0.0, 0.0, 1.0)])
def test_intervals_cover(sizes: tuple[float, float, float]) -> None:
    generator, hits = np.random.default_rng(1), []
    for _ in range(400):
        tasks = {str(task): runs(0.2 + crossed(generator, (5, 60), sizes)) for task in range(6)}
        found = hierarchical.over_tasks(tasks)
        assert found is not None
        hits.append(found.low <= 0.2 <= found.high)
    assert 0.925 <= np.mean(hits) <= 0.985  # 0.95 with 400 drawings


def test_control_seeds_taken_for_questions_do_not_cover() -> None:
    """All answers as if they were independent: what the crossing is for."""
    generator, hits = np.random.default_rng(1), []
    for _ in range(200):
        shares = crossed(generator, (5, 60), (0.3, 0.5, 1.0))
        half = 1.96 * shares.std(ddof=1) / np.sqrt(shares.size)
        hits.append(abs(shares.mean()) <= half)
    assert np.mean(hits) < 0.6


@settings(deadline=None)
@given(st.integers(0, 999))
def test_a_ratio_is_that_of_all_answers_together(seed: int) -> None:
    generator = np.random.default_rng(seed)
    above, below = generator.integers(0, 2, (2, 4, 50)).astype(float)
    below[:, 0] = 1
    made = [OfMeans(lambda a, b: a / b, (a * b, b)) for a, b in zip(above, below, strict=True)]
    found = hierarchical.of_task(made)
    assert found is not None and found.value == pytest.approx((above * below).sum() / below.sum())
    jackknifed = [
        (np.delete(above * below, i, 1).sum() / np.delete(below, i, 1).sum()) for i in range(50)
    ]  # over questions: their variance and that of the rest
    expected = 49 / 50 * np.sum((np.array(jackknifed) - np.mean(jackknifed)) ** 2)
    assert found.variances[1] + found.variances[2] >= 0.5 * expected


def test_what_is_undefined_has_no_effect() -> None:
    nothing = [OfMeans(lambda a, b: a / b, (np.zeros(9), np.zeros(9)))] * 3
    assert hierarchical.of_task(nothing) is None and hierarchical.over_tasks({"a": nothing}) is None
    assert hierarchical.of_task(runs(np.ones((1, 9)))) is None, "one seed is no sample"
    shares = np.random.default_rng(0).normal(size=(3, 9))
    holes = shares.copy()
    holes[1, 4] = np.nan
    found, without = hierarchical.of_task(runs(holes)), hierarchical.of_task(runs(np.delete(shares, 4, 1)))
    assert found == without, "a question without a value with one seed counts with none"


def test_seeds_share_the_questions_that_all_of_them_have() -> None:
    shares = np.random.default_rng(0).normal(size=(3, 9))
    longer = [*runs(shares[:2]), *runs(np.append(shares[2:], [[9.0, 9.0]], 1))]
    assert hierarchical.of_task(longer) == hierarchical.of_task(runs(shares))


def test_an_effect_without_questions_varies_between_seeds_alone() -> None:
    values = np.array([[1.0], [1.5], [0.5]])
    found = hierarchical.estimate({"a": hierarchical.of_task(runs(values))})  # type: ignore[dict-item]
    half = 4.302652729911275 * 0.5 / np.sqrt(3)  # Student's, two degrees of freedom
    assert (found.low, found.high) == pytest.approx((1 - half, 1 + half))
    assert np.isnan(runs(values)[0].interval()[1:]).all()


def test_the_same_in_every_answer_is_sure() -> None:
    found = hierarchical.over_tasks({"a": runs(np.full((3, 8), 0.5))})
    assert found is not None and (found.low, found.value, found.high, found.p) == (0.5, 0.5, 0.5, 0.0)


# ------------------------------------------------------------------------------------------------------------ verdicts
def estimate(value: float, half: float, p: float = 0.001) -> Estimate:
    return Estimate(value, value - half, value + half, p, 20.0, {})


@pytest.mark.parametrize(
    ("found", "p", "said"),
    [
        (estimate(0.2, 0.1), 0.01, REPRODUCED),
        (estimate(-0.2, 0.1), 0.01, REFUTED),
        (estimate(0.2, 0.1), 0.06, UNDECIDED),
        (estimate(0.02, 0.01), 0.01, EQUIVALENT),
        (estimate(-0.02, 0.029), 0.5, EQUIVALENT),
        (estimate(0.02, 0.04), 0.5, UNDECIDED),
        (None, float("nan"), hierarchical.NOT_JUDGED),
    ],
)
def test_verdict(found: Estimate | None, p: float, said: str) -> None:
    assert hierarchical.verdict(found, p, 0.05) == said


def test_false_discoveries_are_held_down_over_all_statements() -> None:
    generator, false = np.random.default_rng(0), []
    for _ in range(200):
        p = np.concatenate([generator.uniform(size=80), generator.uniform(0, 1e-4, 20)])
        decided = hierarchical.false_discovery(p) <= 0.05
        false.append(decided[:80].sum() / max(1, decided.sum()))
    assert np.mean(false) <= 0.06
    assert (np.random.default_rng(1).uniform(size=100) <= 0.05).sum() > 0, "control: unadjusted, some are called"


def test_needed_is_what_decides() -> None:
    generator = np.random.default_rng(0)
    tasks = {str(task): runs(0.1 + crossed(generator, (3, 40), (0.25, 0.0, 0.8))) for task in range(6)}
    found = hierarchical.over_tasks(tasks)
    assert found is not None and hierarchical.verdict(found, found.p, 0.01) == UNDECIDED
    wanted = hierarchical.needed(found, 0.01)
    assert wanted["n_seeds"] is not None and wanted["n_seeds"] > 3
    distance, more = max(abs(found.value), 0.01 - abs(found.value)), wanted["n_seeds"] / 3
    variances = [sum(np.divide(task.variances, (more, 1, more))) for task in found.tasks.values()]
    assert 1.96 * np.sqrt(sum(variances)) / 6 < distance
    hopeless = {"a": runs(0.001 + crossed(generator, (3, 40), (0.0, 3.0, 0.1)))}
    assert hierarchical.needed(hierarchical.over_tasks(hopeless), 0.0)["n_seeds"] is None  # type: ignore[arg-type]
