"""Every item of the two papers has a place in the book."""

import re

import pytest

from iclgd_helpers.pages import statements
from tools import claims_pages, coverage_page

ITEMS = coverage_page.items()
NUMBERED = {
    "C": ["Proposition 2.1", "Theorem 3.1", "observation 1", "observation 2", "observation 3", "Algorithm 1"]
    + ["Theorem 4.1", "section 5.1", "Lemma 6.1", "appendix"],
    "B": ["Table 1", "Table 2", "Table 3", "Figure 1", "Figure 3", "3.4, first", "3.4, second", "4.1, third"],
}
EQUATIONS = {"C": 11, "B": 4}


def equations(paper: str) -> set[int]:
    """Numbers of the equations that a paper's items name, ranges included."""
    found = set()
    for item in ITEMS[paper]:
        for first, last in re.findall(r"equations? (\d+)(?: to (\d+))?", item["where"]):
            found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("paper", ITEMS)
def test_every_numbered_item_is_listed_once(paper):
    places = [item["where"] for item in ITEMS[paper]]
    assert len(set(places)) == len(places)
    assert equations(paper) == set(range(1, EQUATIONS[paper] + 1))
    assert [name for name in NUMBERED[paper] if not any(name in place for place in places)] == []


def test_every_item_has_a_page_and_an_outcome():
    page = coverage_page.coverage_page()
    assert page.count("\n| ") == sum(map(len, ITEMS.values())) + 2  # and two lines of heads


def test_every_erratum_and_every_statement_of_the_papers_is_listed():
    named = {name for found in ITEMS.values() for item in found for name in item["by"]}
    assert {f"erratum-{n:02d}" for n in claims_pages.ERRATA} <= named
    assert {s.id for s in statements.STATEMENTS if s.kind in ("paper", "archive")} <= named


def test_verdicts_are_counted_in_the_words_of_the_results():
    rows = [{"id": "R1", "verdict": word, "effect": 0.1} for word in ("equivalent to none", "refuted", "refuted")]
    rows += [{"id": "R1", "verdict": "undecided", "effect": None}, {"id": "R2", "verdict": "reproduced", "effect": 1.0}]
    said = coverage_page.judged("R1", rows)
    assert said == "R1: = equivalent to none 1 of 4, ▼ refuted 2 of 4, not judged 1 of 4"


@pytest.mark.parametrize("fault", [{"pages": []}, {"by": []}, {"by": ["thm-nowhere"]}])
def test_an_item_without_a_place_is_seen(fault, monkeypatch):
    monkeypatch.setattr(coverage_page, "items", lambda: {"C": [{**ITEMS["C"][0], **fault}]})
    with pytest.raises(ValueError, match="has no place|nothing is called"):
        coverage_page.coverage_page()
