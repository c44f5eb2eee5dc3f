"""The files that name versions, addresses and packages agree with each other."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.book_pages import ROOT, repository

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
IMPORT_NAMES = {"PIL": "pillow", "llama_cpp": "llama-cpp-python", "yaml": "pyyaml", "bs4": "beautifulsoup4"}
IMPORT_NAMES |= {"websocket": "websocket-client"}


def lock() -> dict[str, Version]:
    lines = [x for x in (ROOT / "requirements.lock").read_text().splitlines() if not x.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins}


def conda_environment(path: str) -> tuple[list[str], list[str]]:
    entries = yaml.safe_load((ROOT / path).read_text())["dependencies"]
    return [e for e in entries if isinstance(e, str)], [e for d in entries if isinstance(d, dict) for e in d["pip"]]


def test_lock_has_exact_public_versions_only():
    assert lock()["torch"] == Version("2.13.0")
    assert canonicalize_name(PROJECT["name"]) not in lock()


def test_environment_is_the_locked_one():
    for name, version in lock().items():
        assert Version(importlib.metadata.version(name)).public == version.public, name


@pytest.mark.parametrize("line", PROJECT["dependencies"] + EXTRAS)
def test_ranges_admit_the_lock(line):
    requirement = Requirement(line)
    assert lock()[canonicalize_name(requirement.name)] in requirement.specifier
    assert "==" not in line, "a range, so that Colab keeps its own versions"


@pytest.mark.parametrize("path", ["environment.yml", ".binder/environment.yml"])
def test_conda_environments_agree_with_the_lock(path):
    conda, pip = conda_environment(path)
    python = next(entry.split("=", 1)[1] for entry in conda if entry.startswith("python="))
    assert Version(python) in Requirement(f"python{PROJECT['requires-python']}").specifier
    for entry in conda:
        name, _, version = entry.partition("=")
        if version and name != "python":
            assert lock()[canonicalize_name(name)] == Version(version.lstrip("=")), entry
    pins = [Requirement(entry) for entry in pip if not entry.startswith("-")]
    assert pins or "-r requirements.lock" in pip
    for entry in (entry for entry in pip if entry.startswith("-")):  # lines of a requirements file: one option each
        assert re.fullmatch(r"-[re] \S+", entry), entry
    for pin in pins:
        assert str(pin.specifier) == f"=={lock()[canonicalize_name(pin.name)]}", pin


def test_binder_has_all_that_the_helpers_import():
    conda, pip = conda_environment(".binder/environment.yml")
    there = {canonicalize_name(Requirement(e).name) for e in pip if not e.startswith("-")}
    there |= {"torch" if e == "pytorch-cpu" else e.partition("=")[0] for e in conda}
    assert {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]} <= there


def needed(names: set[str]) -> set[str]:
    """Distributions, and those that they need in turn, here."""
    found, waiting = set(), list(names)
    while waiting:
        found.add(name := waiting.pop())
        lines = map(Requirement, importlib.metadata.requires(name) or ())
        here = {canonicalize_name(r.name) for r in lines if not r.marker or r.marker.evaluate({"extra": ""})}
        waiting += here - found - set(waiting)
    return found


def test_pages_need_no_extra():
    """Colab and Binder install none: without them, what the notebooks import can be imported, and their pages shown."""
    cells = [c for path in (ROOT / "notebooks").glob("*.ipynb") for c in nbformat.read(path, 4).cells]
    lines = [node for c in cells if c.cell_type == "code" for node in ast.walk(ast.parse(c.source))]
    lines = [node for node in lines if isinstance(node, ast.ImportFrom)]
    lines = [node for node in lines if node.module.split(".")[0] == "iclgd_helpers"]
    modules = {f"{node.module}.{alias.name}" for node in lines for alias in node.names}
    files = {name: ROOT / f"{name.replace('.', '/')}.py" for name in modules}
    modules = {name if file.is_file() else name.rpartition(".")[0] for name, file in files.items()}
    assert {"iclgd_helpers.pages.grid_figures", "iclgd_helpers.theory.gradient_step"} <= modules
    extras, base = (
        {canonicalize_name(Requirement(x).name) for x in lines} for lines in (EXTRAS, PROJECT["dependencies"])
    )
    extras -= needed(base)
    names = importlib.metadata.packages_distributions()
    blocked = [name for name, found in names.items() if extras & set(map(canonicalize_name, found))]
    blocked.remove("sphinx")  # SciPy takes the name's presence for a build of its own documentation
    assert {"papermill", "nbclient", "pytest"} <= set(blocked)
    program = "import sys; sys.modules.update(dict.fromkeys({}, None)); import {}"
    for missing, passes in ((blocked, True), ([*blocked, "seaborn"], False)):
        command = [sys.executable, "-c", program.format(missing, ", ".join(sorted(modules)))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode == 0) == passes, done.stderr


def imported(folder: Path) -> set[str]:
    names, files = set(), [path for path in folder.rglob("*") if ".venv" not in path.parts]
    for path in (path for path in files if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    own = {path.stem for path in files} | {"iclgd_helpers", "bench", "tools"}
    tops = {name.split(".")[0] for name in names} - own - set(sys.stdlib_module_names)
    return {canonicalize_name(IMPORT_NAMES.get(name, name)) for name in tops}


def test_every_import_is_declared():
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"] + EXTRAS}
    assert imported(ROOT / "iclgd_helpers") <= declared
    assert imported(ROOT / "bench") | imported(ROOT / "tests") <= declared | {"llama-cpp-python"}


def test_one_address_and_one_version():
    url, tag = repository()
    assert tag == f"v{PROJECT['version']}"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["repository-code"], citation["version"]) == (url, PROJECT["version"])
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version = {{{PROJECT['version']}}}" in (ROOT / "book" / "cite.md").read_text()
    assert f"release: {PROJECT['version']}\n" in (ROOT / "_config.yml").read_text()
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    of_book = config["sphinx"]["config"]
    assert (of_book["project"], of_book["epub_identifier"]) == (config["title"], url)
    owner = url.removeprefix("https://github.com/").split("/")[0]
    for path in [ROOT / "README.md", *(ROOT / "book").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]:
        for address in re.findall(rf"github(?:\.com)?/{owner}/[\w.-]+", path.read_text()):
            assert url.endswith(address.removeprefix("github.com/").removeprefix("github/")), path


def test_readme_is_complete():
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"@\w+@", text), "fill in what was measured"
    (picture,) = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", text)
    assert 10_000 < (ROOT / picture).stat().st_size < 300_000


def test_no_machine_in_the_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(r"/(root|home|work|opt|Users)/\w[\w.]+|file://")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".ipynb", ".yml", ".yaml", ".toml"} and path != Path(__file__):
            found = machine.search(path.read_text())
            assert not found, f"{name}: {found[0]}"


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy():
    """The types of package and tools; what it found lies in a cache of its own, so that a second run takes seconds."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
