"""Pages 74 and 76: the command behind the recorded runs, and what the pages' functions conclude from planted data."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import notebook_cells
import numpy as np
import pytest
import torch
from conftest import Material

from iclgd_helpers import cli, paths, storage
from iclgd_helpers.data import sources
from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import finetune, models
from iclgd_helpers.engine.prefix_attention import Call
from iclgd_helpers.experiments import cost, fixed_prompt, parameters, plans, protocol, provenance, runner
from iclgd_helpers.experiments.fixed_prompt import ARMS
from iclgd_helpers.experiments.protocol import PROMPT_SEEDS, PROMPT_STEPS
from iclgd_helpers.paths import repository_root


def run_cells(page: str, *names: str, **given: Any) -> dict[str, Any]:
    """Names after the page's cells were executed behind its parameters and imports; nothing is displayed."""
    return notebook_cells.run(page, "parameters", "imports", *names, display=lambda *_: None, **given)


# ------------------------------------------------------------------------------------------------------------ command
@pytest.fixture
def tiny() -> models.LanguageModel:
    return models.load_model("tiny-llama", "float32", "cpu")


PROMPTS = ["grid", "--plan", "prompts", "--on", "here"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Few steps and rows of generated text, recorded in an empty folder."""
    for name, value in {"PROMPT_STEPS": (0, 1, 3), "N_PROMPT_ROWS": 5, "N_CHOICE_STEPS": 2, "N_CHOICE_ROWS": 4}.items():
        monkeypatch.setattr(protocol, name, value)
    monkeypatch.setattr(protocol, "PROMPTS", str(tmp_path))
    monkeypatch.setattr(fixed_prompt, "_task", lambda task: sources.load_task(task, "generated"))
    monkeypatch.setattr(parameters, "_default_source", lambda *_arguments: "generated")
    return tmp_path


def test_material_keeps_apart_what_is_shown_trained_on_and_chosen_on(tiny: models.LanguageModel) -> None:
    data = sources.load_task("mr", "generated")
    layout = Layout.make(tiny.tokenizer, data.task, "eos")
    given = fixed_prompt.material(layout, data.train, seed=5)
    demonstrations = select_demonstrations(data.train, protocol.N_PROMPT_DEMONSTRATIONS, 5, balanced=True)
    rows = [{example.row for example in part} for part in (demonstrations, given.training, given.choice)]
    assert all(not a & b for a, b in itertools.combinations(rows, 2))
    assert [len(part) for part in rows] == [
        protocol.N_PROMPT_DEMONSTRATIONS,
        protocol.PROMPT_STEPS[-1],
        protocol.N_CHOICE_ROWS,
    ]
    shown, shuffled = given.prompts["demonstrations"], given.prompts["shuffled"]
    differ = [i for i, (a, b) in enumerate(zip(shown, shuffled, strict=True)) if a != b]
    assert differ and all({(shown[i],), (shuffled[i],)} <= set(layout.labels) for i in differ)
    assert sorted(shown) == sorted(shuffled)
    assert given.prompts["plain"] == (layout.bos,)
    assert not set(given.prompts["instruction"][1:-1]) & {layout.bos, *layout.separator}


def test_arms_side_by_side_are_what_each_is_alone_and_go_on_from_a_snapshot(tiny: models.LanguageModel) -> None:
    data = sources.load_task("sst2", "generated")
    layout = Layout.make(tiny.tokenizer, data.task, "eos")
    given = fixed_prompt.material(layout, data.train, seed=2)
    arms = {arm: (given.prompts[arm], 0.05, None) for arm in ARMS}
    together = fixed_prompt.train_on(tiny, layout, given.training[:4], arms)
    half = fixed_prompt.train_on(tiny, layout, given.training[:2], arms)
    resumed = {arm: (prompt, rate, half[arm]) for arm, (prompt, rate, _start) in arms.items()}
    resumed = fixed_prompt.train_on(tiny, layout, given.training[2:4], resumed)
    settings = finetune.Settings(0.05, loss="label")
    for arm in ARMS:
        sequences = fixed_prompt.sequences(layout, given.prompts[arm], given.training[:4])
        alone = finetune.finetune(tiny, sequences, "standard", settings).update
        for values in (together[arm].values, resumed[arm].values):
            for a, b in zip(values, alone.values, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_points_count_the_steps_so_far_and_agree_with_their_rows(tiny: models.LanguageModel) -> None:
    data = sources.load_task("sst2", "generated")
    layout = Layout.make(tiny.tokenizer, data.task, "eos")
    given = fixed_prompt.material(layout, data.train, seed=2)
    queries = [layout.query(example, "label") for example in data.evaluation[:6]]
    points = fixed_prompt.curves(
        tiny, layout, given.prompts, given.training, queries, dict.fromkeys(ARMS, 0.01), (0, 2)
    )
    assert [(point["arm"], point["step"]) for point in points] == [(arm, step) for step in (0, 2) for arm in ARMS]
    shape = cost.Shape.of(tiny.model.config)
    for point in points:
        assert point["accuracy"]["value"] == point["right"].count("1") / 6
        tokens = [
            len(given.prompts[point["arm"]]) + len(layout.demonstration(e)) for e in given.training[: point["step"]]
        ]
        assert np.isclose(point["tflop"] * 1e12, sum(cost.standard_step(shape, n, 1).total for n in tokens))
    spent = {point["arm"]: point["tflop"] for point in points if point["step"]}
    assert spent["plain"] < spent["instruction"] < spent["demonstrations"] == spent["shuffled"]


def seeds_of(folder: Path) -> set[str]:
    """Seeds that are stored there."""
    (record,) = fixed_prompt.load_all(folder)
    return set(record["seeds"])


def waiting(*seeds: int) -> list[runner.Job]:
    """What is not stored of a task: rates and seeds, or what the named seeds need."""
    found = [one for one in plans.prompts("tiny-llama", ["sst2"]) if not one.is_stored]
    return [one.job for one in found if not seeds or one.job.arguments.get("seed", seeds[0]) in seeds]


def compute(*seeds: int) -> None:
    assert runner.run(waiting(*seeds), None, lambda line: None) == []


def test_a_run_goes_on_where_it_stopped(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = fixed_prompt.curves, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(fixed_prompt, "curves", interrupted)
    assert len(waiting()) == 4 and waiting()[1].after == (waiting()[0].name,)
    with pytest.raises(KeyboardInterrupt):
        compute()
    (before,) = fixed_prompt.load_all(small)
    assert list(before["seeds"]) == ["2"] and len(waiting()) == 2 and not waiting()[0].after
    compute()
    (complete,) = fixed_prompt.load_all(small)
    assert list(complete["seeds"]) == ["2", "3", "4"] and complete["seeds"]["2"] == before["seeds"]["2"]
    assert complete["rates"] == before["rates"] and len(calls) == 4 and not waiting()


def test_two_processes_that_finish_two_seeds_at_once_store_both(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one seed is stored, another process stores another one."""
    write, inside = storage.write_json, []

    def meanwhile(path: Path, content: dict[str, Any]) -> None:
        if content.get("seed") == 2 and not inside:
            inside.append(True)
            compute(3)
        write(path, content)

    monkeypatch.setattr(storage, "write_json", meanwhile)
    compute(2)
    assert inside and seeds_of(small) == {"2", "3"}


def test_an_older_record_stays_until_a_new_seed_is_there(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute()
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    monkeypatch.setattr(provenance, "engine_hash", lambda: "another")

    def interrupted(*_arguments: Any, **_options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fixed_prompt, "curves", interrupted)
    runner.identities.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        compute()
    runner.identities.cache_clear()
    assert {name: (small / name).read_bytes() for name in before if "rates" not in name} == {
        name: content for name, content in before.items() if "rates" not in name
    }


@pytest.mark.parametrize("part", [2, "rates"])
def test_a_record_of_other_sizes_helpers_data_or_model_is_not_taken_for_this_one(
    small: Path, monkeypatch: pytest.MonkeyPatch, part: str | int
) -> None:
    compute()
    assert fixed_prompt.stored("tiny-llama", "sst2", part)
    others = [(protocol, "N_PROMPT_ROWS", 6), (provenance, "engine_hash", lambda: "another")]
    others += [(fixed_prompt, "_task", lambda task: sources.load_task("mr", "generated"))]
    for module, name, value in others:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert fixed_prompt.stored("tiny-llama", "sst2", part) is None
    path = fixed_prompt.record_file("tiny-llama", "sst2", part)
    storage.write_json(path, storage.read_json(path) | {"model_content": "another"})
    assert fixed_prompt.stored("tiny-llama", "sst2", part) is None


def test_the_command_says_its_cost_and_refuses_in_one_line(small: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--model", "tiny-llama", "--tflops", "0.1"]
    assert cli.main([*PROMPTS, *options, "--task", "sst2", "--cost-only"]) == 0
    assert "TFLOP" in capsys.readouterr().out and not list(small.iterdir())
    for wrong in (["--task", "cola"], ["--model", "no-such-model"]):
        assert cli.main([*PROMPTS, *options, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_nothing_is_computed_that_could_not_be_stored(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (small / "file").touch()
    monkeypatch.setattr(protocol, "PROMPTS", str(small / "file"))
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("computed what cannot be stored"))
    assert cli.main([*PROMPTS, "--model", "tiny-llama", "--tflops", "1", "--task", "sst2"]) == 2
    assert f"cannot write to {small / 'file'}" in capsys.readouterr().err


def test_committed_records_are_whole() -> None:
    found = fixed_prompt.load_all()
    assert len(found) == len(PROMPT_SEEDS)
    for record in found:
        assert set(record["rates"]["chosen"]) == set(ARMS) and record["task"] in PROMPT_SEEDS
        for seed in record["seeds"].values():
            assert {(p["arm"], p["step"]) for p in seed["points"]} == set(
                itertools.product(ARMS, record["parameters"]["steps"])
            )
            assert all(len(point["right"]) == len(record["rows"]) for point in seed["points"])


# ------------------------------------------------------------------------------------------------------------ page 74
PRICE = {"plain": 1, "instruction": 1.5, "demonstrations": 5, "shuffled": 5}
RISING, HIGH, LOW = (20, 30, 36, 40), (40, 42, 44, 44), (10, 10, 12, 12)


def planted(
    levels: dict[str, tuple[int, ...]], which: dict[str, tuple[int, ...]] = PROMPT_SEEDS
) -> list[dict[str, Any]]:
    """Records in which each arm has so many of 48 rows right after each number of steps."""

    def point(arm: str, step: int, correct: int) -> dict[str, Any]:
        accuracy = {"value": correct / 48, "interval": [correct / 48 - 0.1, correct / 48 + 0.1]}
        right = "1" * correct + "0" * (48 - correct)
        return {"arm": arm, "step": step, "tflop": step * PRICE[arm], "right": right, "accuracy": accuracy,
                "label_log_probability": -1.0, "class_log_probability": -1.0}  # fmt: skip

    def seed() -> dict[str, Any]:
        points = [point(arm, step, n) for arm in ARMS for step, n in zip(PROMPT_STEPS, levels[arm], strict=True)]
        return {"points": points, "prompt_tokens": PRICE, "seconds": 1.0}

    tried = [{"arm": arm, "learning_rate": 1e-3, "class_log_probability": -1.0, "n": 16} for arm in ARMS[:3]]
    rates = {"points": tried, "chosen": dict.fromkeys(ARMS, 1e-3)}
    return [
        {"kind": "prompts", "model": "planted", "task": task, "engine": "x", "parameters": fixed_prompt.sizes(),
         "data_checksum": "x" * 64, "rows": list(range(48)), "rates": rates, "seeds": {str(s): seed() for s in seeds}}
        for task, seeds in which.items()
    ]  # fmt: skip


def judged(found: list[dict[str, Any]]) -> dict[str, str]:
    """Statement -> verdict, by the page's own cells; every table and figure between them is made as well."""
    names = ["rates", "look", "curves", "draw-curves", "steps-figure", "operations-figure", "effect", "status"]
    names += ["effects-table", "effects-figure", "verdicts", "finding", "reach"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ICLGD_TABLES", raising=False)  # nothing is written
        patch.setattr("iclgd_helpers.pages.figures.show", plt.close)
        patch.setattr("iclgd_helpers.pages.tables.share", lambda name, content: None)
        patch.setattr("iclgd_helpers.measures.intervals.RESAMPLES", 200)
        space = run_cells("74_fixed_prompt_finetuning", *names, found=found)
    return {(row.id, row.model): row.verdict for row in space["verdicts"].itertuples()}


def of_one(found: list[dict[str, Any]]) -> dict[str, str]:
    """Statement -> verdict, for records of one model."""
    return {statement: verdict for (statement, _model), verdict in judged(found).items()}


def test_verdicts_turn_round_with_the_arms() -> None:
    better = {"plain": RISING, "instruction": HIGH, "demonstrations": HIGH, "shuffled": LOW}
    worse = {"plain": HIGH, "instruction": LOW, "demonstrations": LOW, "shuffled": HIGH}
    assert of_one(planted(better)) == dict.fromkeys(("F1", "F2", "F3", "F4"), "reproduced") | {"F5": "not reproduced"}
    assert of_one(planted(worse)) == dict.fromkeys(("F1", "F2", "F3", "F4"), "not reproduced") | {"F5": "inconclusive"}


def test_faster_in_steps_is_not_cheaper() -> None:
    quick = {"plain": RISING, "instruction": RISING, "demonstrations": (20, 44, 46, 48), "shuffled": (20, 44, 46, 48)}
    found = of_one(planted(quick))
    assert found["F1"] == found["F5"] == "reproduced" and found["F3"] == found["F4"] == "inconclusive"
    assert found["F2"] != "reproduced"


@pytest.mark.parametrize(
    "which", [{}, {"mr": ()}, {"mr": (5,)}, {"sst2": (2, 3, 4)}, {"sst2": (2,), "subj": (4,), "mr": (5,)}]
)
def test_few_records_decide_nothing(which: dict[str, tuple[int, ...]]) -> None:
    better = {"plain": RISING, "instruction": HIGH, "demonstrations": HIGH, "shuffled": LOW}
    assert set(judged(planted(better, which)).values()) <= {"inconclusive"}


def test_models_are_judged_apart() -> None:
    better = {"plain": RISING, "instruction": HIGH, "demonstrations": HIGH, "shuffled": LOW}
    worse = {"plain": HIGH, "instruction": LOW, "demonstrations": LOW, "shuffled": HIGH}
    found = judged(planted(better) + [record | {"model": "other"} for record in planted(worse)])
    assert found["F1", "planted"] == "reproduced" and found["F1", "other"] == "not reproduced"


def test_stored_tables_of_two_models_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (repository_root() / "results" / "demonstration_attention").glob("*sst2*.json"):
        content = storage.read_json(path)
        content["parameters"]["model"] = "other"
        storage.write_json(tmp_path / path.name, content)
        shutil.copy(path, tmp_path / f"first-{path.name}")
    monkeypatch.delenv("ICLGD_TABLES", raising=False)  # nothing is written
    monkeypatch.setattr(paths, "resolve_path", lambda _path: tmp_path)
    space = run_cells(PAGE_76, "stored", "stored-verdicts", store=False, columns=["vectors", "level", "statement",
                      "verdict", "n"])  # fmt: skip
    assert {"other"} < set(space["others"]["model"]) and len(space["kept_files"]) == 2


# ------------------------------------------------------------------------------------------------------------ page 76
PAGE_76 = "76_demonstration_attention"


def test_scores_are_the_layers_own_in_every_family(double: Material) -> None:
    space = run_cells(PAGE_76, "vectors", "inside-scores")
    model, prefix = double.model, double.layout.prefix(double.demonstrations)
    queries = double.queries()
    keys = space["context_keys"](model, prefix)
    ours = space["dots"](space["question_vectors"](model, queries, prefix), keys) * space["scales"](model)
    windows = cost.Shape.of(model.model.config).windows
    for number, query in enumerate(queries):
        call = Call(read=torch.tensor([len(prefix) + query.read]))
        model.hidden(torch.tensor([[*prefix, *query.tokens]]), call=call)
        for layer in range(model.n_layers):
            theirs = call.scores[layer][0].sum(0)[: len(prefix)]
            first = max(0, len(prefix) + query.read + 1 - (windows[layer] or 10**6))  # earlier ones are not seen
            if first < len(prefix):
                double.close(ours[layer, number, first:], theirs[first:])


def test_owners_name_the_demonstration_of_each_token(double: Material) -> None:
    owners = run_cells(PAGE_76, "inside-scores")["owners"](double.layout, double.demonstrations)
    prefix = double.layout.prefix(double.demonstrations)
    assert len(owners) == len(prefix)
    for number, demonstration in enumerate(double.demonstrations):
        of_it = [token for token, owner in zip(prefix, owners, strict=True) if owner == number]
        assert tuple(of_it) == double.layout.demonstration(demonstration)


def naive_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b, pair by pair."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = np.array([(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs])
    return (signs[:, 0] * signs[:, 1]).sum() / np.sqrt((signs[:, 0] ** 2).sum() * (signs[:, 1] ** 2).sum())


def test_tau_is_that_of_all_pairs() -> None:
    space = run_cells(PAGE_76, "tau-functions")
    first, second = torch.randn(2, 3, 9, dtype=torch.float64), torch.randint(0, 4, (2, 3, 9)).double()
    found = space["taus"](first, second)
    assert found.shape == (3, 2)
    for layer, question in itertools.product(range(2), range(3)):
        expected = naive_tau(first[layer, question].numpy(), second[layer, question].numpy())
        assert np.isclose(found[question, layer], expected)


def arms(finetuned: float, unfinetuned: float, spread: float = 0.01) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    levels = {"finetuned": finetuned, "no finetuning": unfinetuned, "random ordering": 0.0}
    return {name: level + spread * rng.standard_normal((30, 4)) for name, level in levels.items()}


@pytest.mark.parametrize(
    ("levels", "expected"),
    [((0.4, 0.0), ("holds", "holds")), ((0.4, 0.4), ("holds", "fails")), ((0.4, 0.25), ("holds", "fails")),
     ((0.4, 0.15), ("holds", "holds")), ((-0.2, 0.1), ("fails", "nothing to explain"))],
)  # fmt: skip
def test_the_control_decides_whether_similarity_needs_finetuning(
    levels: tuple[float, float], expected: tuple[str, str]
) -> None:
    judge = run_cells(PAGE_76, "verdict")["judge"]
    assert tuple(state for _effect, state in judge(arms(*levels))) == expected
    assert tuple(state for _effect, state in judge(arms(0.0, 0.0, spread=0.3)))[0] == "inconclusive"
