"""Pages that are executed side by side: their order, what is shown meanwhile, and their end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from iclgd_helpers import storage
from iclgd_helpers.experiments import live_lines
from tools import book_pages, page_costs, page_lanes
from tools.page_lanes import Page, next_page


def page(name, run=None, expected=None):
    return Page(Path(f"{name}.ipynb"), Path(), Path(), {}, "", run, run is not None, expected)


def order(pages, lanes):
    """The pages as they begin, when each takes the seconds that are expected; and which were beside each other."""
    waiting, running, stored, begun, beside, now = list(pages), {}, set(), [], [], 0.0
    while waiting or running:
        while len(running) < lanes and (new := next_page(waiting, {p.run for p in running}, stored)):
            waiting.remove(new)
            running[new] = now + (new.expected or 1)
            begun.append(new.name)
        beside.append({p.name for p in running})
        ended = min(running, key=running.get)
        now = running.pop(ended)
        stored.add(ended.run)
    return begun, beside, now


BOOK = [
    page("quickstart", "a", 280), page("theory", None, 10), page("more", None, 20), page("alignment", "a", 25),
    page("norms", "a", 220), page("other", "b", 90),
]  # fmt: skip


def test_what_others_wait_for_comes_first_then_the_longest():
    begun, beside, seconds = order(BOOK, 2)
    assert begun == ["quickstart", "other", "more", "theory", "norms", "alignment"]
    assert not any({"quickstart", name} <= pair for pair in beside for name in ("norms", "alignment"))
    assert seconds == 500, "control: one after the other they take 645"
    assert order(BOOK, 1)[2] == 645


@pytest.mark.parametrize(("cores", "alone", "beside"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (16, 16, 8)])
def test_pages_beside_each_other_share_the_cores(monkeypatch, cores, alone, beside):
    monkeypatch.setattr(page_lanes, "n_cores", lambda: cores)
    with_model, without = page("10", "a run"), page("01")
    assert [page_lanes.n_threads(with_model, value) for value in (False, True)] == [alone, beside]
    assert [page_lanes.n_threads(without, value) for value in (False, True)] == [1, 1]


def test_without_estimates_the_books_order_stays():
    assert order([page(name) for name in "abc"], 1)[0] == ["a", "b", "c"]
    assert order([page("a"), page("b", "run"), page("c", "run")], 1)[0] == ["b", "a", "c"]


def test_pages_of_one_run_are_found_by_their_parameters():
    found = {path: book_pages.preset_values(path, "smoke") for path in book_pages.notebooks()}
    runs = {path.stem: page_lanes.shown_run(path, given) for path, given in found.items()}
    assert runs["00_quickstart"][0] == runs["50_prediction_alignment"][0] is not None
    assert runs["01_one_step"] == (None, False), "theory"
    assert runs["10_inside_a_pretrained_model"] == (None, True), "a model, and no run"
    path = book_pages.ROOT / "notebooks" / "50_prediction_alignment.ipynb"
    assert page_lanes.shown_run(path, {"preset": "smoke", "seed": 3})[0] != runs["00_quickstart"][0]


def test_estimates_are_of_this_checkout_and_preset_else_the_references(tmp_path, monkeypatch):
    monkeypatch.setattr(page_costs, "ROOT", tmp_path)
    costs, notebook = tmp_path / "costs.json", Path("a.ipynb")
    assert page_costs.expected(notebook, costs, "quick") is None
    page_costs.refer(notebook, 12.3)
    assert page_costs.expected(notebook, costs, "quick") == 12
    assert page_costs.expected(notebook, costs, "smoke") is None
    storage.write_json(costs, {"preset": "smoke", "seconds": 3.5})
    assert page_costs.expected(notebook, costs, "smoke") == 3.5
    assert page_costs.expected(notebook, costs, "quick") == 12


def test_the_table_of_seconds_names_pages_of_the_book():
    path = book_pages.ROOT / page_costs.REFERENCE
    named = storage.read_json(path)["seconds"] if path.is_file() else {}
    assert named.keys() <= {page.stem for page in book_pages.notebooks()}


@pytest.mark.parametrize(("noted", "said"), [
    (("standard", 3, 64), "finetuning standard 3 of 64"),
    (("queries", 0, 24), "queries 0 of 24"),
    (("loading the model", 0, None), "loading the model"),
])  # fmt: skip
def test_stages_in_words(noted, said):
    assert live_lines.stage(*noted) == said


def test_live_lines_are_drawn_in_place_and_only_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    lines = live_lines.LiveLines()
    lines.draw(["one", "two"])
    lines.draw(["x" * 500])
    lines.say("stays")
    out, err = capsys.readouterr()
    assert out == "stays\n" and err.count("\n") == 3 and "\x1b[2F\x1b[J" in err and "x" * 200 not in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    live_lines.LiveLines().draw(["one"])
    assert capsys.readouterr().err == ""


PROGRAM = """
import sys
from pathlib import Path
from tools import build_book, book_pages, page_costs, page_lanes
root = Path(sys.argv[1])
for module in (build_book, book_pages, page_costs):
    module.ROOT = root
page_lanes.n_cores = lambda: 6
page_lanes.shown_run = lambda notebook, _parameters: (None, notebook.stem == "1")  # the first has a model
"""


@pytest.fixture
def two_pages(tmp_path):
    """A program that executes two pages at once, and the folder of the book."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "iclgd_helpers").mkdir()
    (tmp_path / "requirements.lock").touch()
    chapters = "{file: notebooks/1}, {file: notebooks/2}"
    (tmp_path / "_toc.yml").write_text(f"format: jb-book\nroot: index\nparts: [{{chapters: [{chapters}]}}]")

    def start(first, second, **options):
        for name, source in (("1", first), ("2", second)):
            cells = [new_code_cell("seed = 0\nn_demonstrations = 4", metadata={"tags": ["parameters"]})]
            notebook = new_notebook(cells=[*cells, new_code_cell(source)])
            book_pages.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
        (tmp_path / "program.py").write_text(
            f"{PROGRAM}\ndef main():\n    from iclgd_helpers.command_line import exit_status\n    import click\n"
            "    command = click.command()(lambda: print(build_book.executed(root / '_build', 'smoke')))\n"
            "    return exit_status(command, [], 'book')\n"
        )
        command = [sys.executable, "-c", "import sys; from iclgd_helpers.signals import start; start('program')"]
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{book_pages.ROOT}", "TMPDIR": str(tmp_path)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, str(tmp_path)], env=environment, cwd=tmp_path, **streams, **options)

    return start


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")


def test_two_pages_run_at_once_each_with_its_own_memory(two_pages, tmp_path):
    wait = (
        "from pathlib import Path\nimport time\nPath({0!r}).touch()\nwhile not Path({1!r}).exists(): time.sleep(0.02)\n"
    )
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    large = "block = bytearray(400_000_000)\nblock[::4096] = bytes(len(block[::4096]))\ntime.sleep(1)"
    said, fault = two_pages(wait.format(here, there) + large, wait.format(there, here)).communicate(timeout=120)
    assert fault == ""
    costs = {name: json.loads((tmp_path / "_build" / "pages" / f"{name}.json").read_text()) for name in "12"}
    assert costs["1"]["peak_gb"] - costs["2"]["peak_gb"] > 0.3, "not that of both lanes"
    assert [line.split()[:2] for line in said.splitlines()[:2]] == [["1", "begins"], ["2", "begins"]]


def test_a_page_has_the_threads_that_it_is_given(two_pages, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    note = "import os\nfrom pathlib import Path\nPath({0!r}).write_text(os.environ['OMP_NUM_THREADS'])"
    texts = [note.format(str(tmp_path / name)) for name in "ab"]
    assert two_pages(*texts).communicate(timeout=120)[1] == ""
    assert [(tmp_path / name).read_text() for name in "ab"] == ["3", "1"], "with a model, and without"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert two_pages(*(text + " or 1" for text in texts)).communicate(timeout=120)[1] == ""
    assert [(tmp_path / name).read_text() for name in "ab"] == ["3", "3"], "what its user asks for"


def test_a_page_that_fails_ends_the_other_one(two_pages, tmp_path):
    process = two_pages("1 / 0", "import time\ntime.sleep(100)")
    _, fault = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "1.ipynb, cell In [2]: ZeroDivisionError" in fault and fault.count("\n") == 2
    assert not list((tmp_path / "_build" / "executed").glob("2*"))
    assert not list(tmp_path.glob("iclgd-*"))


def test_an_interrupt_ends_everything_at_once_and_says_what_is_kept(two_pages, tmp_path):
    started = tmp_path / "started"
    child = "import subprocess\nsubprocess.Popen(['sleep', '300'])\n"
    process = two_pages("pass", f"{child}open({str(started)!r}, 'w').close()\nimport time\ntime.sleep(100)")
    until(lambda: started.exists() and (tmp_path / "_build" / "pages" / "1.json").exists())
    family = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    process.send_signal(2)
    _, fault = process.communicate(timeout=30)
    assert time.monotonic() - began < 4, "two seconds on a machine that is idle"
    assert process.returncode == 130 and "1 of 2 pages are done and stay" in fault and fault.count("\n") == 2
    assert len(family) >= 2 and not [one for one in family if one.is_running() and one.status() != "zombie"]
    assert not list(tmp_path.glob("iclgd-*")), "nothing is left beside what was stored"
    assert {path.name for path in (tmp_path / "_build" / "executed").iterdir()} == {"1.ipynb"}
