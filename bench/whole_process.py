"""A whole process that predicts: which of its seconds are not scoring."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.measuring import child, timed
from bench.setting import Bench, Setting
from iclgd_helpers.engine.models import LanguageModel


def whole_process(bench: Bench) -> dict[str, Any]:
    """Seconds of a fresh process from start to exit, without those in which queries are scored."""
    job = {"what": "predicted", "setting": asdict(bench.setting)}
    found = [child(job) for _round in range(bench.setting.rounds)]
    rest = [one["whole_process_seconds"] - one["scoring_seconds"] for one in found]
    return {
        "not_scoring_seconds": statistics.median(rest),
        "seconds": {name: [one[name] for one in found] for name in found[0] if name.endswith("seconds")},
        "n_queries": len(bench.cell.queries),
        "counts": "interpreter, imports, text, tokens, model and prefix; prepare_seconds are text, tokens and model",
    }


def predicted(setting: Setting, _job: Mapping[str, Any]) -> dict[str, Any]:
    """In a fresh process: label every query; the accuracy, and the seconds of each stage."""
    bench = Bench(setting, Path(), {})
    prepare = timed(lambda: bench.cell)
    with timed_prefixes(bench.cell.model) as prefixes:
        whole = timed(lambda: bench.ours)
    return {
        "accuracy": float((bench.ours.argmax(-1) == [query.label for query in bench.cell.queries]).mean()),
        "prepare_seconds": prepare,
        "prefix_seconds": sum(prefixes),
        "scoring_seconds": whole - sum(prefixes),
    }


@contextmanager
def timed_prefixes(model: LanguageModel) -> Iterator[list[float]]:
    """Seconds of every prefix that the model reads meanwhile."""
    seconds: list[float] = []
    plain = model.prefix

    def prefix(*arguments: Any) -> Any:
        found: list[Any] = []
        seconds.append(timed(lambda: found.append(plain(*arguments))))
        return found[0]

    model.prefix = prefix
    try:
        yield seconds
    finally:
        del model.prefix
