"""What every section measures with: seconds, operations, rates, memory, and fresh processes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.experiments import cost
from iclgd_helpers.paths import repository_root


class NotMeasured(RuntimeError):
    """Something cannot be measured here; what was measured without it stays."""


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(rounds: int, **runs: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each of `runs`, one after the other, `rounds` times: what disturbs the machine disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _round in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return seconds


def score(model: LanguageModel, queries: Sequence[Query], arm: Arm, batch_tokens: int | None = None) -> np.ndarray:
    """The scoring loop, recording on: every observation is made; of it the log-probabilities are kept."""
    options = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
    result = np.zeros((len(queries), len(queries[0].labels)))
    for indices, seen in observe(model, queries, {"arm": arm}, **options):
        result[indices] = seen["arm"].label_log_probabilities.double().cpu().numpy()
    return result


def useful(shape: cost.Shape, queries: Sequence[Query], prefix: int) -> float:
    """Operations of the scoring loop without padding: the prefix once, then every query."""
    work = cost.forward(shape, prefix)
    for query in queries:
        tokens, rows = len(query.tokens), len({place for places in query.tree.places for place in places})
        work += cost.forward(shape, tokens, prefix, rows) + cost.recording(shape, tokens, len(query.labels))
    return work.total


def product_rate(sizes: Sequence[int], dtype: torch.dtype) -> float:
    """Best FLOP/s of a square matrix product."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        a @ b
        best = max(best, max(2 * size**3 / timed(lambda a=a, b=b: a @ b) for _ in range(4)))
    return best


def differences(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How far two sets of label log-probabilities `[query, class]` lie apart, and how often they predict the same."""
    gap = np.abs(ours - theirs)
    return {
        "same_prediction": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "largest_log_probability_difference": float(gap.max()),
        "median_log_probability_difference": float(np.median(gap)),
    }


def child(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run `job` in a fresh process of this environment; its result, and the seconds of the whole process."""
    command = [sys.executable, "-m", "bench", "--child", json.dumps(job)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository_root())
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"child process failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"whole_process_seconds": seconds}


def peak_memory() -> int:
    """Most memory that this process has held, bytes; not that of the process which started it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
