"""
A small explicit transformer, and the same forward pass with every attention layer computed as one gradient step.

Tokens are columns, demonstrations come first. A layer treats its heads by a function (`Attend`), so that a page can put
another one in its place. Such functions are attention as usual, one gradient step, or a deliberately wrong version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional as F

from iclgd_helpers.theory import gradient_step


@dataclass(frozen=True)
class Config:
    """
    Shape and kind of a transformer.

    Attributes
    ----------
    attention
        `linear` sums values times kernel; `normalised` divides by the sum of the kernel; `softmax` too, with the kernel
        $e^{k·q/√d}$.
    feature_map
        of the first two, a name known to `gradient_step.feature_map`. RoPE turns what it gives.
    value_scale
        of value projections; without a norm, stacks explode unless it is small.

    Raises
    ------
    ValueError
        for an unknown name, RoPE with odd `d_head` or in normalised attention (vanishing denominator).
    """

    n_layers: int = 4
    d_model: int = 12
    n_heads: int = 3
    d_head: int = 4
    attention: Literal["linear", "normalised", "softmax"] = "linear"
    feature_map: str = "elu1"
    causal: bool = True
    norm: Literal["none", "pre", "post"] = "pre"
    biases: bool = True
    mlp: bool = True
    positions: Literal["none", "learned", "rope", "alibi"] = "none"
    n_positions: int = 512
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("attention", "norm", "positions"):
            known = get_args(get_type_hints(Config)[name])
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: known are {', '.join(known)}")
        if self.positions == "rope" and (self.d_head % 2 or self.attention == "normalised"):
            raise ValueError("RoPE needs an even d_head, and linear or softmax attention")


@dataclass(frozen=True)
class Weights:
    """Each layer's matrices by name, heads as first axis; `positions` `[d_model, n_positions]`; the feature map."""

    config: Config
    layers: list[dict[str, Tensor]]
    positions: Tensor
    feature: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Heads:
    """
    What the heads of a layer are given.

    Attributes
    ----------
    keys, queries
        features (softmax: plain vectors) `[head, feature, token]`.
    values
        `[head, d_head, token]`, with a last row of ones where attention is normalised.
    positions
        `[token]`.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Trace:
    """
    A forward pass over M demonstrations and N prompt tokens.

    Attributes
    ----------
    states
        the embedding, then the output of each layer, `[d_model, M + N]`.
    heads
        of each layer.
    attended
        the stream between attention and MLP, of each layer, `[d_model, M + N]`.
    """

    n_demonstrations: int
    states: list[Tensor] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    attended: list[Tensor] = field(default_factory=list)

    @property
    def output(self) -> Tensor:
        """Final states of the prompt's tokens `[d_model, N]`."""
        return self.states[-1][:, self.n_demonstrations :]


# (config, heads, n_demonstrations, layer) -> [head, d_head, token]
Attend = Callable[[Config, Heads, int, int], Tensor]
Split = Callable[[bool, int, int, int], tuple[range, range]]  # as `training_tokens`


def random_weights(config: Config, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Weights:
    """Gaussian weights of variance 1 / inputs, norm gains near one, biases and positions of order one half."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    d, h, k, wide = config.d_model, config.n_heads, config.d_head, 4 * config.d_model
    bias = 0.5 if config.biases else 0.0
    layers = []
    for _ in range(config.n_layers):
        layer = {f"w_{name}": normal(h, k, d, scale=d**-0.5) for name in "qkv"}
        layer |= {f"b_{name}": normal(h, k, 1, scale=bias) for name in "qkv"}
        layer["w_v"], layer["b_v"] = config.value_scale * layer["w_v"], config.value_scale * layer["b_v"]
        layer |= {"w_o": normal(h, d, k, scale=(h * k) ** -0.5), "b_o": normal(d, 1, scale=bias)}
        layer |= {"w_1": normal(wide, d, scale=d**-0.5), "b_1": normal(wide, 1, scale=bias)}
        layer |= {"w_2": normal(d, wide, scale=wide**-0.5), "b_2": normal(d, 1, scale=bias)}
        for norm in ("norm_1", "norm_2"):
            layer |= {f"{norm}_gain": 1 + normal(d, scale=0.2), f"{norm}_bias": normal(d, scale=0.4 * bias)}
        layers.append(layer)
    positions = normal(d, config.n_positions, scale=0.5)
    return Weights(config, layers, positions, gradient_step.feature_map(config.feature_map, k, generator))


def layer_norm(columns: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Each column `[d, token]` to mean zero and variance one, then `gain` and `bias` `[d]`."""
    return F.layer_norm(columns.T, gain.shape, gain, bias).T


def rotate(columns: Tensor, positions: Tensor) -> Tensor:
    """
    RoPE: entries 2i and 2i + 1 of each column `[..., d, token]` turn by `positions` `[token]` / 10000^(2i / d).

    Source: Su et al. (2021), equation 15. Positions may be negative.
    """
    d = columns.shape[-2]
    speeds = 10000.0 ** (-torch.arange(0, d, 2, dtype=columns.dtype) / d)
    angles = speeds[:, None] * positions.to(columns.dtype)
    even, odd = columns[..., 0::2, :], columns[..., 1::2, :]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-2).flatten(-3, -2)


def project(weights: Weights, layer: dict[str, Tensor], inputs: Tensor, positions: Tensor) -> Heads:
    """Keys, queries and values of the tokens `inputs` `[d_model, token]`, which are at `positions` `[token]`."""
    config = weights.config
    q, k, v = (layer[f"w_{name}"] @ inputs + layer[f"b_{name}"] for name in "qkv")
    if config.attention != "softmax":
        q, k = (torch.stack([weights.feature(head) for head in x]) for x in (q, k))
    if config.positions == "rope":
        q, k = rotate(q, positions), rotate(k, positions)
    if config.attention != "linear":
        v = torch.stack([gradient_step.with_ones_row(head) for head in v])
    return Heads(k, q, v, positions)


def kernel(config: Config, keys: Tensor, queries: Tensor) -> Tensor:
    """What each key counts for each query: `[head, feature, key], [head, feature, query]` to `[head, key, query]`."""
    scores = keys.mT @ queries
    return torch.exp(scores / config.d_head**0.5) if config.attention == "softmax" else scores


def recency(config: Config, positions: Tensor) -> Tensor:
    """ALiBi's factors $e^{-s|i-j|}$ `[head, key, query]`, slopes 2^(-8 h / n_heads); ones without ALiBi."""
    if config.positions != "alibi":
        return positions.new_ones(config.n_heads, 1, 1)
    slopes = 2.0 ** (-8.0 * torch.arange(1, config.n_heads + 1, dtype=positions.dtype) / config.n_heads)
    return torch.exp(-slopes[:, None, None] * (positions[:, None] - positions).abs())


def read_out(config: Config, sums: Tensor) -> Tensor:
    """Outputs from summed values `[..., d_v, token]`: divided by the last row unless attention is linear."""
    return sums if config.attention == "linear" else sums[..., :-1, :] / sums[..., -1:, :]


def attention(config: Config, heads: Heads, n_demonstrations: int, layer: int) -> Tensor:
    """Attention as usual: every query at once. `[head, d_head, token]`"""
    counts = kernel(config, heads.keys, heads.queries) * recency(config, heads.positions)
    return read_out(config, heads.values @ (counts.triu() if config.causal else counts))


def training_tokens(causal: bool, token: int, n_demonstrations: int, n_tokens: int) -> tuple[range, range]:
    """
    Tokens that write the base, and tokens that are trained on, when `token` asks.

    Source: [C], Lemma 6.1, corrected. Causal: a demonstration has the base zero and is trained on the demonstrations up
    to itself. A prompt token has the prompt up to itself as base, and is trained on all demonstrations.
    """
    if causal and token < n_demonstrations:
        return range(0), range(token + 1)
    return range(n_demonstrations, token + 1 if causal else n_tokens), range(n_demonstrations)


def one_step_attention(
    config: Config,
    heads: Heads,
    n_demonstrations: int,
    layer: int,
    learning_rate: float | None = None,
    split: Split = training_tokens,
) -> Tensor:
    """
    The same outputs, from one gradient step a head and token on the implied training set. `[head, d_head, token]`

    Softmax steps in the space of functions, as its kernel has no finite features. Where attention is normalised, the
    row of ones steps with the values.

    Parameters
    ----------
    learning_rate
        the number of samples by default, as in Algorithm 1.
    split
        which tokens write the base, and which are trained on.

    Source: [C], Theorem 3.1, Algorithm 1 and Lemma 6.1, corrected.
    """
    n_tokens = heads.keys.shape[-1]
    weighted = recency(config, heads.positions).expand(-1, n_tokens, n_tokens)
    sums = torch.empty_like(heads.values)
    for head, token in ((h, t) for h in range(config.n_heads) for t in range(n_tokens)):
        values = heads.values[head] * weighted[head, :, token]
        keys, query = heads.keys[head], heads.queries[head, :, token : token + 1]
        parts = split(config.causal, token, n_demonstrations, n_tokens)
        base, trained = ((values[:, list(part)], keys[:, list(part)]) for part in parts)
        after = _stepped(config, base, trained, learning_rate or max(1, len(parts[1])))
        sums[head, :, token : token + 1] = after(query)
    return read_out(config, sums)


def _stepped(
    config: Config, base: tuple[Tensor, Tensor], trained: tuple[Tensor, Tensor], rate: float
) -> gradient_step.Map:
    """The map of queries after one step: of a matrix, or of a function where the kernel has no finite features."""
    has_samples = trained[0].shape[1] > 0
    if config.attention == "softmax":
        function = gradient_step.KernelExpansion(gradient_step.softmax_kernel, base[1], base[0])
        if not has_samples:
            return function
        return gradient_step.kernel_step(function, gradient_step.implied_kernel_set(*trained, function, rate), rate)
    weight = gradient_step.fast_weight(*base)
    if has_samples:
        data = gradient_step.implied_training_set(*trained, weight, rate)
        weight = gradient_step.gradient_step(weight, lambda w: gradient_step.mean_half_squared_error(w, data), rate)
    return lambda query: weight @ query


def forward(
    weights: Weights,
    prompt: Tensor,
    demonstrations: Tensor | None = None,
    attend: Attend = attention,
    first_position: int = 0,
) -> Trace:
    """
    Run on `[demonstrations, prompt]`, `[d_model, M]` and `[d_model, N]`; zero-shot without demonstrations.

    Parameters
    ----------
    attend
        how each layer's heads give their outputs.
    first_position
        of the first token of all.
    """
    config, past = weights.config, prompt[:, :0] if demonstrations is None else demonstrations
    x, m = torch.cat([past, prompt], dim=1), past.shape[1]
    positions = torch.arange(first_position, first_position + x.shape[1]).to(x.dtype)
    if config.positions == "learned":
        x = x + weights.positions[:, positions.long()]
    trace = Trace(m, [x])
    pre, post = config.norm == "pre", config.norm == "post"
    for number, layer in enumerate(weights.layers):
        norms = [partial(layer_norm, gain=layer[f"norm_{i}_gain"], bias=layer[f"norm_{i}_bias"]) for i in (1, 2)]
        heads = project(weights, layer, norms[0](x) if pre else x, positions)
        x = x + (layer["w_o"] @ attend(config, heads, m, number)).sum(0) + layer["b_o"]
        x = norms[0](x) if post else x
        trace.heads.append(heads)
        trace.attended.append(x)
        if config.mlp:
            inner = F.gelu(layer["w_1"] @ (norms[1](x) if pre else x) + layer["b_1"])
            x = x + layer["w_2"] @ inner + layer["b_2"]
            x = norms[1](x) if post else x
        trace.states.append(x)
    return trace


def one_step_forward(
    weights: Weights,
    prompt: Tensor,
    demonstrations: Tensor | None = None,
    learning_rate: float | None = None,
    split: Split = training_tokens,
) -> Trace:
    """
    `forward`, with every attention layer computed by `one_step_attention`.

    Source: [C], Algorithm 1 and Theorem 4.1, corrected.
    """
    attend = partial(one_step_attention, learning_rate=learning_rate, split=split)
    return forward(weights, prompt, demonstrations, attend)


def written_weight(heads: Heads, tokens: slice) -> Tensor:
    """The fast weights that `tokens` write into each head, `[head, d_v, feature]`; not for softmax or ALiBi."""
    return heads.values[..., tokens] @ heads.keys[..., tokens].mT
