"""Chapter 09: when the implied data are the task's, and what training one linear attention layer finds."""

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from claims.registry import Control, Interval, chapter, mean_of
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("09_from_identity_to_learning", drawn="sizes, covariance, weights and examples", status="conditional")
OSWALD = "von Oswald et al. 2022, section 2; corrected for the question's slot"


# ------------------------------------------------------------------------------------------- von Oswald's construction
def regression(seed: int) -> tuple[Tensor, ...]:
    """X `[d, n]`, Y `[d_y, n]`, W_0 `[d_y, d]`, x_q `[d, 1]`; sizes from the seed."""
    g = torch.Generator().manual_seed(seed)
    d, d_y, n = 3 + seed % 4, 1 + seed % 3, 4 + seed % 9
    X, W, W_0, x_q = (torch.randn(*s, generator=g) for s in ((d, n), (d_y, d), (d_y, d), (d, 1)))
    return X, W @ X, W_0, x_q


def descent(X: Tensor, Y: Tensor, W: Tensor, eta: float, steps: int) -> Tensor:
    """Gradient descent on the mean of halved squares, by autograd."""
    for _ in range(steps):
        leaf = W.clone().requires_grad_()
        (0.5 * ((leaf @ X - Y) ** 2).sum(0).mean()).backward()
        W = W - eta * leaf.grad
    return W


def slots_after(X: Tensor, Y: Tensor, W_0: Tensor, x_q: Tensor, slot: Tensor, eta: float, layers: int, key: bool):
    """The question's slot after so many layers with von Oswald's weights, token by token."""
    n, (d_y, d) = X.shape[1], W_0.shape
    tokens = [torch.cat([X[:, i], Y[:, i]]) for i in range(n)] + [torch.cat([x_q[:, 0], slot[:, 0]])]
    for _ in range(layers):
        seen = tokens if key else tokens[:n]
        added = []
        for asking in tokens:
            total = torch.zeros(d_y)
            for other in seen:
                total += (W_0 @ other[:d] - other[d:]) * (other[:d] @ asking[:d])
            added.append(torch.cat([torch.zeros(d), eta / n * total]))
        tokens = [token + extra for token, extra in zip(tokens, added, strict=True)]
    return tokens[-1][d:, None]


@claim(
    "V-slot-minus",
    statement="With -W_0 x_q in the question's slot, von Oswald's layer answers as W_0 after one gradient step",
    source=OSWALD,
    controls=[Control("the question is among the keys", {"key": True})],
    options={"sign": -1.0},
)
@claim(
    "V-slot-zero",
    statement="With an empty slot of the question the same holds, if the question is no key",
    source=OSWALD,
    controls=[Control("the question is among the keys", {"key": True})],
    options={"sign": 0.0},
)
@claim(
    "V-slot-plus",
    statement="With +W_0 x_q in its slot the question may be a key, since its residual is zero",
    source=OSWALD,
    controls=[Control("the answer is read as minus the slot", {"minus": True})],
    options={"sign": 1.0, "key": True},
)
@claim(
    "V-tied",
    statement="L such layers with the same weights are L gradient steps from any W_0, if the question is no key",
    source="von Oswald et al. 2022, section 2; any W_0: this book",
    controls=[Control("the question is among the keys: right for one layer, wrong from the second on", {"key": True})],
    options={"sign": 1.0, "layers": (2, 3)},
)
def slot(seed: int, sign: float, layers: tuple[int, ...] = (1,), key: bool = False, minus: bool = False) -> list[float]:
    """Answers with `sign` W_0 x_q in the question's slot; `key`: the question is one; `minus`: the slot is all."""
    X, Y, W_0, x_q = regression(seed)
    start = sign * W_0 @ x_q
    read = torch.zeros_like(start) if minus else start + W_0 @ x_q
    return [
        error(read - slots_after(X, Y, W_0, x_q, start, 0.3, n, key), descent(X, Y, W_0, 0.3, n) @ x_q) for n in layers
    ]


@claim(
    "V-labels",
    statement="With these weights, base W_0 and rate M, the implied labels are the labels of the task",
    source="[C] Theorem 3.1 with von Oswald's weights; this book",
    controls=[Control("half the rate: the labels are others, though the step is the same", {"factor": 1 / 2})],
)
def labels(seed: int, factor: float = 1) -> float:
    X, Y, W_0, _ = regression(seed)
    n = X.shape[1]
    eta = factor * n
    return error(torch.stack([n / eta * (Y[:, i] - W_0 @ X[:, i]) + W_0 @ X[:, i] for i in range(n)], 1), Y)


# -------------------------------------------------------------------------------------- one layer of linear attention
def gauss_hermite(d: int, count: int) -> tuple[Tensor, Tensor]:
    """Points `[point, d]` and their shares, for expectations over N(0, I) exact to degree 2 count - 1 in each entry."""
    nodes, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(count))
    shares = torch.cartesian_prod(*[weights / weights.sum()] * d).reshape(-1, d)
    return torch.cartesian_prod(*[nodes] * d).reshape(-1, d), shares.prod(1)


def moments(Lambda: Tensor, noise: float, n: int) -> tuple[Tensor, Tensor]:
    """E[G_ab (w.x) x_c] and E[G_ab G_cd] for G the mean of (x, y)(x, y)^T, by exact Gauss-Hermite quadrature over w."""
    d = len(Lambda)
    w, share = gauss_hermite(d, 3)
    S = torch.zeros(len(w), d + 1, d + 1)
    S[:, :d, :d], S[:, :d, d], S[:, d, :d] = Lambda, w @ Lambda, w @ Lambda
    S[:, d, d] = (w @ Lambda * w).sum(1) + noise
    second = torch.einsum("s,sab,scd->abcd", share, S, S)
    second += torch.einsum("s,sac,sbd->abcd", share, S, S) / n + torch.einsum("s,sad,sbc->abcd", share, S, S) / n
    return torch.einsum("s,sab,sc->abc", share, S, w @ Lambda), second


def population_loss(v: Tensor, A: Tensor, Lambda: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Exact error of v^T G A x against w.x; `v [run, d + 1]`, `A [run, d + 1, d]`."""
    T = (v[:, :, None, None] * A[:, None]).flatten(1, 2)
    quadratic = (T * (second.flatten(0, 1).flatten(1, 2) @ T @ Lambda)).sum((1, 2))
    return quadratic - 2 * (T * first.flatten(0, 1)).sum((1, 2)) + Lambda.trace()


def closed_form(Lambda: Tensor, noise: float, n: int) -> Tensor:
    return torch.linalg.inv((1 + 1 / n) * Lambda + (Lambda.trace() + noise) / n * torch.eye(len(Lambda)))


def second_moment(Lambda: Tensor, n: int) -> Tensor:
    """E[S^2] of the mean S of x x^T over n demonstrations."""
    return (1 + 1 / n) * Lambda @ Lambda + Lambda.trace() / n * Lambda


def plain_step(Lambda: Tensor, n: int) -> Tensor:
    """The best step at one rate for all directions."""
    return (Lambda @ Lambda).trace() / (second_moment(Lambda, n) @ Lambda).trace() * torch.eye(len(Lambda))


def least_loss(Lambda: Tensor, n: int) -> Tensor:
    """Loss of the best one-layer step."""
    return Lambda.trace() - (Lambda @ Lambda @ closed_form(Lambda, 0.0, n)).trace()


def best_preconditioner(Lambda: Tensor, noise: float, n: int) -> Tensor:
    """Minimiser over Gamma of the exact loss of y-weighted inputs, by solving its normal equations."""
    d = len(Lambda)
    first, second = moments(Lambda, noise, n)
    return torch.linalg.solve(second[d, :d, d, :d], first[d, :d, :] @ torch.linalg.inv(Lambda))


def problem(seed: int) -> tuple[Tensor, int]:
    g = torch.Generator().manual_seed(seed)
    d = 2 + seed % 4
    root = torch.randn(d, d, generator=g)
    return root @ root.T + 0.3 * torch.eye(d), 3 + seed % 20


@claim(
    "V-gamma-isotropic",
    statement="For isotropic inputs the best one-layer step is a plain gradient step at the rate n/(n + d + 1)",
    source="Mahankali et al. 2023, Theorem 1; Ahn et al. 2023",
    controls=[Control("the rate n/(n + d), which forgets the fourth moment's second pairing", {"pairings": 0})],
)
def gamma_isotropic(seed: int, pairings: int = 1) -> float:
    Lambda, n = problem(seed)
    d = len(Lambda)
    return error(n / (n + d + pairings) * torch.eye(d), best_preconditioner(torch.eye(d), 0.0, n))


@claim(
    "V-gamma-unequal",
    statement="For any covariance and noise the best step is preconditioned by "
    "((1 + 1/n) Lambda + (tr Lambda + sigma^2)/n I)^-1",
    source="Ahn et al. 2023, Theorem 1; with noise: this book",
    controls=[Control("without the noise in it", {"noise": 0.0})],
)
def gamma_unequal(seed: int, noise: float = 0.7) -> float:
    Lambda, n = problem(seed)
    return error(closed_form(Lambda, noise, n), best_preconditioner(Lambda, 0.7, n))


@claim(
    "V-loss",
    statement="The loss of the best one-layer step is tr Lambda - tr(Lambda^2 Gamma)",
    controls=[Control("the best plain gradient step", {"plain": True})],
)
def loss_of_best_step(seed: int, plain: bool = False) -> float:
    Lambda, n = problem(seed)
    d = len(Lambda)
    v = torch.zeros(1, d + 1)
    v[0, d] = 1.0
    step = plain_step(Lambda, n) if plain else closed_form(Lambda, 0.0, n)
    A = torch.cat([step, torch.zeros(1, d)])[None]
    return error(population_loss(v, A, Lambda, *moments(Lambda, 0.0, n)), least_loss(Lambda, n)[None])


@claim(
    "V-whitened",
    statement="For tasks w ~ N(0, Lambda^-1) the best preconditioner is n/(n + d + 1) Lambda^-1",
    source="Zhang, Frei and Bartlett 2023; this book, chapter 09",
    controls=[Control("the best preconditioner for w ~ N(0, I)", {"isotropic": True})],
)
def whitened(seed: int, isotropic: bool = False) -> float:
    Lambda, n = problem(seed)
    d = len(Lambda)
    z, share = gauss_hermite(d, 4)
    x = z @ torch.linalg.cholesky(Lambda).T  # E[x x^T Lambda^-1 x x^T] by quadrature, exact to degree 7
    length = (x @ torch.linalg.inv(Lambda) * x).sum(1)
    same = torch.einsum("s,s,sa,sb->ab", share, length, x, x)
    best = torch.linalg.inv(same / n + (n - 1) / n * Lambda)
    found = closed_form(Lambda, 0.0, n) if isotropic else n / (n + d + 1) * torch.linalg.inv(Lambda)
    return error(found, best)


def lbfgs(v: Tensor, A: Tensor, Lambda: Tensor, n: int, iterations: int = 800) -> tuple[Tensor, Tensor, float]:
    exact = moments(Lambda, 0.0, n)
    v, A = v.clone().requires_grad_(), A.clone().requires_grad_()
    options = {"history_size": 60, "line_search_fn": "strong_wolfe", "tolerance_grad": 1e-12, "tolerance_change": 1e-18}
    optimiser = torch.optim.LBFGS([v, A], max_iter=iterations, max_eval=2 * iterations, **options)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = population_loss(v, A, Lambda, *exact).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return v.detach(), A.detach(), float(population_loss(v, A, Lambda, *exact).detach())


UNEQUAL = torch.diag(torch.tensor([3.0, 1.5, 1.0, 0.5, 0.2], dtype=torch.float64))


@claim(
    "V-trained",
    statement="Training all weights of one linear attention layer, from a start near the construction, finds that step",
    source="Zhang, Frei and Bartlett 2023; measured here on the exact loss",
    tolerance=1e-4,
    controls=[Control("the best plain gradient step", {"plain": True})],
)
def trained(seed: int, plain: bool = False) -> float:
    n, d = 10, 5
    if plain:
        return error(plain_step(UNEQUAL, n), closed_form(UNEQUAL, 0.0, n))
    g = torch.Generator().manual_seed(seed)
    v, A = 0.02 * torch.randn(1, d + 1, generator=g), 0.02 * torch.randn(1, d + 1, d, generator=g)
    v[0, d] += 0.3
    A[0, :d] += 0.3 * torch.eye(d)
    v, A, _ = lbfgs(v, A, UNEQUAL, n)
    return error(v[0, d] * A[0, :d], closed_form(UNEQUAL, 0.0, n))


def rank_one(Lambda: Tensor, n: int) -> tuple[Tensor, Tensor]:
    d, widest = len(Lambda), int(Lambda.diag().argmax())
    v, A = torch.zeros(1, d + 1), torch.zeros(1, d + 1, d)
    v[0, widest] = A[0, d, widest] = float(closed_form(Lambda, 0.0, n)[widest, widest]) ** 0.5
    return v, A


@claim(
    "V-rank1",
    statement="The rank-one route of one linear attention layer ends at a stationary point, whose loss is "
    "tr Lambda - max_i lambda_i^2 Gamma_ii",
    controls=[Control("the loss of the best layer", {"best": True})],
)
def rank_one_point(seed: int, best: bool = False) -> float:
    g = torch.Generator().manual_seed(seed)
    Lambda, n = torch.diag(torch.rand(4, generator=g) + torch.arange(4) / 2 + 0.2), 3 + seed % 20
    v, A = (value.requires_grad_() for value in rank_one(Lambda, n))
    loss = population_loss(v, A, Lambda, *moments(Lambda, 0.0, n))
    slopes = torch.autograd.grad(loss.sum(), (v, A))
    reached = (Lambda.diag() ** 2 * closed_form(Lambda, 0.0, n).diag()).max()
    formula = least_loss(Lambda, n) if best else Lambda.trace() - reached
    return max(error(loss.detach(), formula[None]), *(float(slope.norm()) for slope in slopes))


@claim(
    "V-trap",
    statement="For Lambda = diag(3, 1.5, 1, .5, .2) and 10 demonstrations that route leads into a strict local "
    "minimum: descent from its surroundings comes back to it",
    tolerance=1e-6,
    controls=[Control("descent from near the construction", {"near_best": True})],
)
def trap(seed: int, near_best: bool = False) -> list[float]:
    g, n = torch.Generator().manual_seed(seed), 10

    def near(v: Tensor, A: Tensor, size: float) -> tuple[Tensor, Tensor]:
        return v + size * torch.randn(v.shape, generator=g), A + size * torch.randn(A.shape, generator=g)

    v, A, bottom = lbfgs(*near(*rank_one(UNEQUAL, n), 0.02), UNEQUAL, n)
    if near_best:
        v, A = torch.zeros_like(v), torch.zeros_like(A)
        v[0, -1], A[0, :-1] = 0.5, 0.5 * torch.eye(5)
    return [abs(lbfgs(*near(v, A, 0.03), UNEQUAL, n)[2] / bottom - 1) for _ in range(2)]


@claim(
    "V-random",
    statement="Theorem 3.1 holds for every random layer, but few random layers (weights of unit variance) "
    "beat predicting zero",
    status="empirical",
    controls=[Control("layers near von Oswald's construction", {"near": True})],
)
def random_layers(seed: int, near: bool = False) -> Interval:
    g, d, n, size = torch.Generator().manual_seed(seed), 5, 10, 2000
    v, A = torch.randn(size, d + 1, generator=g), torch.randn(size, d + 1, d, generator=g)
    if near:
        v, A = 0.05 * v, 0.05 * A
        v[:, d] += 0.7
        A[:, :d] += 0.7 * torch.eye(d)
    better = population_loss(v, A, torch.eye(d), *moments(torch.eye(d), 0.0, n)) < d
    ends = stats.binomtest(int(better.sum()), size).proportion_ci(method="wilson")
    return Interval(float(ends.low), float(ends.high), size)


@claim(
    "V-prompts",
    statement="On sampled prompts with unequal directions the closed form is better than any plain gradient step",
    source="Ahn et al. 2023; measured here",
    status="empirical",
    controls=[Control("the best plain gradient step", {"plain": True})],
)
def sampled_prompts(seed: int, plain: bool = False) -> Interval:
    g, n, size = torch.Generator().manual_seed(seed), 10, 40_000
    x = torch.randn(size, n + 1, 5, generator=g) @ UNEQUAL.sqrt()
    y = torch.einsum("snd,sd->sn", x, torch.randn(size, 5, generator=g))
    statistic = torch.einsum("sn,snd->sd", y[:, :n], x[:, :n]) / n
    Gamma = plain_step(UNEQUAL, n) if plain else closed_form(UNEQUAL, 0.0, n)
    return mean_of(((statistic @ Gamma * x[:, n]).sum(1) - y[:, n]) ** 2)


@claim(
    "V-moments",
    statement="The fourth moments of Gaussian inputs give E[S^2] = (1 + 1/n) Lambda^2 + tr(Lambda)/n Lambda (sampled "
    "trace over the formula's)",
    source="the book's own derivation; used by Mahankali et al. 2023 and Ahn et al. 2023",
    status="empirical",
    controls=[Control("Lambda^2 alone, which forgets that demonstrations are few", {"many": True})],
)
def moments_of_s(seed: int, many: bool = False) -> Interval:
    g, n, size = torch.Generator().manual_seed(seed), 4 + seed % 9, 20_000
    x = torch.randn(size, n, 5, generator=g) @ UNEQUAL.sqrt()
    formula = UNEQUAL @ UNEQUAL if many else second_moment(UNEQUAL, n)
    return mean_of((x.mT @ x / n).square().sum((1, 2)) / formula.trace())


@claim(
    "V-rate",
    statement="For isotropic inputs a step at the rate eta has the loss d[(1 - eta)^2 + eta^2 (d + 1)/n] (sampled over "
    "the formula, at 0.8, 1 and 1.2 times the best rate)",
    source="the book's own derivation; Mahankali et al. 2023",
    status="empirical",
    controls=[Control("the formula with d in place of d + 1", {"pairings": 0})],
)
def loss_of_a_rate(seed: int, pairings: int = 1) -> Interval:
    g, n, d, size = torch.Generator().manual_seed(seed), 10, 5, 40_000
    x = torch.randn(size, n + 1, d, generator=g)
    y = torch.einsum("snd,sd->sn", x, torch.randn(size, d, generator=g))
    answer = (torch.einsum("sn,snd->sd", y[:, :n], x[:, :n]) / n * x[:, n]).sum(1)
    rates = [factor * n / (n + d + 1) for factor in (0.8, 1.0, 1.2)]
    formulas = [d * ((1 - rate) ** 2 + rate**2 * (d + pairings) / n) for rate in rates]
    return mean_of(
        sum((rate * answer - y[:, n]) ** 2 / formula for rate, formula in zip(rates, formulas, strict=True)) / 3
    )


@claim(
    "V-steps",
    statement="One gradient step is best among layers of linear attention, not enough for the task: four steps with "
    "the best polynomial have a fraction of its loss",
    source="[C] section 5, citing Mahankali et al. 2023",
    status="refuted here",
    controls=[Control("the best single step, which was said to suffice", {"steps": 1}, erratum=(23,))],
)
def four_steps(seed: int, steps: int = 4) -> Interval:
    g, n, d, size = torch.Generator().manual_seed(seed), 10, 5, 20_000
    x = torch.randn(size, n, d, generator=g)
    powers = torch.linalg.eigvalsh(x.mT @ x / n)[..., None] ** torch.arange(1, steps + 1)
    fit, rest = powers.split(size // 2)
    design = fit.reshape(-1, steps)
    scale = design.norm(dim=0)
    q = torch.linalg.lstsq(design / scale, torch.ones(len(design), 1)).solution[:, 0] / scale
    return mean_of(((1 - rest @ q) ** 2).sum(1))
