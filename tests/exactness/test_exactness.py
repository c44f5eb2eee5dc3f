"""The engine is exact: it equals a naive implementation, and changes nothing that it should not change."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Material

from iclgd_helpers.data import sources
from iclgd_helpers.data.demonstrations import select_demonstrations, shuffle_labels
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import finetune, models, prefix_attention
from iclgd_helpers.engine.finetune import Settings
from iclgd_helpers.engine.models import KVUpdate
from iclgd_helpers.engine.observe import Arm, Observation, batches, observe
from iclgd_helpers.engine.prefix_attention import Call
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import experiment, parameters, runs, updates

METHODS = ("standard", "joint", "sequential")
OBSERVED = ("label_log_probabilities", "lens_log_odds", "attention_output", "attention_scores")
RATE = 0.02


def seen(material: Material, prefix, token_read="label", update=None, batch_tokens=1536, queries=None) -> dict:
    """Observations of all queries behind `prefix`, put back into their order; scores padded to one width."""
    queries = material.queries(token_read) if queries is None else queries
    width = max(len(query.tokens) for query in queries)
    rows: dict[int, tuple] = {}
    arms = {"arm": Arm(tuple(prefix), update)}
    for indices, observations in observe(material.model, queries, arms, batch_tokens):
        observation: Observation = observations["arm"]
        pad = width - observation.attention_scores.shape[-1]
        scores = torch.nn.functional.pad(observation.attention_scores, (0, pad))
        for place, index in enumerate(indices):
            values = [getattr(observation, name)[place] for name in OBSERVED[:-1]]
            rows[index] = (*values, scores[place])
    assert sorted(rows) == list(range(len(queries)))
    stacked = (torch.stack([rows[i][part] for i in range(len(queries))]) for part in range(len(OBSERVED)))
    return dict(zip(OBSERVED, stacked, strict=True))


def prompts(material: Material) -> list[list[int]]:
    return [naive.encode(material.model.tokenizer, example.prompt) for example in material.examples]


def close(material: Material, ours: dict, expected: dict) -> None:
    for name in OBSERVED:
        material.close(ours[name], expected[name])


def tuned(material: Material, method: str, rate: float = RATE, n: int | None = None, **options) -> finetune.Finetuned:
    """Finetuned on the first `n` demonstrations, or on all."""
    return finetune.finetune(material.model, material.sequences[:n], method, Settings(rate, **options))


def state_of(material: Material) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in material.model.model.state_dict().items()}


def same_bits(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in OBSERVED)


# ------------------------------------------------------------------------------------------------ observation
@pytest.mark.parametrize("token_read", ["label", "prompt"])
@pytest.mark.parametrize("n_demonstrations", [0, 1, 4])
def test_observation_equals_naive(material: Material, token_read: str, n_demonstrations: int):
    demonstrations = material.demonstrations[:n_demonstrations]
    task, tokenizer = material.layout.task, material.model.tokenizer
    before = naive.context(tokenizer, task, demonstrations, "eos")
    assert n_demonstrations < 4 or len(before) > 96  # four times Gemma's window
    ours = seen(material, material.layout.prefix(demonstrations), token_read)
    model = naive.stock(material.model)
    for i, prompt in enumerate(prompts(material)):
        expected = naive.observe(model, before, prompt, material.labels, token_read)
        n_read = expected["attention_scores"].shape[-1]
        assert n_read == len(prompt) + (token_read == "label")
        material.close(ours["label_log_probabilities"][i], expected["label_log_probabilities"])
        material.close(ours["lens_log_odds"][i], expected["lens"])
        material.close(ours["attention_output"][i], expected["attention_output"])
        material.close(ours["attention_scores"][i][..., :n_read], expected["attention_scores"])
        assert not ours["attention_scores"][i][..., n_read:].any()


def test_the_two_read_tokens_differ(double: Material):
    prefix = double.layout.prefix(double.demonstrations)
    at_label, at_prompt = seen(double, prefix, "label"), seen(double, prefix, "prompt")
    assert torch.equal(at_label["label_log_probabilities"], at_prompt["label_log_probabilities"])
    assert (at_label["attention_output"] - at_prompt["attention_output"]).abs().max() > 0.01


def test_scores_through_softmax_are_attention_weights(material: Material):
    """Over the query's own tokens the scores give the model's weights, up to what falls on the prefix."""
    before = material.layout.prefix(material.demonstrations)
    ours = seen(material, before)["attention_scores"]
    model = naive.stock(material.model)
    for i, prompt in enumerate(prompts(material)):
        weights = naive.observe(model, before, prompt, material.labels)["attention_weights"][..., len(before) :]
        for layer, own in enumerate(weights):
            visible = own[0] > 0  # not so beyond a sliding window
            scores = ours[i][layer][:, : len(visible)]
            material.close(torch.softmax(scores[:, visible], -1), own[:, visible] / own.sum(-1, keepdim=True))
            assert not scores[:, ~visible].any()


def test_whole_rows_of_attention_weights(material: Material):
    """With BOS as the first of the read tokens nothing is left out: the rows agree without renormalising."""
    model = naive.stock(material.model)
    for prompt in prompts(material)[:2]:
        tokens = [material.layout.bos, *prompt, *material.labels[0]]
        call = Call(read=torch.tensor([len(tokens) - 1]))
        with torch.no_grad():
            material.model.hidden(torch.tensor([tokens]), call=call)
        for layer, weights in enumerate(
            naive.observe(model, [tokens[0]], prompt, material.labels)["attention_weights"]
        ):
            visible = weights[0] > 0
            material.close(torch.softmax(call.scores[layer][0][:, visible], -1), weights[:, visible])


@pytest.mark.parametrize("length", [1, 2, 23, 24, 25, 60, 110])
def test_cached_equals_recomputed(material: Material, length: int):
    """Behind a prefix of any length, shorter and longer than Gemma's window of 24."""
    language_model = material.model
    prefix = material.layout.prefix(material.demonstrations)[:length]
    assert len(prefix) == length
    queries = [torch.tensor(query.tokens) for query in material.queries()]
    packing = prefix_attention.Packing.of([query.tree for query in material.queries()], torch.device("cpu"))
    call = Call(prefix=language_model.prefix(prefix), packing=packing)
    with torch.no_grad():
        cached = language_model.hidden(torch.cat(queries)[None], start=length, call=call)[0]
        for tokens, own in zip(queries, cached.split([len(q) for q in queries]), strict=True):
            recomputed = language_model.hidden(torch.cat([torch.tensor(prefix), tokens])[None])[0, length:]
            material.close(own, recomputed)


def test_batch_equals_single(material: Material):
    """Queries of very different lengths, so that there is much padding."""
    examples = [replace(e, prompt=e.prompt[: 8 + 25 * i]) for i, e in enumerate(material.examples)]
    queries = [material.layout.query(example, "label") for example in examples]
    assert len({len(query.tokens) for query in queries}) == len(queries)
    prefix = material.layout.prefix(material.demonstrations[:2])
    batch, single = (seen(material, prefix, batch_tokens=n, queries=queries) for n in (4000, 1))
    assert [len(b) for b in batches(queries, 4000)] == [len(queries)] and len(batches(queries, 1)) == len(queries)
    close(material, batch, single)


@pytest.mark.parametrize("family", ["llama", "gemma3", "xglm"])
@pytest.mark.parametrize("at_once", [1, 40_000])  # one token at a time, and so many that the last part is smaller
def test_attention_without_the_fused_kernel(double: Material, at_once: int, monkeypatch: pytest.MonkeyPatch):
    """What other devices run: the same numbers, whatever the size of the parts."""
    prefix = double.layout.prefix(double.demonstrations)
    fused = seen(double, prefix)
    in_parts, n_parts = prefix_attention._attend_in_parts, []
    with monkeypatch.context() as patch:
        patch.setattr(prefix_attention, "SCORES_AT_ONCE", at_once)
        patch.setattr(prefix_attention, "FUSED_ON", ())
        patch.setattr(prefix_attention, "_attend_in_parts", lambda *given: n_parts.append(given) or in_parts(*given))
        plain = seen(double, prefix)
    assert len(n_parts) >= 2 * double.model.n_layers
    close(double, plain, fused)


@pytest.mark.parametrize("separator", ["eos", "newline"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_separators(double: Material, separator: str):
    tokenizer, task = double.model.tokenizer, double.layout.task
    layout = double.layout.make(tokenizer, task, separator)
    expected = naive.context(tokenizer, task, double.demonstrations, separator)
    assert list(layout.prefix(double.demonstrations)) == expected
    text = tokenizer.decode(layout.prefix(double.demonstrations))
    between = {"eos": "</s>", "newline": "\n"}[separator]
    first = double.demonstrations[0]
    assert text.startswith(
        f"<s>{first.prompt} {task.verbalizers[first.label]}{between}{double.demonstrations[1].prompt}"
    )
    assert text.endswith(between) and text.count(between) == len(double.demonstrations)


# ---------------------------------------------------------------------------------------------------- updates
@pytest.mark.parametrize("method", METHODS)
def test_zero_rate_changes_nothing(double: Material, method: str):
    result = tuned(double, method, rate=0.0)
    assert result.gradient_norms.min() > 0
    for old, new in zip(double.model.original().values, result.update.values, strict=True):
        assert torch.equal(old, new)
    prefix = double.layout.prefix()
    assert same_bits(seen(double, prefix), seen(double, prefix, update=result.update))


def test_update_of_zero_changes_nothing(material: Material):
    prefix = material.layout.prefix(material.demonstrations[:2])
    original = material.model.original()
    copy = KVUpdate(tuple(value.clone() for value in original.values))
    assert same_bits(seen(material, prefix), seen(material, prefix, update=copy))
    other = KVUpdate(tuple(value * 1.01 for value in original.values))
    assert not same_bits(seen(material, prefix), seen(material, prefix, update=other))


def test_update_reaches_the_prefix(double: Material, stock):
    """Keys and values of the prefix are those of the updated weights, too."""
    update = tuned(double, "standard").update
    naive.finetune(stock, double.sequences, "standard", RATE)
    before = double.layout.prefix(double.demonstrations[:2])
    ours = seen(double, before, update=update)
    for i, prompt in enumerate(prompts(double)):
        expected = naive.observe(stock, before, prompt, double.labels)
        double.close(ours["label_log_probabilities"][i], expected["label_log_probabilities"])


def test_using_restores_after_an_exception(double: Material):
    state = state_of(double)
    update = KVUpdate(tuple(torch.randn_like(value) for value in double.model.original().values))
    with pytest.raises(KeyError):
        with double.model.using(update):
            with double.model.using(None):
                pass
            assert all(torch.equal(t.parameter, v) for t, v in zip(double.model.trainables, update.values, strict=True))
            raise KeyError
    assert all(torch.equal(value, state[name]) for name, value in state_of(double).items())


@pytest.mark.parametrize("method", METHODS)
def test_finetuning_restores_after_an_interrupt(double: Material, method: str):
    state = state_of(double)

    replaced = lambda: [m for m in double.model.model.modules() if "forward" in vars(m)]  # noqa: E731
    before = replaced()  # XGLM's attention modules

    def interrupt():
        assert len(replaced()) > len(before)  # the interrupt comes while projections use the learners' weights
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner = finetune.Learner(double.sequences, Settings(RATE))
        finetune.finetune_together(double.model, [learner], method, interrupt)
    assert all(torch.equal(value, state[name]) for name, value in state_of(double).items())
    assert not any(parameter.requires_grad for parameter in double.model.model.parameters())
    assert replaced() == before
    blocks = naive.blocks(double.model.model)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


# ------------------------------------------------------------------------------------------------- finetuning
def compare_finetuning(material: Material, method: str, **options) -> finetune.Finetuned:
    """Train both ways and assert that losses, gradient norms, weights and drift agree."""
    ours = tuned(material, method, n=2, **options)
    before, after = naive.stock(material.model), naive.stock(material.model)
    losses, norms = naive.finetune(after, material.sequences[:2], method, RATE, **options)
    material.close(ours.losses, losses)
    material.close(ours.gradient_norms, norms)
    expected = [p for layer in range(material.model.n_layers) for _name, p in naive.key_values(after, layer)]
    assert len(expected) == len(ours.update.values)
    for value, parameter in zip(ours.update.values, expected, strict=True):
        material.close(value, parameter)
    material.close(finetune.drift(material.model, ours.update), naive.drift(before, after))
    assert min(naive.drift(before, after)) > 0
    return ours


@pytest.mark.parametrize("loss", ["all", "label", "label_space"])
@pytest.mark.parametrize("method", METHODS)
def test_finetuning_equals_naive(material: Material, method: str, loss: str):
    result = compare_finetuning(material, method, loss=loss)
    assert result.losses.shape == (2, 1 if method == "standard" else material.model.n_layers)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", ["global", "per_layer", "elementwise"])
def test_clipping_equals_naive_and_bounds_the_step(double: Material, method: str, clip: str):
    if method == "sequential" and clip == "global":
        with pytest.raises(InputError, match="per_layer"):
            tuned(double, method, clip=clip, clip_value=1.0)
        return
    value = 0.002 if clip == "elementwise" else 0.3
    result = compare_finetuning(double, method, clip=clip, clip_value=value)
    assert (result.gradient_norms > value).all()  # the recorded norms are those before clipping
    one = tuned(double, method, n=1, clip=clip, clip_value=value).update
    steps = [(old - new) / RATE for old, new in zip(double.model.original().values, one.values, strict=True)]
    layers = [trainable.layer for trainable in double.model.trainables]
    squares = [
        sum(float(s.square().sum()) for s, at in zip(steps, layers, strict=True) if at == n) for n in set(layers)
    ]
    if clip == "global":
        assert sum(squares) ** 0.5 == pytest.approx(value, rel=1e-9)
    elif clip == "per_layer":
        assert [square**0.5 for square in squares] == pytest.approx([value] * len(squares), rel=1e-9)
    else:
        largest = max(float(step.abs().max()) for step in steps)
        assert largest == pytest.approx(value, rel=1e-9)
    untouched = tuned(double, method, n=1, clip=clip, clip_value=1e6).update
    free = tuned(double, method, n=1).update
    assert all(torch.equal(a, b) for a, b in zip(untouched.values, free.values, strict=True))


def learners(material: Material, method: str) -> list[finetune.Learner]:
    """Other rates, every kind of clipping, other labels, and other starting weights, on sequences of equal lengths."""
    kinds = ["none", "per_layer", "elementwise"] + ["global"] * (method != "sequential")
    settings = [Settings(RATE, clip=kind, clip_value=None if kind == "none" else 0.01) for kind in kinds]
    other = [replace(sequence, answer=sequence.trunk[-1:]) for sequence in material.sequences]
    moved = finetune.perturbed(material.model, 3, 0.1)
    return [
        *(finetune.Learner(material.sequences, s) for s in (*settings, Settings(3 * RATE), Settings(0.0))),
        finetune.Learner(other, Settings(RATE)),
        finetune.Learner(material.sequences, Settings(RATE), moved),
    ]


@pytest.mark.parametrize("limit", [2**30, 1, 40_000])
@pytest.mark.parametrize("method", METHODS)
def test_learners_together_equal_each_alone(double: Material, method: str, limit: int, monkeypatch):
    """Whatever the groups they are split into; and the two that differ in one thing differ in their weights."""
    monkeypatch.setattr(finetune, "LEARNER_BYTES", limit)
    several, steps = learners(double, method), []
    together = finetune.finetune_together(double.model, several, method, lambda: steps.append(1))
    assert len(steps) == len(several) * len(double.sequences)
    for learner, ours in zip(several, together, strict=True):
        with double.model.using(learner.start):
            alone = finetune.finetune(double.model, learner.sequences, method, learner.settings)
        double.close(ours.losses, alone.losses)
        double.close(ours.gradient_norms, alone.gradient_norms)
        for value, expected in zip(ours.update.values, alone.update.values, strict=True):
            double.close(value, expected)
    first = together[0].update.values
    assert all(not all(map(torch.equal, first, other.update.values)) for other in together[1:])  # negative control


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def capped_loss(states, weight, targets, bias, cap):
    """The naive one, through all logits at once."""
    logits = states @ weight.T + bias
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="none")


@pytest.mark.parametrize("cap", [None, 1000.0])
@pytest.mark.parametrize(("at_once", "threads", "products"), [
    (1, 1, [1] * 33), (10, 2, [2, 2, 2, 1]), (40, 1, [1]), (40, 3, [3]), (10_000, 2, [1]),
])  # fmt: skip
def test_the_vocabulary_loss_in_parts(
    at_once: int, threads: int, products: list[int], cap: float | None, set_threads, monkeypatch
):
    """
    Loss and gradient are those of a softmax over the whole vocabulary, however large a logit, whatever the parts:
    the words at once, and in how many products, where a block of words can be divided by the threads.
    """
    monkeypatch.setattr(finetune, "WORDS_AT_ONCE", at_once)
    set_threads(threads)
    multiply, seen = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda one, other: (seen.append(len(one)), multiply(one, other))[1])
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 7, generator=generator, dtype=torch.float64) * 20 for n in (5, 33))
    targets, bias = torch.randint(33, (5,), generator=generator), weight[:, 0] * 9
    losses, gradients = [], []
    for loss in (finetune._VocabularyLoss.apply, capped_loss):
        leaf = states.clone().requires_grad_()
        losses.append(loss(leaf, weight, targets, bias, cap))
        gradients.append(torch.autograd.grad((losses[-1] * torch.arange(1, 6)).sum(), leaf)[0])
    assert torch.allclose(*losses, rtol=1e-12) and torch.allclose(*gradients, rtol=1e-9, atol=1e-9)
    assert float(gradients[0].abs().max()) > 1
    assert seen[::2] == seen[1::2] == products


def gradients_by_layer(material: Material) -> list[list[list[torch.Tensor | None]]]:
    """For the loss of each layer, the gradient of every layer's K and V parameters (None: no path)."""
    language_model = material.model
    targets = finetune.Targets.of(material.sequences[:1], "all", language_model.device)
    found = []
    with finetune._training(language_model, [finetune.Learner([], Settings(RATE))]) as descent:

        def on_layer(_layer, output, _recompute):
            loss = finetune.sequence_loss(language_model, language_model.lens(output), targets)
            gradients = torch.autograd.grad(loss, descent.weights, retain_graph=True, allow_unused=True)
            by_layer = [[] for _ in range(language_model.n_layers)]
            for trainable, gradient in zip(language_model.trainables, gradients, strict=True):
                by_layer[trainable.layer].append(gradient)
            found.append(by_layer)

        finetune.layer_by_layer(language_model, targets, on_layer)
    return found


def test_a_layers_loss_has_no_gradient_in_other_layers(double: Material, monkeypatch: pytest.MonkeyPatch):
    layers = range(double.model.n_layers)
    for of, by_layer in enumerate(gradients_by_layer(double)):
        for at in layers:
            assert [g is None for g in by_layer[at]] == [at != of] * len(by_layer[at])
    monkeypatch.setattr(torch.Tensor, "detach", lambda tensor: tensor)  # negative control
    for of, by_layer in enumerate(gradients_by_layer(double)):
        for at in layers:
            reached = any(g is not None and g.abs().max() > 1e-6 for g in by_layer[at])
            assert reached == (at <= of)


def query_part(model, tensor: torch.Tensor) -> torch.Tensor:
    return tensor - naive.without_query(model, tensor)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_query_rows_of_fused_projections_stay(double: Material, method: str, monkeypatch: pytest.MonkeyPatch):
    def moved_and_norm() -> tuple[float, float]:
        model = models.tiny_model(double.model.name, dtype=torch.float64)
        result = finetune.finetune(model, double.sequences, method, Settings(RATE))
        changes = [new - old for old, new in zip(model.original().values, result.update.values, strict=True)]
        moved = max(float(query_part(model.model, change).abs().max()) for change in changes)
        kept = [float(naive.without_query(model.model, change).abs().max()) for change in changes]
        assert min(kept) > 0  # while every K and V part does move
        return moved, float(result.gradient_norms[0].square().sum())

    moved, norm = moved_and_norm()
    assert moved == 0.0
    monkeypatch.setattr(models, "_kv_mask", lambda *_given: None)
    moved_without, norm_without = moved_and_norm()  # negative control
    assert moved_without > 1e-6 and norm_without > norm * (1 + 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_controls_leave_query_rows_alone(double: Material):
    update = finetune.random_update(double.model, seed=3, norm=1.0)
    for old, new in zip(double.model.original().values, update.values, strict=True):
        assert not query_part(double.model.model, new - old).any()
        assert (naive.without_query(double.model.model, new - old) != 0).double().mean() > 0.6


def test_sequential_differs_from_joint(double: Material):
    """Not for the lowest layer at the first step; for every other, since it sees updated layers below."""
    joint, sequential = (tuned(double, method, n=1) for method in ("joint", "sequential"))
    for trainable, a, b in zip(double.model.trainables, joint.update.values, sequential.update.values, strict=True):
        if trainable.layer == 0:
            double.close(a, b)
        elif a.ndim > 1:  # a bias of the keys has no gradient without rotary positions: softmax cancels it
            assert (a - b).abs().max() > 1e-7
    assert (joint.losses[0, 1:] - sequential.losses[0, 1:]).abs().min() > 1e-6
    assert joint.losses[0, 0] == sequential.losses[0, 0]


def test_the_last_layer_of_joint_is_standard_without_depth(double: Material):
    """The top layer's own loss is the model's loss: so are its first-step value and its gradient norm."""
    joint, standard = (tuned(double, method, n=1) for method in ("joint", "standard"))
    double.close(joint.losses[0, -1], standard.losses[0, 0])
    double.close(joint.gradient_norms[0, -1], standard.gradient_norms[0, -1])
    assert (joint.gradient_norms[0, 0] - standard.gradient_norms[0, 0]).abs() > 1e-3


@pytest.mark.parametrize("method", ["standard", "joint"])
def test_gradient_norms_are_of_one_step_alone(double: Material, method: str):
    """The same demonstration six times at rate 0: flat norms. The original's would grow."""
    again = [double.sequences[0]] * 6
    passes = naive.loss_passes(again[0], "all")
    norms = finetune.finetune(double.model, again, method, Settings(0.0)).gradient_norms
    first = norms[0]
    assert torch.equal(norms, first.expand_as(norms))
    model, accumulated = naive.stock(double.model), []
    trained = [[p.requires_grad_() for _n, p in naive.key_values(model, i)] for i in range(double.model.n_layers)]
    for _ in range(2):  # negative control: no zeroing between the steps
        seen_once = naive.forward(model, again[0].tokens)
        if method == "standard":
            naive.loss_of([seen_once.logits], passes, again[0], "all").backward()
        else:
            for i, parameters in enumerate(trained):
                lens = naive.lens_logits(model, seen_once.block_outputs[i])
                value = naive.loss_of([lens], passes, again[0], "all")
                for p, g in zip(parameters, torch.autograd.grad(value, parameters, retain_graph=True), strict=True):
                    p.grad = g if p.grad is None else p.grad + g
        squares = [sum(naive.without_query(model, p.grad).square().sum() for p in ps) for ps in trained]
        accumulated.append(torch.stack(squares).sqrt())
    double.close(first, accumulated[0])
    double.close(2 * first, accumulated[1])


def test_unknown_method(double: Material):
    with pytest.raises(InputError, match="'sideways'.*standard, joint, sequential"):
        tuned(double, "sideways")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_keeps_a_master_copy(family: str, method: str, monkeypatch: pytest.MonkeyPatch):
    """Steps too small for bfloat16 add up in the float32 copy; without it they would all be lost."""
    single, half = (models.tiny_model(f"tiny-{family}", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    data = sources.load_task("snippets", "generated")
    layout = Layout.make(half.tokenizer, data.task, "eos")
    sequence = layout.training_sequence(data.train[0])

    def changes(language_model: models.LanguageModel, n_steps: int, rate: float) -> torch.Tensor:
        """As the model applies them, of the entries near which bfloat16 numbers are at least 2**-11 apart."""
        update = finetune.finetune(language_model, [sequence] * n_steps, method, Settings(rate)).update
        pairs = list(zip(language_model.original().values, update.values, strict=True))
        return torch.cat([(new.to(language_model.dtype) - old)[old.abs() >= 0.0625].float() for old, new in pairs])

    rate = 1e-4 / float(changes(single, 1, 1.0).abs().max())  # below half of that distance
    assert not changes(half, 1, rate).any()
    added_up = changes(half, 24, rate)
    assert added_up.abs().max() >= 2**-11
    exact = changes(single, 24, rate)
    monkeypatch.setattr(
        prefix_attention, "precise_dtype", lambda tensor: tensor.dtype
    )  # negative control: no float32 copy
    assert not changes(half, 24, rate).any()
    assert exact.abs().max() > 2**-11


# --------------------------------------------------------------------------------------------------- controls
def test_random_and_rescaled_updates_have_the_norm_asked_for(double: Material):
    language_model = double.model
    standard, joint = (tuned(double, method).update for method in ("standard", "joint"))
    original = language_model.original().values

    def flat(update: KVUpdate) -> torch.Tensor:
        return torch.cat([(new - old).flatten() for old, new in zip(original, update.values, strict=True)])

    norm = flat(standard).norm()
    assert norm > 1e-3 and abs(flat(joint).norm() / norm - 1) > 1e-3
    double.close(finetune.update_norm(language_model, standard), norm)
    random, other = (finetune.random_update(language_model, seed, float(norm)) for seed in (1, 2))
    matched = finetune.scaled_to(language_model, joint, float(norm))
    for update in (random, other, matched):
        double.close(flat(update).norm(), norm)
    assert naive.cosine(flat(matched), flat(joint)) == pytest.approx(1, abs=1e-9)
    assert abs(naive.cosine(flat(random), flat(other))) < 0.1  # no direction is preferred
    assert torch.equal(flat(random), flat(finetune.random_update(language_model, 1, float(norm))))
    entries = flat(random)[flat(random) != 0]
    assert abs(entries.mean() / entries.std()) < 0.1
    assert 2.5 < (entries / entries.std()).pow(4).mean() < 3.5  # Gaussian, as an isotropic direction is


def test_perturbation_is_of_the_size_asked_for(double: Material):
    moved = finetune.perturbed(double.model, 7, 1e-3)
    for old, new in zip(double.model.original().values, moved.values, strict=True):
        relative = naive.without_query(double.model.model, new / old - 1)
        chosen = relative[relative != 0]
        assert not query_part(double.model.model, new - old).any()
        assert 0.5e-3 < chosen.std() < 2e-3 and len(chosen) > 0.6 * old.numel()


@pytest.mark.parametrize("what", ["blocks", "everything"])
def test_untrained_weights(double: Material, what: str):
    language_model = double.model
    model = language_model.model
    before = {name: value.clone() for name, value in model.named_parameters()}
    in_blocks = {id(p) for p in naive.blocks(model).parameters()}
    norms = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            norms |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    std = model.config.init_std if hasattr(model.config, "init_std") else model.config.initializer_range
    with pytest.raises(ZeroDivisionError):
        with language_model.untrained(5, what):
            drawn = {name: value.detach().clone() for name, value in model.named_parameters()}
            for name, value in model.named_parameters():
                if what == "blocks" and (id(value) not in in_blocks or name in norms):
                    assert torch.equal(value, before[name]), name
                elif name in norms:
                    neutral = 0.0 if name.endswith("bias") or "gemma" in language_model.name else 1.0
                    assert (value == neutral).all(), name
                elif value.ndim == 1:
                    assert (value == 0).all(), name
                else:
                    assert float(value.std()) == pytest.approx(std, rel=0.15), name
                    assert not torch.equal(value, before[name])
            raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    with language_model.untrained(5, what):
        assert all(torch.equal(value, drawn[name]) for name, value in model.named_parameters())
    with language_model.untrained(6, what):
        assert not all(torch.equal(value, drawn[name]) for name, value in model.named_parameters())


# --------------------------------------------------------------------------------------- the whole experiment
def cell_of(family: str, **given) -> runs.Run:
    given = {
        "preset": "smoke", "task": "sst5", "model": f"tiny-{family}", "dtype": "float64", "seed": 4,
        "n_demonstrations": 4, "max_examples": 6,
        "learning_rate": 3.0 if family in ("gemma3", "xglm") else 0.3,
    } | given  # fmt: skip
    return runs.prepare(parameters.resolve(given))


def naive_experiment(cell: runs.Run) -> dict:
    """Everything that a record says of a cell, computed without the engine (random draws apart)."""
    given, language_model, task = cell.parameters, cell.model, cell.layout.task
    data = sources.load_task(given.task, given.data_source)
    demonstrations = select_demonstrations(data.train, given.n_demonstrations, given.seed, given.balanced)
    shuffled = shuffle_labels(demonstrations, given.seed + 1000)
    examples = data.evaluation[: given.max_examples]
    tokenizer = language_model.tokenizer
    labels = naive.label_tokens(tokenizer, task)
    bare = naive.context(tokenizer, task, [], given.separator)
    options = {"loss": given.loss, "clip": given.clip, "clip_value": given.clip_value}
    tuned, arms = {}, {}

    def train(name: str, method: str, chosen: list) -> torch.nn.Module:
        sequences = [naive.sequence(tokenizer, task, e, bare) for e in chosen]
        before, after = naive.stock(language_model), naive.stock(language_model)
        losses, norms = naive.finetune(after, sequences, method, given.learning_rate, **options)
        tuned[name] = {"losses": losses, "gradient_norms": norms, "drift": naive.drift(before, after)}
        tuned[name]["kept_by_rounding"] = 1.0
        return after

    def add(name: str, model: torch.nn.Module, before: list[int]) -> None:
        prompts = [naive.encode(tokenizer, example.prompt) for example in examples]
        arms[name] = [naive.observe(model, before, prompt, labels, given.token_read) for prompt in prompts]

    context, shuffled_context = (naive.context(tokenizer, task, d, given.separator) for d in (demonstrations, shuffled))
    plain = naive.stock(language_model)
    add("zero_shot", plain, bare)
    add("in_context", plain, context)
    add("in_context_shuffled", plain, shuffled_context)
    trained = {method: train(method, method, demonstrations) for method in METHODS}
    for method, model in trained.items():
        add(method, model, bare)
    add("standard_shuffled", train("standard_shuffled", "standard", shuffled), bare)
    moved = finetune.perturbed(language_model, given.seed + 1000, updates.PERTURBATION)
    with language_model.using(moved):  # the draw is the engine's, what it does is not
        again = {method: train(f"{method} again", method, demonstrations) for method in METHODS}
    for method, model in again.items():
        add(f"{method} again", model, bare)
        pairs = zip(arms[method], arms.pop(f"{method} again"), strict=True)
        differences = [(a["label_log_probabilities"] - b["label_log_probabilities"]).abs().max() for a, b in pairs]
        tuned[method]["conditioning"] = float(max(differences))
        del tuned[f"{method} again"]

    def change(model: torch.nn.Module) -> list[torch.Tensor]:
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        return [new.detach() - old for new, old in pairs]

    size = torch.stack([c.square().sum() for c in change(trained["standard"])]).sum().sqrt()
    joint = change(trained["joint"])
    matched = naive.stock(language_model)
    with torch.no_grad():
        for parameter, c in zip(matched.parameters(), joint, strict=True):
            parameter += c * size / torch.stack([c.square().sum() for c in joint]).sum().sqrt()
    add("norm_matched", matched, bare)
    random = finetune.random_update(language_model, given.seed + 1000, float(size))
    with language_model.using(random):  # the draw is the engine's: its size and direction are tested above
        add("random_update", naive.stock(language_model), bare)
    with language_model.untrained(given.seed + 1000, given.untrained):
        plain = naive.stock(language_model)
        add("untrained_zero_shot", plain, bare)
        add("untrained_in_context", plain, context)
        add("untrained_standard", train("untrained_standard", "standard", demonstrations), bare)
    return {"arms": arms, "finetuning": tuned, "labels": [e.label for e in examples], "examples": examples}


def layerwise(metric, *arms: list[dict], tensor: str) -> np.ndarray:
    """`metric` of each example and layer, `[example, layer]`."""
    return np.array([
        [metric(*(arm[tensor][layer] for arm in of_one)) for layer in range(len(of_one[0][tensor]))]
        for of_one in zip(*arms, strict=True)
    ])  # fmt: skip


def check_comparison(cell: runs.Run, close, got: dict, triple: list[list[dict]], truth: dict) -> None:
    zero_shot, in_context, finetuned = triple
    labels, rows, seed = truth["labels"], [e.row for e in truth["examples"]], cell.parameters.seed
    delta = layerwise(naive.sim_am_delta, *triple, tensor="attention_scores")
    if cell.model.name in ("tiny-llama", "tiny-gemma3", "tiny-gpt_neox"):  # rotary: layer 0 is noise
        delta[:, 0] = np.nan
    random = np.empty(delta.shape)
    for i, row in enumerate(rows):
        outputs = [arm[i]["attention_output"] for arm in (zero_shot, in_context)]
        draws = np.random.default_rng([seed, row]).random(tuple(outputs[0].shape))
        for layer, draw in enumerate(draws):
            z, c = (naive.unit(output[layer]) for output in outputs)
            random[i, layer] = naive.cosine(naive.minus(c, z), draw)
    expected = {
        "sim_aou": layerwise(naive.sim_aou, *triple, tensor="attention_output"),
        "sim_aou_raw": layerwise(naive.sim_aou_raw, *triple, tensor="attention_output"),
        "sim_aou_null": layerwise(naive.sim_aou_null, *triple, tensor="attention_output"),
        "sim_aou_random": random,
        "sim_am_zero_shot": layerwise(naive.sim_am, in_context, zero_shot, tensor="attention_scores"),
        "sim_am_direct": layerwise(naive.sim_am, in_context, finetuned, tensor="attention_scores"),
        "sim_am_delta": delta,
    }
    for metric, values in expected.items():
        per_layer = [naive.mean(column) for column in values.T]
        close(got[metric]["per_layer"], per_layer)
        close(got[metric]["mean"], naive.mean(per_layer))
        assert got[metric]["n"] == len(labels) and got[metric]["undefined"] == int(np.isnan(values).sum())
    predictions = [[int(e["label_log_probabilities"].argmax()) for e in arm] for arm in triple]
    assert got["partition"] == naive.partition(*predictions, labels)
    close(got["rec2ftp"]["value"], naive.rec2ftp(*predictions, labels))
    for which in ("all", "correct", "incorrect"):
        for rule in ("code", "set"):
            close(got[f"jaccard_{which}_{rule}"]["value"], naive.jaccard(*predictions, labels, which, rule))


COMPARED = {  # a comparison -> unchanged, in context, finetuned
    **{name: ("zero_shot", "in_context", name) for name in ("standard", "joint", "sequential", "standard_shuffled")},
    **{name: ("zero_shot", "in_context", name) for name in ("random_update", "norm_matched")},
    "untrained_standard": ("untrained_zero_shot", "untrained_in_context", "untrained_standard"),
}
OPTIONS = {
    "as the original": {},
    "as the papers' text": dict(token_read="prompt", separator="newline", balanced=True, untrained="everything"),
    "label loss, clipped": {"loss": "label", "clip": "per_layer", "clip_value": 0.5, "learning_rate": 4.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_record_equals_naive(double: Material, few_resamples, family: str, options: dict):
    cell = cell_of(family, **options)
    record = experiment.compute(cell, progress=False)
    truth, n = naive_experiment(cell), len(cell.queries)
    assert set(record.json["arms"]) == set(truth["arms"])
    labels = np.array(truth["labels"])
    for name, observed in truth["arms"].items():
        arm = record.json["arms"][name]
        log_probabilities = torch.stack([e["label_log_probabilities"] for e in observed])
        stored = np.stack(record.examples[f"log_probability/{name}"])
        np.testing.assert_allclose(stored, log_probabilities, rtol=1e-6)
        predictions = log_probabilities.argmax(-1).numpy()
        assert arm["accuracy"] == (predictions == labels).mean()
        assert arm["predicted"] == [int((predictions == c).sum()) for c in range(log_probabilities.shape[1])]
        double.close(arm["label_log_probability"], log_probabilities[range(n), labels].mean())
        lens = torch.stack([e["lens"].argmax(-1) for e in observed]).numpy()
        assert arm["lens_accuracy"] == (lens == labels[:, None]).mean(0).tolist()
    assert set(record.json["finetuning"]) == set(truth["finetuning"])
    for name, expected in truth["finetuning"].items():
        for key in ("losses", "gradient_norms", "drift"):
            double.close(record.json["finetuning"][name][key], expected[key])
        if name in METHODS:
            assert record.json["finetuning"][name]["conditioning"] == pytest.approx(expected["conditioning"], rel=1e-4)
            assert expected["conditioning"] > 1e-9
    assert set(record.json["comparisons"]) == set(COMPARED)
    for name, triple in COMPARED.items():
        check_comparison(
            cell, double.close, record.json["comparisons"][name], [truth["arms"][a] for a in triple], truth
        )
    unchanged = [comparison["partition"]["unchanged"] for comparison in record.json["comparisons"].values()]
    assert min(unchanged) < n  # or the prediction metrics would have compared nothing
    assert record.examples["row"].tolist() == [e.row for e in truth["examples"]]
    assert record.examples["label"].tolist() == labels.tolist()


def without_intervals(value: object) -> object:
    """A record without its intervals (whose resamples are drawn by position) and what timing put there."""
    if isinstance(value, dict):
        left_out = "interval accuracy_interval per_layer_low per_layer_high created timings environment".split()
        return {k: without_intervals(v) for k, v in value.items() if k not in left_out}
    return value


def flatten(value: object, path: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flatten(item, f"{path}/{i}").items()}
    return {path: value}


def test_order_of_queries_is_irrelevant(double: Material, few_resamples, family: str):
    cell = cell_of(family, max_examples=8)
    order = np.random.default_rng(0).permutation(len(cell.queries))
    one = experiment.compute(cell, progress=False)
    other = experiment.compute(replace(cell, queries=[cell.queries[i] for i in order]), progress=False)
    first, second = flatten(without_intervals(one.json)), flatten(without_intervals(other.json))
    assert first.keys() == second.keys() and len(first) > 200
    for key, value in first.items():
        assert second[key] == (
            pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True) if isinstance(value, float) else value
        )
    restored = other.examples.iloc[np.argsort(order)].reset_index(drop=True)
    for column in one.examples:
        a, b = (np.stack(frame[column]).astype(float) for frame in (one.examples, restored))
        np.testing.assert_allclose(a, b, rtol=2e-3 if "sim" in column else 1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama"])
def test_the_same_cell_twice_is_the_same_record(double: Material, few_resamples, family: str):
    one, other = (experiment.compute(cell_of(family), progress=False) for _ in range(2))
    for key, value in one.json.items():
        if key not in experiment.records.VOLATILE:
            assert repr(value) == repr(other.json[key]), key
    assert one.examples.equals(other.examples)
