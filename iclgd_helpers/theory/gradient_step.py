"""
One gradient step, and the attention layer that equals it: feature maps, fast weights, implied training sets, kernels.

Tokens are columns. Axes: `d_in`, `d_out`, `d_k`, `d_v`, `feature`, and `token`, `query` or `sample` for columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Kernel = Callable[[Tensor, Tensor], Tensor]  # [d, n], [d, m] -> [n, m]

FEATURE_MAPS = ("identity", "elu1", "exp", "rff", "favor")


def feature_map(name: str, d_k: int, generator: torch.Generator | None = None, n_features: int | None = None) -> Map:
    """
    A map of columns, `[d_k, token]` to `[feature, token]`.

    Parameters
    ----------
    name
        `identity`; `elu1` (elu + 1) or `exp`, both entry by entry; or one of two kinds of random features. `rff` are
        Fourier features of the kernel exp(-|x-y|^2/2), `favor` are positive features of exp(x.y).
    generator
        from which the random ones draw their directions here, once.
    n_features
        of the random ones; 128 of `rff` and 64 of `favor` by default.

    Raises
    ------
    ValueError
        for an unknown name, an odd number of Fourier features, or a missing generator.

    Source: Katharopoulos et al. 2020 (elu1); Rahimi and Recht 2007 (rff); Choromanski et al. 2021 (favor).
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"unknown feature map {name!r}: known are {', '.join(FEATURE_MAPS)}")
    if name == "identity":
        return lambda x: x
    if name == "elu1":
        return lambda x: torch.nn.functional.elu(x) + 1
    if name == "exp":
        return torch.exp
    if generator is None:
        raise ValueError(f"feature map {name!r} is random: pass a generator")
    n_features = n_features or (128 if name == "rff" else 64)
    if name == "favor":
        directions = torch.randn(n_features, d_k, generator=generator, dtype=torch.float64)
        return lambda x: torch.exp(directions.to(x) @ x - x.square().sum(0) / 2) / math.sqrt(n_features)
    if n_features % 2:
        raise ValueError(f"random Fourier features come in pairs: {n_features} is odd")
    directions = torch.randn(n_features // 2, d_k, generator=generator, dtype=torch.float64)

    def fourier(x: Tensor) -> Tensor:
        angles = directions.to(x) @ x
        return torch.cat([angles.cos(), angles.sin()]) * math.sqrt(2 / n_features)

    return fourier


def monomial_features(d_k: int, degree: int, scale: float | None = None) -> Map:
    """
    The explicit features whose inner product is the series of exp(scale x.y) up to `degree`.

    `[d_k, token]` to `[feature, token]` with binomial(d_k + degree, degree) features; `scale` is 1/sqrt(d_k) if None.
    """
    scale = 1 / math.sqrt(d_k) if scale is None else scale
    chosen = [c for n in range(degree + 1) for c in itertools.combinations_with_replacement(range(d_k), n)]
    exponents = torch.tensor([[c.count(i) for i in range(d_k)] for c in chosen])  # [feature, d_k]
    logs = exponents.double().sum(1) * math.log(scale) - torch.lgamma(exponents.double() + 1).sum(1)

    def monomials(x: Tensor) -> Tensor:
        powers = x[:, None] ** torch.arange(degree + 1)[None, :, None].to(x)  # [d_k, exponent, token]
        product = (logs / 2).exp().to(x)[:, None].expand(-1, x.shape[1])
        for row in range(d_k):
            product = product * powers[row, exponents[:, row]]
        return product

    return monomials


def linear_attention(values: Tensor, keys: Tensor, query: Tensor) -> Tensor:
    """`[d_v, token], [feature, token], [feature, query]` to `[d_v, query]`: V K^T q. Source: [C] section 2.1."""
    return values @ (keys.T @ query)


def fast_weight(values: Tensor, keys: Tensor) -> Tensor:
    """The matrix that tokens write, `[d_v, feature]`: the sum of v_i k_i^T. Source: [B] equation 4, [C] equation 5."""
    return values @ keys.T


@dataclass(frozen=True)
class TrainingSet:
    """Pairs for a linear map or a kernel expansion: `inputs [d_in, sample]`, `targets [d_out, sample]`."""

    inputs: Tensor
    targets: Tensor


def _implied(values: Tensor, keys: Tensor, predicted: Tensor, learning_rate: float) -> TrainingSet:
    if learning_rate <= 0:
        raise ValueError(f"the learning rate must be positive, not {learning_rate}")
    if values.shape[-1] != keys.shape[-1] or not values.shape[-1]:
        raise ValueError(f"{values.shape[-1]} values for {keys.shape[-1]} keys: need as many of each, and at least one")
    return TrainingSet(keys, values.shape[-1] / learning_rate * values + predicted)


def implied_training_set(values: Tensor, keys: Tensor, base: Tensor, learning_rate: float) -> TrainingSet:
    """
    The pairs on which one step from `base` adds `fast_weight(values, keys)`, whatever the rate.

    The inputs x_i are the keys, and y_i = M/learning_rate value_i + base x_i for M samples.

    Parameters
    ----------
    values, keys, base
        `[d_v, sample]`, `[feature, sample]`, `[d_v, feature]`.

    Raises
    ------
    ValueError
        without samples, for different numbers of keys and values, or a rate that is not positive.

    Source: [C] Theorem 3.1, corrected (feature map on keys and queries; mean of halved squares).
    """
    return _implied(values, keys, base @ keys, learning_rate)


def mean_half_squared_error(weight: Tensor, training_set: TrainingSet) -> Tensor:
    """Mean over samples of 1/2 |W x_i - y_i|^2, a scalar. Source: [C] equation 4 with the missing 1/2."""
    residual = weight @ training_set.inputs - training_set.targets
    return residual.square().sum() / (2 * residual.shape[1])


def gradient_step(weight: Tensor, loss: Map, learning_rate: float) -> Tensor:
    """`weight` after one step on `loss` (of the weight, a scalar), its gradient by autograd; the result is detached."""
    weight = weight.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(weight), weight)
    return (weight - learning_rate * gradient).detach()


def softmax_kernel(keys: Tensor, queries: Tensor, scale: float | None = None, shift: float | Tensor = 0.0) -> Tensor:
    """exp(scale k.q - shift), `[token, query]`; `scale` is 1/sqrt(d_k) if None. No attention output feels `shift`."""
    scale = 1 / math.sqrt(keys.shape[-2]) if scale is None else scale
    return torch.exp(scale * keys.mT @ queries - shift)


@dataclass(frozen=True)
class KernelExpansion:
    """
    f(q) = sum over j of coefficients_j kernel(centres_j, q): `centres [d, token]`, `coefficients [d_v, token]`.

    With axes before these, as many functions side by side, each asked its own queries.
    """

    kernel: Kernel
    centres: Tensor
    coefficients: Tensor

    def __call__(self, queries: Tensor) -> Tensor:
        """`[d, query]` to `[d_v, query]`."""
        return self.coefficients @ self.kernel(self.centres, queries)


def implied_kernel_set(values: Tensor, keys: Tensor, base: KernelExpansion, learning_rate: float) -> TrainingSet:
    """As `implied_training_set`, for keys `[d_k, sample]` without features and a base that is a function."""
    return _implied(values, keys, base(keys), learning_rate)


def kernel_step(function: KernelExpansion, training_set: TrainingSet, learning_rate: float) -> KernelExpansion:
    """
    `function` after one step on the mean of 1/2 |f(x_i) - y_i|^2, its gradient taken in the kernel's own space.

    That gradient is the function 1/M sum_i (f(x_i) - y_i) kernel(x_i, .); the step appends M centres.
    """
    residual = function(training_set.inputs) - training_set.targets
    centres = torch.cat([function.centres, training_set.inputs], -1)
    added = -learning_rate / residual.shape[-1] * residual
    return KernelExpansion(function.kernel, centres, torch.cat([function.coefficients, added], -1))


def with_ones_row(values: Tensor) -> Tensor:
    """`[d_v, token]` to `[d_v + 1, token]`: a last row of ones, which collects the denominator of softmax."""
    return torch.cat([values, torch.ones_like(values[..., :1, :])], -2)


def ratio(stacked: Tensor) -> Tensor:
    """`[d_v + 1, query]` to `[d_v, query]`: all rows but the last, divided by it."""
    return stacked[..., :-1, :] / stacked[..., -1:, :]


def softmax_by_one_step(
    own: tuple[Tensor, Tensor],
    demonstrations: tuple[Tensor, Tensor],
    queries: Tensor,
    learning_rate: float = 1.0,
    kernel: Kernel = softmax_kernel,
) -> Tensor:
    """
    Softmax attention of `queries [d_k, query]` to demonstrations and own tokens, as a ratio of two kernel steps.

    Numerator and denominator are the rows of one function, which starts at what the own tokens write and takes one
    step; `[d_v, query]`.

    Parameters
    ----------
    own, demonstrations
        `(values [d_v, token], keys [d_k, token])`; there may be no own tokens.
    """
    base = KernelExpansion(kernel, own[1], with_ones_row(own[0]))
    pairs = implied_kernel_set(with_ones_row(demonstrations[0]), demonstrations[1], base, learning_rate)
    return ratio(kernel_step(base, pairs, learning_rate)(queries))


def gate(keys: Tensor, demonstration_keys: Tensor, queries: Tensor) -> Tensor:
    """The demonstrations' share of the softmax attention of each query, `[query]`; 1 where there are no own keys."""
    own, shown = (torch.logsumexp(k.T @ queries / math.sqrt(len(queries)), 0) for k in (keys, demonstration_keys))
    return torch.sigmoid(shown - own)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """
    Frobenius norm of the difference, relative to that of `expected`; of two zeros 0.

    Raises
    ------
    ValueError
        if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    difference = torch.linalg.vector_norm(actual - expected)
    return float(difference / torch.linalg.vector_norm(expected)) if difference else 0.0
