"""Labels of several tokens, in every family: scores, read positions and losses equal the naive implementation's."""

import itertools
from dataclasses import replace

import float64
import naive
import pytest
import torch
from conftest import Material

from iclgd_helpers.data import sources
from iclgd_helpers.data.demonstrations import shuffle_labels
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import finetune, models
from iclgd_helpers.engine.finetune import Learner, Settings
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.errors import InputError

SCORES = ("sum", "mean", "first")
LABELS = ("true", "neutral", "days")  # of 2, 1 and 3 tokens
TWINS = ("the song", "the door", "the song today")  # the first token is the same; the first begins the last
RATE = 0.02


def layout(model: models.LanguageModel, labels: tuple[str, ...], score: str) -> Layout:
    task = replace(sources.load_task("cb", "generated").task, verbalizers=labels)
    return Layout.make(model.tokenizer, task, "eos", score)


def in_words(given: Material, labels: tuple[str, ...], score: str) -> Material:
    return replace(given, layout=layout(given.model, labels, score))


def tokens_of(given: Material) -> list[list[int]]:
    """Of each label, as it stands behind a prompt."""
    return [naive.encode(given.model.tokenizer, " " + word) for word in given.layout.task.verbalizers]


def test_the_labels_are_of_one_two_and_three_tokens():
    tokenizer = models.tiny_model("tiny-llama").tokenizer
    assert sorted(len(naive.encode(tokenizer, " " + word)) for word in LABELS) == [1, 2, 3]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("token_read", ["label", "prompt"])
def test_observation_equals_naive(material: Material, score: str, token_read: str):
    given = in_words(material, LABELS, score)
    queries, labels = given.queries(token_read), tokens_of(given)
    assert all(query.tree.is_branched for query in queries) == (score != "first")
    prefix, model = given.layout.prefix(given.demonstrations), naive.stock(given.model)
    assert list(prefix) == naive.context(given.model.tokenizer, given.layout.task, given.demonstrations, "eos")
    for indices, seen in observe(given.model, queries, {"arm": Arm(prefix)}, batch_tokens=70):
        for place, i in enumerate(indices):
            prompt = naive.encode(given.model.tokenizer, given.examples[i].prompt)
            expected = naive.observe(model, prefix, prompt, labels, token_read, score)
            n_read = expected["attention_scores"].shape[-1]
            given.close(seen["arm"].label_log_probabilities[place], expected["label_log_probabilities"])
            given.close(seen["arm"].lens_log_odds[place], expected["lens"])
            given.close(seen["arm"].attention_output[place], expected["attention_output"])
            scores = seen["arm"].attention_scores[place]
            given.close(scores[..., :n_read], expected["attention_scores"])
            assert not scores[..., n_read:].any()


def test_the_three_scores_differ(double: Material):
    """The control: were they one, the tests above would show it of none."""
    found = {}
    for score in SCORES:
        given = in_words(double, LABELS, score)
        ((indices, seen),) = observe(given.model, given.queries(), {"arm": Arm(given.layout.prefix())})
        found[score] = seen["arm"].label_log_probabilities[torch.tensor(indices).argsort()]
    torch.testing.assert_close(found["sum"][:, 1], found["mean"][:, 1])  # of one token
    torch.testing.assert_close(found["sum"][:, 1], found["first"][:, 1])
    torch.testing.assert_close(found["sum"][:, 2], 3 * found["mean"][:, 2])
    assert (found["sum"] < found["first"])[:, [0, 2]].all()


def test_labels_that_saw_each_other_would_score_otherwise(double: Material, monkeypatch):
    """The control of the tree: in a plain sequence, a label reads the tokens of the one before it."""
    given = in_words(double, LABELS, "sum")
    arms = {"arm": Arm(given.layout.prefix(given.demonstrations))}
    ((_indices, right),) = observe(given.model, given.queries(), arms)
    monkeypatch.setattr("iclgd_helpers.data.token_layout.TokenTree.is_branched", False)
    ((_indices, wrong),) = observe(given.model, given.queries(), arms)
    difference = right["arm"].label_log_probabilities - wrong["arm"].label_log_probabilities
    assert not difference[:, :2].any() and (difference[:, 2].abs() > 1e-3).all()


@pytest.mark.parametrize("n_classes", [2, 3, 7, 20, 50])
def test_any_number_of_classes(n_classes: int):
    model = models.tiny_model("tiny-llama", dtype=torch.float64)
    pairs = itertools.product("door song lamp tea the".split(), "night days today n window s t w x y".split())
    words = [f"{one} {other}" for one, other in pairs]
    task = replace(sources.load_task("cb", "generated").task, verbalizers=tuple(words[:n_classes]))
    rows = sources.load_task("cb", "generated").evaluation[:2]
    with float64.uncast():
        ours = Layout.make(model.tokenizer, task, "eos")
        queries = [ours.query(row, "label") for row in rows]
        assert len({len(label) for label in ours.labels}) > 1 and len(queries[0].labels) == n_classes
        ((indices, seen),) = observe(model, queries, {"arm": Arm(ours.prefix())})
        labels = [naive.encode(model.tokenizer, " " + word) for word in task.verbalizers]
        stock = naive.stock(model)
        for place, i in enumerate(indices):
            prompt = naive.encode(model.tokenizer, rows[i].prompt)
            expected = naive.observe(stock, [ours.bos], prompt, labels)["label_log_probabilities"]
            torch.testing.assert_close(seen["arm"].label_log_probabilities[place], expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ finetuning
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("loss", ["all", "label", "label_space"])
@pytest.mark.parametrize("method", finetune.METHODS)
def test_finetuning_equals_naive(double: Material, method: str, loss: str, score: str):
    given = in_words(double, LABELS, score)
    sequences = given.sequences[:2]
    assert len({len(sequence.answer) for sequence in given.sequences}) > 1
    result = finetune.finetune(given.model, sequences, method, Settings(RATE, loss))
    stock = naive.stock(given.model)
    losses, norms = naive.finetune(stock, sequences, method, RATE, loss)
    given.close(result.losses, losses)
    given.close(result.gradient_norms, norms)
    expected = [
        parameter for layer in range(given.model.n_layers) for _name, parameter in naive.key_values(stock, layer)
    ]
    for ours, theirs in zip(result.update.values, expected, strict=True):
        given.close(ours, theirs.data)


def test_losses_of_several_tokens_differ_by_score(double: Material):
    """The control of the scores: each gives another loss where labels have several tokens."""
    found = {}
    for score in SCORES:
        given = in_words(double, LABELS, score)
        for loss in ("label", "label_space"):
            result = finetune.finetune(given.model, given.sequences[:3], "standard", Settings(0.0, loss))
            found[loss, score] = result.losses[:, 0]
    for loss in ("label", "label_space"):
        for one, other in (("sum", "mean"), ("sum", "first"), ("mean", "first")):
            assert (found[loss, one] - found[loss, other]).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["all", "label", "label_space"])
def test_learners_side_by_side_are_learners_alone(double: Material, loss: str):
    """With shuffled labels, whose tokens are of another number, too."""
    given = in_words(double, LABELS, "sum")
    shuffled = [given.layout.training_sequence(e) for e in shuffle_labels(given.demonstrations, seed=1)]
    assert [len(s.answer) for s in shuffled] != [len(s.answer) for s in given.sequences]
    learners = [Learner(s, Settings(rate, loss)) for s, rate in ((given.sequences, RATE), (shuffled, RATE / 2))]
    learners.append(Learner(given.sequences, Settings(RATE / 4, loss)))
    together = finetune.finetune_together(given.model, learners, "joint")
    for learner, one in zip(learners, together, strict=True):
        alone = finetune.finetune(given.model, learner.sequences, "joint", learner.settings)
        given.close(one.losses, alone.losses)
        for ours, theirs in zip(one.update.values, alone.update.values, strict=True):
            given.close(ours, theirs)


# ------------------------------------------------------------------------------------------------ the boundary
@pytest.mark.parametrize(
    ("labels", "score", "message"),
    [
        (TWINS, "first", "'the song' and 'the door' of task 'cb' begin with the same token: pass label_score=sum"),
        (TWINS, "sum", "'the song' and 'the song today' of task 'cb': the first begins the second"),
        (("true", "true ", "neutral"), "sum", None),
    ],
)
def test_labels_whose_scores_say_nothing(labels, score, message):
    model = models.tiny_model("tiny-llama")
    if message is None:
        layout(model, labels, "mean")
        return
    with pytest.raises(InputError) as raised:
        layout(model, labels, score)
    assert message in str(raised.value)
    assert layout(model, labels, "mean").labels
