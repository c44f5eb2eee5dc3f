"""`python -m iclgd_helpers.experiments.run_notebook`: what it writes, and what it says to bad input."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill.cli import _resolve_type

from iclgd_helpers import cli, command_line
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import run_notebook
from iclgd_helpers.experiments.notebook_files import parameters_cell
from iclgd_helpers.experiments.parameters import validate_for_notebook
from tools.book_pages import ROOT

PAGE = ROOT / "notebooks" / "50_prediction_alignment.ipynb"


def small_notebook(folder: Path, source: str) -> Path:
    cells = [
        new_code_cell("seed = 0\nn_demonstrations = 4", metadata={"tags": ["parameters"]}),
        new_code_cell(source),
    ]
    path = folder / "small.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def printed(path: Path) -> str:
    return "".join(o.get("text", "") for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", []))


def test_bad_input_from_the_command_line(tmp_path):
    asked = ["run", str(PAGE), "-p", "sed", "3", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "iclgd_helpers", *asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "did you mean 'seed'" in done.stderr and done.stderr.count("\n") == 1


def test_missing_notebook_and_output_that_is_a_file(tmp_path, capsys):
    assert cli.main(["run", str(tmp_path / "none.ipynb")]) == 2
    assert "no notebook at" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["run", str(small_notebook(tmp_path, "")), "--output", str(tmp_path / "file")]) == 2
    assert "needed is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["seed = 1 + 1", "seed, k = 1, 2", "seed = = 3", "seed = k = 3", "seed: int = 3", "print(3)"]
)
def test_cell_of_parameters_holds_literals(line, tmp_path):
    path = small_notebook(tmp_path, "")
    notebook = nbformat.read(path, as_version=4)
    next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])).source = line
    nbformat.write(notebook, path)
    with pytest.raises(InputError, match="may only hold lines such as seed = 3"):
        parameters_cell(path)


def test_a_pages_own_parameters_have_a_folder_of_their_own():
    page = ROOT / "notebooks" / "72_gradient_norms_and_clipping.ipynb"
    given = [{"preset": "smoke", "n_clip_values": n} for n in (3, 9)]
    folders = {run_notebook.default_folder(page, one, validate_for_notebook(page, one)) for one in [*given, given[0]]}
    assert len(folders) == 2


@pytest.mark.parametrize("text", ["3", "-1", "1e-3", "True", "False", "None", "nan", "three", "1_0", "", "2048.0"])
def test_values_are_read_as_papermill_reads_them(text):
    assert repr(command_line.literal(text)) == repr(_resolve_type(text))


def test_paths_are_read_from_where_they_are_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").touch()
    (tmp_path / "book").mkdir()
    pairs = [("data_file", "./mine.csv"), ("data_folder", "book"), ("model", "tiny-llama"), ("label_column", "book")]
    here = {"data_file": str(tmp_path / "mine.csv"), "data_folder": str(tmp_path / "book")}
    assert command_line.typed(pairs) == here | {"model": "tiny-llama", "label_column": "book"}
    elsewhere = [("data_file", "README.md"), ("data_folder", "None"), ("label_values", "1")]
    assert command_line.typed(elsewhere) == {"data_file": "README.md", "data_folder": None, "label_values": "1"}, (
        "what is not here is the book's, and a text may look like a number"
    )
    monkeypatch.chdir(ROOT)
    assert command_line.typed([("data_folder", "book")]) == {"data_folder": "book"}, (
        "no machine's path where none is needed"
    )


def test_bad_input_found_inside_a_notebook(tmp_path, capsys):
    notebook = small_notebook(
        tmp_path,
        "from iclgd_helpers.errors import InputError\nraise InputError('one fault:\\n   another fault')",
    )
    assert cli.main(["run", str(notebook), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: one fault:\nerror: another fault\n", "a line for each"
    assert not (tmp_path / "out").exists()


def test_failing_cell_is_named_and_nothing_has_the_final_name(tmp_path, capsys):
    notebook = small_notebook(tmp_path, "1 / 0")
    assert cli.main(["run", str(notebook), "--output", str(tmp_path / "out")]) == 1
    assert "small.ipynb, cell In [2]: ZeroDivisionError" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.failed.ipynb"]


@pytest.mark.parametrize(
    ("end", "known"),
    [("os._exit(3)", "ended with exit status 3"), ("os.kill(os.getpid(), 9)", "was ended by SIGKILL")],
)
def test_of_a_dead_kernel_what_is_known_is_said(end, known, tmp_path, capsys):
    notebook = small_notebook(tmp_path, f"import os\n{end}")
    assert cli.main(["run", str(notebook), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"small.ipynb: the kernel {known}" in said and said.count("\n") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.failed.ipynb"]


@pytest.mark.parametrize("name", ["{seed}", "{0}", "{", "a } b"])
def test_braces_in_names_are_names(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    (folder := tmp_path / name).mkdir()
    notebook = small_notebook(folder, "print(seed)").rename(folder / f"{name}.ipynb")
    assert cli.main(["run", str(notebook), "-p", "seed", "5", "--output", str(folder / "{out}")]) == 0
    assert printed(folder / "{out}" / f"{name}.ipynb") == "5\n"
    assert not list((tmp_path / "temporary").iterdir()), "nothing of the kernel is left"


def test_value_arrives_and_foreign_kernels_are_ignored(tmp_path, monkeypatch, capsys):
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = small_notebook(tmp_path, "import sys\nprint(sys.executable, seed)")
    assert cli.main(["run", str(notebook), "-p", "seed", "3", "--output", str(tmp_path / "out")]) == 0
    assert printed(tmp_path / "out" / "small.ipynb") == f"{sys.executable} 3\n"
    assert "small.ipynb" in capsys.readouterr().out


def test_killed_run_leaves_no_notebook_and_can_be_repeated(tmp_path):
    marker = tmp_path / "started"
    source = f"import pathlib, time\nm = pathlib.Path({str(marker)!r})\nslow = not m.exists()\nm.touch()\n"
    notebook = small_notebook(tmp_path, source + "time.sleep(60 if slow else 0)\nprint('done')")
    command = [sys.executable, "-m", "iclgd_helpers", "run", str(notebook), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "small.ipynb").exists()
    assert [path.name[:6] for path in (tmp_path / "out").iterdir()] == [".part-"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert printed(tmp_path / "out" / "small.ipynb") == "done\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.ipynb"], "what was left is removed"


def test_page_with_its_record(tmp_path, records_folder):
    arguments = [str(PAGE), "--preset", "smoke", "-p", "seed", "3", "--output", str(tmp_path / "out")]
    assert cli.main(["run", *arguments]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        PAGE.name,
        "record.json",
        "examples.parquet",
        "calibration.parquet",
    }
    parameters = json.loads((tmp_path / "out" / "record.json").read_text())["parameters"]
    assert (parameters["seed"], parameters["preset"], parameters["model"]) == (3, "smoke", "tiny-llama")


def test_plain_papermill_from_another_folder(tmp_path, monkeypatch, records_folder):
    monkeypatch.chdir(tmp_path)
    values = {"preset": "smoke", "seed": 3}
    papermill.execute_notebook(PAGE, tmp_path / "out.ipynb", values, kernel_name="python3", progress_bar=False)
    assert "PASS" in printed(tmp_path / "out.ipynb")
