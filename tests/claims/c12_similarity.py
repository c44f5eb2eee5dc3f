"""Page 60, its sections on the null: SimAOU does not score zero by chance."""

import torch
from torch import Tensor

from claims.registry import Control, Interval, chapter, mean_of
from iclgd_helpers.theory.gradient_step import relative_error

claim = chapter("60_attention_similarity", drawn="states", status="empirical")
N, D = 4000, 256


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (unit(a) * unit(b)).sum(-1)


def states(seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Unit h_ZS, h_ICL, h_FT with given cosines to h_ZS and independent directions apart from it; their null."""
    g = torch.Generator().manual_seed(seed)
    rho = [0.2 + 0.6 * float(torch.rand((), generator=g)) for _ in range(2)]
    c = unit(torch.randn(N, D, generator=g))
    others = []
    for r in rho:
        away = torch.randn(N, D, generator=g)
        away = unit(away - (away * c).sum(-1, keepdim=True) * c)
        others.append(r * c + (1 - r**2) ** 0.5 * away)
    return c, *others, 0.5 * ((1 - rho[0]) * (1 - rho[1])) ** 0.5


def near_one(ratios: Tensor) -> Interval:
    """Interval of the mean of ratios, which the statement says is one."""
    assert abs(float(ratios.mean()) - 1) < 0.02
    return mean_of(ratios)


@claim(
    "M-formula",
    statement="For unit vectors SimAOU is (rho_12 - rho_1 - rho_2 + 1) / (2 sqrt((1 - rho_1)(1 - rho_2))).",
    source="this book; SimAOU: Dai et al. 2022, section 4, and [B]",
    status="identity",
    controls=[
        Control(
            "without the 1, which is the squared length of the zero-shot state that both updates contain", {"one": 0}
        )
    ],
)
def formula(seed: int, one: float = 1) -> float:
    g = torch.Generator().manual_seed(seed)
    a, b, c = unit(torch.randn(3, 50, 3 + seed % 20, generator=g))
    rho_1, rho_2, rho_12 = cosine(a, c), cosine(b, c), cosine(a, b)
    scale = 2 * ((1 - rho_1) * (1 - rho_2)).sqrt()
    return relative_error((rho_12 - rho_1 - rho_2 + one) / scale, cosine(a - c, b - c))


@claim(
    "M-null",
    side="above",
    statement="For states that agree in nothing but their cosines with the zero-shot state, SimAOU divided by "
    "sqrt((1 - rho_1)(1 - rho_2))/2 is one on average: the null is not zero.",
    source="this book, on [B], section 3",
    controls=[
        Control(
            "what zero as the null would mean: the average of the cosine between the parts that are independent",
            {"apart": True},
            erratum=(27,),
        )
    ],
)
def null(seed: int, apart: bool = False) -> Interval:
    c, a, b, expected = states(seed)
    if apart:
        a, b = (x - (x * c).sum(-1, keepdim=True) * c for x in (a, b))
        return mean_of(cosine(a, b) / expected)
    return near_one(cosine(a - c, b - c) / expected)


@claim(
    "M-inflation",
    side="above",
    statement="Normalising states before subtracting makes independent updates look alike.",
    source="this book, on Dai et al. 2022, section 4, and [B]",
    controls=[Control("the cosine of the same updates, subtracted as they are", {"normalised": False})],
)
def inflation(seed: int, normalised: bool = True) -> Interval:
    g = torch.Generator().manual_seed(seed)
    c, u, v = torch.randn(3, N, D, generator=g)
    a, b = c + u, c + v
    if normalised:
        a, b, c = unit(a), unit(b), unit(c)
    return mean_of(cosine(a - c, b - c))


@claim(
    "M-random",
    side="above",
    statement="A random unit state in place of the finetuned one scores about sqrt(1 - rho_1)/2 (their ratio, on "
    "average), so a random baseline near zero has replaced the difference and not the state.",
    source="this book, on [B], Table 2",
    controls=[Control("a random vector in place of the difference b - c", {"difference": True})],
)
def random_state(seed: int, difference: bool = False) -> Interval:
    c, a, _, _ = states(seed)
    r = torch.randn(N, D, generator=torch.Generator().manual_seed(1000 + seed))
    about = 0.5 * (1 - cosine(a, c)).sqrt()
    return mean_of(cosine(a - c, r) / about) if difference else near_one(cosine(a - c, unit(r) - c) / about)
