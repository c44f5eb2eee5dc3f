"""The rule of the verdicts, and the uncertainty over questions that it reads: planted cases beside controls."""

import itertools

import numpy as np
import pytest
from notebook_cells import sources

from iclgd_helpers.measures import intervals, resampling
from iclgd_helpers.measures.verdicts import status, verdict

UP, DOWN, WIDE, NONE = (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.1, -0.1, 0.3), (float("nan"),) * 3
BARE = [(value, float("nan"), float("nan")) for value in (1.0, 1.1, 0.9, 8.0)]
STATUSES = [
    ("for", [UP, UP, WIDE]), ("for", [UP, UP, NONE]), ("for", BARE[:3]), ("against", [DOWN] * 3), ("open", []),
    ("open", [UP]), ("open", [UP, UP, DOWN]), ("open", [UP, WIDE, WIDE]), ("open", [WIDE, WIDE, NONE]), ("open", BARE),
    ("open", [UP, (0.2, 0.1, float("nan")), WIDE]), ("undefined", [NONE]), ("undefined", [UP, NONE]),
]  # fmt: skip


@pytest.mark.parametrize(("said", "effects"), STATUSES)
def test_status_of_a_task(said: str, effects: list[tuple[float, float, float]]) -> None:
    assert status(effects) == said
    turned = [(-value, -high, -low) for value, low, high in effects]
    assert status(turned) == {"for": "against", "against": "for"}.get(said, said), "turned round, it turns round"


def test_one_effect_of_a_whole_task_decides_it() -> None:
    assert status([UP], least=1) == "for" and status([NONE], least=1) == "undefined"


def test_control_seeds_without_a_value_are_not_taken_for_zero() -> None:
    """With NaN as 0, or left in, a task with an undefined seed would be open."""
    assert status([UP, UP, NONE]) == "for" != status([UP, UP, (0.0, 0.0, 0.0)])


@pytest.mark.parametrize(("n_for", "n_against", "n_open"), list(itertools.product(range(5), repeat=3)))
def test_verdict_of_a_model(n_for: int, n_against: int, n_open: int) -> None:
    """Written out: two thirds for, else half against, of three judged tasks or more."""
    n = n_for + n_against + n_open
    said = "inconclusive" if n_for < n * 2 / 3 - 1e-9 and n_against < n / 2 else "yes" if n_for > n_against else "no"
    statuses = n_for * ["for"] + n_against * ["against"] + n_open * ["open"] + ["undefined", "no in-context effect"]
    assert verdict(statuses, words=("yes", "no")) == (said if n >= 3 else "inconclusive")


def test_nothing_is_no_verdict() -> None:
    assert verdict([]) == verdict(["missing"] * 6) == "not run" != verdict(["missing", "undefined"])
    assert verdict(["for", "for"], fewest=2) == "reproduced" != verdict(["for", "for"])


@pytest.mark.parametrize("slug", ["62_controls", "74_fixed_prompt_finetuning", "78_results_of_the_reproduction"])
def test_every_page_judges_by_this_rule(slug: str) -> None:
    code = "\n".join(sources(slug).values())
    assert "from iclgd_helpers.measures.verdicts import" in code and "def status(" not in code
    assert '.count("for")' not in code.replace('["for"]', ""), "no second rule"


# --------------------------------------------------------------------------------------------------------- resampling
def test_interval_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coin's is the binomial one; what is undefined is left out of all columns; nothing left is NaN."""
    coin = np.arange(40) % 2
    value, low, high = resampling.of_means(lambda a: a, coin)
    assert value == 0.5 and 0.3 < low < 0.4 and 0.6 < high < 0.7
    monkeypatch.setattr(intervals, "RESAMPLES", 50)
    assert resampling.of_means(lambda a: a, coin) != (value, low, high), "the number of resamples is read anew"
    holed = np.where(np.arange(40) < 20, np.nan, 1)
    assert resampling.of_means(lambda a, b: a - b, holed, np.arange(40) >= 20) == (0, 0, 0)
    assert np.isnan(resampling.of_means(lambda a: a, np.full(3, np.nan))).all()
    assert np.isnan(resampling.of_means(lambda a, b: a / b, coin * 0, coin * 0)).all()


# ------------------------------------------------------------------------------------------- variance between cells
def equally_good(rng: np.random.Generator, n_cells: int, n: int, redrawn: float) -> np.ndarray:
    """`[cell, question]`: cells of one expected accuracy, which share a part of their answers."""
    shared, own = rng.random(n) < 0.7, rng.random((n_cells, n)) < 0.7
    return np.where(rng.random((n_cells, n)) < redrawn, own, shared)


def test_variance_between_cells_is_that_of_all_pairs_of_questions() -> None:
    right = np.random.default_rng(3).random((4, 7)) < 0.5
    deviation = right - right.mean(0)

    def naive(kept: list[int]) -> float:
        pairs = [deviation[:, i] @ deviation[:, j] for i in kept for j in kept if i != j]
        return float(np.mean(pairs)) / 3

    value, without = resampling.variance_between(right)
    assert value == pytest.approx(naive(list(range(7))), abs=1e-12)
    assert without == pytest.approx([naive([i for i in range(7) if i != q]) for q in range(7)], abs=1e-12)


def test_equally_good_cells_have_no_variance_however_much_they_disagree() -> None:
    rng, found, plain = np.random.default_rng(0), [], []
    for _ in range(400):
        few, many = (resampling.variance_between(equally_good(rng, 5, 100, share)) for share in (0.1, 0.9))
        found.append(resampling.jackknife(many[0] - few[0], many[1] - few[1]))
        plain.append(np.var(equally_good(rng, 5, 100, 0.9).mean(1), ddof=1))
    values, lows, highs = np.array(found).T
    assert abs(values.mean()) < 4 * values.std() / 20 < np.mean(plain)  # a plain variance would be far above zero
    assert (lows > 0).mean() < 0.05 and (highs < 0).mean() < 0.07  # 0.025 each, nominally


def test_jackknife_of_a_mean_is_the_textbook_interval() -> None:
    x = np.random.default_rng(0).normal(size=50)
    value, low, high = resampling.jackknife(x.mean(), (x.sum() - x) / 49)
    half = 1.959964 * x.std(ddof=1) / np.sqrt(50)
    assert (low, high) == pytest.approx((value - half, value + half))
    assert resampling.signed_root((0.04, -0.09, 0.0)) == pytest.approx((0.2, -0.3, 0.0))
