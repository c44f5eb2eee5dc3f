"""Intervals over examples: joint resampling, undefined values, the order of averaging, coverage."""

import numpy as np
import pytest

from iclgd_helpers.measures import intervals


def test_layer_means_average_examples_first_then_layers():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, 10.0], [5.0, np.nan]])
    result = intervals.layer_means(values)
    assert result["per_layer"] == [3.0, 10.0]
    assert result["mean"] == 6.5  # not 4.75, the mean of all four values
    assert (result["n"], result["undefined"]) == (4, 4)


def test_layer_without_values_is_undefined_and_left_out():
    values = np.array([[np.nan, 2.0], [np.nan, 4.0]])
    result = intervals.layer_means(values)
    assert np.isnan(result["per_layer"][0]) and np.isnan(result["per_layer_low"][0])
    assert result["mean"] == 3.0 and result["undefined"] == 2
    assert result["interval"] == (result["per_layer_low"][1], result["per_layer_high"][1])
    nothing = intervals.layer_means(np.full((3, 2), np.nan))
    assert np.isnan(nothing["mean"]) and np.isnan(nothing["interval"]).all()


def test_intervals_hold_their_means_and_are_the_same_again():
    values = np.random.default_rng(0).normal(size=(50, 3))
    result = intervals.layer_means(values)
    assert result["interval"][0] < result["mean"] < result["interval"][1]
    for low, mean, high in zip(*(result[k] for k in ("per_layer_low", "per_layer", "per_layer_high")), strict=True):
        assert low < mean < high
    assert intervals.layer_means(values) == result


def test_examples_are_resampled_with_all_their_layers():
    """Equal layers tell no more than one; were they resampled each for itself, the interval would shrink."""
    column = np.random.default_rng(1).normal(size=(60, 1))
    result = intervals.layer_means(np.repeat(column, 16, axis=1))
    one = intervals.layer_means(column)["interval"]
    assert result["interval"] == pytest.approx(one, abs=0.02)
    assert result["interval"][1] - result["interval"][0] > 2 * (one[1] - one[0]) / 16**0.5


def test_columns_are_resampled_jointly():
    values = np.random.default_rng(2).normal(size=40)

    def difference(a, b):
        return float((a - b).mean())

    assert intervals.over_examples(difference, values, values - 1) == pytest.approx((1, 1))
    low, high = intervals.over_examples(difference, values, values[::-1])
    assert high - low > 0.2


@pytest.mark.parametrize("n", [1, 7, 56, 100, 801])
def test_the_mean_has_no_call_a_resample_and_the_same_ends(n: int):
    """To the last bit: records hold these numbers."""
    generator = np.random.default_rng(n)
    single = generator.normal(size=n).astype(np.float32)
    for values in (generator.normal(size=n), generator.random(n) < 0.7, single, generator.normal(size=(n, 3))):
        called = intervals.over_examples(lambda drawn: np.mean(drawn), values)
        assert intervals.over_examples(np.mean, values) == called


def test_undefined_resamples_are_left_out():
    def of_positive(values):
        return float(values[values > 0].mean()) if (values > 0).any() else float("nan")

    values = np.array([-1.0, -1.0, -1.0, 2.0])
    assert intervals.over_examples(of_positive, values) == (2.0, 2.0)
    assert np.isnan(intervals.over_examples(of_positive, -np.abs(values))).all()


def test_ends_are_the_quantiles_of_the_level():
    """Exactly, on known draws: `test_coverage` alone could not tell 90 % from 95 %."""
    draws = np.random.default_rng(4).permutation(np.append(np.arange(1001.0), [np.nan] * 7))
    assert intervals._percentiles(draws) == pytest.approx((25, 975))


@pytest.mark.parametrize("kind", ["accuracy", "layers"])
def test_coverage(kind: str, monkeypatch: pytest.MonkeyPatch):
    """In about 95 % of 300 simulated experiments the interval holds the true value."""
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    generator, hits = np.random.default_rng(3), 0
    for _ in range(300):
        if kind == "accuracy":
            low, high = intervals.over_examples(np.mean, generator.random(100) < 0.7)
            hits += low <= 0.7 <= high
        else:  # layers share each example's part
            values = 0.3 + generator.normal(size=(60, 1)) + 0.5 * generator.normal(size=(60, 4))
            low, high = intervals.layer_means(values)["interval"]
            hits += low <= 0.3 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_interval_over_seeds_is_students():
    """By hand: t of 0.975 is 12.7062 at one degree of freedom and 4.3027 at two; undefined values do not count."""
    assert intervals.over_seeds([1.0, 3.0])["interval"] == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    found = intervals.over_seeds([1.0, None, 2.0, float("nan"), 3.0])
    half = 4.3027 / 3**0.5
    assert found["n"] == 3 and found["mean"] == 2.0
    assert found["interval"] == pytest.approx((2 - half, 2 + half), abs=1e-4)
    one = intervals.over_seeds([0.5])
    assert one["mean"] == 0.5 and one["n"] == 1 and np.isnan(one["interval"]).all()
    assert intervals.over_seeds([])["n"] == 0
