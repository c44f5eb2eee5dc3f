"""The small transformer against plain loops, and its forward pass as one gradient step a layer, over random shapes."""

from functools import partial

import naive_transformer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iclgd_helpers.theory import transformer
from iclgd_helpers.theory.gradient_step import relative_error

FINITE = ("identity", "elu1", "exp", "rff", "favor")


@st.composite
def configs(draw, **fixed):
    """Kinds and shapes; normalised attention needs a positive kernel, and no RoPE."""
    attention = fixed.get("attention") or draw(st.sampled_from(("linear", "normalised", "softmax")))
    positive = ("elu1", "exp", "favor")
    places = ("none", "learned", "alibi") if attention == "normalised" else ("none", "learned", "rope", "alibi")
    values = {
        "n_layers": draw(st.integers(1, 3)),
        "d_model": draw(st.integers(3, 8)),
        "n_heads": draw(st.integers(1, 3)),
        "d_head": draw(st.sampled_from((2, 4))),
        "attention": attention,
        "feature_map": draw(st.sampled_from(positive if attention == "normalised" else FINITE)),
        "causal": draw(st.booleans()),
        "norm": draw(st.sampled_from(("pre", "post"))),
        "biases": draw(st.booleans()),
        "mlp": draw(st.booleans()),
        "positions": draw(st.sampled_from(places)),
    }
    return transformer.Config(**values | fixed)


def material(config, m, n, seed, dtype=torch.float64):
    """Weights, prompt `[d_model, n]` and demonstrations `[d_model, m]`."""
    generator = torch.Generator().manual_seed(seed)
    weights = transformer.random_weights(config, generator, dtype)
    tokens = torch.randn(config.d_model, m + n, generator=generator, dtype=torch.float64).to(dtype)
    return weights, tokens[:, m:], tokens[:, :m]


counts = {"m": st.integers(0, 6), "n": st.integers(1, 5), "seed": st.integers(0, 10_000)}


def close(actual, expected, tolerance=1e-9):
    assert relative_error(actual, expected) < tolerance


@settings(max_examples=60)
@given(config=configs(), first=st.integers(0, 9), **counts)
def test_forward_is_the_plain_loop(config, m, n, seed, first):
    weights, prompt, demonstrations = material(config, m, n, seed)
    trace = transformer.forward(weights, prompt, demonstrations, first_position=first)
    expected = naive_transformer.forward(weights, prompt, demonstrations, first_position=first)
    assert len(trace.states) == len(expected) == config.n_layers + 1
    for actual, wanted in zip(trace.states, expected, strict=True):
        close(actual, wanted)
    close(trace.output, expected[-1][:, m:])


@settings(max_examples=60)
@given(config=configs(), rate=st.sampled_from((None, 0.3, 7.0)), **counts)
def test_one_step_a_layer_is_the_forward_pass(config, m, n, seed, rate):
    weights, prompt, demonstrations = material(config, m, n, seed)
    actual = transformer.one_step_forward(weights, prompt, demonstrations, learning_rate=rate)
    expected = naive_transformer.forward(weights, prompt, demonstrations)
    for ours, wanted in zip(actual.states, expected, strict=True):
        close(ours, wanted, 1e-8)


@settings(max_examples=15)
@given(config=configs(feature_map="elu1", norm="post", positions="none"), **counts)
def test_single_precision(config, m, n, seed):
    weights, prompt, demonstrations = material(config, m, n, seed, torch.float32)
    actual = transformer.one_step_forward(weights, prompt, demonstrations)
    assert actual.output.dtype == torch.float32
    close(actual.output, transformer.forward(weights, prompt, demonstrations).output, 1e-3)


@settings(max_examples=20)
@given(seed=counts["seed"], m=st.integers(2, 6), n=st.integers(2, 5))
def test_a_wrong_split_is_seen(seed, m, n):
    weights, prompt, demonstrations = material(transformer.Config(n_layers=2), m, n, seed)
    expected = transformer.forward(weights, prompt, demonstrations).output

    def literal(causal, token, n_demonstrations, n_tokens):  # Lemma 6.1 as printed: all demonstrations for everybody
        return range(n_demonstrations, max(token + 1, n_demonstrations)), range(n_demonstrations)

    assert (
        relative_error(transformer.one_step_forward(weights, prompt, demonstrations, split=literal).output, expected)
        > 1e-6
    )
    halved = transformer.one_step_forward(weights, prompt, demonstrations[:, 1:])
    assert relative_error(halved.output, expected) > 1e-6


@settings(max_examples=20)
@given(token=st.integers(0, 11), m=st.integers(0, 12), causal=st.booleans())
def test_training_tokens(token, m, causal):
    base, trained = (set(part) for part in transformer.training_tokens(causal, token, m, 12))
    seen = set(range(token + 1)) if causal else set(range(12))
    assert base | trained == seen and not base & trained
    assert base == {i for i in seen if i >= m}


@settings(max_examples=20)
@given(config=configs(attention="linear", positions="none"), **counts)
def test_written_weight_adds_up_over_tokens(config, m, n, seed):
    weights, prompt, demonstrations = material(config, m, n, seed)
    for heads in transformer.forward(weights, prompt, demonstrations).heads:
        parts = (transformer.written_weight(heads, part) for part in (slice(0, m), slice(m, None)))
        whole = torch.stack([sum(torch.outer(v, k) for v, k in zip(heads.values[h].T, heads.keys[h].T, strict=True))
                             for h in range(config.n_heads)])  # fmt: skip
        close(sum(parts), whole)


@settings(max_examples=20)
@given(config=configs(), **counts)
def test_causal_demonstrations_never_see_the_prompt(config, m, n, seed):
    weights, prompt, demonstrations = material(config, m, n, seed)
    first = transformer.forward(weights, prompt, demonstrations)
    second = transformer.forward(weights, -prompt.flip(1), demonstrations)
    equal = torch.allclose(first.states[-1][:, :m], second.states[-1][:, :m], rtol=1e-12, atol=1e-12)
    if config.causal or m == 0:
        assert equal
    alone = transformer.forward(weights, prompt, demonstrations[:, :0])
    close(alone.output, transformer.forward(weights, prompt).output, 1e-15)


@settings(max_examples=15)
@given(shift=st.integers(-5, 9), seed=counts["seed"], d=st.sampled_from((2, 4, 6)))
def test_rotation_depends_on_differences_only(shift, seed, d):
    x, y = torch.randn(2, d, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    where = torch.arange(4.0, dtype=torch.float64)
    turn = partial(transformer.rotate, positions=where + shift)
    close(turn(x).T @ turn(y), transformer.rotate(x, where).T @ transformer.rotate(y, where))
    expected = torch.stack([naive_transformer.turned(x[:, i], i + shift) for i in range(4)], 1)
    close(turn(x), expected, 1e-12)


@pytest.mark.parametrize(
    "wrong",
    [{"attention": "cosine"}, {"norm": "mid"}, {"positions": "sines"}, {"positions": "rope", "d_head": 3},
     {"positions": "rope", "attention": "normalised"}],
)  # fmt: skip
def test_impossible_configurations(wrong):
    with pytest.raises(ValueError, match="unknown|RoPE"):
        transformer.Config(**wrong)


def test_weights_come_from_the_generator_alone():
    first, second, third = (
        transformer.random_weights(transformer.Config(), torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first.layers[3]["w_o"], second.layers[3]["w_o"])
    assert not torch.equal(first.layers[3]["w_o"], third.layers[3]["w_o"])
    plain = transformer.random_weights(
        transformer.Config(biases=False, value_scale=0.5), torch.Generator().manual_seed(1)
    )
    assert not plain.layers[0]["b_v"].any() and not plain.layers[0]["b_o"].any()
    assert torch.equal(plain.layers[0]["w_v"], 0.5 * first.layers[0]["w_v"])
