"""
Comparison of in-context learning with finetuning: SimAOU, SimAM, Rec2FTP, Jaccard, and what they score by chance.

Tensors are as in `observe.Observation`; predictions are NumPy arrays `[example]` of class numbers. An undefined value
(a cosine with a zero vector, 0 / 0) is NaN, to be left out and counted, never 0.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Predictions = NDArray[np.integer]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine along the last axis; NaN where a vector is exactly zero."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, torch.nan)


def normalised(output: Tensor) -> Tensor:
    """`output` with each vector along the last axis at length 1."""
    return output.div(output.norm(dim=-1, keepdim=True))


def sim_aou(zero_shot: Tensor, in_context: Tensor, finetuned: Tensor, normalise: bool = True) -> Tensor:
    """
    Similarity of attention output updates: cos(h_ICL − h_ZS, h_FT − h_ZS); `[query, layer]` in [−1, 1].

    Source: Dai et al. 2023, section 4; Bar Natan et al., section 3. As in their code each `h` is normalised first
    unless `normalise` is False.
    """
    if normalise:
        zero_shot, in_context, finetuned = map(normalised, (zero_shot, in_context, finetuned))
    return cosine(in_context - zero_shot, finetuned - zero_shot)


def sim_aou_null(zero_shot: Tensor, in_context: Tensor, finetuned: Tensor) -> Tensor:
    """
    What SimAOU scores when both updates are independent: ½ √((1 − ρ₁)(1 − ρ₂)), with ρ the cosine to zero-shot.

    Both differences of unit vectors contain −h_ZS, so that even unrelated updates are similar; `[query, layer]`.
    """
    rho = [cosine(other, zero_shot).clamp(-1, 1) for other in (in_context, finetuned)]
    return 0.5 * ((1 - rho[0]) * (1 - rho[1])).sqrt()


def sim_aou_random(zero_shot: Tensor, in_context: Tensor, rows: list[int], seed: int) -> Tensor:
    """
    The original code's random baseline: cos(h_ICL − h_ZS, r) with r uniform on [0, 1) in each coordinate.

    The draw depends on the seed and the example's row only, so that the order of queries does not matter.
    """
    update = normalised(in_context) - normalised(zero_shot)
    draws = [np.random.default_rng([seed, row]).random(update.shape[1:]) for row in rows]
    return cosine(update, torch.from_numpy(np.stack(draws)).to(update))


def sim_am(in_context: Tensor, other: Tensor) -> Tensor:
    """
    Similarity of attention maps, direct: cosine of pre-softmax scores for each head, mean over heads; `[query, layer]`.

    Source: Dai et al. 2023, section 4 (there against zero-shot and finetuned scores).
    """
    return cosine(in_context, other).nanmean(-1)


def sim_am_delta(zero_shot: Tensor, in_context: Tensor, finetuned: Tensor, first_layer: bool) -> Tensor:
    """
    SimAM between changes: cos(m_ICL − m_ZS, m_FT − m_ZS), mean over heads; `[query, layer]`.

    Layer 0 is undefined unless its scores depend on whether a prompt comes before the question. `first_layer` is what
    `LanguageModel.first_layer_sees_the_prompt` measures; without it m_ICL − m_ZS is rounding noise in layer 0.
    """
    value = cosine(in_context - zero_shot, finetuned - zero_shot).nanmean(-1)
    if not first_layer:
        value[:, 0] = torch.nan
    return value


# ------------------------------------------------------------------------------------------------------- predictions
def changed(zero_shot: Predictions, other: Predictions, labels: Predictions, which: str = "all") -> NDArray[np.bool_]:
    """Examples whose prediction differs from zero-shot: `all`, or only to the `correct` or to an `incorrect` label."""
    differs: NDArray[np.bool_] = other != zero_shot
    wanted: NDArray[np.bool_] = differs if which == "all" else (other == labels) == (which == "correct")
    return differs & wanted


def jaccard(
    zero_shot: Predictions,
    in_context: Predictions,
    finetuned: Predictions,
    labels: Predictions,
    which: str = "all",
    rule: str = "code",
) -> float:
    """
    Jaccard index, in [0, 1], of the predictions changed by in-context learning and by finetuning.

    With `rule="code"` (the original's) an example counts as shared only if both changed it to the same label. One that
    is changed to two different labels counts twice in the union. `rule="set"` is the paper's formula. They differ for
    three or more classes only. NaN if nothing changed.
    """
    a, b = changed(zero_shot, in_context, labels, which), changed(zero_shot, finetuned, labels, which)
    shared = a & b & (in_context == finetuned) if rule == "code" else a & b
    union = a.sum() + b.sum() - shared.sum()
    return float(shared.sum() / union) if union else float("nan")


def jaccard_by_chance(zero_shot: Predictions, in_context: Predictions, finetuned: Predictions) -> float:
    """
    The Jaccard index (`rule="code"`, all changes) of two methods that change as many answers, but blindly.

    Both turn as many answers from and to the same classes. If one turns a of n answers z into c, and the other b, they
    share a b / n of them. In [0, 1]; NaN if nothing changed. Page 50 derives it.
    """
    shared = 0.0
    for z in np.unique(zero_shot):
        for c in np.unique(in_context):
            able = (zero_shot == z) & (z != c)
            turned = ((in_context == c) & able).sum(), ((finetuned == c) & able).sum()
            shared += turned[0] * turned[1] / max(1, able.sum())
    total = (in_context != zero_shot).sum() + (finetuned != zero_shot).sum()
    return float(shared / (total - shared)) if total else float("nan")


def rec2ftp(zero_shot: Predictions, in_context: Predictions, finetuned: Predictions, labels: Predictions) -> float:
    """Share, in [0, 1], of the examples that finetuning puts right which in-context learning puts right too."""
    fixed = (zero_shot != labels) & (finetuned == labels)
    return float((in_context[fixed] == labels[fixed]).mean()) if fixed.any() else float("nan")


def partition(
    zero_shot: Predictions, in_context: Predictions, finetuned: Predictions, labels: Predictions
) -> dict[str, int]:
    """
    Number of examples in each part of Figure 1: who changed the zero-shot prediction, and whether the change is right.

    Keys: `unchanged`, and `<who>_<outcome>` with who `in_context`, `finetuned` or `both`, outcome `correct` or
    `incorrect`; `both_different` if both changed it, to different labels.
    """
    by_context, by_finetuning = in_context != zero_shot, finetuned != zero_shot
    both, same = by_context & by_finetuning, in_context == finetuned
    parts = {"unchanged": int((~by_context & ~by_finetuning).sum()), "both_different": int((both & ~same).sum())}
    groups = {
        "both": (both & same, in_context),
        "in_context": (by_context & ~by_finetuning, in_context),
        "finetuned": (by_finetuning & ~by_context, finetuned),
    }
    for who, (members, predictions) in groups.items():
        right = predictions == labels
        parts[f"{who}_correct"], parts[f"{who}_incorrect"] = int((members & right).sum()), int((members & ~right).sum())
    return parts


def prediction_entropy(predictions: Predictions, n_classes: int) -> float:
    """Entropy, in bits, of the distribution of predicted classes over the examples; 0 for a constant predictor."""
    shares = np.bincount(predictions, minlength=n_classes) / len(predictions)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum() + 0.0)
