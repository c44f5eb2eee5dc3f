"""Every claim of the book holds, its control fails, its notebook says so, and the ledger is what the checks give."""

import copy
import dataclasses
import inspect
import re

import claims_ledger
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from claims import registry
from claims.registry import Claim, Control, Exact, Measured
from iclgd_helpers.pages import claims
from tools import book_pages, claims_pages

CLAIMS = registry.load()
LEDGER = {entry["id"]: entry for entry in claims.load()}
KEYS = set("id statement source notebook test tolerance residual controls status drawn seeds".split())
BOOK = book_pages.ROOT / "book"
WORDING_ONLY = "Nothing to measure"


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.id)
def test_claim(claim, request):
    for seed in claims_ledger.seeds(claim):
        assert claims_ledger.broken_rules(claim, claims_ledger.outcome(claim.id, seed)) == [], f"seed {seed}"
    assert LEDGER[claim.id]["test"] == request.node.nodeid


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.id)
def test_ledger_is_current(claim):
    stored = LEDGER[claim.id]
    assert KEYS <= set(stored) and all(stored[name] for name in ("statement", "source", "controls"))
    stale = claims_ledger.differences(stored, claims_ledger.entry(claim))
    assert stale == [], "run `python tests/claims_ledger.py`"


def test_ledger_holds_the_claims_and_no_others():
    assert list(LEDGER) == list(CLAIMS)
    assert len(CLAIMS) >= 45
    assert len({claims_pages.anchor(name) for name in CLAIMS}) == len(CLAIMS)


@pytest.mark.parametrize("claim", LEDGER.values(), ids=lambda claim: claim["id"])
def test_notebook_prints_the_verdict(claim):
    assert book_pages.ROOT / "notebooks" / f"{claim['notebook']}.ipynb" in book_pages.notebooks()
    assert claims_ledger.missing_verdicts(claim) == []


def test_statements_and_claims_name_each_other():
    named = claims_pages.theorems((BOOK / "theorems.md").read_text())
    anchors = {claims_pages.anchor(name): entry for name, entry in LEDGER.items()}
    assert len(named) >= 30 and all(label.split("-")[0] in {"thm", "def", "alg"} for label in named)
    assert {a for found in named.values() for a in found} <= set(anchors)
    assert [label for label, found in named.items() if not label.startswith("def-") and not found] == []
    exact = {a for a, entry in anchors.items() if entry["residual"] is not None}
    assert exact <= {a for found in named.values() for a in found}


def test_errata_are_shown_by_controls():
    page = (BOOK / "errata.md").read_text()
    parts = re.split(r"^\(erratum-(\d\d)\)=$", page, flags=re.M)
    assert sorted(int(n) for n in parts[1::2]) == list(claims_pages.ERRATA)
    shown = {n for entry in LEDGER.values() for n in claims_pages.errata(entry)}
    assert shown <= set(claims_pages.ERRATA) - {26}
    shown.add(26)  # arithmetic on a printed table
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        included = f"_generated/erratum-{number}.md" in text
        assert included == (int(number) in shown), f"erratum {number}"
        assert included != (WORDING_ONLY in text), f"erratum {number}"


def made_up(check=None, faults=({},), **fields) -> Claim:
    controls = [Control("c", fault) for fault in faults]
    usual = {"statement": "s", "source": "p", "notebook": "99_none", "drawn": "numbers", "side": "below"}
    return Claim("X-1", controls=controls, check=check, **usual | fields)


def rules(outcome, **fields) -> list[str]:
    return claims_ledger.broken_rules(made_up(**fields), outcome)


@pytest.mark.parametrize(
    "outcome",
    [
        Exact(2e-9, (1.0,)),
        Exact(1e-12, (1e-7,)),
        Exact(float("nan"), (1.0,)),
        Exact(1e-12, (float("inf"),)),
        Exact(-1.0, (1.0,)),
        Exact(1e-12, ()),
        Measured((0.1, 0.3), ((0.2, 0.5),), 0.95, 10),
        Measured((0.3, 0.1), ((0.5, 0.6),), 0.95, 10),
        Measured((0.1, 0.2), ((0.6, 0.5),), 0.95, 10),
        Measured((0.1, 0.2), ((0.5, 0.6),), 95, 10),
        Measured((0.1, 0.2), ((0.5, 0.6),), 0.95, 1),
        Measured((0.1, 0.2), (), 0.95, 10),
        Measured((0.5, 0.6), ((0.1, 0.2),), 0.95, 10),
    ],
)
def test_a_bad_outcome_is_seen(outcome):
    assert rules(outcome) != []


@pytest.mark.parametrize("outcome", [Exact(1e-12, (1e-5,)), Measured((0.1, 0.2), ((0.3, 0.4),), 0.95, 10)])
def test_a_good_outcome_passes(outcome):
    assert rules(outcome) == []


def test_an_exact_claim_needs_a_tolerance():
    assert rules(Exact(1e-12, (1.0,)), tolerance=None) != []


def test_a_control_is_the_check_with_its_fault():
    def check(seed, sign=1, size=1.0):
        return [abs(1 - sign) * size, abs(1 - size) / 2]

    both = [{"sign": -1, "size": 2.0}, {"sign": -1, "size": 3.0}]
    assert made_up(check, both[:1]).outcome(0) == Exact(0.0, (0.5,))
    assert made_up(check, both).outcome(0) == Exact(0.0, (0.5, 1.0)), "each fault by itself"
    assert made_up(check, [{"sign": -1}], options={"size": 3.0}).outcome(0) == Exact(1.0, (1.0,)), "the largest error"
    assert made_up(check, [{"sign": -1}]).outcome(0).control_errors == (0,), "a case in which the fault does nothing"
    unknown = made_up(lambda seed: [1e-12, float("nan")])
    assert claims_ledger.broken_rules(unknown, unknown.outcome(0)) != [], "not a number is no small error"


def test_an_interval_has_that_of_its_fault_beside_it():
    def check(seed, shift=0.0):
        return registry.mean_of([shift - 1, shift, shift + 1])

    found = made_up(check, [{"shift": 9.0}]).outcome(0)
    low, high = found.interval
    assert (
        (found.n, found.level) == (3, 0.95) and low == pytest.approx(-high) and high == pytest.approx(2.484, abs=1e-3)
    )
    assert found.control_intervals == (pytest.approx((low + 9, high + 9)),)


def usual_options(claim: Claim) -> dict:
    """All options of the claim's check, the claim's own and those left at their default."""
    known = {n: p.default for n, p in inspect.signature(claim.check).parameters.items() if n != "seed"}
    return known | claim.options


def test_every_fault_is_another_setting_of_its_check():
    for claim in CLAIMS.values():
        usual, texts = usual_options(claim), [control.text for control in claim.controls]
        assert claim.controls and len(set(texts)) == len(texts), claim.id
        for control in claim.controls:
            assert control.fault and inspect.signature(claim.check).bind(0, **claim.options | control.fault)
            assert all(value != usual[name] for name, value in control.fault.items()), claim.id


def test_no_two_claims_share_their_positive_check():
    checks: dict[tuple, list[str]] = {}
    for claim in CLAIMS.values():
        checks.setdefault((inspect.unwrap(claim.check), repr(sorted(usual_options(claim).items()))), []).append(
            claim.id
        )
    assert [names for names in checks.values() if len(names) > 1] == []


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.id)
def test_a_control_with_its_hypothesis_restored_is_seen(claim):
    usual = usual_options(claim)
    found = claims_ledger.outcome(claim.id, 0)
    for control in claim.controls:
        back = Control(control.text, {name: usual[name] for name in control.fault})
        restored = dataclasses.replace(claim, controls=[back])
        broken = claims_ledger.broken_rules(restored, restored.outcome(0))
        assert len(broken) == 1 and control.text in broken[0], "a control that passes the check"
        if isinstance(found, Exact):
            wrong = dataclasses.replace(claim, options=claim.options | control.fault, controls=[control])
            assert claims_ledger.broken_rules(wrong, wrong.outcome(0)) != [], "a wrong statement"


def test_a_doctored_ledger_is_seen():
    control = {"text": "c", "erratum": [], "error": 0.5}
    fresh = {"id": "X-1", "statement": "s", "tolerance": 1e-9, "residual": 1e-15, "controls": [control], "n": 3}
    assert (
        claims_ledger.differences(fresh | {"residual": 9e-10, "controls": [control | {"error": 0.5001}]}, fresh) == []
    )
    for name, value in {
        "statement": "another",
        "tolerance": 1e-3,
        "residual": 1e-8,
        "controls": [control | {"error": 0.51}],
        "n": 4,
    }.items():
        assert claims_ledger.differences(fresh | {name: value}, fresh) == [name]
    shorter = copy.copy(fresh)
    del shorter["n"]
    assert claims_ledger.differences(shorter, fresh) == ["n"]
    measured = {"interval": [0.1, 0.2], "residual": None}
    assert claims_ledger.differences(measured | {"interval": [0.1, 0.21]}, measured) == ["interval"]
    assert claims_ledger.differences(measured | {"residual": 0.0}, measured) == ["residual"]


def test_changed_code_is_seen_and_a_comment_is_not(tmp_path):
    codes = {"a": "x = 1\n", "b": "x  =  1  # one\n", "c": "x = 2\n"}
    for name, text in codes.items():
        (tmp_path / f"{name}.py").write_text(text)
    a, b, c = (claims_ledger.code_hash(tmp_path / f"{name}.py") for name in codes)
    assert a == b != c


def test_a_missing_verdict_is_seen(tmp_path):
    def printed(*lines, tags=("nbval-check-output",)):
        output = new_output("stream", text="".join(f"{line}\n" for line in lines))
        cell = new_code_cell("check()", outputs=[output], metadata={"tags": list(tags)})
        nbformat.write(new_notebook(cells=[cell]), tmp_path / "01_x.ipynb")
        return claims_ledger.missing_verdicts({"id": "X-1", "notebook": "01_x"}, tmp_path)

    verdicts = ("X-1 PASS: it holds", "X-1 CONTROL PASS: the wrong sign does not")
    assert printed(*verdicts) == []
    assert printed("X-1, X-2 PASS: both", "X-0, X-1 CONTROL PASS: both") == []
    assert printed(*verdicts, tags=("nbval-ignore-output",)) == ["X-1 PASS", "X-1 CONTROL PASS"]
    assert printed(verdicts[0]) == ["X-1 CONTROL PASS"]
    assert printed(verdicts[1], "X-10 PASS") == ["X-1 PASS"]
    assert claims_ledger.missing_verdicts({"id": "X-1", "notebook": "02_y"}, tmp_path) == ["there is no 02_y.ipynb"]


def test_erratum_26_is_the_mean_of_the_printed_table():
    arms = {"zero_shot": (50, 10), "standard": (60, 10), "in_context": (80, 9)}
    cells = [("accuracy", arm, task, v) for arm, two in arms.items() for task, v in zip("ab", two, strict=True)]
    gap = claims_pages.printed_gap(pd.DataFrame(cells, columns=["quantity", "arm", "task", "value"]))
    assert "25.00 percent" in gap and "10.50 points" in gap and "2 tasks" in gap
    assert "19.38" not in claims_pages.printed_gap() and "6 tasks" in claims_pages.printed_gap()


@pytest.mark.parametrize(("status", "refutes"), [("identity", "It never does."), ("refuted here", "")])
def test_a_claim_names_a_sentence_if_and_only_if_it_refutes_it(monkeypatch, status: str, refutes: str):
    monkeypatch.setattr(registry, "CLAIMS", {})
    with pytest.raises(ValueError, match="the sentence that it refutes"):
        fields = {"statement": "It holds", "notebook": "99_none", "controls": [], "drawn": ""}
        registry.claim("X-none", **fields, status=status, refutes=refutes)(lambda seed: 0.0)


def test_the_pages_are_made_from_the_ledger():
    exact = {"id": "T3.1-x", "statement": "It holds", "source": "[C]", "notebook": "99_none"}
    exact |= {"test": "tests/claims/test_claims.py::test_claim[T3.1-x]", "status": "identity", "refutes": ""}
    exact |= {"controls": [{"text": "wrong sign", "erratum": [3], "error": 110.4}], "drawn": "weights", "seeds": 3}
    exact |= {"tolerance": 1e-9, "residual": 4.3e-14}
    measured = exact | {"id": "V-y", "tolerance": None, "residual": None, "drawn": "", "seeds": 1}
    measured |= {"interval": [0.1, 0.2], "level": 0.95, "n": 7, "side": "below"}
    measured |= {"controls": [{"text": "none", "erratum": [], "interval": [0.3, 0.4]}]}
    page = claims_pages.claims_page([exact, measured], ":label: thm-one\ntext [T3.1-x](#claim-t3-1-x)\n")
    for text in ("(claim-t3-1-x)=", r"$4.3\cdot10^{-14}$", "$10^{-9}$", "$110$", "{prf:ref}`thm-one`", "#erratum-03"):
        assert page.count(text) == 1, text
    assert "[0.1, 0.2], below each control's (level 0.95, $n=7$)" in page and "[0.3, 0.4]" in page
    assert "#claim-t3-1-x" in claims_pages.erratum([exact, measured], 3) and "No check" in claims_pages.erratum(
        [exact], 4
    )
    assert "(identity). It holds." in page
    refuted = claims_pages.claims_page([exact | {"status": "refuted here", "refutes": "It never does."}], "")
    assert "(refuted here). “It never does.” Correct: It holds." in refuted
    assert "weights; 3 seeds" in page and page.count("Nothing is drawn") == 1
    told = "2 claims (2 identity) with 2 controls; in 1 of them nothing is drawn at random.\n"
    assert claims_pages.summary([exact, measured]) == told
