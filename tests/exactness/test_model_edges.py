"""Models and texts at the edge of what the engine takes: families, windows, positions, odd texts, divergence."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from iclgd_helpers.data import sources, synthetic
from iclgd_helpers.data.tasks import Example
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import finetune, models
from iclgd_helpers.engine.finetune import Learner, Settings
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import experiment, learning_rates, parameters, runs, sweeps

TOKENIZER = synthetic.tiny_tokenizer()
IDS = {"vocab_size": len(TOKENIZER), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"num_hidden_layers": 3, "max_position_embeddings": 512}
WINDOW = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**IDS, **SHAPE),
    "qwen2 with a window": transformers.Qwen2Config(**IDS, **SHAPE, **WINDOW),
    "qwen3": transformers.Qwen3Config(**IDS, **SHAPE, head_dim=8),
    "mistral": transformers.MistralConfig(**IDS, **SHAPE, sliding_window=16),
    "olmo2": transformers.Olmo2Config(**IDS, **SHAPE),
    "smollm3": transformers.SmolLM3Config(**IDS, **SHAPE, no_rope_layers=[0, 1, 1]),
    "llama with yarn": transformers.LlamaConfig(**IDS, **SHAPE, rope_parameters=YARN),
    "llama, one head of keys, biases": transformers.LlamaConfig(
        **IDS, **SHAPE | {"num_key_value_heads": 1}, attention_bias=True, mlp_bias=True, hidden_act="gelu"
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **IDS, **SHAPE, head_dim=8, sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
}


def random_model(config: transformers.PretrainedConfig, seed: int = 0) -> models.LanguageModel:
    """Weights large enough that attention matters."""
    model = models._random_model(copy.deepcopy(config), seed, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else parameter.data.add_(0.05)
    return models.LanguageModel(model, TOKENIZER, config.model_type)


def stock_logits(config: transformers.PretrainedConfig, model: models.LanguageModel) -> torch.nn.Module:
    """transformers' own model, with its own attention."""
    own = models._random_model(copy.deepcopy(config), 0, torch.float32)
    own.load_state_dict(model.model.state_dict())
    return own.eval()


def material() -> tuple[Layout, list[Example], list[Example]]:
    data = sources.load_task("cb", "generated")
    return Layout.make(TOKENIZER, data.task, "eos"), data.train[:4], data.evaluation[:5]


# ------------------------------------------------------------------------------------------------ further families
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_transformers(name: str):
    model, (layout, shown, asked) = random_model(CONFIGS[name]), material()
    stock = stock_logits(CONFIGS[name], model)
    queries = [layout.query(example, "label") for example in asked]
    arms = {"zero_shot": Arm(layout.prefix()), "in_context": Arm(layout.prefix(shown))}
    for indices, seen in observe(model, queries, arms):
        for arm, observation in seen.items():
            for row, index in enumerate(indices):
                tokens = torch.tensor([[*arms[arm].prefix, *queries[index].tokens[:-1]]])
                with torch.no_grad():
                    expected = stock(tokens).logits[0, -1].log_softmax(-1)[[token for (token,) in layout.labels]]
                torch.testing.assert_close(observation.label_log_probabilities[row], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_standard_step_is_that_of_autograd(name: str):
    model, (layout, shown, _asked) = random_model(CONFIGS[name]), material()
    stock, sequence = stock_logits(CONFIGS[name], model), layout.training_sequence(shown[0])
    tuned = finetune.finetune(model, [sequence], "standard", Settings(0.1))
    tokens = torch.tensor(sequence.tokens)
    F.cross_entropy(stock(tokens[None]).logits[0, :-1], tokens[1:]).backward()
    wanted = ("k_proj", "v_proj")
    named = [p for n, p in stock.model.layers.named_parameters() if n.split(".")[-2] in wanted]
    for value, parameter in zip(tuned.update.values, named, strict=True):
        moved = parameter - 0.1 * parameter.grad
        torch.testing.assert_close(value, moved.detach(), rtol=0, atol=2e-5 * max(1.0, float(parameter.grad.norm())))


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "qwen2 with a window"])
def test_a_window_of_one_token(kind: str):
    """A token that sees itself alone: what stands before a question changes nothing in such layers."""
    config = CONFIGS[kind].__class__(**CONFIGS[kind].to_dict() | {"sliding_window": 1})
    model, (layout, shown, asked) = random_model(config), material()
    stock, query = stock_logits(config, model), layout.query(asked[0], "label")
    arms = {"in_context": Arm(layout.prefix(shown))}
    ((_indices, seen),) = observe(model, [query], arms)
    with torch.no_grad():
        logits = stock(torch.tensor([[*arms["in_context"].prefix, *query.tokens[:-1]]])).logits[0, -1]
    expected = logits.log_softmax(-1)[None, [token for (token,) in layout.labels]]
    torch.testing.assert_close(seen["in_context"].label_log_probabilities, expected, rtol=0, atol=2e-4)


# --------------------------------------------------------------------------------------------------- positions
SEES = {"tiny-gpt2": True, "tiny-opt": True, "tiny-xglm": True, "tiny-llama": False, "tiny-gpt_neox": False}
SEES |= {"tiny-gemma3": False} | dict.fromkeys(CONFIGS, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEES)
def test_whether_the_first_layer_sees_the_prompt_is_measured(name: str, dtype: torch.dtype):
    if name in CONFIGS:
        model = random_model(CONFIGS[name])
        model.model.to(dtype)
    else:
        model = models.tiny_model(name, dtype=dtype)
    assert model.first_layer_sees_the_prompt == SEES[name]


def test_models_without_positions_in_layer_0_have_no_delta_there():
    layout, shown, asked = material()
    for name, config in (("smollm3", CONFIGS["smollm3"]), ("qwen3", CONFIGS["qwen3"])):
        model = random_model(config)
        arms = {"zs": Arm(layout.prefix()), "icl": Arm(layout.prefix(shown))}
        ((_rows, seen),) = observe(model, [layout.query(asked[0], "label")], arms)
        change = (seen["icl"].attention_scores - seen["zs"].attention_scores)[0].abs().amax((1, 2))
        assert change[0] < 1e-4 * seen["zs"].attention_scores.abs().max() < change[1], name


def test_a_prompt_stays_below_the_length_at_which_rotary_factors_change():
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 96, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = transformers.LlamaConfig(**IDS, **SHAPE, rope_parameters=rope)
    assert models.context(config) == 96 and models.context(CONFIGS["qwen2"]) == 512
    layered = transformers.Gemma3TextConfig(**IDS, **SHAPE, head_dim=8)
    layered.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert models.context(layered) == 96


def test_nothing_is_computed_beyond_the_context():
    config = CONFIGS["qwen2"].__class__(**IDS, **SHAPE | {"max_position_embeddings": 16})
    model = random_model(config)
    model.hidden(torch.zeros(1, 16, dtype=torch.long))
    for tokens, start in ((17, 0), (10, 7)):
        with pytest.raises(InputError, match="17 tokens is longer than the model's context of 16"):
            model.hidden(torch.zeros(1, tokens, dtype=torch.long), start=start)


# -------------------------------------------------------------------------------------------------------- texts
@pytest.mark.parametrize("text", ["a </s> b", "<s>", "x<pad>y", "</s></s>"])
def test_the_spelling_of_a_special_token_is_text(text: str):
    layout, _shown, _asked = material()
    tokens = layout.query(Example(text, 0, 0), "label").tokens[:-1]
    assert not set(tokens) & {0, 1, 2} and TOKENIZER.decode(tokens) == text
    assert set(TOKENIZER(text, add_special_tokens=False)["input_ids"]) & {0, 1, 2}, "as it would be otherwise"


def test_a_prompt_without_tokens_is_refused():
    layout, _shown, _asked = material()
    with pytest.raises(InputError, match="the prompt of row 8 is empty"):
        layout.query(Example("", 0, 7), "label")


def test_a_newline_that_the_tokenizer_does_not_know_is_no_separator(monkeypatch: pytest.MonkeyPatch):
    data = sources.load_task("cb", "generated")
    assert Layout.make(TOKENIZER, data.task, "newline").separator
    other = synthetic.tiny_tokenizer.__wrapped__()
    from tokenizers import normalizers

    other.backend_tokenizer.normalizer = normalizers.Replace("\n", " ")
    with pytest.raises(InputError, match="has no newline: pass separator=eos"):
        Layout.make(other, data.task, "newline")


def test_a_demonstration_longer_than_the_context_is_one_line():
    given = {"preset": "smoke", "task": "cb", "n_demonstrations": 4, "max_examples": 2, "max_context": 70}
    planned = runs.plan(parameters.resolve(given))
    longest = max(len(planned.layout.training_sequence(example).tokens) for example in planned.training)
    sequence = Layout.training_sequence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Layout, "training_sequence", lambda self, e: sequence(self, e, before=sequence(self, e).tokens * 2)
        )
        with pytest.raises(InputError, match=r"the demonstration in row \d+ has \d+ tokens, the context holds 70"):
            runs.plan(parameters.resolve(given | {"equal_demonstrations": False}))
    assert longest <= 70


# --------------------------------------------------------------------------------------------------- divergence
def diverging() -> dict:
    given = {"preset": "smoke", "n_demonstrations": 4, "max_examples": 6, "learning_rate": 1e39}
    return experiment.compute(runs.prepare(parameters.resolve(given)), progress=False).json


def test_an_arm_that_diverges_is_marked_and_has_no_numbers():
    record = diverging()
    finetuned = {"standard", "joint", "sequential", "standard_shuffled", "untrained_standard"}
    arms = {name for name, arm in record["arms"].items() if arm["diverged"]}
    assert arms == finetuned | {"random_update", "norm_matched"}, "and those that are made from its size"
    assert all(record["finetuning"][name]["diverged"] for name in finetuned)
    for name in arms:
        arm, compared = record["arms"][name], record["comparisons"][name]
        assert arm["accuracy"] is None and arm["accuracy_interval"] == [None, None] and arm["predicted"] == []
        assert compared["diverged"] and set(compared["partition"].values()) == {None}
        for metric, found in compared.items():
            if isinstance(found, dict) and metric != "partition":
                assert found.get("mean", found.get("value")) is None and found["interval"] == [None, None], metric
    assert record["arms"]["zero_shot"]["accuracy"] is not None and not record["arms"]["in_context"]["diverged"]


def test_a_learner_that_diverges_leaves_those_beside_it_alone():
    model, (layout, shown, _asked) = models.tiny_model("tiny-llama"), material()
    sequences = [layout.training_sequence(example) for example in shown[:2]]
    for method in finetune.METHODS:
        learners = [Learner(sequences, Settings(rate)) for rate in (0.01, 1e39)]
        calm, wild = finetune.finetune_together(model, learners, method)
        (alone,) = finetune.finetune_together(model, learners[:1], method)
        assert wild.diverged and not calm.diverged
        for ours, theirs in zip(calm.update.values, alone.update.values, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_in_float16_a_diverged_learner_is_marked_too():
    model, (layout, shown, _asked) = models.tiny_model("tiny-llama", dtype=torch.float16), material()
    sequences = [layout.training_sequence(example) for example in shown[:2]]
    learners = [Learner(sequences, Settings(rate)) for rate in (0.001, 1e39)]
    calm, wild = finetune.finetune_together(model, learners, "standard")
    assert wild.diverged and not calm.diverged


def test_a_model_whose_own_numbers_are_not_finite_ends_the_run():
    model, (layout, _shown, asked) = models.tiny_model("tiny-llama"), material()
    model.head.weight.data[:] = math.inf
    queries = [layout.query(example, "label") for example in asked]
    with pytest.raises(InputError, match=r"no finite log-probabilities in torch.float32 \(zero_shot\): pass"):
        list(observe(model, queries, {"zero_shot": Arm(layout.prefix())}))


def test_rates_that_diverge_are_marked_and_never_chosen():
    model, (layout, shown, asked) = models.tiny_model("tiny-llama"), material()
    queries = [layout.query(example, "label") for example in asked]
    sequences = [layout.training_sequence(example) for example in shown]
    points = []
    for rate in (1e39, 0.01):
        tuned = finetune.finetune(model, sequences, "standard", Settings(rate))
        scores = sweeps.label_scores(model, queries, {"arm": Arm(layout.prefix(), tuned.update)})["arm"]
        labels = np.array([query.label for query in queries])
        points.append({"learning_rate": rate} | sweeps.score_summary(scores, labels))
    assert points[0]["diverged"] and points[0]["accuracy"]["value"] is None and not points[1]["diverged"]
    assert learning_rates.best(points) == 0.01
    with pytest.raises(InputError, match="smaller ones"):
        learning_rates.best(points[:1])


def test_sweeps_mark_what_diverges(monkeypatch: pytest.MonkeyPatch):
    given = {"preset": "smoke", "task": "subj", "n_demonstrations": 2, "max_examples": 4, "controls": False}
    cell = runs.prepare(parameters.resolve(given))
    sequences = [cell.layout.training_sequence(example) for example in cell.training]
    tuned = finetune.finetune(cell.model, sequences, "joint", Settings(1e39))
    found = sweeps.compare(cell, cell.queries, {"wild": tuned.update})["wild"]
    assert found["diverged"] and found["jaccard"]["value"] is None and found["sim_aou"]["value"] is None
