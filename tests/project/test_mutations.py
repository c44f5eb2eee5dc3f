"""The list of deliberate faults fits the code and the tests; that each is seen is what `mutations.py` itself finds."""

import ast
from dataclasses import replace

import mutations
import pytest
from mutations import FAULTS, ROOT

from iclgd_helpers import storage


def test_enough_faults_each_once():
    assert len(FAULTS) >= 45
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, *mutations.faulty_line(fault)) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_fault_is_one_changed_line_that_still_parses(fault):
    before, after = mutations.faulty_line(fault)
    assert before != after
    source = (ROOT / fault.path).read_text().replace(fault.before, fault.after)
    assert len(source.splitlines()) == len((ROOT / fault.path).read_text().splitlines())
    ast.parse(source)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_named_test_exists(fault):
    file, name = fault.test.split("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert functions.count(name.split("[")[0]) == 1


@pytest.mark.parametrize("before", ["no such text", "return", "import torch\n"])
def test_text_that_is_missing_repeated_or_long_is_an_error(before):
    with pytest.raises(ValueError, match="not once"):
        mutations.faulty_line(replace(FAULTS[0], before=before))


def test_stored_outcome_and_page_are_current():
    entries = storage.read_json(mutations.RESULTS)["faults"]
    assert entries == [mutations.described(fault) for fault in FAULTS], "run `python tests/mutations.py`"
    head, mark, listed = mutations.PAGE.read_text().partition(mutations.MARK)
    assert mark and listed.strip() == mutations.page(entries).strip()
