"""Sizes of everything that is measured, and what the sections share: one model, and what was found before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.measuring import score
from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine.observe import Arm
from iclgd_helpers.experiments import cost, parameters, runs
from iclgd_helpers.experiments.runs import Run


@dataclass(frozen=True)
class Setting:
    """Sizes of everything; `quick()` is for tests of the bench itself and measures nothing of use."""

    model: str = "SmolLM2-135M-Instruct"
    task: str = "sst2"
    data_source: str | None = None  # the folder that is named, else the hub
    separator: str = "newline"  # as text, so that all peers can be given the same prompt
    n_demonstrations: int = 32
    queries: int = 200
    rounds: int = 3
    recomputed: int = 25  # queries a round that are recomputed the original's way; others in each round
    recompute_rounds: int = 4
    engine_queries: int = 400  # of the engine beside it: the prefix is paid once for all
    llama_queries: int = 100
    lm_eval_rounds: int = 1
    matrices: tuple[int, ...] = (1024, 2048, 4096)
    steps: int = 4
    memory: tuple[int, int] = (200, 800)
    record: int = 32
    growth_queries: tuple[int, ...] = (100, 800, 3200)
    growth_demonstrations: tuple[int, ...] = (4, 8, 16, 32, 64)
    growth_layers: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    growth_rows: int = 60  # queries behind the last two
    growth_arms: tuple[int, ...] = (1, 2, 4, 8, 12)
    growth_arm_rows: int = 24  # queries that all of them see
    growth_tokens: tuple[int, ...] = (8, 16, 32, 64, 128)  # of a training sequence
    growth_learners: tuple[int, ...] = (1, 2, 4, 8)
    step_tokens: int = 12  # where something else grows: the mean of SST-2
    generated_memory: tuple[int, int] = (2_000, 20_000)
    cells: int = 1000  # of the simulated grid
    empty_pages: int = 3  # one behind the other; the last one counts
    book_preset: str = "quick"
    book_cores: tuple[int, ...] = (2, 1)  # the first is what targets are about

    @classmethod
    def quick(cls) -> Setting:
        return cls(
            "tiny-llama", "snippets", "generated", "newline", 4, 12, 2, 3, 2, 8, 4, 1, (64, 128), 2, (8, 16), 8,
            (4, 8, 16), (1, 2, 4), (0.34, 1.0), 6, (1, 2), 4, (8, 16), (1, 2), 8, (20, 40), 20, 1, "smoke",
        )  # fmt: skip

    def parameters(self, **changed: Any) -> parameters.ExperimentParameters:
        own = {name: getattr(self, name) for name in ("model", "task", "data_source", "separator", "n_demonstrations")}
        rest = {"preset": "quick", "max_examples": self.queries, "device": "cpu", "dtype": "float32"}
        return parameters.resolve(rest | own | changed)


class Bench:
    """The setting, what earlier sections found, and the one model in memory."""

    def __init__(self, setting: Setting, folder: Path, done: Mapping[str, Any]) -> None:
        self.setting, self.folder, self.done = setting, folder, done

    @cached_property
    def cell(self) -> Run:
        return runs.prepare(self.setting.parameters())

    @cached_property
    def shape(self) -> cost.Shape:
        return cost.Shape.of(self.cell.model.model.config)

    @property
    def peak(self) -> float:
        return self.done["scoring"]["peak_flops"]["float32"]

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether the processor has units for bfloat16: see `scoring`."""
        return not self.done["scoring"].get("left_out")

    @cached_property
    def in_context(self) -> Arm:
        return Arm(self.cell.layout.prefix(self.cell.demonstrations))

    @cached_property
    def ours(self) -> np.ndarray:
        """Label log-probabilities of the engine, `[query, class]`."""
        return score(self.cell.model, self.cell.queries, self.in_context)

    def some(self, n: int) -> list[Query]:
        """`n` queries; rows repeat when the task has fewer."""
        queries = self.cell.queries
        return [queries[i % len(queries)] for i in range(n)]
