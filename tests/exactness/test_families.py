"""Families: every tested type equals transformers, what makes a type special matters, and the others are refused."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import float64
import model_types
import naive
import pytest
import torch
import transformers
from conftest import in_one_line
from model_types import CASES, CLOSE, IDS, SHAPE, TOKENIZER, compare, random_model
from transformers.models.bloom import modeling_bloom

from iclgd_helpers import storage
from iclgd_helpers.data.token_layout import TokenTree
from iclgd_helpers.engine import families, finetune, models, own_attention, parts, prefix_attention
from iclgd_helpers.engine.finetune import Settings
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.engine.prefix_attention import Scoring
from iclgd_helpers.errors import InputError

ROOT = Path(model_types.ROOT)
HEADS = ("gemma2", "gemma3_text", "granite", "cohere", "phi", "gptj", "gpt_oss", "bloom")  # more than a product behind
SEES_LESS = 1e-6  # what a fault must change at least


def test_the_27_types_are_tried():
    assert {case.kind for case in CASES.values()} == set(families.TESTED) and len(families.TESTED) == 27


@pytest.mark.parametrize("name", CASES)
def test_a_tested_type_is_exact(name: str):
    found = compare(name)
    assert set(found) == {
        "log_probabilities", "lens", "attention_outputs", "scores_through_softmax", "attention_scores", "losses",
        "gradient_norms", "kv_gradients",
    }  # fmt: skip
    assert max(found.values()) < CLOSE, found


@pytest.mark.parametrize("loss", ["label", "label_space"])
@pytest.mark.parametrize("name", HEADS)
def test_losses_over_labels_are_exact_whatever_is_behind_the_head(name: str, loss: str):
    with float64.uncast():
        for labels in (model_types.LABELS, ("neutral", "the", "song")):  # of several tokens, and of one each
            given = model_types.material(name, labels)
            for method in finetune.METHODS:
                found = model_types.finetuned(given, method, loss)
                assert max(found.values()) < CLOSE, (labels, method, found)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma2", "bloom", "falcon, groups", "phi3", "gptj"])
def test_families_in_single_precision(name: str):
    config = CASES[name].config
    model = LanguageModel(random_model(config, torch.float32), TOKENIZER, name)
    stock, tokens = naive.stock(model), torch.arange(90)[None] % 60 + 3
    packing = prefix_attention.Packing.of([TokenTree.of(tokens[0, 50:].tolist(), ())], torch.device("cpu"))
    call = prefix_attention.Call(prefix=model.prefix(tokens[0, :50].tolist()), packing=packing)
    with torch.no_grad():
        ours = model.logits(model.hidden(tokens[:, 50:], start=50, call=call)).log_softmax(-1)
        theirs = stock(tokens, use_cache=False).logits[:, 50:].log_softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", CASES)
def test_families_in_half_precision_stay_near(name: str):
    """Scores of labels, losses and steps; finetuning computes in half precision and keeps float32 weights."""
    shown = None
    for dtype in (torch.float32, torch.bfloat16):
        model = LanguageModel(random_model(CASES[name].config, torch.float32, scale=0.1).to(dtype), TOKENIZER, name)
        given = replace(model_types.material(name), model=model)
        ((_indices, seen),) = observe(model, given.queries(), {"arm": Arm(given.prefix)})
        sequences = [given.layout.training_sequence(example) for example in given.demonstrations]
        tuned = finetune.finetune(model, sequences, "joint", Settings(0.1, "label_space"))
        pairs = zip(tuned.update.values, model.original().values, strict=True)
        step = torch.cat([(new - old).flatten() for new, old in pairs])
        found = (seen["arm"].label_log_probabilities, tuned.losses, step)
        if shown is not None:
            sizes = [float((one - other).norm() / other.norm()) for one, other in zip(found, shown, strict=True)]
            assert sizes[0] < 0.01 and sizes[1] < 0.02 and 0 < sizes[2] < 0.2, sizes
        shown = found


@pytest.mark.parametrize("name", ["llama", "falcon, groups", "bloom", "gemma2", "gpt_oss", "gpt_neo"])
def test_families_without_the_fused_kernel(name: str, monkeypatch: pytest.MonkeyPatch):
    """What other devices run; some rows at a time."""
    monkeypatch.setattr(prefix_attention, "FUSED_ON", ())
    monkeypatch.setattr(prefix_attention, "SCORES_AT_ONCE", 4000)
    assert max(compare(name, methods=("standard",)).values()) < CLOSE


# --------------------------------------------------------------------------------------------- negative controls
def without(**changed: object) -> Callable[..., Scoring]:
    """A way to make scores in which something is left out."""
    return lambda *given: replace(Scoring(*given), **changed)


def wider(*given: object) -> Scoring:
    scoring = Scoring(*given)  # type: ignore[arg-type]
    return scoring if scoring.window is None else replace(scoring, window=scoring.window + 1)


def of_the_head(scale: float, cap: float | None) -> Callable[..., tuple[float, float | None]]:
    return lambda _config: (scale, cap)


def slopes_that_are_not_rounded(module: object, states: torch.Tensor) -> torch.Tensor:
    every = torch.ones(1, prefix_attention.n_positions(states), dtype=torch.long)
    return modeling_bloom.build_alibi_tensor(every, 12, states.dtype)[:, 0]


SCORING, AFTER = (prefix_attention, "Scoring"), (models, "_after_the_head")
FAULTS = {
    "sinks": ("gpt_oss", *SCORING, without(sink=None)),
    "ALiBi": ("bloom", *SCORING, without(alibi=None)),
    "ALiBi of Falcon": ("falcon, ALiBi", *SCORING, without(alibi=None)),
    "rounding of Falcon's ALiBi": ("falcon, ALiBi", own_attention, "_alibi", slopes_that_are_not_rounded),
    "cap of attention": ("gemma2", *SCORING, without(softcap=None)),
    **{
        f"window of {name}": (name, *SCORING, wider)
        for name in ("mistral", "mixtral", "qwen2", "phi3", "gemma2", "gemma3_text", "starcoder2", "gpt_neo", "gpt_oss")
    },
    "cap of logits": ("gemma2", *AFTER, of_the_head(1.0, None)),
    "multiplier of Cohere": ("cohere", *AFTER, of_the_head(1.0, None)),
    "multiplier of Granite": ("granite", *AFTER, of_the_head(1.0, None)),
    **{
        f"mask of {name}": (name, models, "_kv_mask", lambda *_given: None)
        for name in ("gpt2", "gpt_neox", "phi3", "falcon", "falcon, groups", "falcon, ALiBi", "bloom")
    },
}


@pytest.mark.parametrize(("name", "where", "what", "fault"), FAULTS.values(), ids=FAULTS)
def test_families_differ_without(name: str, where: object, what: str, fault: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(where, what, fault)
    monkeypatch.setattr(model_types, "_model", model_types._model.__wrapped__)
    found = compare(name, methods=("standard",))
    changed = {kind for kind, size in found.items() if size > SEES_LESS}
    least = {"kv_gradients"} if what == "_kv_mask" else {"log_probabilities", "losses", "kv_gradients"}
    assert changed >= least, found


@pytest.mark.parametrize("name", ["phi", "gptj"])
def test_families_differ_without_the_bias_of_the_head(name: str, monkeypatch: pytest.MonkeyPatch):
    stock = naive.stock
    monkeypatch.setattr(naive, "stock", lambda model: without_bias(stock(model)))

    def without_bias(model: torch.nn.Module) -> torch.nn.Module:
        model.lm_head.bias.data.zero_()
        return model

    found = compare(name, methods=("joint",))
    assert min(found["log_probabilities"], found["lens"], found["losses"], found["kv_gradients"]) > SEES_LESS


# ------------------------------------------------------------------------------------------------------- found parts
def test_masks_of_fused_families_are_those_once_written_by_hand():
    for name in ("gpt2", "gpt_neox"):
        model = models.tiny_model(f"tiny-{name}")
        for trainable in model.trainables:
            size = trainable.parameter.shape[-1 if name == "gpt2" else 0]
            by_hand = torch.arange(size) >= size // 3 if name == "gpt2" else torch.arange(size) % 24 >= 8
            mask = by_hand[:, None] if name == "gpt_neox" and trainable.parameter.ndim > 1 else by_hand
            assert trainable.mask is not None and torch.equal(trainable.mask, mask)


@pytest.mark.parametrize("name", CASES)
def test_families_train_every_projection_to_keys_and_values_and_no_other(name: str):
    with float64.uncast():
        model = model_types._model(name)
        stock = naive.stock(model)
    for layer in range(model.n_layers):
        ours = [t for t in model.trainables if t.layer == layer]
        for trainable, (_name, parameter) in zip(ours, naive.key_values(stock, layer), strict=True):
            ones = torch.ones_like(parameter)
            assert torch.equal(trainable.masked(ones), naive.without_query(stock, ones))


def test_falcons_default_code_adds_alibi_once():
    """What its eager code adds twice; the naive implementation takes the second one off."""
    with float64.uncast():
        given = model_types.material("falcon, ALiBi")
        once, tokens = naive.stock(given.model), torch.tensor([[*given.prefix]])
        config = once.config.__class__(**once.config.to_dict())
        default = type(once)._from_config(config, attn_implementation="sdpa", dtype=torch.float64).eval()
        default.load_state_dict(once.state_dict())
        with torch.no_grad():
            expected = default(tokens, use_cache=False).logits[0]
            torch.testing.assert_close(naive.forward(once, given.prefix).logits, expected, rtol=0, atol=1e-9)
            assert float((once(tokens, use_cache=False).logits[0] - expected).abs().max()) > SEES_LESS


@pytest.mark.parametrize("name", ["bloom", "gpt_oss", "gemma2", "gptj"])
def test_families_with_relative_positions_score_alike_behind_a_prompt(name: str):
    with float64.uncast():
        assert not model_types._model(name).first_layer_sees_the_prompt
        assert model_types._model("gpt_neo").first_layer_sees_the_prompt


@pytest.mark.parametrize(("name", "longest"), [("phi3", 256), ("llama, dynamic", 512)])
def test_families_whose_positions_depend_on_the_length_stay_below_it(name: str, longest: int):
    with float64.uncast():
        model = model_types._model(name)
        stock, tokens = naive.stock(model), torch.arange(longest + 1)[None] % 60 + 3
        with torch.no_grad():
            ours, theirs = model.logits(model.hidden(tokens[:, :-1])), stock(tokens[:, :-1], use_cache=False).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))
        with pytest.raises(InputError, match=f"longer than the model's context of {longest}"):
            model.hidden(tokens)


@pytest.mark.parametrize("name", CASES)
def test_families_without_training_have_neutral_norms_and_no_biases(name: str):
    model = model_types._model(name)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    with model.untrained(3, "everything"):
        for key, parameter in model.model.named_parameters():
            if key.endswith("bias") or "sinks" in key:
                assert not parameter.any(), key
            elif "norm" in key or ".ln_" in key:
                assert torch.equal(parameter, torch.full_like(parameter, 0.0 if "gemma" in name else 1.0)), key
            else:
                assert 0.005 < float(parameter.std()) < 0.05, key
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


# ----------------------------------------------------------------------------------------------------- other families
MORE = IDS | {"hidden_size": 32, "num_hidden_layers": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
MPT = transformers.MptConfig(vocab_size=len(TOKENIZER), d_model=32, n_heads=4, n_layers=2, max_seq_len=256)
MISSING = {
    "mamba": (transformers.MambaConfig(**MORE), "attention with K and V projections, or a fused one"),
    "rwkv": (transformers.RwkvConfig(**MORE), "attention with K and V projections"),
    "bert": (transformers.BertConfig(**SHAPE, is_decoder=True), "attention with K and V projections"),
    "deepseek_v3": (
        transformers.DeepseekV3Config(**SHAPE | {"num_key_value_heads": 4}, **LATENT),
        "attention with K and V projections",
    ),
    "mpt": (MPT, "attention function (MptAttention asks no interface for one)"),
}
OTHERS = {
    "cohere2": transformers.Cohere2Config(**SHAPE, head_dim=8, sliding_window=16, logit_scale=0.5),
    "granitemoe": transformers.GraniteMoeConfig(**SHAPE, num_local_experts=4, logits_scaling=3.0),
    "glm4": transformers.Glm4Config(**SHAPE, head_dim=8),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**model_types.GPT),
}


def loaded(config: transformers.PretrainedConfig) -> LanguageModel:
    return LanguageModel(random_model(config), TOKENIZER, "other")


@pytest.mark.parametrize(("config", "part"), MISSING.values(), ids=MISSING)
def test_families_whose_parts_are_not_found_are_refused_by_name(config: transformers.PretrainedConfig, part: str):
    said = in_one_line(loaded, config)
    assert f"is a {config.model_type!r}" in said and part in said and families.HELP in said


@pytest.mark.parametrize("kind", OTHERS)
def test_families_without_a_test_show_at_loading_that_they_are_exact(kind: str):
    assert kind not in families.TESTED
    model = loaded(OTHERS[kind])
    assert model.n_layers == 2 and model.trainables


def test_families_without_a_test_are_refused_where_they_differ(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(models, "_after_the_head", lambda _config: (1.0, None))
        said = in_one_line(loaded, OTHERS["granitemoe"])
        assert "is a 'granitemoe'" in said and "log-probabilities differ from transformers' by" in said
    with monkeypatch.context() as patch:
        patch.setattr(prefix_attention, "Scoring", without(scaling=0.3))
        assert "log-probabilities differ" in in_one_line(loaded, OTHERS["glm4"])
    measure = parts.measure
    with monkeypatch.context() as patch:  # a window that the short text does not reach
        patch.setattr(parts, "measure", lambda *given: replace(measure(*given), windows=[None, None]))
        assert "layer 0 does not hand on its sliding window" in in_one_line(loaded, OTHERS["cohere2"])
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "logits", lambda *_given: 1 / 0)
        assert "a pass fails, division by zero" in in_one_line(loaded, OTHERS["glm4"])


def test_families_whose_keys_are_made_of_more_are_refused(monkeypatch: pytest.MonkeyPatch):
    keep = prefix_attention.Call.keep
    monkeypatch.setattr(prefix_attention.Call, "keep", lambda call, at, q, k, v: keep(call, at, q, k + q, v))
    for name in ("gpt2", "bloom", "opt"):
        said = in_one_line(LanguageModel, random_model(CASES[name].config), TOKENIZER, "other")
        assert f"is a {name!r}, whose K and V projections that make nothing else cannot be found" in said


def example_of_the_page() -> str:
    text = (ROOT / "book" / "how_to_use.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"### Add a model family\n.*?```python\n(.*?)```", text, re.DOTALL)
    return code


def test_families_are_added_by_the_lines_on_the_page(monkeypatch: pytest.MonkeyPatch):
    code = example_of_the_page()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert families.HELP.split("'")[1] == "Add a model family"
    monkeypatch.setattr(own_attention, "FORWARDS", dict(own_attention.FORWARDS))
    monkeypatch.setattr(parts, "FORWARDS", own_attention.FORWARDS)
    exec(code, {})
    monkeypatch.setitem(CASES, "mpt", model_types.Case(MPT, "fused"))
    found = compare("mpt")
    assert max(found.values()) < CLOSE, found
    model_types._model.cache_clear()
    monkeypatch.setitem(own_attention.FORWARDS, "MptAttention", without_positions(code))
    assert "log-probabilities differ" in in_one_line(loaded, MPT)


def without_positions(code: str) -> Callable[..., object]:
    names: dict[str, Callable[..., object]] = {}
    exec(code.replace(', "alibi": position_bias[:, 0]', ""), names)
    return names["mpt_attention"]


# ------------------------------------------------------------------------------------------------------------ the page
def test_the_page_of_families_is_that_of_the_present_code():
    stored = storage.read_json(model_types.RESULTS)
    text = model_types.PAGE.read_text(encoding="utf-8")
    assert text[text.index(model_types.MARK) + len(model_types.MARK) :] == "\n" + model_types.table(stored["cases"])
    wanted = [(name, case.kind, case.features) for name, case in CASES.items()]
    assert [(entry["case"], entry["type"], entry["features"]) for entry in stored["cases"]] == wanted
    assert all(0 <= size < CLOSE and math.isfinite(size) for e in stored["cases"] for size in e["errors"].values())
