"""Other programs that do the same job: llama.cpp and lm-evaluation-harness."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import numpy as np

from bench import peers
from bench.measuring import child, differences, score, timed, useful
from bench.setting import Bench
from iclgd_helpers import pinned_downloads
from iclgd_helpers.engine import models
from iclgd_helpers.experiments import cost


def llama_cpp(bench: Bench) -> dict[str, Any]:
    """
    llama.cpp's marginal time a query against the engine's; both exclude model and prefix.

    llama.cpp holds 4-bit weights and multiplies in 8 bits. So the ratio is taken with the engine in bfloat16, where
    both use the processor's units for low precision; the one in float32, and its bound at the full rate of float32
    products, stand beside it. A processor without such units has the latter two only.
    """
    peers.make_environment()
    cell, n = bench.cell, bench.setting.llama_queries
    gguf = peers.gguf_file(bench.setting.model, bench.folder)
    queries = cell.queries[:n]
    engines = {"engine": cell.model}
    if bench.multiplies_bfloat16:
        engines["engine_bfloat16"] = models.load_model(bench.setting.model, "bfloat16", "cpu")
    seconds: dict[str, list[float]] = {"llama_cpp": [], **{name: [] for name in engines}}
    for _round in range(bench.setting.rounds):
        theirs = peers.llama_cpp(cell, gguf, n, bench.folder)
        seconds["llama_cpp"].append(statistics.fmean(theirs["queries"]))
        for name, model in engines.items():
            prefix = timed(lambda model=model: model.prefix(bench.in_context.prefix))
            whole = timed(lambda model=model: score(model, queries, bench.in_context))
            seconds[name].append((whole - prefix) / n)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    prefix = len(bench.in_context.prefix)
    work = useful(bench.shape, queries, prefix) - cost.forward(bench.shape, prefix).total
    half = medians.get("engine_bfloat16")
    return {
        **({"ratio_vs_llama_cpp": medians["llama_cpp"] / half} if half else {}),
        "ratio_vs_llama_cpp_float32": medians["llama_cpp"] / medians["engine"],
        "float32_bound": medians["llama_cpp"] / (work / bench.peak / n),
        "seconds_a_query": seconds,
        "n_queries": n,
        "agreement": differences(bench.ours[:n], np.array(theirs["log_probabilities"])),
        "weights": "llama.cpp: Q4_1 as stored; engine: the same weights de-quantised, recording on",
        "compiled": peers.compiler_options(),
    }


def lm_eval(bench: Bench) -> dict[str, Any]:
    """lm-evaluation-harness: whole processes, model load included, predictions only."""
    peers.make_environment()
    cell, n = bench.cell, len(bench.cell.queries)
    model = pinned_downloads.model_folder(bench.setting.model)
    seconds: dict[str, list[float]] = {"lm_eval": [], "engine": []}
    for _round in range(bench.setting.lm_eval_rounds):
        theirs = peers.lm_eval(cell, model, n, bench.folder / "lm_eval")
        seconds["lm_eval"].append(theirs["seconds"])
        for _ in range(2):
            job = {"what": "predicted", "setting": asdict(bench.setting)}
            seconds["engine"].append(child(job)["whole_process_seconds"])
    return {
        "ratio_vs_lm_eval": statistics.median(seconds["lm_eval"]) / statistics.median(seconds["engine"]),
        "seconds": seconds,
        "rounds": bench.setting.lm_eval_rounds,
        "n_queries": n,
        "agreement": differences(bench.ours, np.array(theirs["log_probabilities"])),
    }
