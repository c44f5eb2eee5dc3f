"""
The notebooks as a maintainer keeps them: `python -m tools.notebooks refresh | smoke-copies FOLDER | sync`.

Execute them and store the outputs; copy them for nbval; write what is the same in all of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from iclgd_helpers import storage
from iclgd_helpers.command_line import Here, exit_status
from iclgd_helpers.experiments import warm_kernels
from iclgd_helpers.experiments.notebook_execution import Execution, prepared
from iclgd_helpers.experiments.notebook_files import parameters_cell
from iclgd_helpers.experiments.parameters import ExperimentParameters
from tools import page_costs
from tools.book_pages import ROOT, TABLES, notebooks, preset_values, read, repository, write

SETUP_MARK = "# Colab setup: "
SETUP = (
    SETUP_MARK
    + """the same cell in every notebook, written by `python -m tools.notebooks sync`.
# For a GPU choose Runtime > Change runtime type > T4 GPU before running it. Elsewhere this cell does nothing.
import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

if "google.colab" in sys.modules and importlib.util.find_spec("iclgd_helpers") is None:
    folder = Path("iclgd-{tag}").absolute()  # the helpers, and the records that the pages show
    address = "{url}"
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", "--depth=1", "--branch={tag}", address, folder], check=True)
    keep = Path("keep.txt")  # torch and numpy stay exactly as Colab installed them
    keep.write_text("".join(f"{{name}}=={{version(name)}}\\n" for name in ("torch", "numpy")))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", keep, "-e", folder], check=True)
    sys.path.insert(0, str(folder))  # a package installed so is found by kernels that start later"""
)


def smoke_copies(folder: Path) -> None:
    """Copies for nbval: the smoke preset's values are injected, committed outputs and counts are kept."""
    for notebook in notebooks():
        write(prepared(notebook, preset_values(notebook, "smoke")), folder / notebook.name)


def refresh(chosen: Iterable[Path]) -> None:
    """Execute at the default preset and store the outputs in `notebooks/`; nothing else writes there."""
    chosen = list(chosen)
    for notebook in chosen:
        parameters_cell(notebook)  # refuses what is no notebook, before anything runs
    os.environ["ICLGD_RECORDS"] = str(ROOT / "_build" / "records")
    os.environ["ICLGD_TABLES"] = str(ROOT / TABLES)
    with warm_kernels.served(chosen) as server:
        for notebook in chosen:
            executed, began = ROOT / "_build" / "refresh" / notebook.name, time.perf_counter()
            Execution(notebook, executed, {}, server).run()
            page_costs.refer(notebook, time.perf_counter() - began)
            write(cleaned(read(executed)), notebook)
            print(f"refreshed {notebook.name}", flush=True)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what a run leaves in the metadata: papermill's, timings, widget state, interpreter version."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    joined = CoalesceStreamsPreprocessor()  # where a kernel cuts a stream is a matter of time
    for cell in notebook.cells:
        for name in ("papermill", "execution", "collapsed"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":  # progress bars and warnings, which name paths of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            joined.preprocess_cell(cell, {}, 0)
    return notebook


def setup_source() -> str:
    """Source of the Colab setup cell."""
    url, tag = repository()
    return SETUP.format(url=url, tag=tag)


def colab_link(notebook: Path) -> str:
    """The first cell's link to Colab; plain text, as a badge image would be loaded from elsewhere."""
    url, tag = repository()
    place = url.removeprefix("https://github.com/")
    return f"[Open in Colab](https://colab.research.google.com/github/{place}/blob/{tag}/notebooks/{notebook.name})"


def with_comments(source: str) -> str:
    """A cell of an experiment's parameters with the schema's comments; a page's own names keep theirs."""
    return "\n".join(map(_with_comment, source.splitlines()))


def _with_comment(line: str) -> str:
    assignment = line.partition("  # ")[0]
    field = ExperimentParameters.model_fields.get(assignment.partition(" = ")[0])
    return f"{assignment}  # {field.description}" if field else line


def sync() -> None:
    """Write what is the same in all notebooks: Colab link below the title, setup cell, comments of parameters."""
    for path in notebooks():
        notebook = read(path)
        title, *lines = notebook.cells[0].source.splitlines()
        rest = "\n".join(line for line in lines if not line.startswith("[Open in Colab](")).strip()
        notebook.cells[0].source = f"{title}\n\n{colab_link(path)}\n\n{rest}".strip()
        put_setup(notebook)
        if "preset" in parameters_cell(path):
            (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
            cell.source = with_comments(cell.source)
        write(notebook, path)


def put_setup(notebook: nbformat.NotebookNode) -> None:
    """The present setup cell in the place of the old one, or before any code."""
    tags = {"tags": ["hide-cell", "nbval-ignore-output"]}
    cell = nbformat.v4.new_code_cell(setup_source(), id="setup", metadata=tags)
    places = [i for i, old in enumerate(notebook.cells) if old.source.startswith(SETUP_MARK)]
    if places:
        cell.execution_count = notebook.cells[places[0]].execution_count
        notebook.cells[places[0]] = cell
    else:
        first_code = [c.cell_type for c in notebook.cells].index("code")
        notebook.cells.insert(first_code, cell)


@click.group(no_args_is_help=False)
def commands() -> None:
    """What maintainers do to the notebooks."""


@commands.command("smoke-copies")
@click.argument("folder", type=Here())
def smoke_copies_command(folder: Path) -> None:
    """Copies of the notebooks for nbval, in FOLDER."""
    storage.require_writable(folder)
    smoke_copies(folder)


@commands.command("refresh")
@click.argument("named", nargs=-1, type=Here())
def refresh_command(named: tuple[Path, ...]) -> None:
    """Store new outputs in notebooks/, or in those that are NAMED."""
    refresh(named or notebooks())


@commands.command("sync")
def sync_command() -> None:
    """Write the Colab link, the setup cell and the comments of parameters into the notebooks."""
    sync()


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m tools.notebooks`."""
    return exit_status(commands, arguments, "python -m tools.notebooks")


if __name__ == "__main__":
    sys.exit(main())
