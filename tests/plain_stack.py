"""The stack of [C], section 4, in plain lines for the claims: linear attention and feed-forward layers, no norms."""

from dataclasses import dataclass

import numpy as np
import torch

from iclgd_helpers.theory.gradient_step import feature_map


@dataclass(frozen=True)
class Stack:
    """Layers `(w_q, w_k, w_v, w_1, w_2)`; `phi` maps columns."""

    layers: list
    phi: object
    causal: bool


def draw(seed, phi="elu1", causal=False, least_layers=3):
    """A stack, demonstrations `[d, M]` and prompt `[d, N]`; shapes and entries from `seed`."""
    rng = np.random.default_rng(seed)
    d, k, m, n = rng.integers([5, 3, 3, 2], [9, 7, 12, 10])
    generator = torch.Generator().manual_seed(int(seed))

    def normal(*shape):
        return torch.randn(*map(int, shape), generator=generator, dtype=torch.float64)

    small = 0.3 / (m + n)  # a polynomial of degree 3^L: without it, states explode
    flat = {"exp": 0.2, "favor": 0.5}.get(phi, 1.0)  # exponentials of exponentials even more so
    layers = [
        (flat * normal(k, d) / d**0.5, flat * normal(k, d) / d**0.5, small * normal(d, d) / d**0.5,
         normal(2 * d, d) / d**0.5, 0.3 * normal(d, 2 * d) / d**0.5)
        for _ in range(least_layers + rng.integers(2))
    ]  # fmt: skip
    return Stack(layers, feature_map(phi, int(k), generator), causal), normal(d, m), normal(d, n)


def feed_forward(layer, columns):
    return layer[4] @ torch.relu(layer[3] @ columns)


def forward(stack, shown, prompt):
    """The states before each layer and after the last, `[d, M + N]`: attention as a sum over the tokens in sight."""
    z, m = torch.cat([shown, prompt], 1), shown.shape[1]
    states = [z]
    for layer in stack.layers:
        w_q, w_k, w_v = layer[:3]
        keys, values, queries = stack.phi(w_k @ z), w_v @ z, stack.phi(w_q @ z)
        new = []
        for i in range(z.shape[1]):
            seen = range(i + 1) if stack.causal else range(z.shape[1])
            new.append(z[:, i] + sum(values[:, j] * torch.dot(keys[:, j], queries[:, i]) for j in seen))
        z = torch.stack(new, 1)
        z = z + feed_forward(layer, z)
        states.append(z)
    assert states[0].shape[1] == m + prompt.shape[1]
    return states


def step(base, inputs, values, rate, labels_rate=None):
    """
    One step from `base` on the mean of 1/2 |W x - y|^2 over `inputs` `[feature, M]`, by autograd, sample by sample.

    The labels are made for `labels_rate`, or `rate`.
    """
    m = inputs.shape[1]
    weight = base.clone().requires_grad_()
    loss = 0
    for x, v in zip(inputs.T, values.T, strict=True):
        label = m / (labels_rate or rate) * v + base @ x
        loss = loss + 0.5 * ((weight @ x - label) ** 2).sum() / m
    return base - rate * torch.autograd.grad(loss, weight)[0]


def algorithm_1(stack, shown, prompt, **fault):
    """
    Algorithm 1 of [C], corrected, for a stack without mask; `fault` names one deviation and its value.

    rate; labels_rate; loss="sum"; base="zero-shot"; demonstrations="base" (they use W_0) or "frozen"; residuals=2;
    query="plain" (no map); keys="plain", or "query" (the map of the queries); feed_forward="return".
    """
    z, m = torch.cat([shown, prompt], 1), shown.shape[1]
    alone = forward(stack, shown[:, :0], prompt)
    for number, layer in enumerate(stack.layers):
        w_q, w_k, w_v = layer[:3]
        own = alone[number] if fault.get("base") == "zero-shot" else z[:, m:]
        w_0 = (w_v @ own) @ stack.phi(w_k @ own).T
        plain = (w_q if fault.get("keys") == "query" else w_k) @ z[:, :m]
        inputs = plain if fault.get("keys") == "plain" else stack.phi(plain)
        rate = fault.get("rate", m) * (m if fault.get("loss") == "sum" else 1)  # a sum's gradient: M times the mean's
        w_1 = step(w_0, inputs, w_v @ z[:, :m], rate, labels_rate=fault.get("labels_rate", m))
        queries = w_q @ z if fault.get("query") == "plain" else stack.phi(w_q @ z)
        moved = z + w_1 @ queries
        if fault.get("demonstrations") == "base":
            moved[:, :m] = z[:, :m] + w_0 @ queries[:, :m]
        elif fault.get("demonstrations") == "frozen":
            moved[:, :m] = z[:, :m]
        z = moved
        if fault.get("feed_forward") == "return":
            return z + feed_forward(layer, z)
        kept = z
        z = fault.get("residuals", 1) * z + feed_forward(layer, z)
        if fault.get("demonstrations") == "frozen":
            z[:, :m] = kept[:, :m]
    return z


def per_token(stack, shown, prompt, literal=False):
    """Lemma 6.1, corrected, in a causal stack: each token has its own base and training set. literal: as printed."""
    z, m = torch.cat([shown, prompt], 1), shown.shape[1]
    for layer in stack.layers:
        w_q, w_k, w_v = layer[:3]
        keys, values, queries = stack.phi(w_k @ z), w_v @ z, stack.phi(w_q @ z)
        new = []
        for i in range(z.shape[1]):
            base = values[:, m : i + 1] @ keys[:, m : i + 1].T  # zero for a demonstration
            samples = slice(0, m) if i >= m or literal else slice(0, i + 1)
            rate = keys[:, samples].shape[1]
            new.append(z[:, i] + step(base, keys[:, samples], values[:, samples], rate) @ queries[:, i])
        z = torch.stack(new, 1)
        z = z + feed_forward(layer, z)
    return z
