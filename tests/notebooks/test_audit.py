"""Every finding of page 84 can fail: with one fact changed, its verdict changes. The search for counts is exact."""

import itertools
import re

import notebook_cells
import numpy as np
import pandas as pd
import pytest

from iclgd_helpers.pages import published, tables

PAGE = "84_audit_of_the_published_numbers"
SOURCES = ("archive", "archived_gradient_norms", "class_counts", "dai_accuracies", "table", "text")
TABLE_2 = "table2-cells A-table2 A-random A-averages sst5-table A-sst5 A-unsupported".split()
CLIPPING = [*TABLE_2, *"clip-table A-clip A-clip-more A-noop".split()]
COUNTS = "A-average search search-all counts-table A-counts cb-counts A-cb A-cb-swapped".split()
COLLAPSE = "A-average collapse-table A-collapse seeds-table A-seeds".split()
LATER = "delta-table A-delta A-order untrained-table A-untrained".split()


@pytest.fixture
def page(monkeypatch):
    """Runs cells of the page on changed tables, and returns the verdicts; nothing is written or displayed."""
    monkeypatch.setattr(tables, "download", lambda *_: None)
    shared = {}
    monkeypatch.setattr(tables, "share", lambda name, *parts: shared.update({name: parts}))
    original = {name: getattr(published, name) for name in SOURCES}

    def run(ids, **changes):
        for name, change in changes.items():

            def changed(*arguments, _name=name, _change=change):
                found = original[_name](*arguments)
                _change(found)
                return found

            monkeypatch.setattr(published, name, changed)
        names = notebook_cells.run(PAGE, "parameters", "imports", "data", "define-finding", *ids)
        return {name: entry["verdict"] for name, entry in names["findings"].items()}

    run.shared = shared
    return run


def put(column, value, **where):
    """Change `column` to `value` in the one row that is `where`; none, in the other printed tables."""

    def change(frame):
        rows = np.logical_and.reduce([frame[name] == wanted for name, wanted in where.items()])
        assert rows.sum() <= 1
        frame.loc[rows, column] = value

    return change


def as_if_seeded(archive):
    archive["sim_aou_random"] = archive.groupby(["task", "seed", "perm"])["sim_aou_random"].transform("first")


def trained_norm_grows(norms):
    norms.loc[32, "global_keys_values"] = 100


def more_in_context(accuracies):
    accuracies.loc["mr", "in_context"] += 1


def nothing_fixed(archive):
    archive.loc[archive["task"].eq("sst2") & archive["method"].eq("joint"), "fixed_finetuned"] = 0


LOG = {"commit_date": "2023-09-05", "clipping": "none"}
LATE = {"commit": "5160217"}  # the result files
CASES = {
    "A-table2": (TABLE_2, "archive", put("sim_aou", 0.3310, task="mr", **LOG)),
    "A-random": (TABLE_2, "archive", as_if_seeded),
    "A-averages": (TABLE_2, "table", put("value", 0.2801, task="average", arm="joint", quantity="sim_aou")),
    "A-cut-off": (TABLE_2, "table", put("value", 0.4428, task="average", arm="standard", quantity="sim_am")),
    "A-sst5": (TABLE_2, "table", put("value", 0.0813, task="sst5", arm="standard", quantity="sim_aou")),
    "A-sst5-count": (TABLE_2, "archive", put("sim_aou", 0.2, task="sst5", method="standard", precision="fp32")),
    "A-unsupported": (TABLE_2, "archive", put("sim_am", 0.4944, task="agnews", method="standard", precision="fp32")),
    "A-delta": (LATER, "archive", put("sim_am", 0.5, task="mr", method="joint", seed=5, **LATE)),
    "A-reversal": ([*TABLE_2, *LATER], "table", put("value", 0.6, task="mr", arm="joint", quantity="sim_am")),
    "A-clip": (CLIPPING, "table", put("value", 0.36, arm="joint_clipped", quantity="sim_aou")),
    "A-clip-more": (CLIPPING, "archive", put("sim_aou", 0.2, task="sst2", clip_value=12)),
    "A-noop": (CLIPPING, "archive", put("fixed_both", 334, clipping="per_layer", precision="fp16")),
    "A-norms": (["A-norms"], "archived_gradient_norms", trained_norm_grows),
    "A-average": (["A-average"], "text", put("value", 21.43, place="section 3.3")),
    "A-average-dai": (["A-average"], "dai_accuracies", more_in_context),
    "A-counts": (COUNTS, "table", put("value", 34.1, quantity="jaccard", task="mr")),
    "A-counts-either": (COUNTS, "table", put("value", 20.0, quantity="jaccard", task="mr")),
    "A-jaccard": (
        [*TABLE_2, "jaccard-table", "A-jaccard"],
        "table",
        put("value", 19.5, quantity="jaccard_correct", task="sst2"),
    ),
    "A-cb-layer-causal": (COUNTS, "table", put("value", 90.0, quantity="jaccard_correct", task="cb")),
    "A-cb-constant": (COUNTS, "archive", put("fixed_finetuned", 23, task="cb", commit="cf9dc4b", seed=4)),
    "A-cb-swapped": (COUNTS, "archive", put("changed_finetuned", 44, task="cb", commit="cf9dc4b", seed=4)),
    "A-collapse": (COLLAPSE, "archive", put("changed_finetuned", 1004, task="subj", changed_finetuned=1304)),
    "A-no-collapse": (COLLAPSE, "archive", nothing_fixed),
    "A-seeds": (COLLAPSE, "archive", put("accuracy_in_context", 65.0, source_path="output.out")),
    "A-order": (LATER, "archive", put("perm", 0, task="cb", method="joint", seed=4, **LATE)),
    "A-untrained": (LATER, "archive", put("sim_aou", 0.05, task="sst2", weights="untrained", seed=2)),
}


def every_cell():
    """All cells that findings need, and those that count them, in the page's order."""
    needed = {*itertools.chain(*(ids for ids, _source, _change in CASES.values())), "findings", "finding"}
    return [name for name in notebook_cells.sources(PAGE) if name in needed]


def test_all_findings_hold_and_are_the_stored_ones(page):
    found = page(every_cell())
    assert set(found.values()) == {"PASS"} and set(found) == set(CASES)
    stored = pd.read_csv(published.FOLDER.parent / "tables" / "audit_findings.csv").set_index("finding")
    assert stored["verdict"].to_dict() == found
    _archive, lines = page.shared["finding-84"]
    assert f"{len(CASES)} of {len(CASES)} findings" in lines[0][1] and "not confirmed" not in lines[0][1]


def test_the_box_names_the_findings_that_do_not_hold(page):
    _ids, source, change = CASES["A-untrained"]
    page(every_cell(), **{source: change})
    _archive, (first, _, last) = page.shared["finding-84"]
    assert f"{len(CASES) - 1} of {len(CASES)} findings" in first[1] and "not confirmed: A-untrained." in first[1]
    assert "on 2 of 5" in last[1]


def test_what_precision_alone_does_is_no_effect_of_clipping(page):
    close = put("sim_aou", 0.3410, clipping="per_layer", precision="fp32")
    assert page(CLIPPING, archive=close)["A-noop"] == "NOT CONFIRMED"


@pytest.mark.parametrize("name", CASES)
def test_a_finding_fails_when_its_fact_changes(page, name):
    ids, source, change = CASES[name]
    assert page(ids, **{source: change})[name] == "NOT CONFIRMED"


def search():
    return notebook_cells.run(PAGE, "search", "search-all", np=np, pd=pd, itertools=itertools)


def brute_force(n, classes):
    """All tables of counts of `n` questions, by the kind of each question: before, by finetuning, in context."""
    changed = {True: [0], False: [1]} if classes == 2 else {True: [0, -1], False: [1, 0]}
    kinds = []  # right before?, then the answer: None unchanged, 1 right, 0 and -1 two different wrong ones
    for before in (True, False):
        kinds += [(before, ft, icl) for ft in (None, *changed[before]) for icl in (None, *changed[before])]
    for numbers in compositions(n, len(kinds)):
        count = dict.fromkeys("zfigjxy", 0) | {"ft": 0, "icl": 0}
        for (before, ft, icl), m in zip(kinds, numbers, strict=True):
            count["z"] += before * m
            for name, fixed, wrongly, answer in (("ft", "f", "i", ft), ("icl", "g", "j", icl)):
                count[name] += m * (before if answer is None else answer == 1)
                if answer is not None:
                    count[fixed if answer == 1 else wrongly] += m
            if ft is not None and ft == icl:
                count["x" if ft == 1 else "y"] += m
        yield tuple(count[name] for name in ("z", "ft", "icl", *"figjxy"))


def compositions(n, parts):
    for bars in itertools.combinations(range(n + parts - 1), parts - 1):
        yield [b - a - 1 for a, b in itertools.pairwise((-1, *bars, n + parts - 1))]


@pytest.mark.parametrize(("n", "classes"), [(7, 2), (3, 3)])
def test_the_search_finds_all_counts_and_with_two_classes_only_these(n, classes):
    possible = set(brute_force(n, classes))
    solutions, checked = search()["solutions"], 0
    for counts in sorted(possible)[:: max(1, len(possible) // 40)]:
        z, ft, icl, f, i, g, j, x, y = counts
        unions = f + g - x, i + j - y, f + g + i + j - x - y
        if not all(unions):
            continue
        exact = [100 * v / n for v in (z, ft, icl)]
        exact += [100 * v / u for v, u in zip((x, y, x + y), unions, strict=True)]
        names = ("zero_shot", "standard", "in_context", "jaccard_correct", "jaccard_incorrect", "jaccard")
        wide = dict(zip(names, ((v - 0.05, v + 0.05) for v in exact), strict=True))
        found = set(solutions(n, wide, classes).itertuples(index=False, name=None))

        def fits(c, exact=exact):
            unions = c[3] + c[5] - c[7], c[4] + c[6] - c[8], sum(c[3:7]) - c[7] - c[8]
            if not all(unions):
                return False
            values = [100 * v / n for v in c[:3]]
            values += [100 * v / u for v, u in zip((c[7], c[8], c[7] + c[8]), unions, strict=True)]
            return all(abs(a - b) <= 0.05 + 1e-9 for a, b in zip(values, exact, strict=True))

        wanted = {c for c in possible if fits(c)}
        assert counts in wanted <= found
        if classes == 2:
            assert found == wanted
        checked += 1
    assert checked >= 10


def test_every_finding_has_a_case():
    named = {
        name
        for name in re.findall(r'finding\(\n?\s*"(A-[a-z0-9-]+)"', "\n".join(notebook_cells.sources(PAGE).values()))
    }
    assert named == set(CASES)
