"""One direction of imports: a lower floor never imports a higher one, and nothing imports itself through others."""

import re

import house
import pytest

from iclgd_helpers.paths import PACKAGE, repository_root

DRAWING = re.search(r"```text house\n(.*?)```", (repository_root() / "CONTRIBUTING.md").read_text(), re.S)
FLOORS = [re.findall(r"[a-z_]+", line.partition("  ")[0]) for line in DRAWING[1].splitlines()]  # from the top


def floor(module: str) -> int:
    """Number of the floor of a module, counted from the top of the drawing."""
    room = module.partition("/")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def climbing(imports: dict[str, set[str]]) -> list[str]:
    """Imports from a floor to one above it."""
    rooms = {a: found for a, found in imports.items() if not a.endswith(("__init__", "__main__"))}
    return [f"{a} -> {b}" for a, found in rooms.items() for b in found if floor(b) < floor(a)]


def test_every_module_has_a_place_in_the_drawing():
    rooms = {name.partition("/")[0] for name in house.imports()} - {"__init__", "__main__"}
    assert rooms == {room for rooms in FLOORS for room in rooms}


def test_no_floor_imports_a_higher_one():
    assert climbing(house.imports()) == []


def test_nothing_imports_itself_through_others():
    assert [name for name in house.imports() if name in circle(name)] == []


def circle(module: str) -> set[str]:
    return {name for other in house.imports()[module] for name in (other, *house.reached(other))}


@pytest.mark.parametrize(("module", "line"), [
    ("engine/models", "from iclgd_helpers.experiments import records"),
    ("storage", "def f():\n    from iclgd_helpers.data.tasks import Task"),
    ("data/tasks", "from iclgd_helpers.engine import models"),
])  # fmt: skip
def test_control_a_climbing_import_is_seen(module: str, line: str):
    source = (PACKAGE / f"{module}.py").read_text() + "\n" + line
    found = house.imported(source, house.imports())
    assert len(climbing(house.imports() | {module: found})) == 1


def test_one_module_imports_dask():
    names = re.compile(r"(import|from) (dask|distributed)[ .\n]|import_module\(.(dask|distributed)[.\"]")
    importing = {path.stem for path in PACKAGE.rglob("*.py") if names.search(path.read_text())}
    assert importing == {"dask_workers", "performing"}, "what a worker asks for its name, and nothing else"
