"""Claims of page 03: rate, labels, loss, number of steps, data and weights that the identity leaves open."""

import torch

from claims.registry import Control, chapter
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("03_what_the_step_does_not_say", drawn="sizes, projections, prompt, demonstrations and queries")


class Draw:
    """Projections, prompt and demonstrations (elu + 1) of random sizes, with more outputs than features."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.d_in, self.d_k, self.n = 7, *torch.randint(3, 6, (1,), generator=self.generator).tolist(), 9
        self.d_v = self.d_k + 1
        self.m = int(torch.randint(2, 15, (), generator=self.generator))
        self.w_k, self.w_q = (self.normal(self.d_k, self.d_in) / self.d_in**0.5 for _ in range(2))
        self.w_v = self.normal(self.d_v, self.d_in)
        self.own, self.shown = self.normal(self.d_in, self.n), self.normal(self.d_in, self.m)
        self.base = self.w_v @ self.own @ self.features(self.own).T
        self.keys, self.values = self.features(self.shown), self.w_v @ self.shown
        self.update = sum(torch.outer(v, k) for v, k in zip(self.values.T, self.keys.T, strict=True))
        self.gram = self.keys.T @ self.keys
        flow = self.values @ self.gram
        self.critical = float(2 * self.m * (self.values * flow).sum() / flow.square().sum())
        self.bound = float(2 * self.m / torch.linalg.eigvalsh(self.gram)[-1])

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def features(self, tokens, projection=None):
        x = (self.w_k if projection is None else projection) @ tokens
        return torch.where(x > 0, x + 1, x.exp())

    def labels(self, rate):
        return self.m / rate * self.values + self.base @ self.keys

    def measured_ratio(self, rate):
        """Implied loss after one step over that before, both evaluated as they stand."""
        y = self.labels(rate)
        return float(loss(step(self.base, self.keys, y, rate), self.keys, y) / loss(self.base, self.keys, y))


def loss(weight, inputs, targets):
    return (
        sum(0.5 * (weight @ x - y).square().sum() for x, y in zip(inputs.T, targets.T, strict=True)) / inputs.shape[1]
    )


def step(weight, inputs, targets, rate):
    weight = weight.clone().requires_grad_(True)
    return (weight - rate * torch.autograd.grad(loss(weight, inputs, targets), weight)[0]).detach()


@claim(
    "R-gauge",
    statement="The matrix after the implied step does not depend on the rate: the labels absorb it.",
    source="[C] Theorem 3.1",
    controls=[Control("another rate with the labels kept", {"factor": 2})],
)
def gauge(seed, factor=1):
    d = Draw(seed)
    rates = (0.01, 0.37, 1.0, d.m, 50.0)
    return [error(step(d.base, d.keys, d.labels(rate), factor * rate) - d.base, d.update) for rate in rates]


@claim(
    "R-ratio",
    statement="The implied loss after the step over that before is |V'(I - rate/M G)|^2 / |V'|^2.",
    controls=[Control("the formula without M", {"with_m": False})],
)
def ratio(seed, with_m=True):
    d = Draw(seed)
    share = 1 / d.m if with_m else 1

    def miss(rate):
        left = d.values - rate * share * d.values @ d.gram
        return abs(d.measured_ratio(rate) / float(left.square().sum() / d.values.square().sum()) - 1)

    return [miss(factor * d.critical) for factor in (0.1, 0.5, 1.0, 3.0)]


@claim(
    "R-critical",
    statement="The implied loss falls below the critical rate 2M tr(V'GV'^T)/|V'G|^2, rises above it and stays "
    "at it; at [C]'s rate M it may rise although the forward pass is the same.",
    controls=[Control("half the critical rate, where the loss is lowest", {"factor": 1 / 2})],
)
def critical(seed, factor=1):
    d = Draw(seed)
    assert d.measured_ratio(0.9 * d.critical) < 1 < d.measured_ratio(1.1 * d.critical)
    return abs(d.measured_ratio(factor * d.critical) - 1)


@claim(
    "R-sufficient",
    statement="Below 2M/lambda, two over the largest eigenvalue of the Hessian, the implied loss falls for all "
    "values; the bound is attained, and never above the critical rate.",
    controls=[Control("values along the top eigenvector, a tenth above the bound", {"factor": 1.1})],
)
def sufficient(seed, factor=1):
    d = Draw(seed)
    assert d.bound <= d.critical * (1 + 1e-9) and d.measured_ratio(0.99 * d.bound) < 1
    d.values = d.normal(d.d_v, 1) @ torch.linalg.eigh(d.gram)[1][:, -1:].T  # the worst case
    return abs(d.measured_ratio(factor * d.bound) - 1)


@claim(
    "R-steps",
    statement="After k steps on the implied set the matrix is W_X + V' (sum over i < k of (I - rate/M G)^i) "
    "Phi'^T; from the second step on it depends on the rate.",
    controls=[Control("the same number of steps at another rate", {"factor": 1 / 3, "counts": (2, 5)})],
)
def steps(seed, factor=1, counts=(1, 2, 5)):
    d = Draw(seed)
    rate = 0.9 * d.bound
    shrink = torch.eye(d.m) - rate / d.m * d.gram

    def miss(count):
        weight, power, series = d.base, torch.eye(d.m), torch.zeros(d.m, d.m)
        for _ in range(count):
            weight = step(weight, d.keys, d.labels(factor * rate), factor * rate)
            series, power = series + power, power @ shrink
        return error(weight - d.base, d.values @ series @ d.keys.T)

    return [miss(count) for count in counts]


@claim(
    "R-limit",
    statement="Below 2M/lambda many steps on the implied set converge to W_X + M/rate V' Phi'^+, for dependent "
    "keys too: the limit scales as one over the rate.",
    controls=[Control("the limit of twice the rate", {"factor": 2})],
)
def limit(seed, factor=1):
    d = Draw(seed)
    rank = min(d.m, 3)  # dependent keys whose singular values are known, so that descent converges quickly
    left, right = torch.linalg.qr(d.normal(7, rank))[0], torch.linalg.qr(d.normal(d.m, rank))[0]
    keys = left @ torch.diag(torch.linspace(0.7, 1.3, rank)) @ right.T
    start, rate = d.normal(d.d_v, 7), d.m / 1.3**2
    targets, weight = d.m / rate * d.values + start @ keys, start
    for _ in range(150):
        weight = step(weight, keys, targets, rate)
    return error(weight - start, d.m / (factor * rate) * d.values @ torch.linalg.pinv(keys, rtol=1e-9))


@claim(
    "R-orthonormal",
    statement="With orthonormal keys and rate M one step fits every implied label.",
    status="conditional",
    controls=[Control("keys that are not orthonormal", {"noise": 0.5})],
)
def orthonormal(seed, noise=0.0):
    d = Draw(seed)
    keys = torch.linalg.qr(d.normal(d.m + 3, d.m))[0]
    start = d.normal(d.d_v, d.m + 3)
    keys = keys + noise * d.normal(d.m + 3, d.m) / (d.m + 3) ** 0.5
    targets = d.values + start @ keys
    return error(step(start, keys, targets, d.m) @ keys, targets)


@claim(
    "R-linear-loss",
    statement="The linear loss -sum <v_i, W x_i> takes the same step at rate 1, with no label that mentions the layer.",
    source="the book's own derivation; [B] section 4.1 calls the loss intractable",
    controls=[Control("the squared loss with the plain values as labels", {"squared": True})],
)
def linear_loss(seed, squared=False):
    d = Draw(seed)
    if squared:
        return error(step(d.base, d.keys, d.values, d.m) - d.base, d.update)
    weight = d.base.clone().requires_grad_(True)
    value = -sum(v @ (weight @ k) for v, k in zip(d.values.T, d.keys.T, strict=True))
    return error(-torch.autograd.grad(value, weight)[0], d.update)


@claim(
    "R-linear-fall",
    statement="In that step the linear loss falls by the squared norm of the update.",
    controls=[Control("half of the squared norm, as for a quadratic loss at its best rate", {"share": 1 / 2})],
)
def linear_fall(seed, share=1):
    d = Draw(seed)

    def value(weight):
        return float(-(d.values * (weight @ d.keys)).sum())

    fall = value(d.base) - value(d.base + d.update)
    return abs(fall / (share * float(d.update.square().sum())) - 1)


@claim(
    "R-honest",
    statement="With the plain values as labels one step at rate M adds V'Phi'^T - W_X Phi'Phi'^T, the batch "
    "delta rule.",
    source="the book's own derivation; Widrow and Hoff 1960",
    controls=[Control("the second term left out, that is linear attention", {"second_term": 0})],
)
def honest(seed, second_term=1):
    d = Draw(seed)
    change = step(d.base, d.keys, d.values, d.m) - d.base
    return error(change, d.update - second_term * d.base @ d.keys @ d.keys.T)


@claim(
    "R-online",
    statement="One demonstration at a time, in either order, the implied steps give the batch step.",
    controls=[Control("the delta rule in the two orders", {"implied": False})],
)
def online(seed, implied=True):
    d = Draw(seed)
    rate, changes = 0.5 / float(d.keys.square().sum(0).max()), []
    for order in (range(d.m), reversed(range(d.m))):
        weight = d.base
        for i in order:
            key, target = d.keys[:, i : i + 1], d.values[:, i : i + 1] / rate
            weight = step(weight, key, target + weight @ key if implied else target, rate)
        changes.append(weight - d.base)
    return [error(*changes), *(error(change, d.update) for change in changes)]


@claim(
    "R-mixing",
    statement="Demonstrations mixed by any orthogonal matrix write the same update: the data are not identified.",
    controls=[Control("only the values mixed", {"mixed_keys": False})],
)
def mixing(seed, mixed_keys=True):
    d = Draw(seed)
    mix = torch.linalg.qr(d.normal(d.m, d.m))[0]
    keys, values = d.keys @ mix if mixed_keys else d.keys, d.values @ mix
    return error(step(d.base, keys, d.m * values + d.base @ keys, 1.0) - d.base, d.update)


@claim(
    "R-min-norm",
    statement="For queries that do not span the feature space a smaller update, projected on their span, "
    "answers alike.",
    controls=[Control("the projected update on other queries", {"others": True})],
)
def min_norm(seed, others=False):
    d = Draw(seed)
    spanning, other = (d.features(d.normal(d.d_in, d.d_k - 1), d.w_q) for _ in range(2))
    basis = torch.linalg.qr(spanning)[0]
    smaller = d.update @ basis @ basis.T
    assert smaller.norm() < d.update.norm()
    asked = other if others else spanning
    return error(smaller @ asked, d.update @ asked)


@claim(
    "R-value-weights",
    statement="For one fixed prompt a change of the value projection, V'Phi'^T (X Phi^T)^+, has the "
    "demonstrations' effect.",
    status="conditional",
    controls=[Control("the same change on another prompt", {"another": True})],
)
def value_weights(seed, another=False):
    d = Draw(seed)
    change = d.update @ torch.linalg.pinv(d.own @ d.features(d.own).T)
    prompt = d.normal(d.d_in, d.n) if another else d.own
    written = prompt @ d.features(prompt).T
    return error((d.w_v + change) @ written, d.w_v @ written + d.update)


@claim(
    "R-observation-1",
    statement="Demonstrations change the map that is applied to the query, not the query.",
    source="[C] observation 1",
    controls=[
        Control("the old map on the best of all changed queries (more outputs than features)", {"changed": "queries"})
    ],
)
@claim(
    "R-observation-3",
    statement="The input to which a demonstration's label is attached is the feature of its key.",
    source="[C] observation 3",
    controls=[Control("the feature of its query, as printed", {"inputs": "queries"}, erratum=(6,))],
)
def answers(seed, changed="map", inputs="keys"):
    """To queries, against the layer's answers with demonstrations, token by token."""
    d = Draw(seed)
    z = d.features(d.normal(d.d_in, 5), d.w_q)
    tokens = torch.cat([d.shown, d.own], 1)
    pairs = list(zip((d.w_v @ tokens).T, d.features(tokens).T, strict=True))
    expected = torch.stack([sum(v * float(k @ q) for v, k in pairs) for q in z.T], 1)
    if changed == "queries":
        return error(d.base @ (torch.linalg.pinv(d.base) @ expected), expected)
    inputs = d.keys if inputs == "keys" else d.features(d.shown, d.w_q)
    return error(step(d.base, inputs, d.m * d.values + d.base @ inputs, 1.0) @ z, expected)


@claim(
    "R-observation-2",
    statement="Labels equal to the layer's own predictions on the demonstrations' key features give a zero gradient.",
    source="[C] observation 2, with the feature map",
    controls=[Control("predictions on the keys without the feature map, as printed", {"feature": False}, erratum=(5,))],
)
def observation_2(seed, feature=True):
    d = Draw(seed)
    inputs = d.keys if feature else d.w_k @ d.shown
    return error(step(d.base, d.keys, d.base @ inputs, 1.0), d.base)


@claim(
    "R-precision",
    statement="On a base a million times larger than the update a small rate keeps the identity to rounding of "
    "the base.",
    status="conditional",
    tolerance=1e-7,
    controls=[Control("the rate 1e8, at which rounding eats the labels", {"rate": 1e8})],
)
def precision(seed, rate=0.01):
    d = Draw(seed)
    d.base = 1e6 * d.base * float(d.update.norm() / d.base.norm())
    return error(step(d.base, d.keys, d.labels(rate), rate) - d.base, d.update)
