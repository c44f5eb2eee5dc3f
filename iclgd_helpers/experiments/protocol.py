"""Sizes and choices of the reproduction, fixed before its results were seen; reasons: `book/protocol.md`."""

from __future__ import annotations

from typing import Any

import yaml

from iclgd_helpers.paths import PACKAGE

_TASKS: dict[str, Any] = yaml.safe_load((PACKAGE / "experiments" / "protocol.yaml").read_text(encoding="utf-8"))
MODELS = ("SmolLM2-135M-Instruct", "Gemma-3-270M")
SEEDS: dict[str, tuple[int, ...]] = {task: tuple(seeds) for task, seeds in _TASKS["seeds"].items()}
COLUMNS: tuple[str, ...] = tuple(_TASKS["columns"])
STAGES = ("rates", "runs", "orders", "unequal", "clips")  # in the order in which they are computed
N_ROWS, MAX_COMPARED = 100, 200  # evaluation rows of a run; of them compared in every arm, at most
CONFIRMATORY_SEEDS: dict[str, tuple[int, ...]] = {task: tuple(seeds) for task, seeds in _TASKS["confirmatory"].items()}
RECORDS, SWEEPS, PROMPTS = "results/records", "results/sweeps", "results/prompts"

# The confirmatory runs: the rows behind those of the others; where a split has no more, all of it.
CONFIRMATION = "results/confirmation"
N_CONFIRMATORY_ROWS, N_CALIBRATION_ROWS = 300, 64
CONFIRMATORY_ARMS = ("standard", "joint", "in_context_shuffled", "standard_shuffled")
ALL_ROWS_TASKS = tuple(_TASKS["all_rows"])
SEEN_TASKS = tuple(_TASKS["seen"])  # some of whose rows older runs had read

# Comparisons of learning rates, on training rows.
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
N_RATE_ROWS, N_GATE_ROWS = 64, 200
N_SWEEP_DEMONSTRATIONS, N_SWEEP_DEMONSTRATIONS_OF_OTHERS = 16, 8  # of the first model, and of the others

# Runs of the first model alone: other orders and seeds, unequal demonstrations, bounds of clipping.
ORDER_TASKS, ORDERS, MORE_SEEDS = tuple(_TASKS["orders"]), (1, 2, 3, 4), (11, 12)
UNEQUAL_TASKS = tuple(_TASKS["unequal"])
CLIP_TASKS = tuple(_TASKS["clips"])
NORMS_TASK: str = _TASKS["norms"]
CLIP_KINDS = ("global", "per_layer", "elementwise")
CLIP_FACTORS = tuple(2.0**exponent for exponent in range(-6, 3))
N_CLIP_ROWS = 64

# Finetuning behind a fixed prompt.
PROMPT_SEEDS = {task: SEEDS[task] for task in _TASKS["prompts"]}
PROMPT_LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
N_PROMPT_DEMONSTRATIONS, N_PROMPT_ROWS, PROMPT_STEPS = 4, 48, (0, 4, 10, 20)
N_CHOICE_STEPS, N_CHOICE_ROWS = 10, 16


def first_row(task: str) -> int:
    """How many evaluation rows a confirmatory run passes over: those of the exploratory runs."""
    return 0 if task in ALL_ROWS_TASKS else N_ROWS
