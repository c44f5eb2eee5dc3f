"""Chapter 07: heads, biases, norms, positions; whole transformers."""

import itertools

import naive_transformer
import numpy as np
import torch
from plain_stack import step
from torch.nn.functional import elu

from claims.registry import Control, chapter
from iclgd_helpers.theory import transformer
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("07_real_blocks_and_positions", drawn="sizes, weights, demonstrations and prompt")


def phi(x):
    return elu(x) + 1


class Layer:
    """Random projections and tokens of one layer; shapes from `seed`, key dimension even."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.d, self.k, self.v, self.m, self.n = map(int, rng.integers([5, 2, 3, 3, 3], [9, 5, 7, 12, 9]))
        self.k *= 2
        self.generator = torch.Generator().manual_seed(int(seed))
        self.w_q, self.w_k = self.normal(self.k, self.d) / self.d**0.5, self.normal(self.k, self.d) / self.d**0.5
        self.w_v = self.normal(self.v, self.d) / self.d**0.5
        self.shown, self.prompt = self.normal(self.d, self.m), self.normal(self.d, self.n)
        self.all = torch.cat([self.shown, self.prompt], 1)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def step(self, keys, values, start=None):
        """The matrix after one step on the demonstrations, from the one that the prompt has written."""
        start = values[:, self.m :] @ keys[:, self.m :].T if start is None else start
        return step(start, keys[:, : self.m], values[:, : self.m], 1.0)


@claim(
    "X-heads",
    statement="With several heads, each takes a step of its own; the output projection adds up the results.",
    source="the book's own; [C] has one head",
    controls=[Control("the heads' matrices exchanged", {"exchanged": 1})],
)
def heads(seed, exchanged=0):
    it = Layer(seed)
    expected, steps, outs, queries = 0, [], [], []
    for _ in range(3):
        w_q, w_k = (it.normal(it.k, it.d) / it.d**0.5 for _ in range(2))
        w_v, w_o = it.normal(it.v, it.d), it.normal(it.d, it.v)
        keys, values, q = phi(w_k @ it.all), w_v @ it.all, phi(w_q @ it.prompt)
        expected = expected + w_o @ values @ (keys.T @ q)
        steps.append(it.step(keys, values))
        outs.append(w_o)
        queries.append(q)
    return error(sum(outs[h] @ steps[h - exchanged] @ queries[h] for h in range(3)), expected)


@claim(
    "X-heads-joint",
    statement="All heads together are one step on M times H block-sparse samples: one head's key in its block each.",
    controls=[Control("M samples with the heads' keys concatenated and their projected values added", {"dense": True})],
)
def heads_joint(seed, dense=False):
    it = Layer(seed)
    n_heads = 2 + seed % 3
    start, inputs, values, queries, expected = [], [], [], [], 0
    for h in range(n_heads):
        w_q, w_k = (it.normal(it.k, it.d) / it.d**0.5 for _ in range(2))
        w_ov = it.normal(it.d, it.v) @ it.normal(it.v, it.d)
        keys, v, q = phi(w_k @ it.all), w_ov @ it.all, phi(w_q @ it.prompt)
        expected = expected + v @ (keys.T @ q)
        start.append(v[:, it.m :] @ keys[:, it.m :].T)
        block = torch.zeros(n_heads * it.k, it.m)
        block[h * it.k : (h + 1) * it.k] = keys[:, : it.m]
        inputs.append(block)
        values.append(v[:, : it.m])
        queries.append(q)
    inputs, values = (sum(parts) if dense else torch.cat(parts, 1) for parts in (inputs, values))
    return error(step(torch.cat(start, 1), inputs, values, 2.0) @ torch.cat(queries), expected)


@claim(
    "X-norm",
    statement="With a norm before attention and biases of keys and values, the training set is in normalised inputs, "
    "with the biases in inputs and labels.",
    controls=[
        Control("a training set of inputs that were not normalised", {"norm": False}),
        Control("a training set without the biases", {"biases": False}),
    ],
)
def normalised_layer(seed, norm=True, biases=True):
    """A layer with norm and biases, whose training set is made with or without them."""
    it = Layer(seed)
    gain, shift = 1 + 0.3 * it.normal(it.d), 0.3 * it.normal(it.d)
    b_q, b_k, b_v = it.normal(it.k, 1), it.normal(it.k, 1), it.normal(it.v, 1)
    z = torch.stack([naive_transformer.normed(x, gain, shift) for x in it.all.T], 1)
    keys, values, q = phi(it.w_k @ z + b_k), it.w_v @ z + b_v, phi(it.w_q @ z[:, it.m :] + b_q)
    shown = z[:, : it.m] if norm else it.shown
    inputs, labels = it.w_k @ shown, it.w_v @ shown
    if biases:
        inputs, labels = inputs + b_k, labels + b_v
    start = values[:, it.m :] @ keys[:, it.m :].T
    return error(step(start, phi(inputs), labels, 1.0) @ q, values @ (keys.T @ q))


@claim(
    "X-learned",
    statement="With learned positions, base and queries are those of the prompt at the places M, ..., M + N - 1.",
    controls=[Control("the base of the prompt at the places 0, ..., N - 1", {"from_zero": True})],
)
def learned(seed, from_zero=False):
    it = Layer(seed)
    table = it.normal(it.d, it.m + it.n)
    z = it.all + table
    keys, values, q = phi(it.w_k @ z), it.w_v @ z, phi(it.w_q @ z[:, it.m :])
    prompt = it.prompt + table[:, : it.n] if from_zero else z[:, it.m :]
    start = it.w_v @ prompt @ phi(it.w_k @ prompt).T
    return error(it.step(keys, values, start) @ q, values @ (keys.T @ q))


def turn(columns, first, apart=1):
    """RoPE of columns that stand at `first`, `first` + 1, ... (if 1 `apart`), by complex multiplication."""
    return torch.stack([naive_transformer.turned(x, first + apart * i) for i, x in enumerate(columns.T)], 1)


@claim(
    "X-rope-matrix",
    statement="RoPE: moving the prompt by M places multiplies its fast weight by the rotation of M, transposed.",
    source="Su et al. (2021); the book's own",
    controls=[Control("the fast weight stays as it was", {"turned": False})],
)
def rope_matrix(seed, turned=True):
    it = Layer(seed)
    keys, values = it.w_k @ it.prompt, it.w_v @ it.prompt
    here, there = values @ turn(keys, 0).T, values @ turn(keys, it.m).T
    rotation = turn(torch.eye(it.k), it.m, apart=0) if turned else torch.eye(it.k)
    return error(here @ rotation.T, there)


@claim(
    "X-rope-after",
    statement="RoPE applied to what elu + 1 gives: moving the prompt leaves its own outputs as they were.",
    source="Su et al. (2021), section 3.3; the book's own",
    controls=[Control("RoPE before elu + 1", {"kind": "before"})],
    options={"kind": "after"},
)
def rope_outputs(seed, kind, move_queries=True):
    """The prompt's own outputs at places 0.. and at M..: `identity`, `softmax`, or elu + 1 `before` or `after` RoPE."""
    it = Layer(seed)

    def outputs(first, first_query):
        keys, q = it.w_k @ it.prompt, it.w_q @ it.prompt
        if kind == "after":  # RoPE after the map
            keys, q = turn(phi(keys), first), turn(phi(q), first_query)
        else:
            keys, q = turn(keys, first), turn(q, first_query)
        if kind == "before":  # RoPE before the map
            keys, q = phi(keys), phi(q)
        scores = keys.T @ q
        return it.w_v @ it.prompt @ (torch.softmax(scores / it.k**0.5, 0) if kind == "softmax" else scores)

    return error(outputs(it.m, it.m if move_queries else 0), outputs(0, 0))


for kind, attention in {"identity": "without a feature map", "softmax": "in softmax attention"}.items():
    claim(
        f"X-rope-{kind}",
        statement=f"RoPE {attention}: moving the prompt leaves its own outputs as they were.",
        source="Su et al. (2021); the book's own",
        controls=[Control("keys are moved, queries are not", {"move_queries": False})],
        options={"kind": kind},
    )(rope_outputs)


@claim(
    "X-rope-negative",
    statement="Under RoPE the zero-shot base is right as it is, if demonstrations stand at negative places j - M.",
    controls=[Control("zero-shot base, demonstrations at the places 0, ..., M - 1", {"from_zero": True})],
)
def rope_negative(seed, from_zero=False):
    it = Layer(seed)
    values, q = it.w_v @ it.all, turn(it.w_q @ it.all, 0)[:, it.m :]
    expected = values @ (turn(it.w_k @ it.all, 0).T @ q)
    start = values[:, it.m :] @ turn(it.w_k @ it.prompt, 0).T
    inputs = turn(it.w_k @ it.shown, 0 if from_zero else -it.m)
    return error(it.step(inputs, values, start) @ turn(it.w_q @ it.prompt, 0), expected)


@claim(
    "X-rope-stack",
    statement="A whole transformer with RoPE answers a prompt alike at whatever place it begins.",
    controls=[Control("the same with learned positions", {"positions": "learned"})],
)
def rope_stack(seed, positions="rope"):
    config = transformer.Config(n_layers=2, positions=positions, attention="softmax")
    generator = torch.Generator().manual_seed(seed)
    weights = transformer.random_weights(config, generator)
    prompt = torch.randn(config.d_model, 5, generator=generator)
    first, second = (naive_transformer.forward(weights, prompt, first_position=i)[-1] for i in (0, 3 + seed % 9))
    return error(second, first)


@claim(
    "X-alibi",
    statement="ALiBi with slope s, in normalised attention, is a step with sample weights exp(s j): recency counts.",
    source="Press et al. (2022); the book's own",
    controls=[Control("all samples count alike", {"weighted": False})],
)
def alibi(seed, weighted=True):
    it = Layer(seed)
    slope, total = 0.25, it.m + it.n
    keys, q = phi(it.w_k @ it.all), phi(it.w_q @ it.all)
    rows = torch.cat([it.w_v @ it.all, torch.ones(1, total)])
    counts = torch.exp(slope * torch.arange(total))
    of_samples = counts if weighted else torch.ones(total)
    expected, found = [], []
    for i in range(it.m, total):
        amounts = torch.tensor([torch.dot(keys[:, j], q[:, i]) * np.exp(-slope * (i - j)) for j in range(i + 1)])
        expected.append((rows[:-1, : i + 1] * amounts).sum(1) / amounts.sum())
        start = (rows * counts)[:, it.m : i + 1] @ keys[:, it.m : i + 1].T
        found.append(weighted_step(start, keys, rows, of_samples[: it.m]) @ q[:, i])
    found = torch.stack(found, 1)
    return error(found[:-1] / found[-1], torch.stack(expected, 1))


def weighted_step(start, keys, rows, counts, rate=2.0):
    """One step on 1/M sum_j counts_j 1/2 |W x_j - y_j|^2, with y_j = M / rate v_j + W_0 x_j."""
    m = len(counts)
    weight = start.clone().requires_grad_()
    loss = 0
    for j in range(m):
        target = m / rate * rows[:, j] + start @ keys[:, j]
        loss = loss + counts[j] / m * 0.5 * ((weight @ keys[:, j] - target) ** 2).sum()
    return start - rate * torch.autograd.grad(loss, weight)[0]


def first_left_out(causal, token, m, n):
    base, trained = transformer.training_tokens(causal, token, m, n)
    return base, range(1, trained.stop) if token >= m else trained


def variant(seed, attention, causal, norm, split=transformer.training_tokens):
    rng = np.random.default_rng(seed)
    layers, heads, m, n = map(int, rng.integers([2, 2, 2, 2], [4, 4, 8, 7]))
    config = transformer.Config(
        n_layers=layers, d_model=4 * heads, n_heads=heads, attention=attention, causal=causal, norm=norm
    )
    generator = torch.Generator().manual_seed(seed)
    weights = transformer.random_weights(config, generator)
    tokens = torch.randn(config.d_model, m + n, generator=generator)
    expected = naive_transformer.forward(weights, tokens[:, m:], tokens[:, :m])[-1][:, m:]
    return error(transformer.one_step_forward(weights, tokens[:, m:], tokens[:, :m], split=split).output, expected)


for attention, causal, where in itertools.product(("linear", "normalised", "softmax"), (True, False), ("pre", "post")):
    mask = "causal" if causal else "full"
    claim(
        f"X-{attention}-{mask}-{where}",
        statement=f"A transformer with heads, biases, MLPs and {where}-norm, {attention} attention, {mask} mask, "
        "equals its layer-by-layer one-step recursion.",
        source="the book's own; [C] Theorem 4.1 for one linear head without norms",
        controls=[Control("the prompt's tokens are not trained on the first demonstration", {"split": first_left_out})],
        options={"attention": attention, "causal": causal, "norm": where},
    )(variant)
