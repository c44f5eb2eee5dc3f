"""The bench itself, at sizes that measure nothing: what it writes, when it resumes, when it says no."""

import copy
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as bench_main
from bench import measure, peers
from bench.measure import Bench, Setting
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import cost
from tools.book_pages import ROOT

WITHOUT_CHILDREN = ["scoring", "recompute", "labels", "record", "finetune_step", "growth", "ablations"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Exit status and file of a quick bench without child processes."""
    folder = tmp_path_factory.mktemp("bench")
    only = [word for name in WITHOUT_CHILDREN for word in ("--only", name)]
    status = bench_main.main(["--quick", "--output", str(folder / "bench.json"), *only])
    return status, folder / "bench.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Bench(Setting.quick(), tmp_path_factory.mktemp("parts"), {"scoring": {"peak_flops": {"float32": 1e9}}})


def test_keys_and_sections(run):
    status, file = run
    result = json.loads(file.read_text())
    assert status == 1, "a tiny model meets no target of speed, and peers were left out"
    assert set(bench_main.KEYS) <= set(result) and set(result["sections"]) == set(WITHOUT_CHILDREN)
    assert result["quick"] and {"processor", "torch", "threads"} <= set(result["machine"])
    for section in result["sections"].values():
        assert {"seconds", "cpu_seconds", "load_before", "when"} <= set(section["run"])
    assert set(result["finetune_step"]) == {"standard", "joint", "sequential"}
    assert all(point["flops"] > 0 for points in result["growth"].values() for point in points)
    assert {"all_on", "shared_prefix", "batching", "needed_rows"} == set(result["ablations"]["seconds_a_query"])
    assert result["ratio_vs_lm_eval"] is None and result["bytes_per_query"] > 0


def test_the_originals_way_gives_the_same_numbers(run):
    sections = json.loads(run[1].read_text())["sections"]
    found, labels = sections["recompute"], sections["labels"]
    assert found["same_numbers"] and max(found["largest_differences"].values()) < 1e-4
    assert labels["same_numbers"] and min(labels["label_tokens"]) > 1 and len(labels["label_tokens"]) == 4


def test_an_interrupted_bench_goes_on(run, capsys, monkeypatch):
    _status, file = run
    monkeypatch.delattr(measure, "scoring")  # a kept section is not measured again
    bench_main.main(["--quick", "--output", str(file), "--only", "recompute"])
    assert capsys.readouterr().out.count("kept from") == 2
    assert set(json.loads(file.read_text())["sections"]) == set(WITHOUT_CHILDREN), "sections measured before stay"
    monkeypatch.setattr(bench_main, "bench_hash", lambda: "other code")
    with pytest.raises(AttributeError, match="scoring"):
        bench_main.main(["--quick", "--output", str(file), "--only", "recompute"])


def passing():
    values = {key: 2 * target if larger else target / 2 for key, (larger, target) in bench_main.TARGETS.items()}
    return values | {"sections": {section: {"same_numbers": True} for section in ("recompute", "labels")}}


def test_targets():
    assert all(row["met"] for row in bench_main.verdicts(passing()))
    for key, (larger, target) in bench_main.TARGETS.items():
        for wrong in (None, target * (0.99 if larger else 1.01)):
            rows = bench_main.verdicts(passing() | {key: wrong})
            assert [row["key"] for row in rows if not row["met"]] == [key]
            assert "NO" in bench_main.show(rows)
    for key, section in bench_main.SAME_NUMBERS.items():
        other_numbers = copy.deepcopy(passing())
        other_numbers["sections"][section]["same_numbers"] = False
        missed = [row["key"] for row in bench_main.verdicts(other_numbers) if not row["met"]]
        assert missed == [key], "a fast wrong number is no success"


def test_exit_status_follows_the_table(monkeypatch, tmp_path):
    for results, status in ((passing(), 0), (passing() | {"ratio_vs_recompute": 1.0}, 1)):
        labels = {"same_numbers": True, "ratio_vs_recompute": results["labels_ratio_vs_recompute"]}
        sections = {"recompute": {"same_numbers": True}, "labels": labels, "all": results}
        monkeypatch.setattr(bench_main, "run", lambda *_arguments, sections=sections: sections)
        assert bench_main.main(["--quick", "--output", str(tmp_path / "bench.json")]) == status


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_a_quick_run_is_never_stored_for_the_book(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_main, "run", lambda *_arguments: {"recompute": {"same_numbers": True}, "all": passing()})
    monkeypatch.setattr(bench_main, "repository_root", lambda: tmp_path)
    monkeypatch.setattr(bench_main, "bench_hash", lambda: "code")
    bench_main.main([*quick, "--store", "--output", str(tmp_path / "bench.json")])
    assert (tmp_path / "results" / "bench" / "bench.json").exists() == (not quick)


def test_children(tiny):
    """What fresh processes do, in this one."""
    setting = json.loads(json.dumps(asdict(tiny.setting)))
    assert 0 <= measure.run_child({"what": "predict", "setting": setting})["accuracy"] <= 1
    kept = [measure.run_child({"what": "memory", "setting": setting, "n": 4, "keep": keep}) for keep in (False, True)]
    assert kept[0]["kept_bytes"] == 0 < kept[1]["kept_bytes"] and kept[0]["peak_bytes"] >= kept[0]["loaded_bytes"]


def test_what_is_switched_off_changes_time_but_no_number(tiny):
    cell, arm = tiny.cell, tiny.in_context
    queries = cell.queries[:5]
    reference = measure.score(cell.model, queries, arm)
    whole = [measure.prompt_and_query(arm.prefix, query) for query in queries]
    bare = measure.Arm(cell.layout.prefix())
    np.testing.assert_allclose(measure.score(cell.model, whole, bare), reference, atol=1e-4)
    np.testing.assert_allclose(measure.score(cell.model, queries, arm, 1), reference, atol=1e-4)
    with measure.head_everywhere(cell.model):
        np.testing.assert_array_equal(measure.score(cell.model, queries, arm), reference)
    with measure.truncated(cell.model, 1) as shorter:
        assert np.abs(measure.score(shorter, queries, arm) - reference).max() > 1e-3, "control"
        assert shorter.n_layers == 1
    np.testing.assert_array_equal(measure.score(cell.model, queries, arm), reference)
    assert not any(p.requires_grad for p in cell.model.model.parameters())
    measure.gradient(cell.model, cell.layout.training_sequence(cell.training[0]), everything=True)
    assert not any(p.requires_grad for p in cell.model.model.parameters())


def test_useful_work_is_what_the_loop_multiplies(tiny):
    """Without attention, which runs in an operator that torch does not count."""
    cell, prefix = tiny.cell, tiny.in_context.prefix
    with FlopCounterMode(display=False) as counter:
        measure.score(cell.model, cell.queries, tiny.in_context)
    operators = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    whole = cost.forward(tiny.shape, len(prefix))
    for query in cell.queries:
        tokens = len(query.tokens)
        whole += cost.forward(tiny.shape, tokens, len(prefix), 1)
        whole += cost.recording(tiny.shape, tokens, len(cell.layout.labels))
    assert operators["aten.mm"] == whole.linear + whole.head
    assert measure.useful(tiny.shape, cell.queries, len(prefix)) == whole.total


def test_export_for_the_harness(tiny, tmp_path):
    peers.export(tiny.cell, 5, tmp_path)
    text = (tmp_path / "sst2_fixed.yaml").read_text()
    assert str(tmp_path) in text and '["negative", "positive"]' in text and "{folder}" not in text
    rows = peers.pd.read_parquet(tmp_path / "validation.parquet")
    assert rows["row"].tolist() == [query.row for query in tiny.cell.queries[:5]]
    demonstrations = peers.pd.read_parquet(tmp_path / "train.parquet")
    assert demonstrations["prompt"].tolist() == [e.prompt for e in tiny.cell.demonstrations]


def test_matrix_rate_and_differences():
    assert measure.product_rate((32, 64), torch.float32) > 0
    same = np.log(np.array([[0.2, 0.8], [0.9, 0.1]]))
    assert measure.differences(same, same[:, ::-1])["same_prediction"] == 0.0
    assert measure.differences(same, same)["largest_log_probability_difference"] == 0.0


def test_peers_are_pinned_and_apart():
    lines = [x for x in (ROOT / "bench" / "peers.txt").read_text().splitlines() if not x.startswith("#")]
    assert all("==" in line for line in lines) and {"lm-eval==0.4.13", "llama-cpp-python==0.3.36"} <= set(lines)
    for text in ((ROOT / "requirements.lock").read_text(), (ROOT / "pyproject.toml").read_text()):
        assert "lm-eval" not in text and "llama" not in text.lower().replace("tinyllama", "")


def test_without_the_six_tasks_the_default_text_is_used(monkeypatch, capsys, tmp_path):
    def missing(*_arguments):
        raise InputError("set ICLGD_DATA")

    monkeypatch.setattr(bench_main.sources, "load_task", missing)
    monkeypatch.delenv("ICLGD_DATA", raising=False)
    assert Setting(**bench_main.text()).task == "snippets"
    assert "ICLGD_DATA" in capsys.readouterr().out
    monkeypatch.setenv("ICLGD_DATA", "a/slip")
    output = ["--output", str(tmp_path / "bench.json")]
    assert bench_main.main(output) == 2, "a folder that was named is used, or nothing is measured"
