"""Memory of a process as its queries become more, and bytes of a record."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.measuring import child, peak_memory
from bench.setting import Bench, Setting
from iclgd_helpers import paths
from iclgd_helpers.data.synthetic import generate_rows
from iclgd_helpers.data.tasks import Example
from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.experiments import comparison, experiment, records
from iclgd_helpers.experiments.runs import Run


def memory(bench: Bench) -> dict[str, Any]:
    """
    Peak memory of fresh processes that observe and compare three arms on few and on many queries.

    With the real model, queries repeat where the task has fewer. With a tiny one there are many more, each another
    generated text: what grows with them would hide behind a real model's weights and the time that it takes.
    """
    few, many = bench.setting.memory
    tiny = replace(bench.setting, model="tiny-llama", data_source="generated")

    def run(setting: Setting, n: int, **options: bool) -> dict[str, Any]:
        return child({"what": "observed", "setting": asdict(setting), "n": n, **options})

    found = {"few": run(bench.setting, few), "many": run(bench.setting, many)}
    found["few_kept"] = run(bench.setting, few, keep=True)
    generated = {str(n): run(tiny, n, generated=True) for n in bench.setting.generated_memory}
    kept = found["few_kept"]["kept_bytes"] / few
    peaks = [one["peak_bytes"] for one in generated.values()]
    return {
        "memory_growth": found["many"]["peak_bytes"] / found["few"]["peak_bytes"],
        "generated_memory_growth": peaks[-1] / peaks[0],
        "n_queries": [few, many],
        "processes": found,
        "generated_processes": generated,
        "observed_bytes_per_query": kept,
        "growth_if_kept": (found["few_kept"]["peak_bytes"] + kept * (many - few)) / found["few_kept"]["peak_bytes"],
        "counts": "peak resident memory of the whole process, interpreter and model load included; growth_if_kept adds "
        "what was observed of the further queries to the peak measured with everything kept",
    }


def observed(setting: Setting, job: Mapping[str, Any]) -> dict[str, Any]:
    """In a fresh process: observe and compare three arms, and keep of it what a record keeps, or everything."""
    bench = Bench(setting, Path(), {})
    cell, n = bench.cell, job["n"]
    bare = Arm(cell.layout.prefix())
    moved = Arm(bare.prefix, finetune.random_update(cell.model, 0, 1.0))
    loaded, kept, table = peak_memory(), [], []
    arms = {"zero_shot": bare, "in_context": bench.in_context, "standard": moved}
    queries = generated(cell, n) if job.get("generated") else bench.some(n)
    for indices, seen in observe(cell.model, queries, arms):
        rows = [queries[i].row for i in indices]
        compared = comparison.similarities(*seen.values(), cell, rows)
        table.append([value.half() for value in compared.values()])
        if job.get("keep"):
            kept.append(seen)
    parts = (part for batch in kept for observation in batch.values() for part in vars(observation).values())
    return {
        "peak_bytes": peak_memory(),
        "loaded_bytes": loaded,
        "kept_bytes": sum(part.nbytes for part in parts),
        "n_texts": len({query.tokens for query in queries}),
    }


def generated(cell: Run, n: int) -> Sequence[Query]:
    """`n` queries of the cell's task, each another text of the grammar."""
    task = cell.layout.task
    examples = (
        Example(task.template.format(**row), int(row[task.label_column]), number)
        for number, row in enumerate(generate_rows(task, n))
    )
    return [cell.layout.query(example, cell.parameters.token_read) for example in examples]


def record(bench: Bench) -> dict[str, Any]:
    """Stored bytes that one more query costs when every arm sees it: two sizes of one record, compared."""
    n = bench.setting.record
    cell = replace(bench.cell, queries=bench.cell.queries[:n], training=bench.cell.training[:2])
    cell = replace(cell, demonstrations=bench.cell.demonstrations[:2])
    whole = experiment.compute(cell, progress=False)
    sizes = {}
    for rows in (n // 2, n):
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            path = records.save(records.Record(whole.json, whole.examples.iloc[:rows]), Path(folder))
            sizes[rows] = (path / records.PARQUET).stat().st_size
    marginal = (sizes[n] - sizes[n // 2]) / (n - n // 2)
    stored = [r for r in records.load_all("results/records") if r.json["parameters"]["model"] == bench.setting.model]
    return {
        "bytes_per_query": marginal,
        "parquet_bytes_of_no_query": sizes[n] - n * marginal,
        "json_bytes": len(json.dumps(whole.json, indent=1)),
        "n_arms": len(whole.json["arms"]),
        "stored_records": {r.json["id"]: _whole_size(r) for r in stored},
    }


def _whole_size(stored: records.Record) -> dict[str, Any]:
    folder = paths.resolve_path("results/records") / stored.json["id"]
    whole = sum(path.stat().st_size for path in folder.iterdir())
    return {"bytes": whole, "n_queries": stored.json["n_examples"], "n_compared": stored.json["n_compared"]}
