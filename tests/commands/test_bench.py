"""The bench itself, at sizes that measure nothing: what it writes, when it resumes, when it says no."""

import ast
import copy
import importlib
import json
import os
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as bench_main
from bench import (
    ablations,
    beside_peers,
    book,
    children,
    empty_page,
    grid,
    growth,
    measuring,
    memory,
    peers,
    report,
    steps,
    whole_process,
)
from bench import scoring as scoring_section
from bench.setting import Bench, Setting
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import cost
from tools import book_pages
from tools.book_pages import ROOT

SCORING = ("queries", "demonstrations", "layers")
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
    assert set(report.KEYS) <= set(result) and set(result["sections"]) == set(WITHOUT_CHILDREN)
    assert result["quick"] and {"processor", "torch", "threads"} <= set(result["machine"])
    for section in result["sections"].values():
        assert {"seconds", "cpu_seconds", "load_before", "when"} <= set(section["run"])
    assert set(result["finetune_step"]) == {"standard", "joint", "sequential"}
    assert set(result["growth"]) == {*SCORING, "arms", "step_tokens", "step_learners", "step_layers"}
    for points in result["growth"].values():
        assert all(point["flops"] > 0 and point["seconds"] > 0 for point in points)
        assert len({point["x"] for point in points}) > 1, "something grows"
    assert all(result[f"{method}_step_seconds"] > 0 for method in result["finetune_step"])
    assert {"all_on", "shared_prefix", "batching", "needed_rows"} == set(result["ablations"]["seconds_a_query"])
    assert result["ratio_vs_lm_eval"] is None and result["bytes_per_query"] > 0


def test_the_originals_way_gives_the_same_numbers(run):
    sections = json.loads(run[1].read_text())["sections"]
    found, labels = sections["recompute"], sections["labels"]
    assert found["same_numbers"] and max(found["largest_differences"].values()) < 1e-4
    assert labels["same_numbers"] and min(labels["label_tokens"]) > 1 and len(labels["label_tokens"]) == 4


def test_an_interrupted_bench_goes_on(run, capsys, monkeypatch):
    _status, file = run
    monkeypatch.delattr(scoring_section, "scoring")  # a kept section is not measured again
    bench_main.main(["--quick", "--output", str(file), "--only", "recompute"])
    assert capsys.readouterr().out.count("kept from") == 2
    assert set(json.loads(file.read_text())["sections"]) == set(WITHOUT_CHILDREN), "sections measured before stay"
    monkeypatch.setattr(bench_main, "bench_hash", lambda: "other code")
    with pytest.raises(AttributeError, match="scoring"):
        bench_main.main(["--quick", "--output", str(file), "--only", "recompute"])


def passing():
    values = {key: 2 * target if larger else target / 2 for key, (larger, target) in report.TARGETS.items()}
    return values | {"sections": {section: {"same_numbers": True} for section in ("recompute", "labels")}}


def test_targets():
    assert all(row["met"] for row in report.verdicts(passing()))
    for key, (larger, target) in report.TARGETS.items():
        for wrong in (None, target * (0.99 if larger else 1.01)):
            rows = report.verdicts(passing() | {key: wrong})
            assert [row["key"] for row in rows if not row["met"]] == [key]
            assert "NO" in report.show(rows, {})
    for key, section in report.SAME_NUMBERS.items():
        other_numbers = copy.deepcopy(passing())
        other_numbers["sections"][section]["same_numbers"] = False
        missed = [row["key"] for row in report.verdicts(other_numbers) if not row["met"]]
        assert missed == [key], "a fast wrong number is no success"


def test_the_page_has_a_line_for_each_row():
    page = book_pages.read(ROOT / "notebooks" / "80_cost_and_speed.ipynb")
    (cell,) = (cell.source for cell in page.cells if cell.source.startswith("WHAT = "))
    assert list(ast.literal_eval(cell.removeprefix("WHAT = "))) == list(report.TARGETS)


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


def jobs_without_a_function(sources: list[str]) -> set[str]:
    """What sections ask a fresh process for, by name, and no module has."""
    asked = set(re.findall(r'"what": "(\w+)"', "\n".join(sources)))
    modules = {name: importlib.import_module(module) for name, module in children.MODULES.items()}
    return {name for name in asked if not hasattr(modules.get(name), name)}


def test_every_job_that_a_section_asks_for_is_there():
    sources = [path.read_text(encoding="utf-8") for path in Path(children.__file__).parent.glob("*.py")]
    assert jobs_without_a_function(sources) == set()
    assert jobs_without_a_function([*sources, '{"what": "predict"}']) == {"predict"}, "the control"


def test_children(tiny):
    """What fresh processes do, in this one."""
    setting = json.loads(json.dumps(asdict(tiny.setting)))
    found = children.run_child({"what": "predicted", "setting": setting})
    assert 0 <= found["accuracy"] <= 1
    assert 0 < found["prefix_seconds"] and 0 < found["scoring_seconds"]
    job = {"what": "observed", "setting": setting, "n": 4}
    kept = [children.run_child(job | {"keep": keep}) for keep in (False, True)]
    assert kept[0]["kept_bytes"] == 0 < kept[1]["kept_bytes"] and kept[0]["peak_bytes"] >= kept[0]["loaded_bytes"]
    many = children.run_child(job | {"n": 700, "generated": True})
    assert many["n_texts"] == 700, "each query is another text"
    assert len({query.tokens for query in tiny.some(700)}) < 700, "control: rows of the task repeat"


def test_a_prefix_is_no_scoring(tiny):
    model = tiny.cell.model
    with whole_process.timed_prefixes(model) as seconds:
        measuring.score(model, tiny.cell.queries, tiny.in_context)
    assert len(seconds) == 1 and seconds[0] > 0
    measuring.score(model, tiny.cell.queries, tiny.in_context)
    assert len(seconds) == 1, "the model is as before"


def test_whole_processes(tiny, monkeypatch):
    def child(job):
        assert job["what"] == "predicted"
        return {"whole_process_seconds": 9.0, "scoring_seconds": 7.5, "accuracy": 1.0}

    monkeypatch.setattr(whole_process, "child", child)
    assert whole_process.whole_process(tiny)["not_scoring_seconds"] == 1.5


def test_memory_of_few_and_many(tiny, monkeypatch):
    def child(job):
        return {"peak_bytes": 100 + job["n"], "kept_bytes": 8 * bool(job.get("keep")), "model": job["setting"]["model"]}

    monkeypatch.setattr(memory, "child", child)
    found = memory.memory(tiny)
    (few, many), (fewer, more) = tiny.setting.memory, tiny.setting.generated_memory
    assert found["memory_growth"] == (100 + many) / (100 + few)
    assert found["generated_memory_growth"] == (100 + more) / (100 + fewer) > 1
    assert {one["model"] for one in found["generated_processes"].values()} == {"tiny-llama"}


def test_processors_that_emulate_bfloat16_leave_it_out(tiny, monkeypatch):
    """Measured first: the hours that emulation would take are never begun."""
    asked = []

    def rate(sizes, dtype):
        asked.append((tuple(sizes), dtype))
        return 1e9 if dtype == torch.bfloat16 else 8e10

    monkeypatch.setattr(scoring_section, "product_rate", rate)
    found = scoring_section.scoring(tiny)
    assert set(found["left_out"]) == set(scoring_section.NEED_BFLOAT16) and "bfloat16_speedup" not in found
    assert [sizes for sizes, dtype in asked if dtype == torch.bfloat16] == [tiny.setting.matrices[:1]]
    result = report.top({"scoring": found})
    rows = report.verdicts(result)
    assert "ratio_vs_llama_cpp is left out: bfloat16 products reach 1e+09" in report.show(rows, result["left_out"])
    assert not next(row for row in rows if row["key"] == "ratio_vs_llama_cpp")["met"]
    assert scoring_section.without_units({"float32": 1.0, "bfloat16": 2.0}) == {}
    monkeypatch.setattr(scoring_section, "product_rate", lambda *_: 1e9)
    assert "bfloat16_speedup" in scoring_section.scoring(tiny), "control: where the units are there, it is measured"


def test_without_bfloat16_llama_cpp_has_its_other_ratio(tiny, monkeypatch):
    n = len(tiny.cell.queries[: tiny.setting.llama_queries])
    theirs = {"queries": [0.1] * n, "log_probabilities": np.zeros((n, 2)).tolist()}
    monkeypatch.setattr(peers, "make_environment", lambda: None)
    monkeypatch.setattr(peers, "gguf_file", lambda *_: None)
    monkeypatch.setattr(peers, "llama_cpp", lambda *_: theirs)
    monkeypatch.setattr(peers, "compiler_options", dict)
    for left_out in ({}, {"ratio_vs_llama_cpp": "emulated"}):
        done = {"scoring": {"peak_flops": {"float32": 1e9}, "left_out": left_out}}
        found = beside_peers.llama_cpp(Bench(tiny.setting, tiny.folder, done))
        assert "ratio_vs_llama_cpp_float32" in found and ("ratio_vs_llama_cpp" in found) == (not left_out)


def test_a_step_of_any_size(tiny):
    for tokens in (5, 40):
        sequence = steps.sequence_of(tiny, tokens)
        assert len(sequence.tokens) == tokens and sequence.trunk[0] == tiny.cell.layout.prefix()[0]
    alone = steps.point(tiny, "joint", 12)
    assert steps.point(tiny, "joint", 12, n_learners=3)["flops"] == 3 * alone["flops"]
    sequences = [steps.sequence_of(tiny, 12)] * 2
    assert len(steps.step_seconds(tiny.cell.model, sequences, tiny.cell.parameters, "standard", 3)) == 2


def test_arms_are_counted_beside_one(tiny):
    found = growth.of_arms(tiny)
    assert [point["x"] for point in found] == list(tiny.setting.growth_arms)
    assert all(point["flops"] == point["x"] * found[0]["flops"] for point in found)
    assert found[0]["seconds"] == found[0]["one_arm"] == found[-1]["one_arm"]


def test_a_grid_of_cells_that_compute_nothing(tiny):
    found = children.run_child({"what": "performed", "setting": asdict(replace(tiny.setting, cells=6))})
    assert found["n_cells"] == 6 and found["runner_seconds"] > found["cells_seconds"] > found["loop_seconds"]
    assert grid.overhead({"runner_seconds": 3.0, "loop_seconds": 1.0, "n_cells": 1000}) == pytest.approx(2.0)


def test_a_grid_with_a_missing_cell_is_no_measurement(tiny, monkeypatch):
    job = grid.job
    monkeypatch.setattr(grid, "job", lambda folder, number: replace(job(folder, 0), name=f"cell {number}"))
    with pytest.raises(RuntimeError, match="1 of 2 cells were stored"):
        grid.performed(replace(tiny.setting, cells=2), {})


def test_an_empty_page_is_executed(tiny):
    found = children.run_child({"what": "executed", "setting": asdict(tiny.setting)})
    assert len(found["seconds"]) == tiny.setting.empty_pages and found["seconds"][-1] > 0


def test_the_last_of_the_empty_pages_counts(tiny, monkeypatch):
    monkeypatch.setattr(empty_page, "child", lambda job: {"seconds": [4.0, 3.0, 2.0]})
    assert empty_page.empty_page(tiny)["empty_page_seconds"] == 2.0


PAGES = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--folder") + 1], "_build", "pages")
folder.mkdir(parents=True)
assert len(os.sched_getaffinity(0)) == 1
for name in PAGES[:N]:
    ballast = bytearray(60_000_000)
    time.sleep(0.05)
    json.dump({"seconds": 0.05, "peak_gb": 0.5}, (folder / f"{name}.json").open("w"))
print("said", flush=True)
time.sleep(REST)
"""


def stub(monkeypatch, pages, n, rest):
    """A command in place of `iclgd book`, which writes the files of the first `n` of these pages."""
    source = PAGES.replace("PAGES", repr(pages)).replace("[:N]", f"[:{n}]").replace("REST", str(rest))
    monkeypatch.setattr(book, "COMMAND", (sys.executable, "-c", source))
    monkeypatch.setattr(book.storage, "read_json", lambda path: json.loads(path.read_text()))
    monkeypatch.setattr(book, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(book.book_pages, "notebooks", lambda: [book.Path(f"{name}.ipynb") for name in pages])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no process is bound to cores here")
def test_pages_of_the_book_by_the_files_that_it_writes(tiny, monkeypatch):
    pages = ["00_first", "01_theory", "10_model", "12_theory", "72_clip"]
    stub(monkeypatch, pages, len(pages), rest=60)
    before, start = os.sched_getaffinity(0), time.monotonic()
    found = book.book(Bench(replace(tiny.setting, book_cores=(1,)), tiny.folder, {}))
    assert time.monotonic() - start < 30, "the rest of the command, the HTML, is not waited for"
    assert os.sched_getaffinity(0) == before
    assert 0.25 <= found["book_pages_seconds"] < 20 and 0.06 < found["book_peak_gb"] < 1
    assert found["theory_pages_seconds"] == pytest.approx(0.1) and found["page_72_seconds"] == 0.05
    assert set(found["cores"]["1"]["pages"]) == {page[:2] for page in pages}
    assert found.keys() >= {key for key in report.TARGETS if "page_" in key and key != "empty_page_seconds"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no process is bound to cores here")
def test_a_book_that_does_not_end_is_not_measured(tiny, tmp_path, monkeypatch):
    stub(monkeypatch, ["00_first", "01_theory"], 1, rest=0)
    with pytest.raises(measuring.NotMeasured, match="said"):
        book.built(tmp_path, 1, "smoke")
    with pytest.raises(measuring.NotMeasured, match="cores are asked for"), book.on_cores(10_000):
        pass


def test_what_a_book_takes_at_a_time():
    """Two pages side by side take less from first to last than one behind the other."""
    pages = {"00": {"seconds": 8.0, "ended": 10.0}, "01": {"seconds": 5.0, "ended": 8.0}}
    assert book.rows(pages) == {"book_pages_seconds": 8.0, "page_00_seconds": 8.0, "theory_pages_seconds": 5.0}
    pages["01"]["ended"] = 15.0
    assert book.rows(pages)["book_pages_seconds"] == 13.0, "control"


def test_sections_that_measure_more_than_the_engine_are_kept_under_all_of_the_code(tiny, monkeypatch):
    before = bench_main.kept_files(tiny.setting, tiny.folder)
    monkeypatch.setattr(bench_main, "everything_hash", lambda: "another page")
    after = bench_main.kept_files(tiny.setting, tiny.folder)
    assert {name for name in before if before[name] != after[name]} == {"whole_process", "empty_page", "grid", "book"}
    assert all(section.seconds > 0 for section in bench_main.SECTIONS.values())


def test_what_is_switched_off_changes_time_but_no_number(tiny):
    cell, arm = tiny.cell, tiny.in_context
    queries = cell.queries[:5]
    reference = measuring.score(cell.model, queries, arm)
    whole = [ablations.prompt_and_query(arm.prefix, query) for query in queries]
    bare = ablations.Arm(cell.layout.prefix())
    np.testing.assert_allclose(measuring.score(cell.model, whole, bare), reference, atol=1e-4)
    np.testing.assert_allclose(measuring.score(cell.model, queries, arm, 1), reference, atol=1e-4)
    with ablations.head_everywhere(cell.model):
        np.testing.assert_array_equal(measuring.score(cell.model, queries, arm), reference)
    with growth.truncated(cell.model, 1) as shorter:
        assert np.abs(measuring.score(shorter, queries, arm) - reference).max() > 1e-3, "control"
        assert shorter.n_layers == 1
    np.testing.assert_array_equal(measuring.score(cell.model, queries, arm), reference)
    assert not any(p.requires_grad for p in cell.model.model.parameters())
    ablations.gradient(cell.model, cell.layout.training_sequence(cell.training[0]), everything=True)
    assert not any(p.requires_grad for p in cell.model.model.parameters())


def test_useful_work_is_what_the_loop_multiplies(tiny):
    """Without attention, which runs in an operator that torch does not count."""
    cell, prefix = tiny.cell, tiny.in_context.prefix
    with FlopCounterMode(display=False) as counter:
        measuring.score(cell.model, cell.queries, tiny.in_context)
    operators = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    whole = cost.forward(tiny.shape, len(prefix))
    for query in cell.queries:
        tokens = len(query.tokens)
        whole += cost.forward(tiny.shape, tokens, len(prefix), 1)
        whole += cost.recording(tiny.shape, tokens, len(cell.layout.labels))
    assert operators["aten.mm"] == whole.linear + whole.head
    assert measuring.useful(tiny.shape, cell.queries, len(prefix)) == whole.total


def test_export_for_the_harness(tiny, tmp_path):
    peers.export(tiny.cell, 5, tmp_path)
    text = (tmp_path / "sst2_fixed.yaml").read_text()
    assert str(tmp_path) in text and '["negative", "positive"]' in text and "{folder}" not in text
    rows = peers.pd.read_parquet(tmp_path / "validation.parquet")
    assert rows["row"].tolist() == [query.row for query in tiny.cell.queries[:5]]
    demonstrations = peers.pd.read_parquet(tmp_path / "train.parquet")
    assert demonstrations["prompt"].tolist() == [e.prompt for e in tiny.cell.demonstrations]


def test_matrix_rate_and_differences():
    assert measuring.product_rate((32, 64), torch.float32) > 0
    same = np.log(np.array([[0.2, 0.8], [0.9, 0.1]]))
    assert measuring.differences(same, same[:, ::-1])["same_prediction"] == 0.0
    assert measuring.differences(same, same)["largest_log_probability_difference"] == 0.0


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
