"""The scoring loop beside the machine's own products."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bench.measuring import differences, product_rate, score, timed, useful
from bench.setting import Bench
from iclgd_helpers.engine import models

NO_UNITS = "bfloat16 products reach {bfloat16:.3g} FLOP/s here, float32 ones {float32:.3g}: the processor emulates them"
NEED_BFLOAT16 = ("ratio_vs_llama_cpp", "bfloat16_speedup", "bfloat16_agreement")


def scoring(bench: Bench) -> dict[str, Any]:
    """The scoring loop beside the largest matrix products; in bfloat16, too, where the processor has units for it."""
    setting, queries = bench.setting, bench.cell.queries
    rates = {name: product_rate(setting.matrices[:1], getattr(torch, name)) for name in ("float32", "bfloat16")}
    left_out = without_units(rates)
    loaded = {"float32": bench.cell.model}
    if not left_out:
        loaded["bfloat16"] = models.load_model(setting.model, "bfloat16", "cpu")
    found: dict[str, np.ndarray] = {}

    def run(name: str) -> None:
        found[name] = score(loaded[name], queries, bench.in_context)

    for model in loaded.values():
        score(model, queries[:4], bench.in_context)
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for _round in range(setting.rounds):
        for name in loaded:
            rates[name] = max(rates[name], product_rate(setting.matrices, getattr(torch, name)))
            seconds[name].append(timed(lambda name=name: run(name)))
    flops = useful(bench.shape, queries, len(bench.in_context.prefix))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "fraction_of_peak": flops / medians["float32"] / rates["float32"],
        **({} if left_out else in_bfloat16(found, medians, flops / rates["bfloat16"])),
        "left_out": left_out,
        "peak_flops": rates,
        "useful_flops": flops,
        "seconds": seconds,
        "n_queries": len(queries),
        "prefix_tokens": len(bench.in_context.prefix),
        "query_tokens": sum(len(query.tokens) for query in queries),
    }


def without_units(rates: Mapping[str, float]) -> dict[str, str]:
    """
    What needs bfloat16 and is left out, each with the reason; nothing where the processor multiplies it faster.

    Emulated, it would take minutes for what float32 does in seconds, and say nothing of either side of a ratio.
    """
    if rates["bfloat16"] >= rates["float32"]:
        return {}
    return dict.fromkeys(NEED_BFLOAT16, NO_UNITS.format(**rates))


def in_bfloat16(found: Mapping[str, np.ndarray], medians: Mapping[str, float], least: float) -> dict[str, Any]:
    """Speed and agreement beside float32; `least` is the time that the operations take at the rate of products."""
    return {
        "bfloat16_speedup": medians["float32"] / medians["bfloat16"],
        "bfloat16_agreement": differences(found["float32"], found["bfloat16"]),
        "bfloat16_fraction_of_peak": least / medians["bfloat16"],
    }
