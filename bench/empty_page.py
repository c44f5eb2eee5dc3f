"""What a page costs that computes nothing: import, kernel, close."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nbformat import v4

from bench.measuring import child, timed
from bench.setting import Bench, Setting
from iclgd_helpers import storage
from iclgd_helpers.experiments import warm_kernels
from iclgd_helpers.experiments.notebook_execution import Execution

PARAMETERS = "seed = 0\nn_demonstrations = 4"
IMPORTS = """\
import torch

from iclgd_helpers.experiments import experiment, parameters, records
from iclgd_helpers.pages import figures
"""


def empty_page(bench: Bench) -> dict[str, Any]:
    """Seconds of a page without work: of several in one command the last, so that what is kept warm counts as warm."""
    found = child({"what": "executed", "setting": asdict(bench.setting)})
    return {"empty_page_seconds": found["seconds"][-1], **found}


def executed(setting: Setting, _job: Mapping[str, Any]) -> dict[str, Any]:
    """In a fresh process: the seconds of each page, one behind the other."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "empty.ipynb")
        storage.write_text(page, notebook())
        targets = [Path(folder, f"{number}.ipynb") for number in range(setting.empty_pages)]
        with warm_kernels.served([page]) as server:  # as the book has them executed
            pages = [Execution(page, target, {"seed": 1}, server) for target in targets]
            return {"seconds": [timed(one.run) for one in pages]}


def notebook() -> str:
    """The cells that every page of an experiment has."""
    parameters = v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [v4.new_markdown_cell("# 00 Empty"), parameters, v4.new_code_cell(IMPORTS)]
    return str(v4.writes(v4.new_notebook(cells=cells, metadata=kernel)))
