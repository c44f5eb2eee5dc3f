"""The cost model against torch's own counter, real parameters, and a run of a whole cell."""

from dataclasses import replace

import naive
import pytest
import torch
import transformers
from conftest import FAMILIES, in_one_line
from model_types import CASES
from torch.utils.flop_counter import FlopCounterMode

from iclgd_helpers.data import tasks
from iclgd_helpers.data.token_layout import TrainingSequence
from iclgd_helpers.engine import finetune, models
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import cost, experiment, parameters, runs

TOKENS = 17
OTHERS = {
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "olmo2": transformers.Olmo2Config,
    "smollm3": transformers.SmolLM3Config,
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"vocab_size": 64, "pad_token_id": 1, "num_hidden_layers": 3}


def configurations():
    tiny = models._tiny_configs(64)
    chosen = {family: tiny[f"tiny-{family}"] for family in FAMILIES}
    chosen |= {name: kind(**SIZES, **IDS) for name, kind in OTHERS.items()}
    chosen |= {f"{name}, of the tested types": case.config for name, case in CASES.items()}
    narrow = {"ffn_dim": 64, "num_attention_heads": 4, "hidden_size": 32, "word_embed_proj_dim": 16}
    return chosen | {"narrow-opt": transformers.OPTConfig(**IDS, **narrow)}


CONFIGURATIONS = configurations()
every_family = pytest.mark.parametrize("name", CONFIGURATIONS)


def stock(config):
    """The model as transformers makes it: its plain attention is made of matrix products that the counter sees."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False, **models.PLAIN_CODE).eval()


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def counted_in_matrices(run) -> int:
    """Products of linear layers only: they are not batched, those of attention are (or not counted at all)."""

    def one_by_one(weights, parts, linear, states):
        projected = []
        for learner, own in enumerate(states):
            weight = weights[parts["weight"]][learner]
            bias = weights[parts["bias"]][learner] if "bias" in parts else 0
            projected.append(own @ (weight.T if linear else weight) + bias)
        return torch.stack(projected)

    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        # Products with each learner's projections, and with each part of the head, are products of matrices, too.
        patch.setattr(finetune, "_project", one_by_one)
        patch.setattr(torch, "bmm", lambda one, other: torch.stack([x @ y for x, y in zip(one, other, strict=True)]))
        run()
    operators = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in operators.items() if str(operator) in ("aten.mm", "aten.addmm"))


def kv_parameters(model):
    return [p for layer in range(model.config.num_hidden_layers) for _name, p in naive.key_values(model, layer)]


@every_family
def test_parameters_are_counted_without_weights(name):
    config, model = CONFIGURATIONS[name], stock(CONFIGURATIONS[name])
    shape = cost.Shape.of(model.config)
    assert model.config._attn_implementation == "eager", "the caller's model is as before"
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    assert shape.n_stored == sum(p.numel() for p in kv_parameters(model))
    chosen = models.LanguageModel(stock(config), None, name).trainables
    masked = (t.masked(torch.ones_like(t.parameter)) for t in chosen)
    assert shape.n_kv == sum(int(ones.sum()) for ones in masked)


@every_family
def test_forward_pass(name):
    shape, model = cost.Shape.of(CONFIGURATIONS[name]), stock(CONFIGURATIONS[name]).requires_grad_(False)
    tokens = torch.arange(TOKENS)[None]
    measured = counted(lambda: model(tokens, use_cache=False))
    assert measured == cost.forward(shape, TOKENS, rows=TOKENS, full=True).total
    # control: forgetting one matrix, or counting an addition for free, is noticed
    fewer = replace(shape, feed_forward=shape.feed_forward[1:])
    assert measured != cost.forward(fewer, TOKENS, rows=TOKENS, full=True).total
    assert measured != cost.forward(shape, TOKENS, rows=TOKENS - 1, full=True).total


@every_family
def test_standard_step(name):
    shape, model = cost.Shape.of(CONFIGURATIONS[name]), stock(CONFIGURATIONS[name]).requires_grad_(False)
    chosen = [p.requires_grad_(True) for p in kv_parameters(model)]

    def step():
        logits = model(torch.arange(TOKENS)[None], use_cache=False).logits
        torch.autograd.grad(logits.square().sum(), chosen)

    measured = counted(step)
    assert measured == cost.standard_step(shape, TOKENS, TOKENS, full=True).total
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    chosen = list(model.parameters())
    assert counted(step) > measured, "control: gradients of all parameters cost more"


@pytest.mark.parametrize("method", finetune.METHODS)
@every_family
def test_steps_of_the_engine(name, method):
    """The engine's attention is one fused operator that torch does not count: everything else is the same."""
    config = CONFIGURATIONS[name]
    shape, model = cost.Shape.of(config), models.LanguageModel(stock(config), None, name)
    sequence = TrainingSequence(tuple(range(3, 2 + TOKENS)), (5,), ((5,), (6,)), "sum", 0)
    settings = finetune.Settings(0.01)
    measured = counted(lambda: finetune.finetune(model, [sequence], method, settings))
    expected = cost.STEPS[method](shape, TOKENS, TOKENS - 1, full=True)
    assert measured in (expected.linear + expected.head, expected.total)


def brute_pairs(tokens, prefix, window):
    return sum(
        1 for i in range(prefix, prefix + tokens) for j in range(prefix + tokens) if 0 <= i - j < (window or 10**9)
    )


@pytest.mark.parametrize("window", [None, 1, 5, 8, 50])
@pytest.mark.parametrize("prefix", [0, 1, 7, 20])
def test_pairs_left_by_the_mask(prefix, window):
    assert cost.pairs(9, prefix, window) == brute_pairs(9, prefix, window)
    assert cost.pairs(9, prefix, window, full=True) == 9 * (prefix + 9)


SEVERAL = ("true", "neutral", "days")  # tokens of a label: 2, 1, 3


@pytest.mark.parametrize(
    ("verbalizers", "options"),
    [
        (None, {"dtype": "float32"}),
        (None, {"dtype": "bfloat16"}),
        (SEVERAL, {"task": "cb", "loss": "label_space"}),
        (SEVERAL, {"task": "cb", "label_score": "first", "loss": "label"}),
    ],
)
def test_a_whole_cell(verbalizers, options, monkeypatch):
    dtype = options.get("dtype", "float32")
    if verbalizers:
        monkeypatch.setitem(tasks.TASKS, "cb", replace(tasks.TASKS["cb"], verbalizers=verbalizers))
    few = {"preset": "smoke", "max_examples": 12, "max_compared": 8, "n_demonstrations": 3}
    given = parameters.resolve(few | options)
    cell = runs.prepare(given)
    measured = counted_in_matrices(lambda: experiment.compute(cell, progress=False))
    expected = cost.of_run(cell)
    linear = sum(work.linear + work.head for work in expected.stages.values())
    assert measured == linear
    fewer = replace(cell, parameters=given.model_copy(update={"controls": False}))
    without = cost.of_run(fewer).flops
    assert without < 0.8 * expected.flops and without < measured, "control: arms that are forgotten"
    assert expected.table(1e9)[-1]["seconds"] == pytest.approx(expected.flops / 1e9)
    assert ("conditioning" in expected.stages) == (dtype == "float32")


def test_bytes_by_hand():
    shape = cost.Shape.of(CONFIGURATIONS["llama"])
    assert cost.weights_bytes(shape, "bfloat16") == 2 * shape.n_parameters
    assert shape.n_kv == 3 * 2 * 32 * 16 and cost.update_bytes(shape) == 4 * shape.n_kv
    assert cost.prefix_bytes(shape, 10, "float32") == 3 * 2 * 10 * 16 * 4
    tiny, large = ([length] for length in (4, 400))
    assert cost.batch_bytes(shape, tiny, 10, 1, "float32") < cost.batch_bytes(shape, large, 10, 1, "float32")


def matrices(model) -> int:
    """Entries of the matrices of a stock Llama's layers."""
    return sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear))


def test_moved_bytes_are_those_of_the_models_own_tensors():
    config = CONFIGURATIONS["llama"]
    shape, model = cost.Shape.of(config), stock(config)
    weights, head = matrices(model), model.lm_head.weight.numel()
    cache = model(torch.arange(TOKENS)[None], use_cache=True).past_key_values
    keys_values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cost.pass_bytes(shape, 5, TOKENS - 5, dtype="float32") == 4 * (weights + keys_values)
    assert cost.pass_bytes(shape, 5, TOKENS - 5, 2) == 2 * (weights + keys_values + head + 2 * config.vocab_size)
    per_token = cost.pass_bytes(shape, 2) - cost.pass_bytes(shape, 1)
    assert 0 < per_token < weights, "control: one more token reads no matrix again"


def test_moved_bytes_of_a_step():
    shape = cost.Shape.of(CONFIGURATIONS["llama"])
    layers, head = matrices(stock(CONFIGURATIONS["llama"])), shape.d_embedding * shape.vocabulary
    update = 4 * 4 * shape.n_kv
    assert cost.step_bytes(shape, "standard", 12) == 2 * (2 * layers + head) + update
    assert cost.step_bytes(shape, "sequential", 12) == 2 * (3 * layers + 3 * head) + update
    assert cost.step_bytes(shape, "joint", 12) == cost.step_bytes(shape, "standard", 12)
    many = finetune.STEP_TOKENS
    assert cost.step_bytes(shape, "joint", many) == 2 * (2 * layers + 3 * head) + update, "control: no longer at once"
    assert cost.step_bytes(shape, "standard", many) == cost.step_bytes(shape, "standard", 12)


def test_moved_bytes_of_a_run_have_its_stages():
    shape, sizes = cost.Shape.of(CONFIGURATIONS["llama"]), (50, [9, 12, 9, 7], [11, 13])
    for options in ({}, {"controls": False}, {"n_compared": 2}):
        planned = cost.run_cost(shape, *sizes, dtype="float16", **options)
        moved = cost.run_bytes(shape, *sizes, **options)
        assert list(moved) == list(planned.stages)
    together, alone = (cost.run_bytes(shape, *sizes, batch_tokens=n)["observe, all arms"] for n in (100, 1))
    passed = [cost.pass_bytes(shape, 50)] + [cost.pass_bytes(shape, n, 50, 1) for n in sizes[1]]
    assert cost._scoring_bytes(shape, 50, sizes[1], "float16", 1) == sum(passed)
    assert together < 0.5 * alone, "control: a batch of one question reads everything for each"


def test_the_papers_model_and_unknown_ones():
    sizes = {"num_layers": 24, "d_model": 2048, "attention_heads": 32, "ffn_dim": 8192, "vocab_size": 51200}
    shape = cost.Shape.of(transformers.XGLMConfig(**sizes))
    assert 1.30e9 < shape.n_parameters < 1.33e9 and shape.n_kv == 24 * 2 * (2048 * 2048 + 2048)
    with pytest.raises(InputError, match="bert"):
        cost.Shape.of(transformers.BertConfig())


def test_memory_is_near_that_of_the_rehearsals():
    from iclgd_helpers.experiments import records

    sizes = {"num_layers": 24, "d_model": 2048, "attention_heads": 32, "ffn_dim": 8192, "vocab_size": 51200}
    shape = cost.Shape.of(transformers.XGLMConfig(**sizes))
    rehearsals = records.load_all("results/rehearsal")
    assert {record.json["parameters"]["dtype"] for record in rehearsals} == {"float32", "bfloat16"}
    for record in rehearsals:
        queries, training = [60] * record.json["n_examples"], [60] * record.json["n_training_demonstrations"]
        dtype = record.json["parameters"]["dtype"]
        one = cost.run_cost(shape, record.json["prefix_tokens"], queries, training, dtype=dtype)
        measured = record.json["environment"]["peak_memory_mib"] * 2**20
        assert 0.75 < one.peak_memory_bytes / measured < 1.1, dtype
        weights = cost.weights_bytes(shape, dtype)
        assert weights / measured < 0.75, "control: the weights alone are not enough"


def test_a_configuration_of_which_no_model_can_be_made_is_refused_in_one_line():
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, hidden_act="unheard of"
    )
    assert "cannot load model 'llama'" in in_one_line(cost.Shape.of, config)
