"""The calibrated reading: a planted bias is removed exactly; changed predictions are shared out between two causes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from iclgd_helpers.measures import calibration


@given(st.integers(1, 20), st.integers(2, 5), st.integers(0, 999))
def test_prior_is_the_mean_label_distribution(n: int, n_classes: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(0, 3, (n, n_classes)) - 7  # of a vocabulary, so not normalised
    expected = softmax(scores, -1).mean(0)
    np.testing.assert_allclose(np.exp(calibration.log_prior(scores)), expected, rtol=1e-12)


def test_no_prior_underflows() -> None:
    never = np.array([[0.0, -900.0], [0.0, -950.0]])
    assert calibration.log_prior(never)[1] == pytest.approx(-900 - np.log(2))
    assert calibration.calibrated(never, calibration.log_prior(never)).argmax(-1).tolist() == [1, 0]


def planted(n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Scores to read a prior on, and questions without and with a bias, so large that raw predictions follow it.

    A text tells its class for sure, as many texts each class: then the mean distribution of biased scores is the bias.
    """
    generator = np.random.default_rng(seed)
    bias = log_softmax(generator.normal(0, 3, n_classes))
    texts = np.tile(bias, (8, 1))  # whatever is asked, the answer is the bias
    evidence = generator.normal(0, 1, (50, n_classes))
    return texts, evidence, evidence + bias


@given(st.integers(2, 5), st.integers(0, 999))
def test_a_planted_bias_is_removed_exactly(n_classes: int, seed: int) -> None:
    texts, evidence, biased = planted(n_classes, seed)
    found = calibration.calibrated(biased, calibration.log_prior(texts))
    np.testing.assert_allclose(found, log_softmax(evidence, -1), atol=1e-10)


def test_control_the_prior_of_other_classes_does_not_remove_it() -> None:
    texts, evidence, biased = planted(3, 0)
    shuffled = calibration.calibrated(biased, calibration.log_prior(texts)[[1, 2, 0]])
    assert (biased.argmax(-1) != evidence.argmax(-1)).mean() > 0.2, "raw predictions follow the bias"
    assert (shuffled.argmax(-1) != evidence.argmax(-1)).mean() > 0.2


@given(st.integers(2, 4), st.integers(0, 999))
def test_a_shift_of_all_scores_of_a_text_changes_nothing(n_classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, shift = generator.normal(0, 2, (30, n_classes)), generator.normal(0, 5, (30, 1))
    np.testing.assert_allclose(calibration.log_prior(scores + shift), calibration.log_prior(scores), atol=1e-12)
    prior = calibration.log_prior(scores)
    found = [calibration.calibrated(one, prior) for one in (scores, scores + shift)]
    np.testing.assert_allclose(*found, atol=1e-10)


# ------------------------------------------------------------------------------------------------------ decomposition
def share(before: np.ndarray, after: np.ndarray, *priors: np.ndarray) -> tuple[float, float]:
    """Share of changed predictions by the prior, and of all."""
    rows = calibration.shifted(before, after, *priors).mean(1)
    return float(calibration.by_prior(*rows)), float(rows[2])


@given(st.integers(2, 4), st.integers(0, 999))
def test_changes_of_a_prior_alone_are_all_its_own(n_classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    evidence, prior = generator.normal(0, 1, (40, n_classes)), generator.normal(0, 2, n_classes)
    by_prior, whole = share(evidence, evidence + prior, np.zeros(n_classes), prior)
    assert by_prior == pytest.approx(whole)
    by_prior, whole = share(evidence, generator.normal(0, 1, (40, n_classes)), prior, prior)
    assert by_prior == pytest.approx(0) and whole > 0, "control: with one prior, all is evidence"


@given(st.integers(0, 999))
def test_both_shares_add_up_and_do_not_depend_on_names(seed: int) -> None:
    generator = np.random.default_rng(seed)
    before, after = generator.normal(0, 1, (2, 40, 2))
    priors = generator.normal(0, 1, (2, 2))
    rows = calibration.shifted(before, after, *priors).mean(1)
    by_evidence = calibration.by_prior(rows[1], rows[0], rows[2])
    assert calibration.by_prior(*rows) + by_evidence == pytest.approx(rows[2])
    assert rows[2] == pytest.approx((before.argmax(-1) != after.argmax(-1)).mean())
