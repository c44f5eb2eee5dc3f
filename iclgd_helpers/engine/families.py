"""Names: the architectures that are tested to be exact, and the models that need no download."""

from __future__ import annotations

# Types of configurations whose models are compared with transformers' own, in `tests/exactness/test_families.py`.
TESTED = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo", "olmo2", "smollm3", "phi", "phi3",
    "gemma", "gemma2", "gemma3_text", "granite", "cohere", "stablelm", "starcoder2", "falcon", "bloom", "gptj",
    "gpt_neo", "gpt2", "gpt_neox", "opt", "xglm", "gpt_oss",
)  # fmt: skip
HELP = "see 'Add a model family' on the page How to use"  # the section of book/how_to_use.md

TINY = ("tiny-llama", "tiny-gpt2", "tiny-gpt_neox", "tiny-opt", "tiny-gemma3", "tiny-xglm")  # random, made in memory
# Random weights in the exact shape of fairseq's dense model with 1.3 billion parameters: a rehearsal without them.
REHEARSAL = "random-fairseq-dense-1.3B"
