"""Claims of page 04: softmax attention as kernel step, gate, proximal step and running average."""

import math

import torch
from torch.nn import functional as F

from claims.registry import Control, Interval, chapter, mean_of
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("04_softmax_exactly", drawn="sizes, keys, values and queries")


class Draw:
    """Keys, values and queries of a prompt and of demonstrations, of random numbers; d_k = 3, moderate scores."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.d_k, self.d_v = 3, 6
        self.n, self.m = torch.randint(2, 12, (2,), generator=self.generator).tolist()
        self.keys, self.shown_keys = 0.8 * self.normal(3, self.n), 0.8 * self.normal(3, self.m)
        self.values, self.shown_values = self.normal(6, self.n), self.normal(6, self.m)
        self.queries = 0.8 * self.normal(3, 5)
        self.all_keys = torch.cat([self.shown_keys, self.keys], 1)
        self.all_values = torch.cat([self.shown_values, self.values], 1)
        self.truth = self.attend(self.all_values, self.all_keys)
        self.zero_shot = self.attend(self.values, self.keys)
        self.pull, self.own_pull = kernel(self.shown_keys, self.queries), kernel(self.keys, self.queries)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def attend(self, values, keys):
        """torch's own softmax attention."""
        return F.scaled_dot_product_attention(self.queries.T[None], keys.T[None], values.T[None])[0].T


def kernel(keys, queries):
    """exp(k.q/sqrt(d_k)), pair by pair, `[token, query]`."""
    return torch.tensor([[math.exp(float(k @ q) / math.sqrt(len(k))) for q in queries.T] for k in keys.T])


def ones(values):
    return torch.cat([values, torch.ones_like(values[:1])])


@claim(
    "S-additivity",
    statement="For linear attention the effects of two sets of demonstrations add up.",
    controls=[Control("softmax attention, whose effects do not", {"softmax": True})],
)
def additivity(seed, softmax=False):
    d = Draw(seed)
    own, first, second = (d.values, d.keys), (d.shown_values, d.shown_keys), (d.normal(6, 4), d.normal(3, 4))

    def linear(values, keys):
        return sum(torch.outer(v, k) for v, k in zip(values.T, keys.T, strict=True)) @ d.queries

    def effect(*sets):
        attention = d.attend if softmax else linear
        values, keys = (torch.cat([s[i] for s in (own, *sets)], 1) for i in (0, 1))
        return attention(values, keys) - attention(*own)

    return error(effect(first) + effect(second), effect(first, second))


@claim(
    "S-ratio",
    statement="Softmax attention to demonstrations and prompt is the ratio of two rows of one kernel expansion "
    "(values with a row of ones) that starts at the prompt's and takes one functional gradient step, at any rate.",
    controls=[
        Control("the step in the numerator alone", {"read": "numerator"}),
        Control(
            "the sum of equation 5 carried over to a form with a denominator", {"read": "two ratios"}, erratum=(13,)
        ),
        Control("the opposite step", {"direction": -1}),
    ],
)
def ratio(seed, read="ratio", direction=1):
    d = Draw(seed)
    start = ones(d.values) @ d.own_pull
    at_keys = ones(d.values) @ kernel(d.keys, d.shown_keys)

    def miss(rate):
        labels = d.m / rate * ones(d.shown_values) + at_keys
        change = rate / d.m * (labels - at_keys) @ d.pull
        after = start + direction * change
        answers = {
            "ratio": after[:-1] / after[-1],
            "numerator": after[:-1] / start[-1],
            "two ratios": start[:-1] / start[-1] + change[:-1] / change[-1],
        }
        return error(answers[read], d.truth)

    return [miss(rate) for rate in (0.1, 1.0, float(d.m))]


def monomials(x, degree):
    """All ordered products up to `degree`, by repeated Kronecker products: `[1 + d + d^2 + ..., token]`."""
    level, rows = torch.ones_like(x[:1]), []
    for n in range(degree + 1):
        rows.append(level / math.sqrt(math.factorial(n)))
        level = (level[:, None] * x[None] / len(x) ** 0.25).flatten(0, 1)
    return torch.cat(rows)


@claim(
    "S-features",
    statement="With explicit monomial features the kernel step is an ordinary gradient step; its outputs tend "
    "to softmax attention as the degree grows.",
    tolerance=1e-8,
    controls=[Control("features up to degree one: linear attention with a constant", {"degree": 1})],
)
def features(seed, degree=9):
    d = Draw(seed)
    shrink = 0.5 / max(float(d.all_keys.norm(dim=0).max()), float(d.queries.norm(dim=0).max()))
    keys, shown, asked = (shrink * 3**0.5 * x for x in (d.keys, d.shown_keys, d.queries))  # small scores: low degrees
    d.queries = asked
    truth = d.attend(d.all_values, torch.cat([shown, keys], 1))
    own, given, query = (monomials(x, degree) for x in (keys, shown, asked))
    weight = (ones(d.values) @ own.T).requires_grad_(True)
    targets = (d.m * ones(d.shown_values) + weight @ given).detach()
    loss = 0.5 * (weight @ given - targets).square().sum() / d.m
    after = (weight - torch.autograd.grad(loss, weight)[0]).detach() @ query
    return error(after[:-1] / after[-1], truth)


@claim(
    "S-random",
    statement="With positive random features the error of softmax attention falls as features are added "
    "(logarithm of the error at 4096 over that at 64).",
    source="the book's own derivation; Choromanski et al. 2021",
    status="empirical",
    side="below",
    controls=[Control("features without the factor of the keys, whose estimate is biased", {"corrected": False})],
)
def random(seed, corrected=True):
    d = Draw(seed)

    def miss(n_features):
        directions = d.normal(n_features, 3)
        keys, asked = d.all_keys / 3**0.25, d.queries / 3**0.25
        given = (directions @ keys - corrected * keys.square().sum(0) / 2).exp()
        after = ones(d.all_values) @ given.T @ (directions @ asked).exp()
        return error(after[:-1] / after[-1], d.truth)

    return mean_of([math.log10(miss(4096) / miss(64)) for _ in range(40)])


@claim(
    "S-gate",
    statement="Softmax attention is (1 - a) times zero-shot attention plus a times attention to the "
    "demonstrations, with a the logistic function of the difference of log-sum-exps.",
    controls=[Control("the share of demonstrations among tokens in place of a", {"share": True})],
)
def gate(seed, share=False):
    d = Draw(seed)
    odds = d.pull.sum(0).log() - d.own_pull.sum(0).log()
    a = d.m / (d.m + d.n) if share else 1 / (1 + (-odds).exp())
    return error((1 - a) * d.zero_shot + a * d.attend(d.shown_values, d.shown_keys), d.truth)


@claim(
    "S-output-step",
    statement="Per query, softmax attention is one gradient step from the zero-shot output on the weighted squared "
    "distance to the plain values, at every rate whose product with weight i is kappa_i / (Z_X + Z_D).",
    controls=[
        Control("another rate with the weights kept", {"kept": True}),
        Control("weights that are shares among the demonstrations alone", {"shares_of": "demonstrations"}),
    ],
)
def output_step(seed, kept=False, shares_of="all tokens"):
    d = Draw(seed)
    total = d.pull.sum(0) + (d.own_pull.sum(0) if shares_of == "all tokens" else 0)

    def miss(rate):
        weights = d.pull / total / (1 if kept else rate)
        u = d.zero_shot.clone().requires_grad_(True)
        loss = sum(0.5 * (a * (u - v[:, None]).square()).sum() for a, v in zip(weights, d.shown_values.T, strict=True))
        (gradient,) = torch.autograd.grad(loss, u)
        return error(d.zero_shot - rate * gradient, d.truth)

    return [miss(rate) for rate in (0.37, 2.0, 11.0)]


def objective(d, u):
    """Proximal objective of all queries: strength of the prompt times distance to zero-shot, plus that to values."""
    kept = (d.own_pull.sum(0) * (u - d.zero_shot).square()).sum()
    return 0.5 * (
        kept + sum((k * (u - v[:, None]).square()).sum() for k, v in zip(d.pull, d.shown_values.T, strict=True))
    )


@claim(
    "S-minimiser",
    statement="Softmax attention is the exact minimiser of the proximal objective, which therefore never increases.",
    controls=[Control("the gradient at the zero-shot output", {"at": "zero_shot"})],
)
def minimiser(seed, at="truth"):
    d = Draw(seed)
    assert objective(d, d.truth) < objective(d, d.zero_shot)
    u = getattr(d, at).clone().requires_grad_(True)
    slope = torch.autograd.grad(objective(d, u), u)[0]
    return float(slope.norm() / (d.own_pull.sum(0) + d.pull.sum(0)).norm() / d.truth.norm())


@claim(
    "S-online",
    statement="Running averages with rate kernel over running sum, in any order of demonstrations, give softmax "
    "attention.",
    source="the book's own derivation; Milakov and Gimelshein 2018",
    controls=[Control("the rate of an unweighted average", {"weighted": False})],
)
def online(seed, weighted=True):
    d = Draw(seed)

    def stream(order):
        u, total = d.zero_shot.clone(), d.own_pull.sum(0).clone()
        for count, i in enumerate(order, 1):
            total = total + d.pull[i]
            u = u + (d.pull[i] / total if weighted else 1 / (d.n + count)) * (d.shown_values[:, i : i + 1] - u)
        return u

    return [error(stream(torch.randperm(d.m, generator=d.generator).tolist()), d.truth) for _ in range(3)]


@claim(
    "S-sink",
    statement="One added to the denominator of softmax is a prompt token with key zero and value zero.",
    controls=[Control("the prompt without that token", {"tokens": 0})],
)
def sink(seed, tokens=1):
    d = Draw(seed)
    weights = torch.cat([d.pull, d.own_pull])
    zeros = torch.zeros(d.d_v, tokens), torch.zeros(d.d_k, tokens)
    attended = d.attend(*(torch.cat(parts, 1) for parts in zip(zeros, (d.all_values, d.all_keys), strict=True)))
    return error(attended, d.all_values @ (weights / (1 + weights.sum(0))))


@claim(
    "S-test-time",
    statement="On plain values and from zero, one batch step at rate M is linear attention, one pass of single steps "
    "is the delta rule, and the limit of batch steps is V'Phi'^+ at any rate below 2M/lambda; the best constant under "
    "the kernel's weights is softmax attention.",
    source="the book's own derivation; Wang, Shi and Fox 2025, von Oswald et al. 2025",
    controls=[Control("implied labels, here of a base that is not zero", {"implied": True})],
)
def plain_learners(seed, implied=False):
    d, found = Draw(seed), []
    for m in (3, 12):  # fewer and more samples than features
        left, _, right = torch.linalg.svd(d.normal(5, m), full_matrices=False)
        inputs, values = left @ torch.diag(torch.linspace(0.6, 1.0, len(right))) @ right, d.normal(6, m)
        base = d.normal(6, 5) if implied else torch.zeros(6, 5)

        def labels(rate, before, m=m, values=values):
            return m / rate * values + before if implied else values

        def batch(rate, steps, m=m, inputs=inputs, base=base, labels=labels):
            weight, targets = base, labels(rate, base @ inputs)
            for _ in range(steps):
                weight = weight - rate / m * sum(
                    torch.outer(weight @ x - y, x) for x, y in zip(inputs.T, targets.T, strict=True)
                )
            return weight

        online, delta = base.clone(), torch.zeros(6, 5)
        for x, y, v in zip(inputs.T, labels(0.5, base @ inputs).T, values.T, strict=True):
            online.requires_grad_(True)
            (gradient,) = torch.autograd.grad(0.5 * (online @ x - y).square().sum(), online)
            online = (online - 0.5 * gradient).detach()
            delta = delta @ (torch.eye(5) - 0.5 * torch.outer(x, x)) + 0.5 * torch.outer(v, x)
        least = values @ torch.linalg.pinv(inputs)
        found += [error(batch(m, 1), values @ inputs.T), error(online, delta)]
        found += [error(batch(rate, 200), least) for rate in (m, m / 2)]
    start = d.normal(6, 1) if implied else torch.zeros(6, 1)
    targets = d.m / 2 * d.shown_values + start if implied else d.shown_values
    constants = [torch.linalg.lstsq(a.sqrt()[:, None], a.sqrt()[:, None] * targets.T).solution[0] for a in d.pull.T]
    return [*found, error(torch.stack(constants, 1), d.attend(d.shown_values, d.shown_keys))]


def window_of_best_temperature(generator, settings, slope):
    """
    For each setting (noise, n): the mean squared distance from the query of what attention weighs, at its best
    inverse temperature. The settings share their tasks, f(x) = c + theta.x on the sphere.
    """

    def sphere(*shape):
        points = torch.randn(*shape, 3, generator=generator)
        return points / points.norm(dim=-1, keepdim=True)

    def weigh(inputs, queries, inverse_temperature):
        scores = inverse_temperature * torch.einsum("pnd,pd->pn", inputs, queries)
        return scores.softmax(1)

    n_tasks = 100
    inputs, queries = sphere(n_tasks, max(n for _, n in settings)), sphere(n_tasks)
    theta, c = slope * torch.randn(n_tasks, 3, 1, generator=generator), torch.randn(n_tasks, 1, generator=generator)
    labels, wanted = (inputs @ theta)[..., 0] + c, (queries[:, None] @ theta)[..., 0] + c

    def risk(noise, n, inverse_temperature):
        """Squared bias plus the variance that the labels' noise gives; its mean over the noise is exact."""
        weights = weigh(inputs[:, :n], queries, inverse_temperature)
        bias = (weights * labels[:, :n]).sum(1, keepdim=True) - wanted
        return float(bias.square().mean() + noise**2 * weights.square().sum(1).mean())

    def window(noise, n):
        best = min(torch.logspace(-1, 2, 40).tolist(), key=lambda temperature: risk(noise, n, temperature))
        fresh, asked = sphere(200, n), sphere(200)
        weights = weigh(fresh, asked, best)
        distances = (fresh - asked[:, None]).square().sum(2)
        return float((weights * distances).sum(1).mean())

    return [window(*setting) for setting in settings]


bandwidth = {
    "source": "Collins et al. 2024; the noise: the book's own proof",
    "status": "empirical",
    "drawn": "tasks, examples and queries",
    "controls": [
        Control("functions that do not depend on the input, for which the widest window is best", {"slope": 0.0}),
    ],
}


@claim(
    "S-bandwidth-noise",
    statement="The window of softmax attention at its best temperature is wider with more noise (logarithm of its "
    "mean squared distance at noise 1 over that at noise 0.1; the same tasks).",
    options={"settings": ((0.1, 32), (1.0, 32))},
    side="above",
    **bandwidth,
)
@claim(
    "S-bandwidth-examples",
    statement="The window of softmax attention at its best temperature is narrower with more examples (logarithm of "
    "its mean squared distance with 128 examples over that with 8; the same tasks).",
    options={"settings": ((0.5, 8), (0.5, 128))},
    side="below",
    **bandwidth,
)
def moved_window(seed, settings, slope=1.0) -> Interval:
    generator = torch.Generator().manual_seed(seed)
    pairs = [window_of_best_temperature(generator, settings, slope) for _ in range(20)]
    return mean_of([math.log(after / before) for before, after in pairs])
