"""Priors of a run, and what is made of them, equal a naive implementation's; their texts are the right ones."""

import float64
import naive
import numpy as np
import pytest

from iclgd_helpers.experiments import experiment, parameters, readings, records, runs
from iclgd_helpers.experiments.inputs import task_data
from iclgd_helpers.measures import metrics

GIVEN = {
    "preset": "smoke", "model": "tiny-llama", "task": "cb", "dtype": "float64", "n_demonstrations": 3,
    "max_examples": 9, "max_compared": 6, "n_calibration_rows": 5, "controls": False, "conditioning": False,
}  # fmt: skip
EMPTY = ("N/A", "[MASK]", "")


@pytest.fixture(scope="module")
def made() -> tuple[runs.Run, records.Record]:
    with float64.uncast():
        run = runs.prepare(parameters.resolve(GIVEN))
        return run, experiment.compute(run, progress=False)


def naive_scores(run: runs.Run, prompts: list[str], arm: str) -> np.ndarray:
    """Label log-probabilities `[text, class]` of whole sequences through the stock model."""
    model, tokenizer, task = naive.stock(run.model), run.model.tokenizer, run.layout.task
    if arm in ("standard", "joint"):
        bare = naive.context(tokenizer, task, [], "eos")
        sequences = [naive.sequence(tokenizer, task, example, bare) for example in run.training]
        naive.finetune(model, sequences, arm, run.parameters.learning_rate)
    shown = run.demonstrations if arm == "in_context" else []
    before, labels = naive.context(tokenizer, task, shown, "eos"), naive.label_tokens(tokenizer, task)
    tokens = [naive.encode(tokenizer, prompt) for prompt in prompts]
    found = [naive.observe(model, before, one, labels) for one in tokens]
    return np.stack([one["label_log_probabilities"].numpy() for one in found])


@pytest.mark.parametrize("arm", ["zero_shot", "in_context", "standard", "joint"])
def test_calibrated_predictions_equal_naive(made: tuple[runs.Run, records.Record], arm: str) -> None:
    run, record = made
    data = task_data(run.parameters)
    rows = record.calibration["row"].tolist()  # type: ignore[index]
    texts = {example.row: example.prompt for example in data.train}
    texts |= {-1 - place: run.layout.task.template.format(premise=t, hypothesis=t) for place, t in enumerate(EMPTY)}
    on_texts = naive_scores(run, [texts[row] for row in rows], arm)
    on_questions = naive_scores(run, [data.evaluation[i].prompt for i in range(6)], arm)
    np.testing.assert_allclose(readings.scores(record.calibration, arm), on_texts, atol=1e-5)  # type: ignore[arg-type]
    prior = []  # mean over the training texts of the distribution among the labels
    for label in range(3):
        shares = [np.exp(row[label]) / np.exp(row).sum() for row in on_texts[:5]]
        prior.append(sum(shares) / len(shares))
    found = record.json["calibrated"]["arms"][arm]
    np.testing.assert_allclose(np.exp(found["log_prior"]), prior, atol=1e-6)
    expected = (np.exp(on_questions) / np.array(prior)).argmax(-1)
    read = readings.read(record, readings.CALIBRATED)
    kept = np.stack(read.examples[f"log_probability/{arm}"][:6].tolist()).argmax(-1)
    assert kept.tolist() == expected.tolist()
    if arm not in ("zero_shot", "in_context"):  # which see more questions
        labels = np.array([query.label for query in run.queries[:6]])
        assert found["accuracy"] == pytest.approx((expected == labels).mean())


def test_texts_are_neither_demonstrations_nor_questions(made: tuple[runs.Run, records.Record]) -> None:
    run, record = made
    rows = record.calibration["row"].tolist()  # type: ignore[index]
    assert len(rows) == 5 + len(EMPTY) and rows[5:] == [-1, -2, -3] and len(set(rows)) == 8
    assert not {example.row for example in (*run.demonstrations, *run.training)} & set(rows)
    other = runs.plan(parameters.resolve(GIVEN | {"seed": 7, "n_demonstrations": 4}))
    shared = {query.row for query in other.calibration} & set(rows)
    assert len(shared) >= 7, "the same for every draw, but for its demonstrations"
    many = runs.plan(parameters.resolve(GIVEN | {"n_calibration_rows": 1000}))
    assert {query.row for query in many.calibration if query.row >= 0}.isdisjoint({e.row for e in many.demonstrations})


def test_without_texts_a_run_is_the_one_of_before(made: tuple[runs.Run, records.Record]) -> None:
    run, record = made
    with float64.uncast():
        plain = experiment.compute(runs.prepare(parameters.resolve(GIVEN | {"n_calibration_rows": 0})), progress=False)
    assert plain.calibration is None and "calibrated" not in plain.json and plain.json["id"] != record.json["id"]
    for name in ("zero_shot", "in_context", "sequential"):
        raw = [readings.scores(one.examples.iloc[:6], name) for one in (record, plain)]
        np.testing.assert_allclose(*raw, atol=1e-6)
    with pytest.raises(KeyError):
        readings.read(plain, readings.CALIBRATED)
    assert readings.of([plain, record], readings.RAW) == [plain, record]
    assert [one.json["id"] for one in readings.of([plain, record], readings.CALIBRATED)] == [record.json["id"]]


def test_a_reading_holds_what_its_predictions_say(made: tuple[runs.Run, records.Record]) -> None:
    _run, record = made
    read = readings.read(record, readings.CALIBRATED)
    labels = np.asarray(record.examples["label"])[:6]
    arms = ("zero_shot", "in_context", "standard")
    predictions = [readings.scores(read.examples.iloc[:6], arm).argmax(-1) for arm in arms]
    found = read.json["comparisons"]["standard"]
    assert found["partition"] == metrics.partition(*predictions, labels)
    value = metrics.jaccard(*predictions, labels)
    assert found["jaccard_all_code"]["value"] == pytest.approx(value, nan_ok=True) or np.isnan(value)
    assert found["sim_aou"] == record.json["comparisons"]["standard"]["sim_aou"], "attention has one reading"
    seen = readings.scores(read.examples, "in_context")
    assert read.json["arms"]["in_context"]["accuracy"] == (seen.argmax(-1) == record.examples["label"]).mean()
    np.testing.assert_allclose(np.exp(seen).sum(1), 1)


def test_rows_that_are_passed_over(made: tuple[runs.Run, records.Record]) -> None:
    run, _record = made
    later = runs.plan(parameters.resolve(GIVEN | {"first_row": 4}))
    assert [query.row for query in later.queries[:5]] == [query.row for query in run.queries[4:]]
    assert [query.row for query in later.calibration] == [query.row for query in run.calibration]


@pytest.mark.parametrize("source", ["training", "no content", "questions"])
def test_priors_of_other_sources(made: tuple[runs.Run, records.Record], source: str) -> None:
    _run, record = made
    found = readings.log_priors(record, source)
    read = readings.with_prior(record, source)
    raw = readings.scores(record.examples.iloc[:6], "standard")
    again = raw - found["standard"]
    kept = readings.scores(read.examples.iloc[:6], "standard")
    np.testing.assert_allclose(kept, again - np.log(np.exp(again).sum(1, keepdims=True)), atol=1e-9)
    if source == "training":
        np.testing.assert_allclose(found["standard"], record.json["calibrated"]["arms"]["standard"]["log_prior"])
