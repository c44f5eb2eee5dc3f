"""
The statements that the reproduction judges, each with its effect: positive where the statement holds.

An effect of a run takes its record, in either reading, and the suffix of the finetuned arms. It gives a function of
means over questions, or KeyError where an arm is missing or has diverged, or None where it is undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import resampling
from iclgd_helpers.measures.hierarchical import OfMeans
from iclgd_helpers.measures.resampling import UNDEFINED, Effect
from iclgd_helpers.pages import gradient_norms, selection
from iclgd_helpers.pages.questions import moved, overlap, predicted, right, similarity

OfRun = Callable[[Record, str], OfMeans | None]


@dataclass(frozen=True)
class Statement:
    """
    A statement with its test.

    Parameters
    ----------
    id : its name, an R and a number.
    kind : its source: paper, archive, or stricter.
    says, source, test : in words: the statement, its place in the source, what a positive effect is.
    effect : of what `unit` says, positive where the statement holds.
    bound : effects within it, to either side, are as good as none; in the effect's unit.
    gated : whether only tasks count on which in-context learning helps on training rows.
    unit : what one effect is made of. `seeds`: a record and the suffix of its finetuned arms. `draws`: the records of
        all seeds of a task. `orders`: those of all orders of its demonstrations. `clips`: a sweep of clipping. The last
        three give (value, low, high).
    rates : which learning rates the finetuned arms may have; keys of `judging.SUFFIX`.
    fewest : how many tasks have to be judged by the counting rule.
    answers : whether its effect is made of answers, so that the two readings differ.
    exploratory : whether it is judged on exploratory runs, for the confirmatory ones do not have what it asks for.
    threshold : whether an effect of zero is at a threshold within the statement, and not the absence of an effect.
    """

    id: str
    kind: str
    says: str
    source: str
    test: str
    effect: Callable[..., Any]
    bound: float
    gated: bool = True
    unit: str = "seeds"
    rates: tuple[str, ...] = ("protocol", "chosen")
    fewest: int = 3
    answers: bool = False
    exploratory: bool = False
    threshold: bool = False


# ------------------------------------------------------------------------------------------------------------- answers
def more_accurate(over: str, under: str) -> OfRun:
    """Accuracy of one arm minus that of another; `*` stands for the rate's suffix."""
    return lambda record, rate: _difference(*(right(record, arm.replace("*", rate)) for arm in (over, under)))


def _difference(over: Any, under: Any) -> OfMeans:
    return OfMeans(lambda a, b: a - b, (over, under))


def changes_more(record: Record, rate: str) -> OfMeans:
    """Share of answers that in-context learning changes, minus the share that finetuning changes."""
    return _difference(moved(record, "in_context"), moved(record, f"standard{rate}"))


def recall(record: Record, rate: str) -> OfMeans:
    """Rec2FTP above one half."""
    fixed, shown, _wrong = _righted(record, rate)
    return OfMeans(lambda both, f: both / f - 0.5, (fixed & shown, fixed))


def recall_above_base(record: Record, rate: str) -> OfMeans:
    """Rec2FTP above the share of all zero-shot errors that in-context learning puts right."""
    fixed, shown, wrong = _righted(record, rate)
    return OfMeans(lambda both, f, s, w: both / f - s / w, (fixed & shown, fixed, shown, wrong))


def _righted(record: Record, rate: str) -> tuple[Any, Any, Any]:
    """Zero-shot errors that finetuning puts right, that in-context learning does, and all of them."""
    wrong = ~right(record, "zero_shot")
    return wrong & right(record, f"standard{rate}"), wrong & right(record, "in_context"), wrong


def jaccard_low(record: Record, rate: str) -> OfMeans | None:
    """One half minus the Jaccard index; undefined where a method changes nothing: it overlaps with nobody."""
    if not moved(record, "in_context").any() or not moved(record, f"standard{rate}").any():
        return None
    return OfMeans(lambda shared, union: 0.5 - shared / union, overlap(record, f"standard{rate}"))


def jaccard_gap(record: Record, rate: str) -> OfMeans:
    """Jaccard index of changes to the right label, minus that of changes to a wrong one."""
    columns = [column for which in ("correct", "incorrect") for column in overlap(record, f"standard{rate}", which)]
    return OfMeans(lambda shared, union, other, whole: shared / union - other / whole, tuple(columns))


def collapse(record: Record, rate: str) -> OfMeans:
    """Share of the commonest prediction of layer-causal finetuning, above 0.9 and above zero-shot's."""
    answers = (predicted(record, arm) for arm in (f"joint{rate}", "zero_shot"))
    commonest = tuple(given == np.bincount(given).argmax() for given in answers)
    return OfMeans(lambda tuned, before: np.minimum(tuned - 0.9, tuned - before), commonest)


def draws_differ(draws: Sequence[Record]) -> Effect:
    """Typical (root mean square) difference of in-context accuracy between two draws (or orders), above 0.05."""
    n = min(record.json["n_compared"] for record in draws)
    questions = {tuple(record.examples["row"][:n]) for record in draws}
    if len(draws) < 2 or len(questions) > 1:  # draws are compared on the same questions or not at all
        return UNDEFINED
    variance, without = resampling.variance_between([right(record, "in_context")[:n] for record in draws])
    value, low, high = resampling.signed_root(resampling.jackknife(2 * variance, 2 * without))
    return value - 0.05, low - 0.05, high - 0.05


# -------------------------------------------------------------------------------------------- attention and gradients
def more_similar(over: str, under: str) -> OfRun:
    """One similarity minus another; `*` stands for the rate's suffix."""
    return lambda record, rate: _difference(*(similarity(record, name.replace("*", rate)) for name in (over, under)))


def larger_below(record: Record, rate: str) -> OfMeans:
    """Log ratio of the layer-causal gradient norms, lowest third of layers to highest, mean over steps."""
    norms, third = _log_norms(record, f"joint{rate}")
    return _one(float((norms[:, :third].mean(1) - norms[:, -third:].mean(1)).mean()))


def larger_than_standard_below(record: Record, rate: str) -> OfMeans:
    """Log ratio of the gradient norms in the lowest third of layers, layer-causal to standard, mean over steps."""
    (joint, third), (standard, _third) = (_log_norms(record, f"{method}{rate}") for method in ("joint", "standard"))
    return _one(float((joint[:, :third].mean(1) - standard[:, :third].mean(1)).mean()))


def _log_norms(record: Record, arm: str) -> tuple[Any, int]:
    """Log of the gradient norms, `[step, layer]`, and a third of the layers."""
    record.arms[arm]  # KeyError: it is not there, or has diverged
    logs = np.log(np.maximum(gradient_norms.norms(record, arm), 1e-30))
    return logs, max(1, logs.shape[1] // 3)


def _one(value: float) -> OfMeans:
    """A number of a run that has no questions."""
    return OfMeans(lambda mean: mean, ([value],))


def clipping_restores(sweep: Mapping[str, Any]) -> Effect:
    """The bound of global clipping at which SimAM gains on no clipping while SimAOU stays above finetuning's."""

    def points(method: str, clip: str) -> list[Any]:
        return [point for point in sweep["points"] if (point["method"], point["clip"]) == (method, clip)]

    def above(point: Any, other: Any, measure: str) -> Effect:
        return resampling.minus(selection.point_effect(point, measure), selection.point_effect(other, measure))

    (free, *_), (plain, *_) = points("joint", "none"), points("standard", "none")
    gains = [
        np.minimum(above(bound, free, "sim_am_direct"), above(bound, plain, "sim_aou"))
        for bound in points("joint", "global")
    ]
    gains = [gain for gain in gains if not np.isnan(gain).any()] or gains  # bounds at which nothing has diverged
    value, low, high = max(gains, key=lambda gain: gain[0]).tolist()
    return value, low, high


# ----------------------------------------------------------------------------------------------------------- statements
SHARE, COSINE, LOG_RATIO = 0.05, 0.02, 0.1  # bounds: shares of answers, similarities, logarithms of ratios
_ANSWERS: dict[str, Any] = {"bound": SHARE, "answers": True}
_SIMILARITY: dict[str, Any] = {"bound": COSINE}
_NORMS: dict[str, Any] = {"bound": LOG_RATIO, "gated": False}
_ONE: dict[str, Any] = {"rates": ("protocol",)}  # otherwise statements are judged at the chosen learning rate, too
STATEMENTS = (
    Statement("R1", "paper", "In-context learning beats zero-shot.", "Table 1", "accuracy, paired over questions",
              more_accurate("in_context", "zero_shot"), gated=False, **_ANSWERS, **_ONE),
    Statement("R2", "paper", "Finetuning beats zero-shot.", "Table 1", "accuracy, paired over questions",
              more_accurate("standard*", "zero_shot"), gated=False, **_ANSWERS),
    Statement("R3", "paper", "In-context learning beats finetuning.", "Table 1, section 3.3",
              "accuracy, paired over questions", more_accurate("in_context", "standard*"), **_ANSWERS),
    Statement("R4", "paper", "In-context learning changes more predictions than finetuning.", "Figure 1",
              "share of changed predictions, in-context minus finetuned", changes_more, **_ANSWERS),
    Statement("R5", "paper", "Changed predictions overlap little.", "Table 1, Jaccard",
              "Jaccard index of changes below 0.5", jaccard_low, threshold=True, **_ANSWERS),
    Statement("R6", "paper", "Changes to a wrong label overlap less than changes to the right one.", "Table 1, Jaccard",
              "Jaccard on correct minus on incorrect changes", jaccard_gap, **_ANSWERS),
    Statement("R7", "archive", "In-context learning recalls what finetuning puts right.",
              "Rec2FTP in the logs; Dai et al.", "Rec2FTP above 0.5", recall, threshold=True, **_ANSWERS),
    Statement("R8", "stricter", "It recalls more of that than of zero-shot errors in general.", "page 50",
              "Rec2FTP above the share of all zero-shot errors put right", recall_above_base, **_ANSWERS),
    Statement("R9", "paper", "SimAOU of finetuning is above the random baseline.", "Table 2",
              "SimAOU minus the published baseline (page 60)",
              more_similar("sim_aou/standard*", "sim_aou_random/standard*"), **_SIMILARITY),
    Statement("R10", "stricter", "SimAOU of finetuning is above its null for independent updates.", "page 60",
              "SimAOU minus its analytic null",
              more_similar("sim_aou/standard*", "sim_aou_null/standard*"), **_SIMILARITY),
    Statement("R11", "stricter", "SimAOU of finetuning is above that of the same model with untrained blocks.",
              "archive, untrained control", "SimAOU minus the control's",
              more_similar("sim_aou/standard", "sim_aou/untrained_standard"),
              exploratory=True, **_SIMILARITY, **_ONE),
    Statement("R12", "stricter", "SimAOU of finetuning is above that of finetuning on shuffled labels.", "page 62",
              "SimAOU minus the control's",
              more_similar("sim_aou/standard", "sim_aou/standard_shuffled"), **_SIMILARITY, **_ONE),
    Statement("R13", "paper", "Layer-causal finetuning has a higher SimAOU than finetuning (5 of 6 tasks).", "Table 2",
              "SimAOU, joint minus standard", more_similar("sim_aou/joint*", "sim_aou/standard*"), **_SIMILARITY),
    Statement("R14", "paper", "SimAM of finetuning is above zero-shot's.", "Table 2",
              "SimAM, standard minus zero-shot",
              more_similar("sim_am_direct/standard*", "sim_am_zero_shot/standard*"), **_SIMILARITY),
    Statement("R15", "paper", "Layer-causal finetuning has a lower SimAM than finetuning.", "Table 2",
              "SimAM, standard minus joint",
              more_similar("sim_am_direct/standard*", "sim_am_direct/joint*"), **_SIMILARITY),
    Statement("R16", "archive", "Layer-causal finetuning has a higher SimAM of changes than finetuning (5 of 6 tasks).",
              "logs from October 2023 on",
              "delta SimAM, joint minus standard",
              more_similar("sim_am_delta/joint*", "sim_am_delta/standard*"), **_SIMILARITY),
    Statement("R17", "paper", "Clipping restores SimAM and keeps SimAOU.", "Table 3",
              "at some bound of global clipping, SimAM above no clipping's and SimAOU above standard's",
              clipping_restores, unit="clips", exploratory=True, **_SIMILARITY, **_ONE),
    Statement("R18", "stricter", "Layer-causal gradient norms are larger in lower layers than in upper ones.",
              "Figure 3", "log ratio of the lowest to the highest third of layers, layer-causal",
              larger_below, **_NORMS),
    Statement("R18b", "paper", "In lower layers, gradient norms are larger layer-causal than standard.",
              "section 4.2, Figure 3", "log ratio of layer-causal to standard norms, lowest third of layers",
              larger_than_standard_below, **_NORMS),
    Statement("R19", "archive", "Layer-causal finetuning ends in near-constant predictions.", "counts in the logs",
              "largest share of one class above 0.9 (page 70 asks 0.95) and above zero-shot's",
              collapse, gated=False, threshold=True, **_ANSWERS),
    Statement("R20", "archive", "In-context accuracy depends on the demonstrations drawn.", "counts in the logs",
              "typical difference between two seeds on the same questions, above 0.05",
              draws_differ, gated=False, unit="draws", threshold=True, **_ANSWERS, **_ONE),
    Statement("R21", "stricter", "In-context accuracy depends on the order of demonstrations.", "varied here",
              "typical difference between two orders of the same demonstrations, above 0.05",
              draws_differ, gated=False, unit="orders", fewest=2, exploratory=True, threshold=True,
              **_ANSWERS, **_ONE),
)  # fmt: skip
BY_ID = {statement.id: statement for statement in STATEMENTS}
