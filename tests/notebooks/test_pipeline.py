"""What the pipeline executes, when, and what it leaves behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from iclgd_helpers.errors import CellError, InputError
from iclgd_helpers.experiments import warm_kernels
from iclgd_helpers.experiments.notebook_execution import Execution
from iclgd_helpers.experiments.parameters import ExperimentParameters
from tools import (
    api_page,
    book_pages,
    build_book,
    claims_pages,
    coverage_page,
    notebooks,
    page_costs,
    page_frames,
    status_page,
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one small notebook; the pipeline works on it instead of this repository."""
    for name in ("notebooks", "book", "iclgd_helpers", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nparts: [{chapters: [{file: notebooks/00_small}]}]"
    )
    (tmp_path / "_config.yml").write_text("repository: {url: 'https://github.com/a/b', branch: v1}")
    (tmp_path / "iclgd_helpers" / "helper.py").write_text("x = 1\n")
    (tmp_path / "requirements.lock").write_text("a==1\n")
    (tmp_path / "book" / "index.md").write_text("# Index\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")
    save(tmp_path, "print('PASS', preset)")
    for module in (book_pages, build_book, notebooks, page_costs, status_page):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("ICLGD_RECORDS", "ICLGD_TABLES"):
        monkeypatch.setenv(name, str(tmp_path))  # `refresh` sets them; afterwards they are as before
    monkeypatch.setattr(build_book, "render", lambda build: None)
    monkeypatch.setattr(coverage_page, "coverage_page", lambda: "")
    monkeypatch.setattr(api_page, "api_page", lambda: "")
    monkeypatch.setattr(page_frames, "belongings", lambda path: f"- **{path.stem}**")
    return tmp_path


def save(project, source, **metadata):
    cells = [
        new_markdown_cell("# 00 Small\n\nA claim."),
        new_code_cell("preset = 'quick'", metadata={"tags": ["parameters"]}, execution_count=1),
        new_code_cell(source, execution_count=2, outputs=[new_output("stream", text="stored\n")], metadata=metadata),
    ]
    nbformat.write(new_notebook(cells=cells), project / "notebooks" / "00_small.ipynb")


def read(path):
    return nbformat.read(path, as_version=4)


def page(project):
    return read(project / "_build" / "executed" / "00_small.ipynb")


def page_key(project, **parameters):
    return page_costs.page_key(project / "notebooks" / "00_small.ipynb", parameters, page_costs.common_key())


def test_a_page_is_executed_once_and_again_when_anything_it_depends_on_changes(project, capsys):
    build_book.book(project)
    assert page(project).cells[2].outputs[0].text == "PASS quick\n"
    costs = json.loads((project / "_build" / "pages" / "00_small.json").read_text())
    assert costs["seconds"] > 0 and costs["peak_gb"] > 0
    assert read(project / "notebooks" / "00_small.ipynb").cells[2].outputs[0].text == "stored\n"
    build_book.book(project)
    assert "unchanged" in capsys.readouterr().out
    (project / "results" / ".part-1").mkdir()
    (project / "results" / ".part-1" / "record.json").write_text("half-written")
    (project / "results" / "page_seconds.json").write_text("{}")
    key = page_key(project)
    assert key == costs["key"]
    for change in (
        lambda: (project / "iclgd_helpers" / "helper.py").write_text("x = 2\n"),
        lambda: (project / "iclgd_helpers" / "new.yaml").write_text("a: 1\n"),
        lambda: (project / "requirements.lock").write_text("a==2\n"),
        lambda: (project / "results" / "new.json").write_text("{}"),
        lambda: save(project, "print('PASS')"),
    ):
        change()
        new = page_key(project)
        assert new != key
        key = new
    assert page_key(project, preset="smoke") != key
    build_book.book(project)
    assert page(project).cells[2].outputs[0].text == "PASS\n"


@pytest.fixture
def no_kernel(monkeypatch):
    """A copy stands for an executed page, and nothing is generated."""

    def copy(self):
        self.target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.notebook, self.target)

    monkeypatch.setattr(Execution, "run", copy)
    monkeypatch.setattr(warm_kernels, "forks", lambda: False)
    monkeypatch.setattr(status_page, "status_page", lambda *_: "")
    monkeypatch.setattr(claims_pages, "write_pages", lambda _folder: None)


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("file", ["pages/00_small.json", "executed/00_small.ipynb"])
@pytest.mark.parametrize("damage", [b"{}", b"null", b"", None], ids=["empty", "null", "nothing", "one bit"])
def test_a_damaged_page_or_cost_is_made_again(file, damage, project, capsys):
    build_book.book(project)
    before, path = page(project), project / "_build" / file
    content = path.read_bytes()
    place = content.rindex(b"quick" if path.suffix == ".ipynb" else b"seconds")
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] if damage is None else damage)
    capsys.readouterr()
    build_book.book(project)
    assert "unchanged" not in capsys.readouterr().out
    assert page(project).cells[2].outputs == before.cells[2].outputs
    build_book.book(project)
    assert "unchanged" in capsys.readouterr().out


@pytest.mark.usefixtures("no_kernel")
def test_entries_of_the_contents_may_say_their_endings_and_be_prose(project):
    toc = (project / "_toc.yml").read_text()
    entries = "notebooks/00_small.ipynb}, {file: notebooks/prose.md}, {file: notebooks/more"
    (project / "_toc.yml").write_text(toc.replace("notebooks/00_small", entries))
    for name in ("prose", "more"):
        (project / "notebooks" / f"{name}.md").write_text(f"# {name}\n")
    assert book_pages.notebooks() == [project / "notebooks" / "00_small.ipynb"]
    build_book.book(project)
    built = {path.name for path in (project / "_build" / "source" / "notebooks").iterdir()}
    assert built == {"00_small.ipynb", "prose.md", "more.md"}


@pytest.mark.parametrize("content", ["[1", "3", "", "a: *b", "\0", "[" * 2000])
@pytest.mark.parametrize("file", ["_toc.yml", "_config.yml"])
def test_broken_settings_of_the_book_are_one_line(file, content, project, capsys):
    (project / file).write_text(content)
    assert notebooks.main(["sync"]) == 2
    said = capsys.readouterr().err
    assert f"{file} cannot be read" in said and said.count("\n") == 1


def test_another_preset_is_injected_in_a_hidden_cell(project):
    build_book.book(project, preset="smoke")
    injected = page(project).cells[2]
    assert 'preset = "smoke"' in injected.source
    assert set(injected.metadata.tags) == {"injected-parameters", "remove-cell"}
    assert page(project).cells[3].outputs[0].text == "PASS smoke\n"


def test_a_failing_page_is_named_and_the_finished_ones_stay(project):
    toc = (project / "_toc.yml").read_text().replace("}]}]", "}, {file: notebooks/40_fails}]}]")
    (project / "_toc.yml").write_text(toc)
    (project / "notebooks" / "00_small.ipynb").rename(project / "notebooks" / "40_fails.ipynb")
    save(project, "print('PASS')")
    broken = read(project / "notebooks" / "40_fails.ipynb")
    broken.cells[2].source = "1 / 0"
    nbformat.write(broken, project / "notebooks" / "40_fails.ipynb")
    with pytest.raises(CellError, match=r"40_fails.ipynb, cell In \[2\]: ZeroDivisionError"):
        build_book.book(project)
    assert page(project).cells[2].outputs[0].text == "PASS\n"
    assert not (project / "_build" / "executed" / "40_fails.ipynb").exists()


def test_smoke_copies_keep_the_stored_outputs(project):
    notebooks.smoke_copies(project / "copies")
    cells = read(project / "copies" / "00_small.ipynb").cells
    assert 'preset = "smoke"' in cells[2].source
    assert (cells[3].execution_count, cells[3].outputs[0].text) == (2, "stored\n")


def test_refresh_stores_outputs_and_nothing_of_the_run(project):
    save(project, "print('PASS')", keep="this")
    notebooks.refresh(book_pages.notebooks())
    notebook = read(project / "notebooks" / "00_small.ipynb")
    assert notebook.cells[2].outputs[0].text == "PASS\n"
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.cells[2].metadata == {"keep": "this", "tags": []}


def test_where_a_stream_was_cut_does_not_show():
    def piece(text, name="stdout"):
        return new_output("stream", name=name, text=text)

    shown = new_output("display_data", {"text/plain": "a figure"})
    outputs = [piece("a"), piece("b"), piece("warned", "stderr"), shown, piece("c")]
    (cell,) = notebooks.cleaned(new_notebook(cells=[new_code_cell("", outputs=outputs)])).cells
    assert [output.get("text") for output in cell.outputs] == ["ab", None, "c"], "what stands between stays there"


def test_refreshing_what_is_no_notebook_is_refused_before_anything_runs(project):
    before = read(project / "notebooks" / "00_small.ipynb")
    with pytest.raises(InputError, match="no notebook at 84"):
        notebooks.refresh([*book_pages.notebooks(), Path("84")])
    assert read(project / "notebooks" / "00_small.ipynb") == before


@pytest.mark.parametrize("command", [["smoke-copies", "{}"], ["refresh", "{}"]])
def test_bad_input_of_the_commands_is_one_line(command, project, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert notebooks.main([word.format(tmp_path / "file") for word in command]) == 2
    said = capsys.readouterr().err.strip()
    assert str(tmp_path / "file") in said and said.startswith("error: ") and "\n" not in said


def test_setup_is_written_once(project):
    notebooks.sync()
    once = read(project / "notebooks" / "00_small.ipynb")
    notebooks.sync()
    assert read(project / "notebooks" / "00_small.ipynb") == once
    title, setup = once.cells[:2]
    assert title.source.count("[Open in Colab](https://colab.research.google.com/github/a/b/blob/v1/") == 1
    for word in ('"--branch=v1"', '"https://github.com/a/b"'):
        assert setup.source.count(word) == 1
    compile(setup.source, "setup", "exec")


def test_comments_of_parameters_are_the_schemas_and_nothing_else_moves():
    source = (
        'preset = "quick"\nclip_value = 3.5  # of old\nn_sweep_examples = 60  # of the page\nlabel_column = "a # b"'
    )
    expected = [
        f'preset = "quick"  # {ExperimentParameters.model_fields["preset"].description}',
        f"clip_value = 3.5  # {ExperimentParameters.model_fields['clip_value'].description}",
        "n_sweep_examples = 60  # of the page",
        f'label_column = "a # b"  # {ExperimentParameters.model_fields["label_column"].description}',
    ]
    assert notebooks.with_comments(source).splitlines() == expected
    assert notebooks.with_comments("\n".join(expected)) == "\n".join(expected)


def test_every_parameter_is_described_in_a_short_line():
    for name, field in ExperimentParameters.model_fields.items():
        assert field.description and len(f"{name} = None  # {field.description}") <= 120, name


def test_comments_are_written_where_there_is_a_preset(project):
    def cell():
        (found,) = (
            c
            for c in read(project / "notebooks" / "00_small.ipynb").cells
            if "parameters" in c.metadata.get("tags", [])
        )
        return found.source

    notebooks.sync()
    assert cell() == notebooks.with_comments("preset = 'quick'")
    page = read(project / "notebooks" / "00_small.ipynb")
    page.cells[2].source = "seed = 0  # of this page"
    book_pages.write(page, project / "notebooks" / "00_small.ipynb")
    notebooks.sync()
    assert cell() == "seed = 0  # of this page", "a page of theory has its own"


def test_setup_on_colab_finds_helpers_and_records_in_this_very_kernel(tmp_path):
    """In an interpreter that lacks the helpers; the commands are taken down, and a folder stands for the clone."""
    folder, taken_down = f"iclgd-{book_pages.repository()[1]}", "commands"
    before = f"""
import pathlib, subprocess, sys, types
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [path for path in sys.path if not pathlib.Path(path, "iclgd_helpers").exists()]
sys.modules["google.colab"] = types.ModuleType("google.colab")
def run(command, check):
    print(*command, file=open("{taken_down}", "a"))
    if "clone" in command:
        pathlib.Path("{folder}").symlink_to({str(book_pages.ROOT)!r})
subprocess.run = run
"""
    after = """
from iclgd_helpers import paths
from iclgd_helpers.pages import published
print(len(published.table(1)), paths.repository_root() / "_toc.yml")
"""
    program = before + notebooks.setup_source() + after
    for times in (1, 2):  # a cell may be run again
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[1] == str(tmp_path / folder / "_toc.yml")
        commands = (tmp_path / taken_down).read_text()
        assert commands.count("git clone") == 1 and commands.count(f"-e {tmp_path / folder}") == times
    bare = subprocess.run([sys.executable, "-c", before + after], cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'iclgd_helpers'" in bare.stderr, "the control: it is the setup that finds them"
