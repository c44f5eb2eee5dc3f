"""
Compares the engine with transformers on a tiny random model of every tested type: `python tests/model_types.py`.

Run it from the root. It writes the largest differences to `results/model_types.json`, and the table of
`book/models.md`. Exit status 1, and nothing written, where one is too large.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import float64
import naive
import torch
import transformers as tf

from iclgd_helpers import storage
from iclgd_helpers.data import sources, synthetic
from iclgd_helpers.data.tasks import Example
from iclgd_helpers.data.token_layout import Layout, Query
from iclgd_helpers.engine import finetune, models
from iclgd_helpers.engine.finetune import Settings
from iclgd_helpers.engine.observe import Arm, observe

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results" / "model_types.json", ROOT / "book" / "models.md"
MARK = "<!-- What follows is written by `python tests/model_types.py`. -->\n"
CLOSE = 1e-9  # in float64; relative to the largest number compared, or to 1
RATE = 0.02
LABELS = ("true", "neutral", "days")  # of 2, 1 and 3 tokens

TOKENIZER = synthetic.tiny_tokenizer()
IDS: dict[str, Any] = {"vocab_size": len(TOKENIZER), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = IDS | HEADS | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"max_position_embeddings": 512}
ALONE = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}  # each head has its own keys
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GPT: dict[str, Any] = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}


def rope(kind: str, **given: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **given}}


@dataclass(frozen=True)
class Case:
    """A tiny configuration, and what is special about it in the words of the page."""

    config: tf.PretrainedConfig
    features: str

    @property
    def kind(self) -> str:
        return str(self.config.model_type)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0, 1.3], "long_factor": [2.0, 4.0], "factor": 2.0}
FALCON = ALONE | {"ffn_hidden_size": 48}
TWELVE = {"hidden_size": 48, "num_attention_heads": 12}  # whose slopes are no powers of two
CASES = {
    "llama": Case(tf.LlamaConfig(**SHAPE), "grouped heads, rotary positions, untied head"),
    "llama, linear": Case(tf.LlamaConfig(**SHAPE, **rope("linear", factor=4.0)), "linear scaling of positions"),
    "llama, dynamic": Case(tf.LlamaConfig(**SHAPE, **rope("dynamic", factor=2.0)), "dynamic scaling"),
    "llama, yarn": Case(
        tf.LlamaConfig(**SHAPE, **rope("yarn", factor=4.0, original_max_position_embeddings=128)), "YaRN"
    ),
    "llama, llama3": Case(tf.LlamaConfig(**SHAPE, **rope("llama3", **LLAMA3)), "Llama 3's scaling"),
    "llama, biases": Case(
        tf.LlamaConfig(
            **SHAPE | {"num_key_value_heads": 1}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
        ),
        "one key/value head, biases, tied head",
    ),
    "mistral": Case(tf.MistralConfig(**SHAPE, head_dim=8, sliding_window=16), "sliding window"),
    "mixtral": Case(
        tf.MixtralConfig(**SHAPE, sliding_window=16, num_local_experts=4, num_experts_per_tok=2),
        "mixture of experts, sliding window",
    ),
    "qwen2": Case(
        tf.Qwen2Config(**SHAPE, sliding_window=16, use_sliding_window=True, max_window_layers=1),
        "biases of Q, K and V, windows in upper layers",
    ),
    "qwen3": Case(tf.Qwen3Config(**SHAPE, head_dim=8), "query and key norms"),
    "qwen3_moe": Case(
        tf.Qwen3MoeConfig(
            **SHAPE, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1],
            norm_topk_prob=True,
        ),
        "mixture of experts in some layers, query and key norms",
    ),
    "olmo": Case(tf.OlmoConfig(**SHAPE, clip_qkv=2.0), "clipped Q, K and V, norms without weights"),
    "olmo2": Case(tf.Olmo2Config(**SHAPE), "norms after attention and feed-forward, query and key norms"),
    "smollm3": Case(tf.SmolLM3Config(**SHAPE, no_rope_layers=[0, 1]), "layers without positions"),
    "phi": Case(
        tf.PhiConfig(
            **SHAPE, qk_layernorm=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5},
        ),
        "parallel residual, partial rotary, bias of the head",
    ),
    "phi3": Case(
        tf.Phi3Config(
            **SHAPE, original_max_position_embeddings=256, sliding_window=16,
            rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                             "original_max_position_embeddings": 256, **FACTORS},
        ),
        "fused QKV, partial rotary, LongRoPE, sliding window",
    ),
    "gemma": Case(tf.GemmaConfig(**SHAPE, head_dim=8), "scaled embedding, tied head"),
    "gemma2": Case(
        tf.Gemma2Config(
            **SHAPE, **WINDOWED, head_dim=8, query_pre_attn_scalar=16, attn_logit_softcapping=4.0,
            final_logit_softcapping=6.0,
        ),
        "soft-capped attention and logits, alternating windows, post-norms",
    ),
    "gemma3_text": Case(
        tf.Gemma3TextConfig(**SHAPE, **WINDOWED, head_dim=8, final_logit_softcapping=6.0),
        "alternating windows with positions of their own, query and key norms",
    ),
    "granite": Case(
        tf.GraniteConfig(
            **SHAPE, embedding_multiplier=2.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.2
        ),
        "multipliers of embedding, residual, attention and logits",
    ),
    "cohere": Case(
        tf.CohereConfig(**SHAPE, logit_scale=0.25, use_qk_norm=True),
        "parallel residual, multiplier of logits, query and key norms",
    ),
    "stablelm": Case(
        tf.StableLmConfig(**SHAPE, use_qkv_bias=True, use_parallel_residual=True, qk_layernorm=True),
        "parallel residual, partial rotary, a norm for each head",
    ),
    "starcoder2": Case(tf.Starcoder2Config(**SHAPE, sliding_window=16), "biases, sliding window"),
    "falcon": Case(tf.FalconConfig(**FALCON), "fused QKV of one key/value head, parallel attention, tied head"),
    "falcon, groups": Case(
        tf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2), "fused QKV in groups, two norms"
    ),
    "falcon, ALiBi": Case(
        tf.FalconConfig(**FALCON | TWELVE, alibi=True, multi_query=False, parallel_attn=False, bias=True),
        "fused QKV by head, ALiBi (rounded to bfloat16), biases",
    ),
    "falcon, ALiBi and one key/value head": Case(tf.FalconConfig(**FALCON, alibi=True), "ALiBi, shared keys"),
    "bloom": Case(tf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4), "fused QKV by head, ALiBi, tied head"),
    "bloom, twelve heads": Case(
        tf.BloomConfig(**IDS, hidden_size=48, n_layer=2, n_head=12, apply_residual_connection_post_layernorm=True),
        "slopes between powers of two, residual after the norm",
    ),
    "gptj": Case(tf.GPTJConfig(**GPT, rotary_dim=4), "parallel residual, rotary pairs, bias of the head"),
    "gpt_neo": Case(
        tf.GPTNeoConfig(
            **IDS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=16, max_position_embeddings=512,
        ),
        "unscaled products, local layers, learned positions",
    ),
    "gpt2": Case(
        tf.GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True), "fused QKV, learned positions, scaled by layer"
    ),
    "gpt_neox": Case(
        tf.GPTNeoXConfig(**ALONE, use_parallel_residual=True), "fused QKV by head, partial rotary, parallel residual"
    ),
    "opt": Case(tf.OPTConfig(**ALONE, ffn_dim=48, word_embed_proj_dim=32), "biases, learned positions, tied head"),
    "opt, post-norm": Case(
        tf.OPTConfig(**ALONE, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
        "post-norm, narrower embedding, no final norm",
    ),
    "xglm": Case(
        tf.XGLMConfig(**IDS, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=512),
        "scaled queries, sinusoidal positions",
    ),
    "gpt_oss": Case(
        tf.GptOssConfig(**SHAPE, **WINDOWED, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
                        **rope("yarn", factor=4.0, original_max_position_embeddings=128)),
        "attention sinks, mixture of experts with biases, alternating windows, YaRN",
    ),
}  # fmt: skip


def random_model(
    config: tf.PretrainedConfig, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 0.3
) -> tf.PreTrainedModel:
    """Weights large enough that attention matters, and no bias 0 or norm 1."""
    model = models._random_model(copy.deepcopy(config), seed, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=scale)
            else:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@dataclass(frozen=True)
class Material:
    """A model of a case, and what it reads: demonstrations, and questions of different lengths."""

    model: models.LanguageModel
    layout: Layout
    demonstrations: list[Example]
    examples: list[Example]

    @property
    def prefix(self) -> tuple[int, ...]:
        return self.layout.prefix(self.demonstrations)

    def queries(self) -> list[Query]:
        return [self.layout.query(example, "label") for example in self.examples]


@cache
def _model(name: str) -> models.LanguageModel:
    return models.LanguageModel(random_model(CASES[name].config), TOKENIZER, name)


def material(name: str, labels: Sequence[str] = LABELS) -> Material:
    """Float64; call it within `float64.uncast`."""
    data = sources.load_task("cb", "generated")
    layout = Layout.make(TOKENIZER, replace(data.task, verbalizers=tuple(labels)), "eos", "sum")
    asked = [replace(example, prompt=example.prompt[: 12 + 17 * i]) for i, example in enumerate(data.evaluation[:2])]
    shown = [replace(example, prompt=example.prompt[:100]) for example in data.train[:2]]
    return Material(_model(name), layout, shown, asked)


def error(ours: object, theirs: object) -> float:
    """Largest difference, relative to the largest number of the two, or to 1."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))
    return difference if difference == difference else float("inf")


def observed(given: Material) -> dict[str, float]:
    """Errors of what `observe` gives: scores of labels, lens, attention outputs, and scores raw and through softmax."""
    stock = naive.stock(given.model)
    labels = [naive.encode(TOKENIZER, " " + word) for word in given.layout.task.verbalizers]
    found: dict[str, float] = {}

    def note(what: str, ours: object, theirs: object) -> None:
        found[what] = max(found.get(what, 0.0), error(ours, theirs))

    for indices, seen in observe(given.model, given.queries(), {"arm": Arm(given.prefix)}):
        for place, index in enumerate(indices):
            prompt = naive.encode(TOKENIZER, given.examples[index].prompt)
            wanted, arm = naive.observe(stock, given.prefix, prompt, labels), seen["arm"]
            n_read = wanted["attention_scores"].shape[-1]
            scores = arm.attention_scores[place][..., :n_read]
            note("log_probabilities", arm.label_log_probabilities[place], wanted["label_log_probabilities"])
            note("lens", arm.lens_log_odds[place], wanted["lens"])
            note("attention_outputs", arm.attention_output[place], wanted["attention_output"])
            for layer, weights in enumerate(wanted["attention_weights"]):
                own = weights[:, len(given.prefix) :]
                visible = own[0] > 0
                ours = torch.softmax(scores[layer][:, visible], -1)
                note("scores_through_softmax", ours, own[:, visible] / own[:, visible].sum(-1, keepdim=True))
                assert not scores[layer][:, ~visible].any()
            note("attention_scores", scores, wanted["attention_scores"])
    return found


def finetuned(given: Material, method: str, loss: str) -> dict[str, float]:
    """Errors of losses, of the gradients' norms and of the weights after two steps."""
    sequences = [given.layout.training_sequence(example) for example in given.demonstrations]
    result = finetune.finetune(given.model, sequences, method, Settings(RATE, loss))
    stock = naive.stock(given.model)
    losses, norms = naive.finetune(stock, sequences, method, RATE, loss)
    wanted = [p.data for layer in range(given.model.n_layers) for _name, p in naive.key_values(stock, layer)]
    before = given.model.original().values
    moved = [(old - new) / RATE for old, new in zip(before, result.update.values, strict=True)]
    expected = [(old - new) / RATE for old, new in zip(before, wanted, strict=True)]
    assert min(float(change.abs().max()) for change in expected if change.ndim > 1) > 0
    return {
        "losses": error(result.losses, losses),
        "gradient_norms": error(result.gradient_norms, norms),
        "kv_gradients": max(map(error, moved, expected)),
    }


def compare(name: str, losses: Sequence[str] = ("all",), methods: Sequence[str] = finetune.METHODS) -> dict[str, float]:
    """Largest error of each kind."""
    with float64.uncast():
        given = material(name)
        found = observed(given)
        for loss in losses:
            for method in methods:
                for what, size in finetuned(given, method, loss).items():
                    found[what] = max(found.get(what, 0.0), size)
    return found


# ---------------------------------------------------------------------------------------------------------- the page
def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The table of the page in Markdown."""
    lines = ["| Type | What was tried | Observation | Finetuning |", "|---|---|---:|---:|"]
    for entry in entries:
        errors = entry["errors"]
        tuned = max(size for what, size in errors.items() if what in ("losses", "gradient_norms", "kv_gradients"))
        seen = max(size for what, size in errors.items() if what not in ("losses", "gradient_norms", "kv_gradients"))
        lines.append(f"| `{entry['type']}` | {entry['features']} | {seen:.0e} | {tuned:.0e} |")
    return "\n".join(lines) + "\n"


def write(entries: Sequence[Mapping[str, Any]]) -> None:
    """Store the outcome and the table."""
    text = PAGE.read_text(encoding="utf-8")
    head = text[: text.index(MARK) + len(MARK)]
    storage.write_json(RESULTS, {"transformers": tf.__version__, "close": CLOSE, "cases": list(entries)})
    storage.write_bytes(PAGE, (head + "\n" + table(entries)).encode())


def main(words: Sequence[str]) -> int:
    """Compare all cases, or those whose names hold one of `words`; then nothing is written."""
    entries, failed = [], False
    for name, case in CASES.items():
        if words and not any(word in name for word in words):
            continue
        start = time.monotonic()
        errors = compare(name, ("all", "label", "label_space"))
        failed |= not max(errors.values()) < CLOSE
        shown = "  ".join(f"{what} {size:.0e}" for what, size in errors.items())
        print(f"{time.monotonic() - start:5.1f} s  {name}: {shown}", flush=True)
        entries.append({"case": name, "type": case.kind, "features": case.features, "errors": errors})
    if failed:
        print(f"error: a difference is not below {CLOSE}", file=sys.stderr)
        return 1
    if not words:
        write(entries)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
