"""The architectures that the engine knows, and the models that need no download: everything that stands in a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts (dotted paths), and how its K and V projections are stored."""

    layers: str
    attention: str
    final_norm: str
    fused: str | None = None  # name of a projection that holds Q, K and V together


_LLAMA = Family("model.layers", "self_attn", "model.norm")
FAMILIES = {
    "llama": _LLAMA,
    "gemma3_text": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": _LLAMA,
    "smollm3": _LLAMA,
    "opt": Family("model.decoder.layers", "self_attn", "model.decoder.final_layer_norm"),
    "xglm": Family("model.layers", "self_attn", "model.layer_norm"),
    "gpt2": Family("transformer.h", "attn", "transformer.ln_f", fused="c_attn"),
    "gpt_neox": Family("gpt_neox.layers", "attention", "gpt_neox.final_layer_norm", fused="query_key_value"),
}

TINY = ("tiny-llama", "tiny-gpt2", "tiny-gpt_neox", "tiny-opt", "tiny-gemma3", "tiny-xglm")  # random, made in memory
# Random weights in the exact shape of fairseq's dense model with 1.3 billion parameters: a rehearsal without them.
REHEARSAL = "random-fairseq-dense-1.3B"
