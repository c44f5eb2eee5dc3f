"""The arms of an experiment: ways to present the questions to a model, or to change it before it answers them."""

from __future__ import annotations

from collections.abc import Collection

METHODS = ("standard", "joint", "sequential")  # of finetuning
CHOSEN = "_chosen"  # ends the name of an arm at the rate that was chosen on training rows
CONTROLS = ("standard_shuffled", "in_context_shuffled", "random_update", "norm_matched")
UNTRAINED = ("untrained_zero_shot", "untrained_in_context", "untrained_standard")


def names(controls: bool, chosen: Collection[str] = ()) -> set[str]:
    """The arms of a cell with these parameters; `chosen` are the methods that run at a chosen rate, too."""
    found = {"zero_shot", "in_context", *METHODS, *(method + CHOSEN for method in chosen)}
    return found | set(CONTROLS + UNTRAINED) if controls else found
