"""The small transformer once more, token by token in plain loops, sharing no code with `theory.transformer`."""

import math

import torch


def normed(x, gain, bias):
    """Layer norm of one column."""
    centred = x - x.mean()
    return gain * centred / torch.sqrt((centred**2).mean() + 1e-5) + bias


def gelu(x):
    """x times the normal distribution function."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def turned(x, position):
    """RoPE of one column by complex multiplication."""
    d = len(x)
    pairs = torch.complex(x[0::2].contiguous(), x[1::2].contiguous())
    angles = torch.tensor([position / 10000 ** (2 * i / d) for i in range(d // 2)], dtype=x.dtype)
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs).flatten()


def feature(weights, x):
    """The feature map of one column."""
    return weights.feature(x[:, None])[:, 0]


def attend(config, head, asking, position, seen):
    """Output of one head: `asking` is a query, `seen` a list of (key, value, position)."""
    slope = 2 ** (-8 * (head + 1) / config.n_heads) if config.positions == "alibi" else 0.0
    amounts = []
    for key, _, where in seen:
        score = torch.dot(key, asking)
        amount = torch.exp(score / math.sqrt(config.d_head)) if config.attention == "softmax" else score
        amounts.append(amount * math.exp(-slope * abs(position - where)))
    total = sum(a * value for a, (_, value, _) in zip(amounts, seen, strict=True))
    return total if config.attention == "linear" else total / sum(amounts)


def forward(weights, prompt, demonstrations=None, first_position=0):
    """The states of all layers, each `[d_model, M + N]`; the first is the embedding."""
    config = weights.config
    columns = [] if demonstrations is None else list(demonstrations.T)
    columns = [*columns, *prompt.T]
    where = [first_position + i for i in range(len(columns))]
    if config.positions == "learned":
        columns = [x + weights.positions[:, i] for x, i in zip(columns, where, strict=True)]
    states = [torch.stack(columns, 1)]
    for layer in weights.layers:
        norm_1 = (layer["norm_1_gain"], layer["norm_1_bias"])
        norm_2 = (layer["norm_2_gain"], layer["norm_2_bias"])
        inputs = [normed(x, *norm_1) if config.norm == "pre" else x for x in columns]
        added = [layer["b_o"][:, 0].clone() for _ in columns]
        for h in range(config.n_heads):
            triples = []
            for x, i in zip(inputs, where, strict=True):
                q, k, v = (layer[f"w_{n}"][h] @ x + layer[f"b_{n}"][h, :, 0] for n in "qkv")
                if config.attention != "softmax":
                    q, k = feature(weights, q), feature(weights, k)
                if config.positions == "rope":
                    q, k = turned(q, i), turned(k, i)
                triples.append((q, (k, v, i)))
            for t, (q, (_, _, i)) in enumerate(triples):
                seen = [s for _, s in (triples[: t + 1] if config.causal else triples)]
                added[t] = added[t] + layer["w_o"][h] @ attend(config, h, q, i, seen)
        columns = [x + a for x, a in zip(columns, added, strict=True)]
        if config.norm == "post":
            columns = [normed(x, *norm_1) for x in columns]
        if config.mlp:
            new = []
            for x in columns:
                inner = normed(x, *norm_2) if config.norm == "pre" else x
                y = x + layer["w_2"] @ gelu(layer["w_1"] @ inner + layer["b_1"][:, 0]) + layer["b_2"][:, 0]
                new.append(normed(y, *norm_2) if config.norm == "post" else y)
            columns = new
        states.append(torch.stack(columns, 1))
    return states
