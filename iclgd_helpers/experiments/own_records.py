"""
The record of a page that trains networks of its own: computed seed by seed, and named by the code that did.

Every finished seed is kept at once, so an interrupted computation continues where it stopped.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from iclgd_helpers import storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import provenance


def without_annotations(source: str) -> str:
    """Source without the annotations of parameters, results and names: they compute nothing."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    spans = []  # from the end of what is annotated to the end of the annotation
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg) and node.annotation:
            spans.append((starts[node.lineno - 1] + node.col_offset + len(node.arg), node.annotation))
        elif isinstance(node, ast.AnnAssign) and node.value:
            spans.append(
                (starts[(node.target.end_lineno or 0) - 1] + (node.target.end_col_offset or 0), node.annotation)
            )
        elif isinstance(node, ast.FunctionDef) and node.returns:
            result = starts[node.returns.lineno - 1] + node.returns.col_offset
            spans.append((source.rindex("->", 0, result), node.returns))
    for begin, annotation in sorted(spans, key=lambda span: -span[0]):
        source = source[:begin] + source[starts[(annotation.end_lineno or 0) - 1] + (annotation.end_col_offset or 0) :]
    return source


def code_hash(functions: Iterable[Callable[..., Any]], settings: Mapping[str, Any]) -> str:
    """Hash of functions, in this order and without comments, layout and annotations, and of their settings."""
    bare = [without_annotations(inspect.getsource(function)) for function in functions]
    source = "".join(map(provenance.source_form, bare))
    return hashlib.sha256((source + json.dumps(settings)).encode()).hexdigest()[:16]


def compute(
    one_seed: Callable[[int], Any], seeds: Iterable[int], facts: Mapping[str, Any], path: Path, unfinished: Path
) -> None:
    """
    Compute the record at `path` on one thread; an older one is replaced when all seeds are there.

    Parameters
    ----------
    one_seed : computes what is kept of a seed.
    facts : further entries of the record, before its `networks` (seed -> what `one_seed` gave).
    unfinished : where finished seeds wait for the others; it is read when the computation is begun again.
    """
    done = storage.read_json(unfinished) if unfinished.exists() else {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that every machine adds in the same order
    try:
        for seed in seeds:
            if str(seed) not in done:
                done[str(seed)] = one_seed(seed)
                storage.write_json(unfinished, done)
    finally:
        torch.set_num_threads(threads)
    storage.write_json(path, {**facts, "networks": done})
    unfinished.unlink()


def load(path: Path) -> dict[str, Any]:
    """The record at `path`; InputError if there is none."""
    if not path.exists():
        raise InputError(f"no record at {path}: clone the repository, or run this page with recompute = True")
    found: dict[str, Any] = storage.read_json(path)
    return found
