"""What a fresh process does for a section: `python -m bench --child JOB`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from bench.setting import Setting

# What is asked for -> the module that has it: a process imports no other, for the imports are measured, too.
MODULES = {
    "predicted": "bench.whole_process",
    "observed": "bench.memory",
    "executed": "bench.empty_page",
    "performed": "bench.grid",
}


def run_child(job: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a job: `what` it is, the `setting`, and what else the function needs."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in job["setting"].items()}
    function = getattr(importlib.import_module(MODULES[job["what"]]), job["what"])
    found: dict[str, Any] = function(Setting(**values), job)
    return found
