"""Bad input of every command: one line that names it and says the way out, status 2, and nothing that was made."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import __main__ as bench_main
from iclgd_helpers import cli, command_line, pinned_downloads
from iclgd_helpers.data.tasks import TASKS
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import inputs, notebook_execution, notebook_files, protocol, runner
from tools import notebooks
from tools.book_pages import ROOT

PAGES = ROOT / "notebooks"
PAGE, OWN_PAGE = (str(PAGES / name) for name in ("50_prediction_alignment.ipynb", "90_your_own_model.ipynb"))
LONG = "x" * 300
HALF = b"\xff".decode("utf-8", "surrogateescape")
SMOKE = ["--preset", "smoke"]
NAMED = {name: ["grid", "--plan", name] for name in ("reproduction", "prompts")}
RUNS = [*SMOKE, "--task", "cb", "-p", "data_source", "generated"]
TABLE = ["-p", "data_file", "one.csv", "-p", "template", "{text} is", "-p", "verbalizers", "bad,good"]


def cell(source: object = "seed = 0\nn_demonstrations = 4", **changed: object) -> dict:
    """A code cell tagged `parameters`, as its JSON."""
    whole = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source, "outputs": []}
    return whole | {"execution_count": None, "id": f"c{abs(hash(str(source))) % 10**6}"} | changed


def notebook(*cells: object, **changed: object) -> dict:
    """A notebook of these cells, as its JSON."""
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5} | changed


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture(autouse=True)
def here(tmp_path: Path, records_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory: a notebook, a short table, an empty file, a circle of links; nothing may be computed."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "good.ipynb").write_text(json.dumps(notebook(cell())))
    (folder / "file").touch()
    (folder / "one.csv").write_text("text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(6)))
    (folder / "circle").symlink_to("circle")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("ICLGD_DATA", raising=False)
    monkeypatch.setattr(pinned_downloads, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(notebook_execution, "execute", lambda *_: pytest.fail("a kernel was started"))
    monkeypatch.setattr(bench_main, "run", lambda *_: pytest.fail("speed was measured"))
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("a job was started"))
    return folder


def refused(name: str, arguments: list[str], fault: str, capfd: pytest.CaptureFixture) -> None:
    """Assert that the command ends with status 2 and one line that holds `fault`."""
    tool = {"bench": bench_main.main, "notebooks": notebooks.main}.get(name)
    status = tool(arguments) if tool else cli.main([*NAMED.get(name, [name]), *arguments])
    said = capfd.readouterr().err
    assert status == 2, said
    assert said.count("\n") == 1 and said.startswith("error: ") and len(said) < 1000, said
    assert fault in said


# ------------------------------------------------------------------------------------------------- words and numbers
SEEDS = [("three", "'three'"), ("-1", "-1"), ("1.5", "1.5"), (str(2**32), str(2**32))]
WORDS = [
    ("run", [], "Missing argument 'NOTEBOOK'"),
    ("run", [""], "it is empty"),
    ("run", [PAGE, "more"], "more"),
    ("run", [PAGE, "--sed", "3"], "--sed"),
    ("run", [PAGE, "-p", "seed"], "requires 2 arguments"),
    ("run", [PAGE, "-p", "sed", "3"], "did you mean 'seed'"),
    ("run", ["50", "-p", "sed", "3"], "did you mean 'seed'"),
    ("run", ["51"], "no notebook at"),
    ("run", ["**"], "no notebook at"),
    ("run", [PAGE, "-p", "seed", "1", "-p", "seed", "2"], "-p seed is given twice"),
    ("run", [PAGE, *SMOKE, "-p", "preset", "paper"], "--preset and -p preset are both given"),
    ("run", [PAGE, "--preset", " "], "it is empty"),
    ("run", [PAGE, "--preset", "huge"], "unknown preset 'huge'"),
    ("run", [PAGE, "--output", ""], "it is empty"),
    ("run", [PAGE, *SMOKE, "-p", "balanced", "true"], "balanced='true'"),
    *(("run", [PAGE, *SMOKE, "-p", "seed", seed], f"seed={said}") for seed, said in SEEDS),
    ("run", [PAGE, *SMOKE, "-p", "task", "nonsense"], "unknown task 'nonsense'"),
    ("run", [PAGE, *SMOKE, "-p", "n_demonstrations", "-1"], "n_demonstrations=-1"),
    ("run", [PAGE, *SMOKE, "-p", "learning_rate", "-1e-3"], "learning_rate=-0.001"),
    ("run", [PAGE, *SMOKE, "-p", "learning_rate", "nan"], "learning_rate=nan"),
    ("run", [PAGE, *SMOKE, "-p", "dtype", "float8"], "dtype='float8'"),
    ("run", [PAGE, *SMOKE, "-p", "data_source", "web"], "data_source='web'"),
    ("run", [PAGE, *SMOKE, "-p", "device", "cpu:99"], "device 'cpu:99'"),
    ("run", [PAGE, *SMOKE, "-p", "device", "privateuseone"], "device 'privateuseone'"),
    ("run", [PAGE, *SMOKE, "-p", "device", "cuda:63"], "device 'cuda:63'"),
    ("run", [str(PAGES / "76_demonstration_attention.ipynb"), *SMOKE, "-p", "store", "yes"], "store='yes'"),
    ("run", [str(PAGES / "72_gradient_norms_and_clipping.ipynb"), "-p", "n_clip_values", "1e9"], "n_clip_values="),
    ("run", [str(PAGES / "80_cost_and_speed.ipynb"), "-p", "device_tflops", "inf"], "device_tflops=inf"),
    ("run", [str(PAGES / "01_one_step.ipynb"), "-p", "n_demonstrations", "1000000000"], "n_demonstrations=10000"),
    ("run", [str(PAGES / "01_one_step.ipynb"), "-p", "learning_rate", "1e300"], "learning_rate=1e+300"),
    ("grid", ["--preset", ""], "it is empty"),
    ("grid", ["--task", "sst3"], "unknown task 'sst3'"),
    ("grid", [*RUNS, "-p", "learning_rat", "1"], "did you mean 'learning_rate'"),
    ("grid", ["--seed", "x"], "'x' is not a valid integer"),
    ("grid", [*RUNS, "-p", "task", "mr"], "--task and -p task are both given"),
    ("grid", [*RUNS, "--plan", "reproduction"], "--preset: --plan reproduction fixes it"),
    ("grid", ["--stage", "rates"], "--stage: give it with --plan reproduction"),
    ("prompts", ["--stage", "rates"], "--stage: give it with --plan reproduction"),
    ("grid", ["--plan", "x"], "'x' is not one of"),
    ("grid", [*RUNS, "--workers", "0"], "1<=x<=1024"),
    ("cost", [*SMOKE, "--task", "sst3"], "unknown task 'sst3'"),
    ("records", ["shwo"], "No such command 'shwo'"),
    *(("records", ["show", name], "0 records in") for name in ("zz", "/nowhere", "**", "[")),
    ("records", ["compare", "a"], "Missing argument 'SECOND'"),
    ("doctor", ["more"], "more"),
    ("grid", [*RUNS, "--seed", "-1"], "seed=-1"),
    *(
        ("grid", [*RUNS, "--tflops", rate], "positive number of TFLOP/s")
        for rate in ("0", "nan", "1e-400", "1e300", "x")
    ),
    ("reproduction", ["--stage", "x"], "unknown stage 'x'"),
    ("reproduction", ["--seed", "3"], "--seed: --plan reproduction fixes it"),
    ("reproduction", ["--tflops", "fast"], "'fast': give a positive number"),
    ("reproduction", ["--task", "snippets"], "unknown task of the plan 'snippets'"),
    ("reproduction", ["--threads", "1e5"], "'1e5' is not a valid integer"),
    ("reproduction", ["--threads", "1000000000000"], "1<=x<=1024"),
    ("reproduction", ["--model", ""], "it is empty"),
    ("prompts", ["--task", "cb"], "unknown task of the plan 'cb'"),
    ("prompts", ["--tflops", "-1"], "positive number of TFLOP/s"),
    ("settings", ["more"], "more"),
    ("notebooks", [], "Missing command"),
    ("notebooks", ["bok"], "No such command 'bok'"),
    ("book", ["--preset", "huge"], "unknown preset 'huge'"),
    ("notebooks", ["smoke-copies"], "Missing argument 'FOLDER'"),
    ("bench", ["--only", "nothing"], "'nothing' is not one of"),
    ("bench", ["more"], "more"),
]


# ---------------------------------------------------------------------------------------------------------------- paths
PATHS = [("~nosuchuser/x", "nosuchuser"), (LONG, "too long"), ("x/" * 3000, "too long"), ("circle", "links"),
         ("circle/x", "circle"), (HALF, "surrogates"), ("a\0b", "null")]  # fmt: skip
USES = {
    "run": lambda path: ["run", path],
    "output": lambda path: ["run", "good.ipynb", "--output", path],
    "model": lambda path: ["run", PAGE, *SMOKE, "-p", "model", path],
    "data_folder": lambda path: ["run", PAGE, *SMOKE, "-p", "data_folder", path],
    "data_file": lambda path: ["run", PAGE, *SMOKE, "-p", "data_file", path, *TABLE[3:]],
    "records": lambda path: ["grid", *RUNS, "--records", path],
    "sweep_model": lambda path: ["grid", *RUNS, "--model", path],
    "grid_model": lambda path: ["reproduction", "--task", "mr", "--model", path],
    "prompt_model": lambda path: ["prompts", "--model", path],
    "book": lambda path: ["book", "--folder", path],
    "copies": lambda path: ["notebooks", "smoke-copies", path],
    "refresh": lambda path: ["notebooks", "refresh", path],
    "bench": lambda path: ["bench", "--quick", "--output", path],
    "bench_data": lambda path: ["bench", "--data-folder", path],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("path", "fault"), PATHS, ids=[fault for _path, fault in PATHS])
def test_paths_that_nothing_can_have(use: str, path: str, fault: str, capfd):
    name, *arguments = USES[use](path)
    refused(name, arguments, fault, capfd)


@pytest.mark.parametrize("variable", ["ICLGD_DATA", "ICLGD_RECORDS"])
@pytest.mark.parametrize(("path", "fault"), PATHS[:3], ids=[fault for _path, fault in PATHS[:3]])
def test_the_same_paths_in_the_environment(variable: str, path: str, fault: str, capfd, monkeypatch):
    monkeypatch.setenv(variable, path)
    refused("grid", ["--preset", "quick", "--task", "cb"] if variable == "ICLGD_DATA" else RUNS, fault, capfd)


NOT_WRITABLE = [
    ("run", ["good.ipynb", "--output", "file"], "cannot write to"),
    ("run", ["good.ipynb", "--output", "file/x"], "cannot write to"),
    ("run", ["good.ipynb", "--output", "/proc/x"], "cannot write to /proc/x"),
    ("run", ["good.ipynb", "--output", "."], "no output of a run"),
    ("run", [PAGE, *SMOKE, "--output", str(PAGES)], "no output of a run"),
    ("grid", [*RUNS, "--records", "file"], "cannot write to"),
    ("grid", [*RUNS, "--records", "/proc/x"], "cannot write to /proc/x"),
    ("book", ["--folder", "file"], "cannot write to"),
    ("notebooks", ["smoke-copies", "/proc/x"], "cannot write to /proc/x"),
    ("bench", ["--quick", "--output", "file/bench.json"], "cannot write to"),
    ("bench", ["--quick", "--output", "/proc/x/bench.json"], "cannot write to /proc/x"),
    ("bench", ["--quick", "--output", "."], "is a folder: name a file"),
]


def test_records_that_could_not_be_stored_stop_a_page_that_computes_them(capfd, monkeypatch):
    monkeypatch.setenv("ICLGD_RECORDS", "/proc/x")
    refused("run", [PAGE, *SMOKE], "cannot write to /proc/x", capfd)
    with pytest.raises(pytest.fail.Exception, match="a kernel was started"):  # this one keeps none
        cli.main(["run", str(PAGES / "10_inside_a_pretrained_model.ipynb"), *SMOKE, "--output", "out"])


@pytest.mark.parametrize("link", [False, True])
def test_only_what_a_run_has_written_is_written_over(link: bool, here: Path, capfd):
    out = here / "out"
    out.mkdir()
    (out / "good.ipynb").hardlink_to(here / "good.ipynb") if link else (out / "good.ipynb").write_text("mine")
    refused("run", ["good.ipynb", "--output", "out"], "no output of a run", capfd)
    (out / "good.ipynb").unlink()
    (out / "good.ipynb").write_text(json.dumps(notebook(cell(), metadata={"papermill": {}})))
    with pytest.raises(pytest.fail.Exception, match="a kernel was started"):  # an earlier run's
        cli.main(["run", "good.ipynb", "--output", "out"])


# ------------------------------------------------------------------------------------------------- models, data, rows
MISSING = [
    ("run", [PAGE, *SMOKE, "-p", "model", "./none"], "config.json"),
    ("run", [PAGE, *SMOKE, "-p", "model", "."], "config.json"),
    ("run", [PAGE, *SMOKE, "-p", "data_folder", "."], "no folder 'snippets'"),
    ("run", [PAGE, *SMOKE, "-p", "data_source", "hub"], "'snippets'"),
    ("run", [PAGE, *SMOKE, "-p", "n_demonstrations", "1000000000"], "n_demonstrations=1000000000"),
    ("run", [PAGE, *SMOKE, *TABLE], "n_demonstrations=16"),
    ("run", [PAGE, *SMOKE, "-p", "data_file", "file", *TABLE[3:]], "no table at"),
    ("run", [PAGE, *SMOKE, *TABLE, "-p", "label_column", "1"], "no column '1'"),
    ("run", [PAGE, *SMOKE, "-p", "data_folder", "2024"], "2024"),
    ("run", [OWN_PAGE, *SMOKE, "-p", "other_model", "./none"], "config.json"),
    ("run", [OWN_PAGE, *SMOKE, "-p", "model", "./none"], "config.json"),
    ("run", [str(PAGES / "80_cost_and_speed.ipynb"), *SMOKE, "-p", "bench_file", "file"], "or damaged: pass"),
    ("run", [str(PAGES / "80_cost_and_speed.ipynb"), "-p", "bench_file", "results/claims.json"], "no measurement"),
    ("grid", [*RUNS, "--model", "./none"], "config.json"),
    ("grid", [*RUNS, "-p", "n_demonstrations", "100000"], "n_demonstrations=100000"),
    ("grid", [*SMOKE, *TABLE], "n_demonstrations=16"),
    ("grid", [*RUNS, "--model", "nowhere/nothing"], "cannot load model 'nowhere/nothing'"),
    ("reproduction", ["--model", "no/such-model", "--task", "cb"], "cannot load model 'no/such-model'"),
    ("reproduction", ["--task", "mr", "--model", "./none"], "config.json"),
    ("prompts", ["--model", "./none"], "config.json"),
]


@pytest.mark.parametrize(("name", "arguments", "fault"), [*WORDS, *NOT_WRITABLE, *MISSING])
def test_bad_input_is_missed_before_anything_slow(name: str, arguments: list[str], fault: str, capfd, here: Path):
    before = sorted(here.parent.rglob("*"))
    refused(name, arguments, fault, capfd)
    assert sorted(here.parent.rglob("*")) == before


@pytest.mark.parametrize(("folder", "fault"), [("/nowhere", "'/nowhere'"), (".", "in the data folder")])
@pytest.mark.parametrize("name", ["reproduction", "prompts", "bench"])
def test_a_data_folder_without_the_tasks(name: str, folder: str, fault: str, capfd, monkeypatch):
    monkeypatch.setenv("ICLGD_DATA", folder)
    refused(name, [], fault, capfd)


def test_the_page_that_brings_its_text_asks_for_no_other(here: Path, monkeypatch):
    """Its default is a table that it writes; the preset's text need not be there."""
    monkeypatch.setattr(inputs, "task_data", lambda _given: pytest.fail("looked for another text"))
    for more, stopped in (([], "a kernel was started"), (["-p", "task", "cb"], "looked for another text")):
        with pytest.raises(pytest.fail.Exception, match=stopped):
            cli.main(["run", OWN_PAGE, *SMOKE, "--output", "out", *more])


def test_a_built_in_name_is_that_model_whatever_lies_here(here: Path):
    (here / "tiny-llama").mkdir()
    assert command_line.from_here("tiny-llama") == "tiny-llama"
    assert command_line.from_here("./tiny-llama") == str(here / "tiny-llama")


def test_the_six_tasks_are_all_but_the_default_one():
    assert set(protocol.SEEDS) == {name for name in TASKS if name != "snippets"}


# ------------------------------------------------------------------------------------------------------------ notebooks
BROKEN = {  # content of a file -> what is said of it
    "text": ("hello", "no notebook"),
    "number": ("84", "says no format"),
    "half": (json.dumps(notebook(cell()))[:200], "no notebook"),
    "a BOM": ("\ufeff" + json.dumps(notebook(cell())), "BOM"),
    "deep": ("[" * 100_000 + "]" * 100_000, "nested"),
    "deep metadata": (notebook(cell(), metadata={"a": nested(400)}), "nested more than 100"),
    "not a number": (json.dumps(notebook(cell(), metadata={"a": float("nan")})), "NaN"),
    "an older format": (notebook(cell(), nbformat=3), "of format 3"),
    "a text for a format": (notebook(cell(), nbformat_minor="5"), "says no format"),
    "no cells": (notebook(cells=None), "no list of cells"),
    "cells that are numbers": (notebook(1, 2), "cell 1"),
    "a cell that is null": (notebook(cell(), None), "cell 2"),
    "a cell of no kind": (notebook(cell(cell_type="x")), "cell 1"),
    "a number for a text": (notebook(cell(3)), "the text of cell 1"),
    "numbers for lines": (notebook(cell([1, 2])), "the text of cell 1"),
    "a number for tags": (notebook(cell(metadata={"tags": 5})), "the tags of cell 1"),
    "lists for tags": (notebook(cell(metadata={"tags": [["parameters"]]})), "the tags of cell 1"),
    "a list for metadata": (notebook(cell(), metadata=[]), "no metadata"),
    "a list for a cell's metadata": (notebook(cell(metadata=[])), "cell 1 has no metadata"),
    "a number for papermill's": (notebook(cell(), metadata={"papermill": 3}), "no metadata"),
    "a number for outputs": (notebook(cell(outputs=3)), "the outputs of cell 1"),
    "half a character": (notebook(cell("seed = 0 # \ud800")), "surrogates"),
    "two cells of parameters": (notebook(cell(), cell("seed = 1")), "2 cells tagged"),
    "no cell of parameters": (notebook(), "0 cells tagged"),
    "an unhashable value": (notebook(cell("seed = {[]: 1}")), "may only hold lines"),
    "too many brackets": (notebook(cell("seed = " + "(" * 5000 + ")" * 5000)), "may only hold lines"),
    "too many signs": (notebook(cell("seed = " + "-" * 20_000 + "1")), "may only hold lines"),
    "a NUL": (notebook(cell("seed = 0\0")), "may only hold lines"),
}
WRONG_DEFAULTS = {
    f"seed = {nested(90)}": "seed=[[",
    "seed = '3 '": "seed='3 '",
    "preset = ['quick']": "preset ['quick']",
}
WRONG_DEFAULTS |= {"preset = 'smoke'\ntask = {1}": "unknown task {1}", "preset = {}": "unknown preset {}"}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("words", [["run"], ["notebooks", "refresh"]], ids=["run", "refresh"])
def test_broken_notebooks(what: str, words: list[str], here: Path, capfd):
    content, fault = BROKEN[what]
    (here / "page.ipynb").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    refused(words[0], [*words[1:], "page.ipynb"], fault, capfd)


@pytest.mark.parametrize("source", WRONG_DEFAULTS)
def test_wrong_values_in_a_notebook(source: str, here: Path, capfd):
    (here / "page.ipynb").write_text(json.dumps(notebook(cell(source))))
    refused("run", ["page.ipynb"], WRONG_DEFAULTS[source], capfd)


LATER = {  # what only Jupyter's library, which takes seconds to import, says
    "no outputs": notebook({name: value for name, value in cell().items() if name != "outputs"}),
    "a list for an id": notebook(cell(id=[])),
    "an output of no kind": notebook(cell(outputs=[{"output_type": "x"}])),
    "a number for the kernel": notebook(cell(), metadata={"kernelspec": 3}),
}


@pytest.mark.parametrize("what", LATER)
def test_notebooks_that_jupyter_cannot_read(what: str, here: Path):
    (here / "page.ipynb").write_text(json.dumps(LATER[what]))
    assert notebook_files.parameters_cell(here / "page.ipynb")
    with pytest.raises(InputError, match="is no notebook") as caught:
        notebook_files.demand_valid(here / "page.ipynb")
    assert "\n" not in str(caught.value)


def test_a_large_file_is_not_read(here: Path, capfd):
    with (here / "large.ipynb").open("wb") as file:
        file.truncate(10**9)  # of which none is on the disk
    refused("run", ["large.ipynb"], "1,000,000,000 bytes", capfd)


# -------------------------------------------------------------------------------------------- the commands as processes
MODULES = {"iclgd_helpers": [[name] for name in cli.iclgd.commands], "bench": [[]], "tools.notebooks": [[]]}
COMMANDS = [[module, *words] for module, several in MODULES.items() for words in several]


def process(words: list[str], here: Path, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(here)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *words], cwd=here, env=environment, **streams, **options)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_and_a_slip_of_every_command(words: list[str], here: Path):
    said, _ = process([*words, "--help"], here).communicate()
    name = (
        "python -m bench" if "bench" in words else {"iclgd_helpers": "iclgd"}.get(words[0], "python -m tools.notebooks")
    )
    assert said.startswith(f"Usage: {name} ")
    started = process([*words, "--nope"], here)
    said, fault = started.communicate()
    assert (started.returncode, said, fault.count("\n")) == (2, "", 1) and "--nope" in fault


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_read_before_anything_slow_is_imported(words: list[str], here: Path):
    slow = ["torch", "transformers", "papermill", "nbformat", "IPython", "matplotlib"]
    if words[0] == "tools.notebooks":
        pytest.skip("a maintainer's tool, which may be slow")
    module = {"iclgd_helpers": "iclgd_helpers.cli", "bench": "bench.__main__"}[words[0]]
    program = f"import sys; sys.modules.update(dict.fromkeys({slow})); sys.argv = {['', *words[1:], '--nope']}\n"
    program += f"from iclgd_helpers.signals import start; start({module!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 2 and "--nope" in done.stderr, done.stderr


SLEEPS = notebook(cell(), cell("open('started', 'w').close()\nimport time\ntime.sleep(60)", metadata={}))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["at once", "in a cell"])
def test_a_signal_ends_a_run_with_one_line_and_leaves_nothing(number: int, status: int, moment: str, here: Path):
    (here / "page.ipynb").write_text(json.dumps(SLEEPS).replace("'started'", repr(str(here / "started"))))
    before = set(here.iterdir())
    started = process(["iclgd_helpers", "run", "page.ipynb", "--output", "out"], here)
    time.sleep(0.3)
    while moment == "in a cell" and not (here / "started").exists():
        time.sleep(0.1)
    started.send_signal(number)
    _, said = started.communicate()
    assert started.returncode == status and said.count("\n") == 1 and "start it again" in said, said
    assert {path.name for path in set(here.iterdir()) - before} <= {"out", "started"}
    assert not (here / "out").exists() or not list((here / "out").iterdir())
