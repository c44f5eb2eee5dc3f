"""The table at the end: what was measured, its target, and whether it is met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# key -> (is a larger value better?, target)
TARGETS = {
    "book_pages_seconds": (False, 360.0),
    "page_00_seconds": (False, 150.0),
    "page_72_seconds": (False, 60.0),
    "page_10_seconds": (False, 40.0),
    "theory_pages_seconds": (False, 75.0),
    "book_peak_gb": (False, 2.5),
    "empty_page_seconds": (False, 3.0),
    "standard_step_seconds": (False, 0.10),
    "sequential_step_seconds": (False, 0.45),
    "joint_step_seconds": (False, 0.25),
    "fraction_of_peak": (True, 0.68),
    "ratio_vs_recompute": (True, 22.5),
    "labels_ratio_vs_recompute": (True, 15.0),
    "ratio_vs_lm_eval": (True, 18.0),
    "ratio_vs_llama_cpp": (True, 3.0),
    "ratio_vs_llama_cpp_float32": (True, 1.4),
    "memory_growth": (False, 1.1),
    "generated_memory_growth": (False, 1.05),
    "bytes_per_query": (False, 1000.0),
    "not_scoring_seconds": (False, 3.0),
    "grid_overhead_ms": (False, 50.0),
}
SAME_NUMBERS = {"ratio_vs_recompute": "recompute", "labels_ratio_vs_recompute": "labels"}  # key -> its section
KEYS = (*TARGETS, "bfloat16_speedup", "bfloat16_agreement", "finetune_step", "growth", "ablations")


def top(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `bench.json` has beside the sections in full: every key, None where it was not measured, and why not."""
    found = {key: value for name in sections if name != "labels" for key, value in sections[name].items()}
    found["labels_ratio_vs_recompute"] = sections.get("labels", {}).get("ratio_vs_recompute")
    reasons = [section["left_out"] for section in sections.values() if "left_out" in section]
    left_out = {key: reason for those in reasons for key, reason in those.items()}
    return {key: found.get(key) for key in KEYS} | {"left_out": left_out}


def verdicts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a target: what was measured, and whether it is met; what was not measured is not met."""
    rows = []
    for key, (larger, target) in TARGETS.items():
        value = results.get(key)
        met = value is not None and (value >= target if larger else value <= target)
        if key in SAME_NUMBERS and value is not None:
            met = met and bool(results["sections"][SAME_NUMBERS[key]]["same_numbers"])
        rows.append({"key": key, "target": f"{'at least' if larger else 'at most'} {target:g}", "value": value})
        rows[-1]["met"] = met
    return rows


def show(rows: list[dict[str, Any]], left_out: Mapping[str, str]) -> str:
    """The table at the end, and a line for each reason why something of it was left out."""
    lines = [f"{'':<28}{'target':<16}{'measured':>12}   met"]
    for row in rows:
        value = "not measured" if row["value"] is None else f"{row['value']:.3f}"
        lines.append(f"{row['key']:<28}{row['target']:<16}{value:>12}   {'yes' if row['met'] else 'NO'}")
    missing = {row["key"]: left_out[row["key"]] for row in rows if row["key"] in left_out}
    return "\n".join([*lines, *(f"{key} is left out: {reason}" for key, reason in missing.items())])
