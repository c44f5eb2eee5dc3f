"""Every notebook keeps the book's form; checked cells hold a reference, so that something is compared."""

import ast
import re

import nbformat
import papermill
import pytest

from iclgd_helpers.experiments.notebook_files import parameters_cell
from iclgd_helpers.experiments.parameters import TheoryParameters, validate_for_notebook
from tools import book_pages, notebooks

NOTEBOOKS = book_pages.notebooks()
EXPERIMENT_PARAMETERS = dict.fromkeys(
    "model task seed data_source data_folder n_demonstrations max_examples learning_rate device dtype".split()
) | {"preset": "quick"}
CLOSING = ("does not show", "summary", "exercise", "reference")
ABSOLUTE = r"/(root|home|Users|work|tmp|opt|usr|mnt|content|data)\b|~/|[A-Za-z]:\\"
IMAGES = {"image/png", "image/svg+xml"}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind=None, tag=None):
    found = nbformat.read(path, as_version=4).cells
    found = [c for c in found if kind is None or c.cell_type == kind]
    return [c for c in found if tag is None or tag in c.metadata.get("tags", [])]


def text_of(output) -> str:
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def is_figure(cell) -> bool:
    return any(IMAGES & set(output.get("data", {})) for output in cell.get("outputs", []))


def test_valid_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert "application/vnd.jupyter.widget" not in path.read_text()


def test_opening_cells(path):
    first, second, *_ = cells(path)
    setup = cells(path, "code")[0]
    assert re.match(rf"# {path.stem[:2]} \S", first.source)
    assert notebooks.colab_link(path) in first.source.splitlines(), "a line of its own"
    assert (first.cell_type, second.cell_type) == ("markdown", "markdown")
    assert setup.source == notebooks.setup_source()
    assert set(setup.metadata.tags) >= {"hide-cell", "nbval-ignore-output"}


def test_one_parameters_cell_of_literals(path):
    (cell,) = cells(path, "code", "parameters")
    assert all(isinstance(statement, ast.Assign) for statement in ast.parse(cell.source).body)
    given = parameters_cell(path)
    assert set(papermill.inspect_notebook(str(path))) == set(given), "papermill knows every one of them, too"
    if "preset" in given:
        assert {name: given.get(name, "missing") for name in EXPERIMENT_PARAMETERS} == EXPERIMENT_PARAMETERS
        assert cell.source == notebooks.with_comments(cell.source), "run python -m tools.notebooks sync"
    else:
        least = {"seed"} if path.stem.startswith("77") else {"seed", "n_demonstrations"}  # 77 draws records, no prompts
        assert least <= set(given) <= set(TheoryParameters.model_fields)
    validate_for_notebook(path, {})


def test_code_cells(path):
    for cell in cells(path, "code"):
        tree = ast.parse(re.sub(r"^[%!].*", "", cell.source, flags=re.M))
        assert len(cell.source.splitlines()) <= 25, cell.source[:80]
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), "wildcard import"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(ABSOLUTE, node.value), f"absolute path {node.value!r}"


def test_no_cell_takes_the_name_of_an_imported_helper(path):
    trees = [ast.parse(re.sub(r"^[%!].*", "", cell.source, flags=re.M)) for cell in cells(path, "code")]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    helpers = {alias.asname or alias.name for node in imports for alias in node.names if "iclgd" in node.module}
    assert not helpers & {name for tree in trees for name in bound(tree)}, "later cells would not find it"
    assert bound(ast.parse("for a, b in x:\n    c = [d for d in b]\ndef e():\n    f = 1")) == {"a", "b", "c", "e"}


def bound(node) -> set[str]:
    """Names that the statements of a module bind, those inside functions and comprehensions left out."""
    inner = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    if isinstance(node, inner):
        return {node.name} if isinstance(node, ast.FunctionDef) else set()
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*map(bound, ast.iter_child_nodes(node)))


def test_checked_cells_hold_a_reference(path):
    checked = cells(path, "code", "nbval-check-output")
    assert checked, "no cell is compared"
    for cell in checked:
        assert cell.execution_count, "nbval compares nothing without an execution count"
        assert re.search(r"\bPASS\b", "".join(map(text_of, cell.outputs))), "a checked cell prints its verdict"


def test_everything_was_executed_without_error(path):
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run make refresh"
    for cell in code:
        assert all(output.output_type != "error" for output in cell.outputs), cell.source[:80]


def test_figures_are_described(path):
    for cell in filter(is_figure, cells(path, "code")):
        shown = cell.metadata.get("mystnb", {})
        assert len(shown.get("image", {}).get("alt", "")) >= 20, f"alt text: {cell.source[:80]}"
        assert shown.get("figure", {}).get("caption"), f"caption: {cell.source[:80]}"
        assert re.fullmatch(r"fig-[a-z0-9-]+", shown["figure"].get("name", "")), f"name: {cell.source[:80]}"
        assert sum(bool(IMAGES & set(output.get("data", {}))) for output in cell.outputs) == 1, "one figure a cell"


def test_figure_names_are_unique(path):
    def names(notebook):
        found = (cell.metadata.get("mystnb", {}).get("figure", {}).get("name") for cell in cells(notebook, "code"))
        return [name for name in found if name]

    own = names(path)
    others = [name for other in NOTEBOOKS if other != path for name in names(other)]
    assert len(set(own)) == len(own) and not set(own) & set(others)


def test_prose(path):
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    without_code = re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.S)
    assert not re.search(r"\d\s*\\?%|\bpercent\b", without_code), "a measured number in prose"
    assert not re.search(r"\{[a-z:]+\}`|^:::|^```\{", prose, flags=re.M), "MyST roles show raw on Colab"
    headings = " ".join(re.findall(r"^#+ (.*)$", prose, flags=re.M)).lower()
    if path.stem != "00_quickstart":
        assert [word for word in CLOSING if word not in headings] == []
