"""Which engines are the same: the present one computes the stored numbers, and its hash does not depend on Python."""

import os
import shutil
import subprocess
from pathlib import Path

import engines
import golden
import numpy as np
import pytest

from iclgd_helpers import storage
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.experiments import inputs, parameters, provenance, records, runs
from iclgd_helpers.paths import PACKAGE, repository_root

STORED = storage.parse_json(golden.PATH.read_bytes())
VERSIONS = ("3.11", "3.12", "3.13")


# -------------------------------------------------------------------------------------------------------- same numbers
@pytest.mark.parametrize("family", golden.CELLS)
def test_numbers_are_those_of_the_engine_of_the_records(family):
    assert engines.differences(STORED["cells"][family], golden.cell(family)) == []


def test_generated_text_is_that_of_the_engine_of_the_records():
    assert golden.checksums() == STORED["checksums"]


def test_a_changed_number_is_seen():
    numbers = STORED["cells"]["llama"]
    name = next(name for name, values in numbers.items() if name.startswith("arms/joint/label"))
    moved = numbers | {name: [value + 1e-5 for value in numbers[name]]}
    assert engines.differences(numbers, numbers) == []
    assert engines.differences(numbers, moved) == engines.differences(moved, numbers) == [name]
    assert engines.differences(numbers, {k: v for k, v in numbers.items() if k != name}) == [name]
    assert engines.differences(numbers, numbers | {name: [None]}) == [name]


def test_a_committed_record_is_what_the_present_engine_computes():
    """A real model on real text: the first questions of a cell, without and with its demonstrations."""
    folder = os.environ.get("ICLGD_DATA")
    if not folder and os.environ.get("ICLGD_REQUIRE_DATA") != "1":
        pytest.skip("needs the six data sets: set ICLGD_DATA to their folder")
    wanted = {"model": "SmolLM2-135M-Instruct", "task": "subj", "seed": 4, "order": 0}
    loaded = records.load_all("results/records")
    record = next(r for r in loaded if wanted.items() <= r.json["parameters"].items())
    before = {"n_calibration_rows": 0}  # the record is older than this parameter
    given = parameters.resolve(before | record.json["parameters"] | {"data_folder": folder})
    assert inputs.check([given]) == [record.json["id"]]
    cell = runs.prepare(given)
    arms = {"zero_shot": Arm(cell.layout.prefix()), "in_context": Arm(cell.layout.prefix(cell.demonstrations))}
    for indices, seen in observe(cell.model, cell.queries[:8], arms):
        for arm, observation in seen.items():
            kept = np.stack(record.examples[f"log_probability/{arm}"][indices])
            np.testing.assert_allclose(observation.label_log_probabilities.numpy(), kept, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ one hash
def interpreter(version: str) -> str | None:
    """A Python of that version on this machine, if there is one."""
    root = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    found = sorted((root / "versions").glob(f"{version}.*/bin/python"))
    return str(found[-1]) if found else shutil.which(f"python{version}")


@pytest.mark.parametrize("version", VERSIONS)
def test_hashes_are_the_same_in_every_python(version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    code = "from iclgd_helpers.experiments import provenance as p; print(p.source_hash(), p.engine_hash())"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=repository_root(), check=True)
    assert done.stdout.split() == [provenance.source_hash(), provenance.engine_hash()]


def test_the_present_engine_is_that_of_the_committed_records():
    assert provenance.engine_hash() == STORED["engine"], "run `python tests/engines.py`"
    entries = storage.read_json(engines.PATH)["engines"]
    assert entries[STORED["engine"]]["shown_by"] == engines.TEST
    name = engines.TEST.split("::")[1]
    assert callable(globals()[name])
    for folder in ("results/records", "results/rehearsal"):
        assert all(map(records.is_current, records.load_all(folder)))


def test_accepting_keeps_one_engine_a_version(tmp_path, monkeypatch):
    path = tmp_path / "engines.json"
    shutil.copy(engines.PATH, path)
    before = storage.read_json(path)["engines"][STORED["engine"]]["equal"]
    for changed in ("one", "two"):
        monkeypatch.setattr(provenance, "source_hash", lambda changed=changed: changed)
        engines.accept(path)
    after = storage.read_json(path)["engines"][STORED["engine"]]["equal"]
    assert "two" in after and "one" not in after and len(after) == len(before)


SOURCE = '''
"""A docstring."""
import os
from pathlib import Path


def f(x: int, name="a"):
    """Another."""
    # a comment
    from math import pi
    if x > 0:
        y = f"{x:{name}} {x + 1!r} {{literal}}"
    return [x,
            y]  # and one more
'''
SAME = [
    ('"""A docstring."""', "'a longer\\n docstring'"),
    ("import os\n", "import sys\nimport re\n"),
    ("    # a comment\n", ""),
    ("from math import pi", "from cmath import pi"),
    ("[x,\n            y]", "[x, y]"),
    ("    if x > 0:\n        y", "    if   x > 0 :\n\n            y"),
]
OTHER = [("x > 0", "x >= 0"), ("{x + 1!r}", "{x + 2!r}"), ("{{literal}}", "{{other}}"), ('"a"', '"b"')]
OTHER += [("    return", "        return")]


@pytest.mark.parametrize(("before", "after"), SAME)
def test_what_computes_nothing_is_not_hashed(before, after):
    assert SOURCE.count(before) == 1
    assert provenance.source_form(SOURCE.replace(before, after)) == provenance.source_form(SOURCE)


@pytest.mark.parametrize(("before", "after"), OTHER)
def test_what_computes_is_hashed(before, after):
    assert SOURCE.count(before) == 1
    assert provenance.source_form(SOURCE.replace(before, after)) != provenance.source_form(SOURCE)


def test_every_engine_module_counts_and_a_missing_one_is_an_error(tmp_path, monkeypatch):
    shutil.copytree(PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "package")
    before = provenance.source_hash.__wrapped__()
    assert before == provenance.source_hash()
    (tmp_path / "package" / "pages" / "figures.py").write_text("raise SystemExit")
    assert provenance.source_hash.__wrapped__() == before
    for name in provenance.ENGINE:
        path = tmp_path / "package" / f"{name}.py"
        source = path.read_text()
        path.write_text(source + "\nADDED = 1\n")
        assert provenance.source_hash.__wrapped__() != before, name
        path.unlink()
        with pytest.raises(FileNotFoundError):
            provenance.source_hash.__wrapped__()
        path.write_text(source)
