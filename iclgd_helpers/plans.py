"""What the commands run unless told otherwise. Why it is this stands in the text of `grid` and of `fixed_prompt`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from iclgd_helpers.parameters import ExperimentParameters, resolve

SIX_TASKS = ("cb", "sst2", "sst5", "subj", "mr", "agnews")
# The reproduction: models, seeds of each task, and its stages in order.
MODELS = ("SmolLM2-135M-Instruct", "Gemma-3-270M")
SEEDS = {"sst2": (2, 3, 4), "subj": (4, 5, 6), "mr": (5, 6, 7), "sst5": (5, 6, 7), "cb": (3, 4, 5), "agnews": (3, 4, 5)}
STAGES = ("rates", "cells", "orders", "unequal", "clips")
# Finetuning behind a fixed prompt.
PROMPT_MODEL = MODELS[0]
PROMPT_SEEDS = {task: SEEDS[task] for task in ("sst2", "subj", "mr")}


def cells(given: Mapping[str, Any], over: Mapping[str, Sequence[Any]]) -> list[ExperimentParameters]:
    """
    Every combination of the values in `over` (parameter -> values), with `given` in all of them.

    Raises
    ------
    InputError
        if any of them has a wrong value.
    """
    names = [name for name, values in over.items() if values]
    combinations = itertools.product(*(dict.fromkeys(over[name]) for name in names))  # twice the same: once
    return [resolve({**given, **dict(zip(names, values, strict=True))}) for values in combinations]
