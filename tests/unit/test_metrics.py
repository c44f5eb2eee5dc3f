"""Metrics: definitions, bounds, symmetries, and what stands where a value is undefined."""

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iclgd_helpers.measures import metrics

WHICH, RULES = ("all", "correct", "incorrect"), ("code", "set")


@st.composite
def predictions(draw: st.DrawFn, classes: tuple[int, int] = (2, 5)) -> list[np.ndarray]:
    """Zero-shot, in-context and finetuned predictions, and the labels."""
    n, n_classes = draw(st.integers(1, 40)), draw(st.integers(*classes))
    column = st.lists(st.integers(0, n_classes - 1), min_size=n, max_size=n)
    return [np.array(draw(column)) for _ in range(4)]


@st.composite
def vectors(draw: st.DrawFn) -> list[torch.Tensor]:
    """Three `[query, layer, d_model]` tensors in float64."""
    seed, n, layers, width = (draw(st.integers(low, high)) for low, high in ((0, 999), (1, 4), (1, 3), (2, 9)))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, layers, width, generator=generator, dtype=torch.float64) for _ in range(3)]


def same(a: float, b: float) -> bool:
    return a == b or (np.isnan(a) and np.isnan(b))


# ------------------------------------------------------------------------------------------------ predictions
@given(predictions())
def test_jaccard_equals_naive_within_bounds(columns: list[np.ndarray]):
    for which in WHICH:
        for rule in RULES:
            value = metrics.jaccard(*columns, which, rule)
            assert same(value, naive.jaccard(*columns, which, rule))
            assert np.isnan(value) or 0 <= value <= 1
            z, c, f, y = columns
            assert same(value, metrics.jaccard(z, f, c, y, which, rule))  # symmetric


@given(predictions((2, 2)))
def test_both_rules_agree_for_two_classes(columns: list[np.ndarray]):
    for which in WHICH:
        assert same(metrics.jaccard(*columns, which, "code"), metrics.jaccard(*columns, which, "set"))


def test_both_rules_differ_for_three_classes():
    """Two examples changed by both, one of them to different labels."""
    columns = [np.array(x) for x in ([0, 0, 0], [1, 1, 0], [1, 2, 0], [1, 1, 1])]
    assert metrics.jaccard(*columns, "all", "code") == pytest.approx(1 / 3)
    assert metrics.jaccard(*columns, "all", "set") == 1.0
    assert metrics.jaccard(*columns, "correct", "code") == pytest.approx(1 / 2)
    assert metrics.jaccard(*columns, "incorrect", "code") == 0.0


@given(predictions())
def test_partition_covers_all_examples_once(columns: list[np.ndarray]):
    parts = metrics.partition(*columns)
    assert parts == naive.partition(*columns)
    assert sum(parts.values()) == len(columns[0]) and len(parts) == 8


@given(predictions())
def test_jaccard_follows_from_the_partition(columns: list[np.ndarray]):
    p = metrics.partition(*columns)
    shared = p["both_correct"] + p["both_incorrect"]
    union = len(columns[0]) - p["unchanged"] + p["both_different"]
    assert same(metrics.jaccard(*columns), shared / union if union else np.nan)


@given(predictions())
def test_rec2ftp_equals_its_definition(columns: list[np.ndarray]):
    value = metrics.rec2ftp(*columns)
    assert same(value, naive.rec2ftp(*columns))
    zero_shot, in_context, finetuned, labels = columns
    fixed = [i for i, y in enumerate(labels) if zero_shot[i] != y and finetuned[i] == y]
    assert same(value, np.mean([in_context[i] == labels[i] for i in fixed]) if fixed else np.nan)
    if fixed:
        assert metrics.rec2ftp(zero_shot, finetuned, finetuned, labels) == 1
        assert metrics.rec2ftp(zero_shot, zero_shot, finetuned, labels) == 0


def test_nothing_changed_is_undefined():
    same_everywhere = [np.zeros(5, int)] * 4
    assert all(np.isnan(metrics.jaccard(*same_everywhere, which, rule)) for which in WHICH for rule in RULES)
    assert np.isnan(metrics.rec2ftp(*same_everywhere))
    assert metrics.partition(*same_everywhere)["unchanged"] == 5


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_prediction_entropy(values: list[int]):
    entropy = metrics.prediction_entropy(np.array(values), 4)
    assert 0 <= entropy <= 2 + 1e-12
    assert (entropy == 0) == (len(set(values)) == 1)
    assert metrics.prediction_entropy(np.array([0, 1, 2, 3]), 4) == pytest.approx(2)


# ------------------------------------------------------------------------------------------------- similarity
@given(vectors(), st.floats(0.01, 100), st.floats(0.01, 100))
@settings(max_examples=50)
def test_sim_aou_bounds_and_invariances(tensors: list[torch.Tensor], a: float, b: float):
    zero_shot, in_context, finetuned = tensors
    value = metrics.sim_aou(zero_shot, in_context, finetuned)
    assert value.abs().max() <= 1 + 1e-12
    # positive scaling of any output, which normalising removes; without it the same changes the value
    torch.testing.assert_close(metrics.sim_aou(zero_shot, a * in_context, b * finetuned), value, rtol=0, atol=1e-9)
    torch.testing.assert_close(metrics.sim_aou(zero_shot, finetuned, in_context), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(metrics.sim_aou(zero_shot, in_context, in_context), torch.ones_like(value))
    rotation = torch.linalg.qr(torch.randn(zero_shot.shape[-1], zero_shot.shape[-1]).double()).Q
    torch.testing.assert_close(metrics.sim_aou(*(t @ rotation for t in tensors)), value, rtol=0, atol=1e-9)
    raw = metrics.sim_aou(zero_shot, in_context, finetuned, normalise=False)
    moved = metrics.sim_aou(*(t + 1.5 for t in tensors), normalise=False)
    torch.testing.assert_close(moved, raw, rtol=0, atol=1e-9)  # raw: only differences matter


def test_raw_sim_aou_depends_on_scale():
    generator = torch.Generator().manual_seed(0)
    z, c, f = torch.randn(3, 4, 2, 8, generator=generator, dtype=torch.float64)
    normalised, raw = (metrics.sim_aou(z, 3 * c, f, n) - metrics.sim_aou(z, c, f, n) for n in (True, False))
    assert normalised.abs().max() < 1e-12 and raw.abs().min() > 1e-3


@given(vectors())
@settings(max_examples=30)
def test_similarities_equal_naive(tensors: list[torch.Tensor]):
    pairs = {
        metrics.sim_aou: naive.sim_aou,
        metrics.sim_aou_null: naive.sim_aou_null,
        lambda z, c, f: metrics.sim_aou(z, c, f, normalise=False): naive.sim_aou_raw,
    }
    for ours, reference in pairs.items():
        for i, row in enumerate(ours(*tensors)):
            for layer, value in enumerate(row):
                assert float(value) == pytest.approx(reference(*(t[i, layer] for t in tensors)), abs=1e-12)


def test_null_is_what_independent_updates_score():
    """Monte Carlo: unit outputs at given cosines to zero-shot, with independent parts across it."""
    generator = torch.Generator().manual_seed(1)
    n, width = 4000, 48
    zero_shot = torch.zeros(n, 1, width, dtype=torch.float64)
    zero_shot[..., 0] = 1

    def at(rho: float) -> torch.Tensor:
        across = torch.randn(n, 1, width, generator=generator, dtype=torch.float64)
        across[..., 0] = 0
        return rho * zero_shot + (1 - rho**2) ** 0.5 * metrics.normalised(across)

    for rho_context, rho_finetuned in ((0.9, 0.9), (0.2, 0.6), (-0.5, 0.3)):
        arms = zero_shot, at(rho_context), at(rho_finetuned)
        seen = float(metrics.sim_aou(*arms).mean())
        assert float(metrics.sim_aou_null(*arms).mean()) == pytest.approx(seen, abs=0.01)
        assert seen > 0.04  # so 0, the null that one would expect, is wrong by much more than the noise


def test_null_of_identical_outputs_is_zero():
    z = torch.randn(2, 3, 5, dtype=torch.float64)
    assert not metrics.sim_aou_null(z, z, torch.randn_like(z)).abs().max() > 1e-7


def test_random_baseline_depends_on_row_and_seed_alone():
    generator = torch.Generator().manual_seed(2)
    z, c = torch.randn(2, 5, 3, 16, generator=generator, dtype=torch.float64)
    rows = [7, 3, 11, 5, 2]
    value = metrics.sim_aou_random(z, c, rows, seed=4)
    order = [4, 2, 0, 1, 3]
    assert torch.equal(metrics.sim_aou_random(z[order], c[order], [rows[i] for i in order], seed=4), value[order])
    assert not torch.equal(metrics.sim_aou_random(z, c, rows, seed=5), value)
    draw = np.random.default_rng([4, 3]).random((3, 16))
    expected = [naive.cosine(naive.minus(naive.unit(c[1, i]), naive.unit(z[1, i])), draw[i]) for i in range(3)]
    assert value[1].tolist() == pytest.approx(expected, abs=1e-12)


def scores(seed: int) -> tuple[torch.Tensor, ...]:
    """Three arms of `[query, layer, head, token]`."""
    return tuple(torch.randn(3, 4, 2, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@given(st.integers(0, 999))
@settings(max_examples=20)
def test_sim_am_equals_naive(seed: int):
    zero_shot, in_context, finetuned = scores(seed)
    direct, delta = metrics.sim_am(in_context, finetuned), metrics.sim_am_delta(*scores(seed), first_layer=True)
    assert direct.abs().max() <= 1 and delta.abs().max() <= 1
    for i in range(4):
        for layer in range(2):
            arms = [arm[i, layer] for arm in (zero_shot, in_context, finetuned)]
            assert float(direct[i, layer]) == pytest.approx(naive.sim_am(*arms[1:]), abs=1e-12)
            assert float(delta[i, layer]) == pytest.approx(naive.sim_am_delta(*arms), abs=1e-12)
    torch.testing.assert_close(metrics.sim_am(finetuned, in_context), direct)


def test_columns_of_zeros_do_not_count():
    """Padding behind the read token is 0 in all arms, and must change nothing."""
    padded = [torch.nn.functional.pad(arm, (0, 6)) for arm in scores(1)]
    torch.testing.assert_close(metrics.sim_am(*padded[1:]), metrics.sim_am(*scores(1)[1:]))
    torch.testing.assert_close(metrics.sim_am_delta(*padded, True), metrics.sim_am_delta(*scores(1), True))


def test_direct_feels_an_offset_that_softmax_does_not():
    _zero_shot, in_context, finetuned = scores(2)
    assert (metrics.sim_am(in_context, finetuned + 5) - metrics.sim_am(in_context, finetuned)).abs().min() > 1e-3


def test_lowest_layer_of_delta_is_undefined_where_it_cannot_see_the_prompt():
    seeing, blind = (metrics.sim_am_delta(*scores(3), first_layer=sees) for sees in (True, False))
    assert blind[:, 0].isnan().all() and not seeing.isnan().any()
    assert torch.equal(blind[:, 1:], seeing[:, 1:])


def test_zero_vectors_are_undefined_not_zero():
    z, c, f = (torch.randn(2, 2, 6, dtype=torch.float64) for _ in range(3))
    f[0] = z[0]  # finetuning changed nothing for the first query
    for normalise in (True, False):
        value = metrics.sim_aou(z, c, f, normalise)
        assert value[0].isnan().all() and not value[1].isnan().any()
    _zero_shot, in_context, finetuned = scores(4)
    finetuned[0, 0, :2] = 0  # two of five heads
    expected = np.mean([naive.cosine(in_context[0, 0, h], finetuned[0, 0, h]) for h in (2, 3, 4)])
    assert float(metrics.sim_am(in_context, finetuned)[0, 0]) == pytest.approx(expected)
    finetuned[0, 0] = 0
    value = metrics.sim_am(in_context, finetuned)
    assert value[0, 0].isnan() and int(value.isnan().sum()) == 1


# ------------------------------------------------------------------------------------------------------------- chance
def test_jaccard_by_chance_is_that_of_shuffled_questions() -> None:
    rng = np.random.default_rng(0)
    z, c, f = rng.integers(0, 3, (3, 300))
    expected = metrics.jaccard_by_chance(z, c, f)
    order = np.argsort(z, kind="stable")
    draws = []
    for _ in range(400):
        shuffled = np.lexsort((rng.random(300), z))  # within the questions of one zero-shot answer
        draws.append(metrics.jaccard(z[order], c[order], f[shuffled], z, "all"))
    assert np.mean(draws) == pytest.approx(expected, abs=0.01)
    assert metrics.jaccard(z, c, c, z, "all") > expected + 0.3, "control: the same changes share more"
    assert np.isnan(metrics.jaccard_by_chance(z, z, z))
