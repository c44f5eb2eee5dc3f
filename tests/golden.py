"""
What the engine computes for a few small cells in float64, flat: `python tests/golden.py` writes `tests/golden.json`.

The stored numbers are those of the engine that made `results/records`. `test_engines.py` compares the present engine
with them: where they agree, its hash may stand in `results/engines.json` beside the one of the records.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import float64

from iclgd_helpers.data import sources, tasks
from iclgd_helpers.experiments import experiment, parameters, provenance, runs

PATH = Path(__file__).with_suffix(".json")
SMALL = {"preset": "smoke", "dtype": "float64", "n_demonstrations": 4, "max_examples": 6, "learning_rate": 0.02}
# Every family, method, loss, kind of clipping, control, token read and separator is in at least one of them.
CELLS: dict[str, dict[str, Any]] = {
    "llama": {"task": "cb", "chosen_rates": {"standard": 0.005, "joint": 0.01, "sequential": 0.03}},
    "gpt2": {"task": "sst5", "loss": "label", "clip": "per_layer", "clip_value": 0.5, "token_read": "prompt"},
    "gpt_neox": {"task": "subj", "loss": "label_space", "clip": "elementwise", "clip_value": 0.01, "balanced": True},
    "opt": {"task": "agnews", "separator": "newline", "untrained": "everything", "seed": 7},
    "gemma3": {"task": "cb", "n_demonstrations": 6, "clip": "global", "clip_value": 2.0, "conditioning": False},
    "xglm": {"task": "mr", "order": 2, "max_compared": 4, "equal_demonstrations": False, "max_context": 96},
}


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, list[float | None]]]:
    """Every list of numbers, and every number, in nested `value`, by the path of its keys."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from numbers(value[key], f"{name}/{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], list):
        yield from numbers(dict(enumerate(value)), name)
    elif isinstance(value, list) and not any(isinstance(item, str) for item in value):
        yield name, [None if item is None else float(f"{item:.9g}") for item in value]
    elif isinstance(value, (int, float)) or value is None:
        yield from numbers([value], name)


def cell(family: str) -> dict[str, list[float | None]]:
    """The numbers of one cell: of its record, and the log-probabilities of its examples."""
    with float64.uncast():
        given = parameters.resolve(SMALL | CELLS[family] | {"model": f"tiny-{family}", "n_calibration_rows": 0})
        record = experiment.compute(runs.prepare(given), progress=False)
    kept = "arms comparisons finetuning n_demonstrations n_training_demonstrations prefix_tokens".split()
    found = dict(numbers({name: record.json[name] for name in kept}))
    columns = [name for name in record.examples if name.startswith("log_probability/")]
    of_rows = {name: [row.tolist() for row in record.examples[name].dropna()] for name in columns}
    return found | dict(numbers(of_rows))


def checksums() -> dict[str, str]:
    """Of the generated text of every task."""
    return {name: sources.load_task(name, "generated").checksum for name in tasks.TASKS}


def main() -> int:
    """Write the numbers of the helpers that are imported; exit status 0."""
    content = {"engine": provenance.engine_hash(), "checksums": checksums()}
    content["cells"] = {family: cell(family) for family in CELLS}
    PATH.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{PATH.name}: engine {content['engine']}, {sum(map(len, content['cells'].values()))} lists of numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
