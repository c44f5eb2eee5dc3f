"""`python -m tools.planted_effects [DRAWINGS]`: what the rule decides on planted effects, into `results/power/`."""

from __future__ import annotations

import io
import multiprocessing
import sys
from typing import Any

import pandas as pd

from iclgd_helpers import storage
from iclgd_helpers.pages import planted
from tools.book_pages import ROOT

FOLDER = ROOT / "results" / "power"
N_DRAWS, N_WORKERS = 500, 2


def _part(job: tuple[planted.Scenario, list[int]]) -> pd.DataFrame:
    return planted.simulate(*job)


def main(n_draws: int = N_DRAWS) -> int:
    """Simulate every scenario, and write drawings and true effects; exit status 0."""
    blocks = [list(range(start, min(start + 25, n_draws))) for start in range(0, n_draws, 25)]
    jobs = [(scenario, block) for scenario in planted.SCENARIOS for block in blocks]
    with multiprocessing.Pool(N_WORKERS) as pool:
        draws = pd.concat(pool.map(_part, jobs, chunksize=1), ignore_index=True)
        truths = pool.map(planted.truth, planted.SCENARIOS, chunksize=1)
    rows: list[dict[str, Any]] = [
        {"scenario": scenario.name, "statement": statement, "reading": reading, "effect": effect}
        for scenario, truth in zip(planted.SCENARIOS, truths, strict=True)
        for (statement, reading), effect in truth.items()
    ]
    file = io.BytesIO()
    numbers = draws.select_dtypes("float").columns
    draws.astype(dict.fromkeys(numbers, "float32")).to_parquet(file, compression="zstd", index=False)
    storage.write_bytes(FOLDER / "draws.parquet", file.getvalue())
    storage.write_json(FOLDER / "truth.json", {"n_draws": n_draws, "effects": rows})
    print(f"{len(draws)} estimates of {n_draws} drawings a scenario")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
