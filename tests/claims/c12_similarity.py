"""Page 11, its section on the measure: SimAOU does not score zero by chance."""

import torch
from torch import Tensor

from claims.registry import Exact, Measured, claim

HERE = {"notebook": "11_greedy_layers_and_fixed_prompts"}
F64 = {"dtype": torch.float64}
N, D = 4000, 256


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (unit(a) * unit(b)).sum(-1)


def interval(values: Tensor) -> tuple[float, float]:
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return float(values.mean()) - half, float(values.mean()) + half


def states(seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Unit h_ZS, h_ICL, h_FT with given cosines to h_ZS and independent directions apart from it; their null."""
    g = torch.Generator().manual_seed(seed)
    rho = [0.2 + 0.6 * float(torch.rand((), generator=g)) for _ in range(2)]
    c = unit(torch.randn(N, D, generator=g, **F64))
    others = []
    for r in rho:
        away = torch.randn(N, D, generator=g, **F64)
        away = unit(away - (away * c).sum(-1, keepdim=True) * c)
        others.append(r * c + (1 - r**2) ** 0.5 * away)
    return c, *others, 0.5 * ((1 - rho[0]) * (1 - rho[1])) ** 0.5


@claim(
    "M-formula",
    statement="For unit vectors SimAOU is (rho_12 - rho_1 - rho_2 + 1) / (2 sqrt((1 - rho_1)(1 - rho_2))).",
    source="this book; SimAOU: Dai et al. 2022, section 4, and [B]",
    status="identity",
    control="without the 1, which is the squared length of the zero-shot state that both updates contain",
    **HERE,
)
def formula(seed: int) -> Exact:
    g = torch.Generator().manual_seed(seed)
    a, b, c = unit(torch.randn(3, 50, 3 + seed % 20, generator=g, **F64))
    rho_1, rho_2, rho_12 = (a * c).sum(-1), (b * c).sum(-1), (a * b).sum(-1)
    found, scale = cosine(a - c, b - c), 2 * ((1 - rho_1) * (1 - rho_2)).sqrt()

    def error(numerator: Tensor) -> float:
        return float((numerator / scale - found).norm() / found.norm())

    return Exact(error(rho_12 - rho_1 - rho_2 + 1), error(rho_12 - rho_1 - rho_2))


@claim(
    "M-null",
    statement="For states that agree in nothing but their cosines with the zero-shot state, SimAOU divided by "
    "sqrt((1 - rho_1)(1 - rho_2))/2 is one on average: the null is not zero.",
    source="this book, on [B], section 3",
    status="refuted here",
    tolerance=None,
    control="what zero as the null would mean: the average of the cosine between the parts that are independent",
    erratum=(27,),
    **HERE,
)
def null(seed: int) -> Measured:
    c, a, b, expected = states(seed)
    apart = cosine(a - (a * c).sum(-1, keepdim=True) * c, b - (b * c).sum(-1, keepdim=True) * c)
    return Measured(interval(cosine(a - c, b - c) / expected), interval(apart / expected), 0.95, N)


@claim(
    "M-inflation",
    statement="Normalising states before subtracting makes independent updates look alike.",
    source="this book, on Dai et al. 2022, section 4, and [B]",
    status="empirical",
    tolerance=None,
    control="the cosine of the same updates, subtracted as they are",
    **HERE,
)
def inflation(seed: int) -> Measured:
    g = torch.Generator().manual_seed(seed)
    c, u, v = torch.randn(3, N, D, generator=g, **F64)
    a, b = c + u, c + v
    return Measured(interval(cosine(unit(a) - unit(c), unit(b) - unit(c))), interval(cosine(u, v)), 0.95, N)


@claim(
    "M-random",
    statement="A random unit state in place of the finetuned one scores about sqrt(1 - rho_1)/2, so a random baseline "
    "near zero has randomised the update and not the state.",
    source="this book, on [B], Table 2",
    status="empirical",
    tolerance=None,
    control="a random update in place of the finetuned one",
    **HERE,
)
def random_state(seed: int) -> Measured:
    c, a, _, _ = states(seed)
    r = torch.randn(N, D, generator=torch.Generator().manual_seed(1000 + seed), **F64)
    return Measured(interval(cosine(a - c, unit(r) - c)), interval(cosine(a - c, r)), 0.95, N)
