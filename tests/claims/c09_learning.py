"""Chapter 09: when the implied data are the task's, and what training one linear attention layer finds."""

import numpy as np
import torch
from scipy import integrate, stats
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


def slots_after(
    X: Tensor, Y: Tensor, W_0: Tensor, x_q: Tensor, slot: Tensor, eta: float, layers: int, key: bool, causal: bool
) -> Tensor:
    """The question's slot after so many layers with von Oswald's weights, token by token; `causal`: under a mask."""
    n, (d_y, d) = X.shape[1], W_0.shape
    tokens = [torch.cat([X[:, i], Y[:, i]]) for i in range(n)] + [torch.cat([x_q[:, 0], slot[:, 0]])]
    for _ in range(layers):
        seen = tokens if key else tokens[:n]
        added = []
        for i, asking in enumerate(tokens):
            total = torch.zeros(d_y)
            for other in seen[: i + 1] if causal else seen:
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
    statement="L such layers with the same weights are L gradient steps from any W_0, if demonstrations see one "
    "another without a mask and the question is no key",
    source="von Oswald et al. 2022, section 2; any W_0: this book",
    controls=[
        Control("the question is among the keys: right for one layer, wrong from the second on", {"key": True}),
        Control("demonstrations see those before them only", {"causal": True}),
    ],
    options={"sign": 1.0, "layers": (2, 3)},
)
def slot(
    seed: int,
    sign: float,
    layers: tuple[int, ...] = (1,),
    key: bool = False,
    minus: bool = False,
    causal: bool = False,
) -> list[float]:
    """Answers with `sign` W_0 x_q in the question's slot; `key`: the question is one; `minus`: the slot is all."""
    X, Y, W_0, x_q = regression(seed)
    start = sign * W_0 @ x_q
    read = torch.zeros_like(start) if minus else start + W_0 @ x_q
    return [
        error(read - slots_after(X, Y, W_0, x_q, start, 0.3, n, key, causal), descent(X, Y, W_0, 0.3, n) @ x_q)
        for n in layers
    ]


@claim(
    "V-labels",
    statement="If W_V e_j = c (y_j - W_0 x_j) and W_K e_j = x_j, the implied labels at the base W_0 are the task's "
    "exactly at the rate c n, and the layer is then a step on the task's own loss",
    source="[C] Theorem 3.1 with von Oswald's weights; this book",
    controls=[
        Control("half that rate", {"factor": 1 / 2}),
        Control("value weights at random", {"constructed": False}),
        Control("a base other than the one whose residuals are the values", {"base": 1 / 2}),
    ],
)
def labels(seed: int, factor: float = 1, constructed: bool = True, base: float = 1) -> float:
    X, Y, W_0, _ = regression(seed)
    (d, n), d_y = X.shape, len(Y)
    g = torch.Generator().manual_seed(100 + seed)
    c = 0.2 + float(torch.rand((), generator=g))
    W_K = torch.cat([torch.eye(d), torch.zeros(d, d_y)], 1)
    residual = torch.cat([-W_0, torch.eye(d_y)], 1)
    W_V = c * (residual if constructed else torch.randn(residual.shape, generator=g))
    tokens = [torch.cat([X[:, j], Y[:, j]]) for j in range(n)]
    eta, W = factor * c * n, base * W_0
    implied = torch.stack([n / eta * W_V @ e + W @ (W_K @ e) for e in tokens], 1)
    written = W + sum(torch.outer(W_V @ e, W_K @ e) for e in tokens)
    return max(error(implied, Y), error(written, descent(X, Y, W, eta, 1)))


# -------------------------------------------------------------------------------------- one layer of linear attention
def about(claimed: float, values: Tensor) -> Interval:
    """Interval of the mean of `values`, which must lie within 5.5 standard errors of what is claimed."""
    assert abs(float(values.mean()) - claimed) < 5.5 * stats.sem(values)
    return mean_of(values)


def gauss_hermite(d: int, count: int) -> tuple[Tensor, Tensor]:
    """Points `[point, d]` and their shares, for expectations over N(0, I) exact to degree 2 count - 1 in each entry."""
    nodes, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(count))
    shares = torch.cartesian_prod(*[weights / weights.sum()] * d).reshape(-1, d)
    return torch.cartesian_prod(*[nodes] * d).reshape(-1, d), shares.prod(1)


def moments(
    Lambda: Tensor, noise: float, n: int, mean: Tensor | None = None, base: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    E[G_ab t.x x_c], E[G_ab G_cd] and E[(t.x)^2] by exact Gauss-Hermite quadrature over w ~ N(mean, I).

    G is the mean of (x, y)(x, y)^T over n demonstrations, and t = w - base; mean and base are 0 unless given.
    """
    d = len(Lambda)
    w, share = gauss_hermite(d, 3)
    w = w if mean is None else w + mean
    target = w if base is None else w - base
    S = torch.zeros(len(w), d + 1, d + 1)
    S[:, :d, :d], S[:, :d, d], S[:, d, :d] = Lambda, w @ Lambda, w @ Lambda
    S[:, d, d] = (w @ Lambda * w).sum(1) + noise
    second = torch.einsum("s,sab,scd->abcd", share, S, S)
    second += torch.einsum("s,sac,sbd->abcd", share, S, S) / n + torch.einsum("s,sad,sbc->abcd", share, S, S) / n
    size = (share * (target @ Lambda * target).sum(1)).sum()
    return torch.einsum("s,sab,sc->abc", share, S, target @ Lambda), second, size


def square(T: Tensor, Lambda: Tensor, second: Tensor) -> Tensor:
    """Expected square of sum_abc T_abc G_ab x_c."""
    return torch.einsum("abc,abij,ijk,ck->", T, second, T, Lambda)


def loss_of(T: Tensor, Lambda: Tensor, first: Tensor, second: Tensor, size: Tensor) -> Tensor:
    """Exact error of sum_abc T_abc G_ab x_c against t.x; T = sum over heads of v (x) A."""
    return square(T, Lambda, second) - 2 * (T * first).sum() + size


def population_loss(v: Tensor, A: Tensor, Lambda: Tensor, first: Tensor, second: Tensor, size: Tensor) -> Tensor:
    """`loss_of` for many single heads: `v [run, d + 1]`, `A [run, d + 1, d]`."""
    T = (v[:, :, None, None] * A[:, None]).flatten(1, 2)
    quadratic = (T * (second.flatten(0, 1).flatten(1, 2) @ T @ Lambda)).sum((1, 2))
    return quadratic - 2 * (T * first.flatten(0, 1)).sum((1, 2)) + size


def effective(v: Tensor, A: Tensor) -> Tensor:
    """Gamma of both routes together: v_y A_xx + v_x A_yx^T."""
    d = A.shape[-1]
    return v[..., d] * A[..., :d, :] + torch.outer(v[..., :d], A[..., d, :])


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
    first, second, _ = moments(Lambda, noise, n)
    return torch.linalg.solve(second[d, :d, d, :d], first[d, :d, :] @ torch.linalg.inv(Lambda))


def problem(seed: int) -> tuple[Tensor, int]:
    g = torch.Generator().manual_seed(seed)
    d = 2 + seed % 4
    root = torch.randn(d, d, generator=g)
    return root @ root.T + 0.3 * torch.eye(d), 3 + seed % 20


@claim(
    "V-even",
    statement="Any one-layer linear attention has the loss of b^T Gamma_eff x_q, with Gamma_eff = v_y A_xx + "
    "v_x A_yx^T, plus the mean square of its even part, so it is not better than the best Gamma",
    controls=[
        Control("tasks with a mean: their sign can no longer be turned", {"mean": 1.0}),
        Control("Gamma_eff without the second route, v_x A_yx^T", {"both": False}),
    ],
)
def even_part(seed: int, mean: float = 0.0, both: bool = True) -> float:
    g, noise = torch.Generator().manual_seed(seed), 0.7
    Lambda, n = problem(seed)
    d = len(Lambda)
    v, A, mu = (torch.randn(*shape, generator=g) for shape in ((d + 1,), (d + 1, d), (d,)))
    exact = moments(Lambda, noise, n, mean * mu)
    T = v[:, None, None] * A
    even, odd = T.clone(), torch.zeros_like(T)
    even[:d, d] = even[d, :d] = 0  # x x^T and y^2 keep their sign with that of the task
    odd[d, :d] = effective(v, A) if both else v[d] * A[:d]
    loss = loss_of(T, Lambda, *exact)
    least = Lambda.trace() - (Lambda @ Lambda @ closed_form(Lambda, noise, n)).trace()
    return max(
        error(loss, loss_of(odd, Lambda, *exact) + square(even, Lambda, exact[1])),
        max(0.0, float(1 - loss / least)),
    )


def drawn_inputs(kind: str, Lambda: Tensor) -> tuple[Tensor, Tensor]:
    """Points `[point, d]` of covariance Lambda and their shares; fourth moments of `gaussian` or `signs`."""
    d = len(Lambda)
    if kind == "gaussian":
        z, share = gauss_hermite(d, 3)
    else:
        z = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * d).reshape(-1, d)
        share = torch.full((len(z),), 1 / len(z))
    return z @ torch.linalg.cholesky(Lambda).T, share


def mean_of_scs(Lambda: Tensor, C: Tensor, n: int, kind: str = "gaussian") -> Tensor:
    """E[S C S] from the inputs' own fourth moment, by quadrature."""
    x, share = drawn_inputs(kind, Lambda)
    same = torch.einsum("s,s,sa,sb->ab", share, (x @ C * x).sum(1), x, x)
    return same / n + (n - 1) / n * Lambda @ C @ Lambda


@claim(
    "V-gamma-isotropic",
    statement="For isotropic Gaussian inputs the best one-layer step is a plain gradient step at the rate "
    "n/(n + d + 1 + sigma^2)",
    source="Mahankali et al. 2023, Theorem 1; Ahn et al. 2023",
    controls=[
        Control("inputs of the same covariance that are not Gaussian: random signs", {"kind": "signs"}),
        Control("labels without the noise", {"noise": 0.0}),
    ],
)
def gamma_isotropic(seed: int, kind: str = "gaussian", noise: float = 0.7) -> float:
    Lambda, n = problem(seed)
    d = len(Lambda)
    B = mean_of_scs(torch.eye(d), torch.eye(d), n, kind) + noise / n * torch.eye(d)
    return error(n / (n + d + 1 + 0.7) * torch.eye(d), torch.linalg.inv(B))


@claim(
    "V-gamma-unequal",
    statement="For any covariance and noise the best step is preconditioned by "
    "((1 + 1/n) Lambda + (tr Lambda + sigma^2)/n I)^-1",
    source="Ahn et al. 2023, Theorem 1, without noise; with noise: this book",
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
    source="Mahankali et al. 2023; recomputed here",
    controls=[Control("the best preconditioner for w ~ N(0, I)", {"isotropic": True})],
)
def whitened(seed: int, isotropic: bool = False) -> float:
    Lambda, n = problem(seed)
    d = len(Lambda)
    best = torch.linalg.inv(mean_of_scs(Lambda, torch.linalg.inv(Lambda), n))
    found = closed_form(Lambda, 0.0, n) if isotropic else n / (n + d + 1) * torch.linalg.inv(Lambda)
    return error(found, best)


def lbfgs(v: Tensor, A: Tensor, Lambda: Tensor, n: int, iterations: int = 300) -> tuple[Tensor, Tensor, float]:
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


def near(v: Tensor, A: Tensor, size: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return v + size * torch.randn(v.shape, generator=g), A + size * torch.randn(A.shape, generator=g)


def construction(size: float) -> tuple[Tensor, Tensor]:
    """The weights that use the first route only."""
    v, A = torch.zeros(1, 6), torch.zeros(1, 6, 5)
    v[0, 5], A[0, :5] = size, size * torch.eye(5)
    return v, A


def rank_one(Lambda: Tensor, n: int, place: int = 0) -> tuple[Tensor, Tensor]:
    """The second route alone, along the widest direction (`place` 1: the second widest), at its best size."""
    d = len(Lambda)
    i = int(Lambda.diag().argsort(descending=True)[place])
    v, A = torch.zeros(1, d + 1), torch.zeros(1, d + 1, d)
    v[0, i] = A[0, d, i] = float(closed_form(Lambda, 0.0, n)[i, i]) ** 0.5
    return v, A


@claim(
    "V-trained",
    statement="Training all weights of one linear attention layer, from a start near the construction, finds that step",
    source="Zhang, Frei and Bartlett 2023; measured here on the exact loss",
    drawn="the starts",
    tolerance=1e-4,
    controls=[Control("a start near the second route", {"second_route": True})],
)
def trained(seed: int, second_route: bool = False) -> float:
    g, n = torch.Generator().manual_seed(seed), 10
    start = rank_one(UNEQUAL, n) if second_route else construction(0.3)
    v, A, _ = lbfgs(*near(*start, 0.02, g), UNEQUAL, n)
    return error(effective(v[0], A[0]), closed_form(UNEQUAL, 0.0, n))


@claim(
    "V-rank1",
    statement="The second route of one linear attention layer has a stationary point whose loss is the least that a "
    "Gamma of rank one can reach, tr Lambda - max_i lambda_i^2 Gamma_ii",
    controls=[
        Control("the best layer's loss", {"best": True}),
        Control("the second widest direction", {"place": 1}),
    ],
)
def rank_one_point(seed: int, best: bool = False, place: int = 0) -> float:
    g = torch.Generator().manual_seed(seed)
    Lambda, n = torch.diag(torch.rand(4, generator=g) + torch.arange(4) / 2 + 0.2), 3 + seed % 20
    v, A = (value.requires_grad_() for value in rank_one(Lambda, n, place))
    loss = population_loss(v, A, Lambda, *moments(Lambda, 0.0, n))
    slopes = torch.autograd.grad(loss.sum(), (v, A))
    root = torch.linalg.cholesky(second_moment(Lambda, n))  # the loss is |root^T Gamma L^1/2 - C|^2 and a constant
    C = torch.linalg.solve(root, Lambda @ Lambda.sqrt())
    least = Lambda.trace() - torch.linalg.svdvals(C)[: 4 if best else 1].square().sum()
    return max(error(loss.detach(), least[None]), *(float(slope.norm()) for slope in slopes))


def curvature(v: Tensor, A: Tensor, Lambda: Tensor, n: int) -> float:
    """Smallest curvature of the loss, without that of v -> sv, A -> A/s, which changes nothing."""
    exact, d = moments(Lambda, 0.0, n), len(Lambda)
    v, A = v * (A.norm() / v.norm()) ** 0.5, A * (v.norm() / A.norm()) ** 0.5  # equal shares
    x, scaling = torch.cat([v.flatten(), A.flatten()]), torch.cat([v.flatten(), -A.flatten()])

    def loss(x: Tensor) -> Tensor:
        return population_loss(x[None, : d + 1], x[d + 1 :].view(1, d + 1, d), Lambda, *exact).sum()

    H = torch.autograd.functional.hessian(loss, x)
    lifted = H + 1e3 * torch.outer(scaling, scaling) / scaling.norm() ** 2
    return float(torch.linalg.eigvalsh(lifted)[0])


@claim(
    "V-trap",
    statement="For Lambda = diag(3, 1.5, 1, .5, .2) and 10 demonstrations descent from near the rank-one point ends in "
    "a strict local minimum (up to scaling) above the best loss: curvatures are positive, and descent from its "
    "surroundings returns to the same Gamma_eff",
    drawn="the starts",
    tolerance=1e-4,
    controls=[
        Control("the rank-one point itself, which is a saddle", {"descend": False}),
        Control("100 demonstrations: the end is the best layer", {"n": 100}),
        Control("descent from near the construction", {"near_best": True}),
    ],
)
def trap(seed: int, descend: bool = True, n: int = 10, near_best: bool = False) -> float:
    g, best = torch.Generator().manual_seed(seed), float(least_loss(UNEQUAL, n))
    v, A = rank_one(UNEQUAL, n)
    if descend:
        v, A, _ = lbfgs(*near(v, A, 0.02, g), UNEQUAL, n)
    above = float(population_loss(v, A, UNEQUAL, *moments(UNEQUAL, 0.0, n))) / best - 1
    start = construction(0.5) if near_best else (v, A)
    back = effective(*(w[0] for w in lbfgs(*near(*start, 0.03, g), UNEQUAL, n)[:2]))
    curved = curvature(v, A, UNEQUAL, n)
    return max(error(back, effective(v[0], A[0])), max(0.0, 0.5 - above), max(0.0, 0.01 - curved))


def least_with(v: Tensor, first: Tensor, second: Tensor, size: Tensor) -> Tensor:
    """Least loss over A_xx for the row v of the value matrix; Lambda = I."""
    d = len(v) - 1
    B = torch.einsum("a,i,abij->bj", v, v, second[:, :d, :, :d])
    first = torch.einsum("a,abc->bc", v, first[:, :d])
    return size - (first * torch.linalg.solve(B, first)).sum()


def loss_without_base(mu: Tensor, n: int) -> float:
    """tr M - tr(M B^-1 M) with M = I + mu mu^T, B = (1 + 1/n) M + tr(M)/n I."""
    M = torch.eye(len(mu)) + torch.outer(mu, mu)
    B = (1 + 1 / n) * M + M.trace() / n * torch.eye(len(mu))
    return float(M.trace() - (M @ torch.linalg.solve(B, M)).trace())


@claim(
    "V-prior-mean",
    statement="For tasks with the mean mu the best b^T Gamma x_q has the loss tr M - tr(M B^-1 M); with mu^T x_q in "
    "the slot and the residuals as values the best is d (1 - eta*), as if the mean were zero",
    source="Zhang, Wu and Bartlett 2024 (one step from a learnable start); Xie et al. 2025; closed form: this book",
    controls=[
        Control("the formula for tasks without a mean", {"known": 0.0}),
        Control("half the mean in the slot", {"base": 1 / 2}),
    ],
)
def prior_mean(seed: int, known: float = 1.0, base: float = 1.0) -> float:
    g, d, n = torch.Generator().manual_seed(seed), 2 + seed % 4, 3 + seed % 9
    mu, eye = 2 * torch.randn(d, generator=g), torch.eye(d)
    without = least_with(torch.cat([0 * mu, torch.ones(1)]), *moments(eye, 0.0, n, mu))
    with_base = least_with(torch.cat([-base * mu, torch.ones(1)]), *moments(eye, 0.0, n, mu, base * mu))
    return max(
        error(without, torch.tensor(loss_without_base(known * mu, n))),
        error(with_base, torch.tensor(d * (1 - n / (n + d + 1)))),
    )


@claim(
    "V-base",
    statement="On sampled prompts of tasks with a mean of length 3 a layer without a base loses what the two closed "
    "forms say against a layer with the mean as base, each at its best Gamma (d = 5, n = 10)",
    source="Zhang, Wu and Bartlett 2024; measured here",
    drawn="prompts",
    status="empirical",
    side="above",
    controls=[Control("tasks without a mean: nothing is lost", {"length": 0.0})],
)
def lost_without_base(seed: int, length: float = 3.0) -> Interval:
    g, n, d, size = torch.Generator().manual_seed(seed), 10, 5, 40_000
    mu = torch.zeros(d)
    mu[0] = length

    def errors(base: Tensor, Gamma: Tensor) -> Tensor:
        x = torch.randn(size, n + 1, d, generator=g)
        rest = torch.einsum("snd,sd->sn", x, mu - base + torch.randn(size, d, generator=g))  # y - base.x
        return ((torch.einsum("sn,snd->sd", rest[:, :n], x[:, :n]) / n @ Gamma * x[:, n]).sum(1) - rest[:, n]) ** 2

    M = torch.eye(d) + torch.outer(mu, mu)
    best = torch.linalg.solve((1 + 1 / n) * M + M.trace() / n * torch.eye(d), M)
    lost = errors(torch.zeros(d), best) - errors(mu, n / (n + d + 1) * torch.eye(d))
    return about(loss_without_base(mu, n) - d * (1 - n / (n + d + 1)), lost)


# --------------------------------------------------------------------------------------- keys and queries of their own
@claim(
    "V-saddles",
    statement="With keys and queries of their own (heads of rank one) every choice of eigenvectors u_i of Lambda, with "
    "Gamma = sum gamma_i u_i u_i^T, is a stationary point of loss tr Lambda - sum lambda_i^2 gamma_i over the choice",
    source="Zhang, Singh, Latham and Saxe 2025; recomputed here",
    controls=[
        Control("keys and queries merged into one matrix", {"merged": True}),
        Control("directions that are no eigenvectors", {"turned": True}),
    ],
)
def saddles(seed: int, merged: bool = False, turned: bool = False) -> float:
    g = torch.Generator().manual_seed(seed)
    Lambda, n = problem(seed)
    d = len(Lambda)
    values, vectors = torch.linalg.eigh(Lambda)
    gamma = 1 / ((1 + 1 / n) * values + values.sum() / n)
    chosen = torch.randperm(d, generator=g)[: 1 + seed % (d - 1)]
    if turned:
        vectors = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    v, key, query = torch.zeros(d, d + 1), torch.zeros(d, d + 1), torch.zeros(d, d)
    for i in chosen:
        v[i, d] = gamma[i] ** (1 / 3)
        key[i, :d] = query[i] = gamma[i] ** (1 / 3) * vectors[:, i]
    A = key[:, :, None] * query[:, None, :]
    weights = [v, A] if merged else [v, key, query]
    for weight in weights:
        weight.requires_grad_()
    A = A if merged else key[:, :, None] * query[:, None, :]
    loss = loss_of(torch.einsum("ha,hbc->abc", v, A), Lambda, *moments(Lambda, 0.0, n))
    formula = values.sum() - (values[chosen] ** 2 * gamma[chosen]).sum()
    slopes = torch.autograd.grad(loss, weights)
    return max(error(loss.detach(), formula), *(float(slope.norm()) for slope in slopes))


@claim(
    "V-plateaus",
    statement="From small weights, gradient flow with keys and queries of their own rests near the least losses of "
    "Gamma of rank 1, 2, ..., one principal component after the other (Lambda = diag(3, 1.5, .6), n = 10, the second "
    "route zero)",
    source="Zhang, Singh, Latham and Saxe 2025; recomputed here on the exact loss",
    drawn="the starts",
    tolerance=1e-4,
    controls=[
        Control("keys and queries merged into one matrix, without the second route: one drop", {"merged": True}),
    ],
)
def plateaus(seed: int, merged: bool = False) -> float:
    lam, n, d = np.array([3.0, 1.5, 0.6]), 10, 3
    gamma = 1 / ((1 + 1 / n) * lam + lam.sum() / n)

    def parts(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x[0], x[1:].reshape(d, d)) if merged else (x[:d], *x[d:].reshape(2, d, d))

    def Gamma(x: np.ndarray) -> np.ndarray:
        return x[0] * parts(x)[1] if merged else np.einsum("h,ha,hb->ab", *parts(x))

    def slope(x: np.ndarray) -> np.ndarray:
        R = 2 * ((lam / gamma)[:, None] * Gamma(x) * lam - np.diag(lam**2))
        if merged:
            return np.append((R * parts(x)[1]).sum(), (x[0] * R).ravel())
        v, key, query = parts(x)
        by_head = (np.einsum("ab,ha,hb->h", R, key, query), v[:, None] * (query @ R.T), v[:, None] * (key @ R))
        return np.concatenate([part.ravel() for part in by_head])

    start = 0.003 * np.random.default_rng(seed).standard_normal(1 + d * d if merged else d + 2 * d * d)
    path = integrate.solve_ivp(lambda _, x: -slope(x), (0, 1e5), start, method="LSODA", rtol=1e-8, atol=1e-12).y.T
    losses = np.array([((lam / gamma)[:, None] * Gamma(x) ** 2 * lam).sum() for x in path])
    losses += lam.sum() - 2 * np.array([(lam**2 * Gamma(x).diagonal()).sum() for x in path])
    speed = np.array([np.linalg.norm(slope(x)) for x in path])
    rests = losses[[i for i in range(1, len(speed) - 1) if speed[i] <= min(speed[i - 1], speed[i + 1])]]
    levels = lam.sum() - np.cumsum(lam**2 * gamma)
    return float(max(np.abs(rests / level - 1).min() for level in levels[:-1]))


@claim(
    "V-random",
    statement="Few random layers (weights of unit variance) beat predicting zero, although each takes a step (T3.1)",
    status="empirical",
    side="below",
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
    side="below",
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
    side="below",
    controls=[Control("Lambda^2 alone, which forgets that demonstrations are few", {"many": True})],
)
def moments_of_s(seed: int, many: bool = False) -> Interval:
    g, n, size = torch.Generator().manual_seed(seed), 4 + seed % 9, 20_000
    x = torch.randn(size, n, 5, generator=g) @ UNEQUAL.sqrt()
    formula = UNEQUAL @ UNEQUAL if many else second_moment(UNEQUAL, n)
    ratios = (x.mT @ x / n).square().sum((1, 2)) / formula.trace()
    return mean_of(ratios) if many else about(1, ratios)


@claim(
    "V-rate",
    statement="For isotropic inputs a step at the rate eta has the loss d[(1 - eta)^2 + eta^2 (d + 1)/n] (sampled over "
    "the formula, at 0.8, 1 and 1.2 times the best rate)",
    source="the book's own derivation; Mahankali et al. 2023",
    status="empirical",
    side="below",
    controls=[Control("the formula with d in place of d + 1", {"pairings": 0})],
)
def loss_of_a_rate(seed: int, pairings: int = 1) -> Interval:
    g, n, d, size = torch.Generator().manual_seed(seed), 10, 5, 40_000
    x = torch.randn(size, n + 1, d, generator=g)
    y = torch.einsum("snd,sd->sn", x, torch.randn(size, d, generator=g))
    answer = (torch.einsum("sn,snd->sd", y[:, :n], x[:, :n]) / n * x[:, n]).sum(1)
    rates = [factor * n / (n + d + 1) for factor in (0.8, 1.0, 1.2)]
    formulas = [d * ((1 - rate) ** 2 + rate**2 * (d + pairings) / n) for rate in rates]
    ratios = sum((rate * answer - y[:, n]) ** 2 / formula for rate, formula in zip(rates, formulas, strict=True)) / 3
    return about(1, ratios) if pairings else mean_of(ratios)


@claim(
    "V-steps",
    statement="One gradient step is not enough for the task: four steps with the best polynomial have a fraction of "
    "its loss",
    source="[C] section 5, citing Mahankali et al. 2023",
    status="refuted here",
    refutes="One gradient step is enough for the task.",
    side="below",
    controls=[
        Control("the best single step, which was said to suffice", {"steps": 1}, erratum=(23,)),
        Control("pure noise in place of the further powers: on other prompts it gains nothing", {"noise": True}),
    ],
)
def four_steps(seed: int, steps: int = 4, noise: bool = False) -> Interval:
    g, n, d, size = torch.Generator().manual_seed(seed), 10, 5, 20_000
    x = torch.randn(size, n, d, generator=g)
    powers = torch.linalg.eigvalsh(x.mT @ x / n)[..., None] ** torch.arange(1, steps + 1)
    if noise:
        powers[..., 1:] = torch.randn(size, d, steps - 1, generator=g)
    fit, rest = powers.split(size // 2)  # the loss is taken on prompts that the fit has not seen
    design = fit.reshape(-1, steps)
    scale = design.norm(dim=0)
    q = torch.linalg.lstsq(design / scale, torch.ones(len(design), 1)).solution[:, 0] / scale
    return mean_of(((1 - rest @ q) ** 2).sum(1))
