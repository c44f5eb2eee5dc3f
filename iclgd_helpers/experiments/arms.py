"""
The arms of a run: what each is, what it needs, and how pages name and draw it.

An arm is a way to present the questions to a model, or to change the model before it answers them. This module
holds everything that is known of an arm; experiments, costs, records and figures read it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

GREY = "#6e6e6e"
CHOSEN = "_chosen"  # ends the name of a method's arm at the learning rate that was chosen on training rows


@dataclass(frozen=True)
class ArmKind:
    """
    What is known of an arm.

    Parameters
    ----------
    label, colour, marker, linestyle, hatch : how it is named and drawn; marker and hatch do without colour.
    in_context : whether demonstrations come before its question.
    updated : whether its K/V projections are its own.
    control : whether it is run only with `controls`.
    beside : the unchanged and the in-context arm that it is compared with, for one that is updated.
    """

    label: str
    colour: str
    marker: str
    linestyle: str | tuple[int, tuple[float, ...]]
    hatch: str
    in_context: bool = False
    updated: bool = False
    control: bool = False
    beside: tuple[str, str] | None = None


_TRAINED, _UNTRAINED = ("zero_shot", "in_context"), ("untrained_zero_shot", "untrained_in_context")
_METHOD: dict[str, Any] = {"updated": True, "beside": _TRAINED}
_UPDATED: dict[str, Any] = _METHOD | {"control": True}
# Colours: Okabe and Ito's set, safe for colour-blind readers; lighter or darker tones of it for the controls.
ARMS = {
    "zero_shot": ArmKind("zero-shot", GREY, "o", ":", ""),
    "in_context": ArmKind("in-context", "#0072B2", "s", "-", "//", in_context=True),
    "standard": ArmKind("finetuned", "#D55E00", "^", "--", "\\\\", **_METHOD),
    "joint": ArmKind("layer-causal, joint", "#009E73", "D", "-.", "xx", **_METHOD),
    "sequential": ArmKind("layer-causal, sequential", "#CC79A7", "v", (0, (6, 1.5)), "..", **_METHOD),
    "in_context_shuffled": ArmKind(
        "in-context, shuffled labels", "#56B4E9", "P", (0, (3, 1)), "||", in_context=True, control=True
    ),
    "standard_shuffled": ArmKind("finetuned, shuffled labels", "#E69F00", "X", (0, (3, 1, 1, 1)), "--", **_UPDATED),
    "random_update": ArmKind("random update", "#222222", "*", (0, (1, 1)), "++", **_UPDATED),
    "norm_matched": ArmKind("joint, norm-matched", "#00573f", "p", (0, (4, 2, 1, 2)), "oo", **_UPDATED),
    "untrained_zero_shot": ArmKind("untrained, zero-shot", "#b0a898", "<", (0, (1, 3)), "", control=True),
    "untrained_in_context": ArmKind(
        "untrained, in-context", "#7f8fb5", ">", (0, (5, 3)), "/", in_context=True, control=True
    ),
    "untrained_standard": ArmKind(
        "untrained, finetuned", "#8a5a2b", "h", (0, (2, 2)), "\\", updated=True, control=True, beside=_UNTRAINED
    ),
}
METHODS = tuple(name for name, arm in ARMS.items() if arm.updated and not arm.control)  # of finetuning
# A comparison asks how similar two ways of changing a model are: (unchanged, in context, updated).
COMPARISONS = {name: (*_TRAINED, name) for name in (*METHODS, *(method + CHOSEN for method in METHODS))}
COMPARISONS |= {name: (*arm.beside, name) for name, arm in ARMS.items() if arm.beside and arm.control}


def kind(name: str) -> ArmKind:
    """What is known of an arm, whatever its learning rate."""
    return ARMS[name.removesuffix(CHOSEN)]


def label(name: str) -> str:
    """An arm as figures name it."""
    return kind(name).label + (", chosen rate" if name.endswith(CHOSEN) else "")


OPTIONAL = tuple(name for name in ARMS if name not in _TRAINED)  # every run has the other two
NEEDED = {  # what an arm is made from, or compared with
    "random_update": ("standard",),
    "norm_matched": ("standard", "joint"),
    "untrained_in_context": _UNTRAINED[:1],
    "untrained_standard": _UNTRAINED,
}


def names(controls: bool, chosen: Collection[str] = (), only: Collection[str] | None = None) -> list[str]:
    """
    The arms of a run with these parameters.

    `chosen` are the methods that run at a chosen rate, too; `only` are those to run beside zero-shot and in-context.
    """
    found = [name for name, arm in ARMS.items() if controls or not arm.control]
    if only is not None:
        found = [name for name in found if name in _TRAINED or name in only]
    return found + [method + CHOSEN for method in chosen if method in found]


def among(chosen: Mapping[str, float] | None, only: Collection[str] | None) -> dict[str, float] | None:
    """The chosen rates of the methods that are run."""
    if chosen is None:
        return None
    return {method: rate for method, rate in chosen.items() if only is None or method in only}
