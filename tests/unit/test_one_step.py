"""The identities between attention and one gradient step, over random shapes, seeds, feature maps, rates and dtypes."""

import io
import math

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iclgd_helpers.pages import figures
from iclgd_helpers.theory.gradient_step import (
    FEATURE_MAPS,
    KernelExpansion,
    TrainingSet,
    fast_weight,
    feature_map,
    gate,
    gradient_step,
    implied_kernel_set,
    implied_training_set,
    kernel_step,
    linear_attention,
    mean_half_squared_error,
    monomial_features,
    ratio,
    relative_error,
    softmax_by_one_step,
    softmax_kernel,
    with_ones_row,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3}
few = settings(max_examples=40)
size = st.integers(1, 9)
rates = st.sampled_from((0.01, 0.37, 1.0, 11.0, 50.0))


class Case:
    """Random own tokens X, demonstrations X' and query, projected; keys have entries of order one."""

    def __init__(self, seed, d_in, d_k, d_v, n_own, n_shown, name="identity", dtype=torch.float64):
        self.generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

        w_k, w_q, w_v = (draw(d, d_in) / math.sqrt(d_in) for d in (d_k, d_k, d_v))
        own, shown, asked = (draw(d_in, n) for n in (n_own, n_shown, 3))
        self.phi = feature_map(name, d_k, self.generator)
        self.keys, self.shown_keys, self.queries = w_k @ own, w_k @ shown, w_q @ asked
        self.values, self.shown_values = w_v @ own, w_v @ shown
        self.all_keys = torch.cat([self.shown_keys, self.keys], 1)
        self.all_values = torch.cat([self.shown_values, self.values], 1)


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    d_in=size,
    d_k=size,
    d_v=size,
    n_own=st.integers(0, 9),
    n_shown=st.integers(1, 12),
    name=st.sampled_from(FEATURE_MAPS),
    dtype=st.sampled_from((torch.float64, torch.float32)),
)


@few
@given(case=cases, rate=rates)
def test_one_step_on_the_implied_set_is_attention_to_the_demonstrations(case, rate):
    """Theorem 3.1: the matrices agree, and so do the outputs for queries that were not used."""
    base = fast_weight(case.values, case.phi(case.keys))
    pairs = implied_training_set(case.shown_values, case.phi(case.shown_keys), base, rate)
    stepped = gradient_step(base, lambda weight: mean_half_squared_error(weight, pairs), rate)
    loud = 1 + rate / case.shown_keys.shape[1]  # a large rate makes labels of nearly nothing but the base
    bound = TOLERANCE[case.values.dtype] * loud * (1 + float(case.phi(case.all_keys).abs().max())) ** 2
    assert relative_error(stepped, fast_weight(case.all_values, case.phi(case.all_keys))) < bound
    seen = linear_attention(case.all_values, case.phi(case.all_keys), case.phi(case.queries))
    difference = stepped @ case.phi(case.queries) - seen
    assert difference.norm() <= bound * case.phi(case.queries).norm() * stepped.norm()


@few
@given(case=cases, rate=rates)
def test_a_step_is_the_written_out_one(case, rate):
    """Against explicit sums over samples, with targets that have nothing to do with attention."""
    inputs, targets = case.shown_keys.double(), case.shown_values.double()
    weight = torch.ones(targets.shape[0], inputs.shape[0], dtype=torch.float64)
    count, expected, loss = inputs.shape[1], weight.clone(), 0.0
    for x, y in zip(inputs.T, targets.T, strict=True):
        expected += rate / count * torch.outer(y - weight @ x, x)
        loss += float(((weight @ x - y) ** 2).sum()) / 2 / count
    pairs = TrainingSet(inputs, targets)
    assert math.isclose(float(mean_half_squared_error(weight, pairs)), loss, rel_tol=1e-12)
    stepped = gradient_step(weight, lambda w: mean_half_squared_error(w, pairs), rate)
    assert relative_error(stepped, expected) < 1e-12
    assert not stepped.requires_grad and (weight == 1).all()


@few
@given(case=cases, rate=rates)
def test_implied_labels_keep_the_values_and_the_base(case, rate):
    values, keys = case.shown_values.double(), case.shown_keys.double()
    base = fast_weight(case.values.double(), case.keys.double())
    pairs = implied_training_set(values, keys, base, rate)
    expected = keys.shape[1] / rate * values + base @ keys
    assert pairs.inputs is keys and torch.allclose(pairs.targets, expected, rtol=1e-12)


@few
@given(case=cases, rate=rates)
def test_linear_attention_is_a_sum_over_tokens(case, rate):
    values, keys, queries = case.all_values.double(), case.all_keys.double(), case.queries.double()
    expected = sum(rate * torch.outer(v, k @ queries) for v, k in zip(values.T, keys.T, strict=True))
    assert relative_error(linear_attention(rate * values, keys, queries), expected) < 1e-10
    assert relative_error(fast_weight(rate * values, keys) @ queries, expected) < 1e-10


@few
@given(case=cases, rate=rates)
def test_softmax_is_a_ratio_of_two_kernel_steps(case, rate):
    own, shown = (case.values, case.keys), (case.shown_values, case.shown_keys)
    scores = case.all_keys.T @ case.queries / case.all_keys.shape[0] ** 0.5
    expected = case.all_values @ torch.softmax(scores, 0)
    bound = 10 * TOLERANCE[case.values.dtype] * (1 + rate / case.shown_keys.shape[1])
    assert relative_error(softmax_by_one_step(own, shown, case.queries, rate), expected) < bound

    def shifted(keys, queries):
        return softmax_kernel(keys, queries, shift=3.0)

    assert relative_error(softmax_by_one_step(own, shown, case.queries, rate, shifted), expected) < bound
    share = gate(case.keys, case.shown_keys, case.queries)
    weights = softmax_kernel(case.all_keys, case.queries)
    expected = weights[: case.shown_keys.shape[1]].sum(0) / weights.sum(0)
    assert torch.allclose(share, expected, rtol=TOLERANCE[share.dtype])


@few
@given(case=cases, rate=rates)
def test_heads_side_by_side_are_the_heads_one_by_one(case, rate):
    def heads(x):
        return torch.stack([x, 0.5 * x, x.flip(-1)])  # three heads with keys, values and queries of their own

    own, shown = ((heads(values), heads(keys)) for values, keys in (
        (case.values, case.keys), (case.shown_values, case.shown_keys)))  # fmt: skip
    queries = heads(case.queries)
    together = softmax_by_one_step(own, shown, queries, rate)
    for head in range(3):
        alone = softmax_by_one_step(*(tuple(x[head] for x in pair) for pair in (own, shown)), queries[head], rate)
        bound = 10 * TOLERANCE[alone.dtype] * (1 + rate / case.shown_keys.shape[1])
        assert relative_error(together[head], alone) < bound


@few
@given(case=cases, rate=rates)
def test_a_kernel_step_is_a_step_in_its_features(case, rate):
    """The step in function space equals autograd's step on the weights of explicit features (any feature map)."""
    keys, shown, queries = case.keys.double(), case.shown_keys.double(), case.queries.double()
    targets = case.shown_values.double()

    def kernel(left, right):
        return case.phi(left).T @ case.phi(right)

    start = KernelExpansion(kernel, keys, case.values.double())
    weight = fast_weight(case.values.double(), case.phi(keys))
    pairs = TrainingSet(case.phi(shown), targets)
    expected = gradient_step(weight, lambda w: mean_half_squared_error(w, pairs), rate) @ case.phi(queries)
    stepped = kernel_step(start, TrainingSet(shown, targets), rate)
    scale = (1 + rate) * (1 + float(case.phi(torch.cat([keys, shown, queries], 1)).norm())) ** 4
    assert (stepped(queries) - expected).norm() <= 1e-10 * scale * (1 + case.all_values.double().norm())
    pairs = implied_kernel_set(targets, shown, start, rate)
    implied = implied_training_set(targets, case.phi(shown), weight, rate)
    assert (pairs.targets - implied.targets).norm() <= 1e-10 * scale * (1 + implied.targets.norm())


@settings(max_examples=20)
@given(d_k=st.integers(1, 4), seed=st.integers(0, 1000), scale=st.sampled_from((None, 0.5, 1.0)))
def test_monomials_are_the_series_of_the_exponential(d_k, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.rand(d_k, n, generator=generator, dtype=torch.float64) * 2 - 1 for n in (4, 6))
    dots = (scale or d_k**-0.5) * left.T @ right
    for degree in (0, 1, 5, 20):
        features = monomial_features(d_k, degree, scale)
        assert features(left).shape == (math.comb(d_k + degree, degree), 4)
        series = sum(dots**n / math.factorial(n) for n in range(degree + 1))
        assert torch.allclose(features(left).T @ features(right), series, rtol=1e-10, atol=1e-12)
    assert torch.allclose(series, softmax_kernel(left, right, scale), rtol=1e-9)


@pytest.mark.parametrize(("name", "kernel"), [("favor", "exponential"), ("rff", "gaussian")])
def test_random_features_estimate_their_kernels(name, kernel):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, n, generator=generator, dtype=torch.float64) / 2 for n in (4, 5))
    exact = (
        torch.exp(left.T @ right) if kernel == "exponential" else torch.exp(-(torch.cdist(left.T, right.T) ** 2) / 2)
    )
    phi = feature_map(name, 3, generator, 40_000)
    assert torch.allclose(phi(left).T @ phi(right), exact, rtol=0.1)
    assert (phi(left) == phi(left)).all(), "directions are drawn once"
    assert phi(left.float()).dtype == torch.float32


def test_plain_feature_maps():
    x = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64)
    assert feature_map("identity", 1)(x).tolist() == x.tolist()
    assert torch.allclose(feature_map("elu1", 1)(x), torch.tensor([[math.exp(-1), 1.0, 3.0]], dtype=torch.float64))
    assert torch.allclose(feature_map("exp", 1)(x), x.exp())


def test_softmax_kernel_by_hand():
    key, query = torch.tensor([[1.0], [2.0], [0.0], [1.0]]), torch.tensor([[0.5], [1.0], [3.0], [-1.0]])
    for options, exponent in (({}, 0.75), ({"scale": 2.0}, 3.0), ({"shift": 1.0}, -0.25)):
        assert math.isclose(float(softmax_kernel(key, query, **options)), math.exp(exponent), rel_tol=1e-6)


def test_relative_error():
    expected = torch.tensor([[3.0, 4.0]])
    assert relative_error(torch.tensor([[3.0, 9.0]]), expected) == 1.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


def test_ones_row_and_ratio():
    values = torch.randn(2, 3)
    assert with_ones_row(values).shape == (3, 3) and torch.equal(ratio(2 * with_ones_row(values)), values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_map("elu2", 3), "unknown feature map 'elu2'"),
        (lambda: feature_map("rff", 3), "pass a generator"),
        (lambda: feature_map("rff", 3, torch.Generator(), 7), "7 is odd"),
        (lambda: implied_training_set(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 2), 1.0), "3 values for 4"),
        (lambda: implied_training_set(torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 2), 1.0), "at least one"),
        (lambda: implied_training_set(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2), 0.0), "must be positive"),
        (lambda: relative_error(torch.ones(2), torch.ones(2, 1)), "shapes differ"),
        (lambda: figures.frames([], [], "nothing"), "at least one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_frame_loses_nothing_as_webp():
    figure, ax = figures.axes()
    ax.imshow(np.arange(12).reshape(3, 4))
    png = figures.png(figure)
    before, after = (PIL.Image.open(io.BytesIO(image)).convert("RGB") for image in (png, figures._webp(png)))
    assert before.tobytes() == after.tobytes() and len(np.unique(np.asarray(before))) > 10


def test_frames_hold_every_picture_and_load_nothing(monkeypatch):
    shown, open_before = [], plt.get_fignums()
    monkeypatch.setattr(figures, "display", lambda *bundles, **options: shown.append(bundles[0]))
    drawn = []
    for height in (0.5, 1.0, 2.0):
        figure, ax = figures.axes()
        ax.plot(np.arange(3) * height)
        drawn.append(figure)
    figures.frames(drawn, ["first", 'a "half" <step>', "last"], "A line that grows")
    (bundle,) = shown
    page = bundle["text/html"]
    assert (page.count("data:image/png;base64,"), page.count("data:image/webp;base64,")) == (1, 2)
    assert bundle["image/png"].startswith(b"\x89PNG") and "from 0 to 4" in page, "what the last frame shows"
    assert "http" not in page and "src=" in page and page.count("<script>") == 1 == page.count("</script>")
    assert 'aria-label="A line that grows"' in page and "<step>" not in page and "first" in page
    assert plt.get_fignums() == open_before, "figures are closed"
