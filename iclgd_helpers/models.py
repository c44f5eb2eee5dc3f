"""
Causal language models: loading, and one adapter for every architecture.

Everything that differs between families stands in `FAMILIES`; nothing else in the package knows an architecture.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from iclgd_helpers import attention, downloads, grammar
from iclgd_helpers.errors import InputError
from iclgd_helpers.parameters import resolve_path


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts (dotted paths), and how its K and V projections are stored."""

    layers: str
    attention: str
    final_norm: str
    rotary: bool
    fused: str | None = None  # name of a projection that holds Q, K and V together


_LLAMA = Family("model.layers", "self_attn", "model.norm", rotary=True)
FAMILIES = {
    "llama": _LLAMA,
    "gemma3_text": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "olmo2": _LLAMA,
    "smollm3": Family("model.layers", "self_attn", "model.norm", rotary=False),  # some layers have no positions
    "opt": Family("model.decoder.layers", "self_attn", "model.decoder.final_layer_norm", rotary=False),
    "xglm": Family("model.layers", "self_attn", "model.layer_norm", rotary=False),
    "gpt2": Family("transformer.h", "attn", "transformer.ln_f", rotary=False, fused="c_attn"),
    "gpt_neox": Family(
        "gpt_neox.layers", "attention", "gpt_neox.final_layer_norm", rotary=True, fused="query_key_value"
    ),
}


@dataclass(frozen=True)
class Trainable:
    """A parameter that finetuning changes; `mask` (broadcastable) is True on its K and V entries, None for all."""

    layer: int
    name: str
    parameter: nn.Parameter
    mask: Tensor | None

    def masked(self, tensor: Tensor) -> Tensor:
        """`tensor` with the entries that belong to the query projection set to 0."""
        return tensor if self.mask is None else tensor * self.mask


@dataclass(frozen=True)
class KVUpdate:
    """
    New values of all trainable parameters, in the order of `LanguageModel.trainables`.

    They are kept in float32 or better, so that a small change survives until a half-precision model rounds it.
    """

    values: tuple[Tensor, ...]


class LanguageModel:
    """A causal language model behind one interface."""

    def __init__(self, model: nn.Module, tokenizer: object, name: str) -> None:
        kind = model.config.model_type
        if kind not in FAMILIES:
            raise InputError(f"model {name!r} is a {kind!r}; supported are {', '.join(sorted(FAMILIES))}")
        self.family = FAMILIES[kind]
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        part = operator.attrgetter
        self.layers: Sequence[nn.Module] = part(self.family.layers)(model)
        self.attentions = [getattr(layer, self.family.attention) for layer in self.layers]
        self.final_norm = part(self.family.final_norm)(model) or nn.Identity()  # old OPT checkpoints have none
        self.head = model.get_output_embeddings()
        if getattr(self.head, "bias", None) is not None:
            raise InputError(f"model {name!r} adds a bias to its logits, which the losses here leave out")
        self.trainables = [t for i, module in enumerate(self.attentions) for t in self._trainables(i, module)]
        _keep_freed_memory()
        _use_shared_prefix(model, self.attentions)

    def _trainables(self, layer: int, module: nn.Module) -> Iterator[Trainable]:
        for projection in (self.family.fused,) if self.family.fused else ("k_proj", "v_proj"):
            for name, parameter in getattr(module, projection).named_parameters():
                mask = _kv_mask(parameter, module) if self.family.fused else None
                yield Trainable(layer, f"{projection}.{name}", parameter, mask)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of what the layers compute."""
        return self.head.weight.dtype

    def hidden(self, tokens: Tensor, start: int = 0, call: attention.Call | None = None) -> Tensor:
        """
        Final-normed hidden states `[batch, token, d_model]` of `tokens` (`[batch, token]`) at positions from `start`.

        With a packing in `call` the batch is 1, and every query begins at `start`.
        """
        packing = None if call is None else call.packing
        positions = torch.arange(tokens.shape[1], device=tokens.device) if packing is None else packing.positions
        positions = (start + positions).expand(len(tokens), -1)
        return self.model.base_model(
            input_ids=tokens, position_ids=positions, use_cache=False, shared=call
        ).last_hidden_state

    def lens(self, states: Tensor) -> Tensor:
        """Logit lens: `states` (`[..., d_model]`, a layer's output) through the final norm; the head comes after."""
        normed = self.final_norm(states)
        project_out = getattr(getattr(self.model.base_model, "decoder", None), "project_out", None)  # OPT-350M
        return normed if project_out is None else project_out(normed)

    @torch.no_grad()
    def prefix(self, tokens: Sequence[int]) -> attention.Prefix:
        """Keys and values of `tokens`, computed once."""
        prefix = attention.Prefix(length=len(tokens))
        self.hidden(torch.tensor([list(tokens)], device=self.device), call=attention.Call(capture=prefix))
        return prefix

    def original(self) -> KVUpdate:
        """The present values of the trainable parameters: the update that changes nothing."""
        return KVUpdate(tuple(t.parameter.data.to(attention.precise_dtype(t.parameter)) for t in self.trainables))

    @contextmanager
    def using(self, update: KVUpdate | None) -> Iterator[None]:
        """The model with `update` in place of its K/V projections; restored bit by bit afterwards."""
        before = [trainable.parameter.data for trainable in self.trainables]
        try:
            if update is not None:
                for trainable, value in zip(self.trainables, update.values, strict=True):
                    trainable.parameter.data = value.to(self.dtype)
            yield
        finally:
            for trainable, data in zip(self.trainables, before, strict=True):
                trainable.parameter.data = data

    @contextmanager
    def untrained(self, seed: int, what: str) -> Iterator[None]:
        """
        The model with random weights: attention and feed-forward (`blocks`), or `everything`.

        `blocks` keeps embeddings, norms and head, as the original's control does. Matrices are drawn from
        N(0, initializer_range²), biases are 0, and for `everything` norms are reset.
        """
        generator = torch.Generator().manual_seed(seed)
        std = getattr(self.model.config, "initializer_range", None) or getattr(self.model.config, "init_std", 0.02)
        norms = {id(p) for m in self.model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()}
        scope = self.layers if what == "blocks" else self.model
        chosen = [p for p in scope.parameters() if what == "everything" or id(p) not in norms]
        before = [parameter.data for parameter in chosen]
        neutral = 0.0 if self.model.config.model_type.startswith("gemma") else 1.0  # Gemma's norms store weight - 1
        try:
            for parameter in chosen:
                drawn = torch.zeros(parameter.shape, dtype=torch.float32)
                if parameter.ndim > 1:
                    drawn.normal_(0.0, std, generator=generator)
                elif id(parameter) in norms:
                    drawn.fill_(neutral)
                parameter.data = drawn.to(parameter)
            if what == "everything":
                _zero_norm_biases(self.model)
            yield
        finally:
            for parameter, data in zip(chosen, before, strict=True):
                parameter.data = data


def _zero_norm_biases(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            module.bias.data = torch.zeros_like(module.bias.data)


def _kv_mask(parameter: nn.Parameter, module: nn.Module) -> Tensor:
    """True on the K and V entries of a fused projection (GPT-2: two thirds of the output; GPT-NeoX: of each head)."""
    if hasattr(module, "head_size"):  # GPT-NeoX: nn.Linear, outputs ordered [head, (q, k, v), head_size]
        outputs = torch.arange(parameter.shape[0]) % (3 * module.head_size) >= module.head_size
        mask = outputs if parameter.ndim == 1 else outputs[:, None]
    else:  # GPT-2: Conv1D, outputs on the last axis, ordered [(q, k, v), head, head_dim]
        mask = torch.arange(parameter.shape[-1]) >= parameter.shape[-1] // 3
    return mask.to(parameter.device)


@functools.cache
def _keep_freed_memory() -> None:
    """
    Let glibc keep what tensors of up to 32 MiB free, instead of giving it back to the kernel.

    Each forward pass would otherwise have the same pages zeroed anew.
    """
    trim_threshold, mmap_threshold = -1, -3  # the names' values in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc's only
    if mallopt is not None:
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**30)


def _use_shared_prefix(model: nn.Module, attentions: Sequence[nn.Module]) -> None:
    if model.config.model_type == "xglm":
        for module in attentions:
            module.forward = types.MethodType(attention.xglm_attention, module)
    else:
        model.set_attn_implementation(attention.NAME)


# ------------------------------------------------------------------------------------------------------------ loading
def _tiny_configs(vocabulary: int) -> dict[str, transformers.PretrainedConfig]:
    """Two- to four-layer configurations of the six tested families, for random models in memory."""
    ids = {"vocab_size": vocabulary, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    gqa = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "tiny-llama": transformers.LlamaConfig(**ids, **gqa, num_hidden_layers=3, max_position_embeddings=2048),
        "tiny-gpt2": transformers.GPT2Config(**ids, n_embd=32, n_layer=3, n_head=4, n_positions=2048),
        "tiny-gpt_neox": transformers.GPTNeoXConfig(
            **ids, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
        ),
        "tiny-opt": transformers.OPTConfig(
            **ids, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
        ),
        "tiny-gemma3": transformers.Gemma3TextConfig(
            **ids, **gqa, head_dim=8, num_hidden_layers=3, sliding_window=24, max_position_embeddings=2048,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "tiny-xglm": transformers.XGLMConfig(
            **ids, d_model=32, ffn_dim=64, num_layers=3, attention_heads=4, max_position_embeddings=2048
        ),
    }  # fmt: skip


# Random weights in the exact shape of fairseq's dense model with 1.3 billion parameters: a rehearsal without them.
REHEARSAL = "random-fairseq-dense-1.3B"


def _rehearsal_config(tokenizer: object) -> transformers.PretrainedConfig:
    return transformers.XGLMConfig(
        vocab_size=51_200, d_model=2048, num_layers=24, attention_heads=32, ffn_dim=8192, scale_embedding=True,
        max_position_embeddings=2048, dropout=0.0, attention_dropout=0.0, activation_function="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel:
    """
    A random model of the family in `name` ("tiny-llama", …), with weights large enough that attention matters.

    The matrices are drawn from N(0, 0.3²): at the usual 0.02 every attention pattern would be uniform.
    """
    tokenizer, config = tokenizer_and_config(name)
    model = _random_model(config, seed, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            else:  # biases and norms too, so that no test passes because they are 0 or 1
                parameter.data += 0.1 * torch.randn_like(parameter)
    return LanguageModel(model.to(device), tokenizer, name)


def _random_model(config: transformers.PretrainedConfig, seed: int, dtype: torch.dtype) -> nn.Module:
    """A model with the weights that its class starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)


def choose_device(device: str) -> str:
    """`auto` is a GPU where there is one, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def tokenizer_and_config(name: str) -> tuple[object, transformers.PretrainedConfig]:
    """
    What a model is, without its weights; `name` as in `load_model`.

    Raises
    ------
    InputError
        if there is no such model, it cannot be reached, or its special tokens contradict each other.
    """
    if name == REHEARSAL:
        tokenizer = tokenizer_and_config("SmolLM2-135M-Instruct")[0]
        return tokenizer, _rehearsal_config(tokenizer)
    tokenizer = grammar.tiny_tokenizer()
    if name in (tiny := _tiny_configs(len(tokenizer))):
        return tokenizer, tiny[name]
    source, options = _source(name)
    with _load_errors(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        config = transformers.AutoConfig.from_pretrained(source, **options)
    _check_special_tokens(name, tokenizer, config)
    return tokenizer, config


def load_model(name: str, dtype: str, device: str, tokenizer: object = None) -> LanguageModel:
    """
    Load a model: a name of `downloads.MODELS`, a random one ("tiny-llama", …, `REHEARSAL`), a local folder, or a hub
    id.

    Weights come from safetensors (a lone `.bin` is converted once); code of a model's repository is never run. A
    `tokenizer` that was loaded and checked before is taken over.

    Raises
    ------
    InputError
        if there is no such model, it cannot be reached, its architecture is not supported, the device is missing, or
        its memory is too small.
    """
    device, precision = choose_device(device), getattr(torch, dtype)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} is not there ({str(error).splitlines()[0]}): pass device=cpu") from None
    with enough_memory(f"the weights of {name!r}"):
        if name.startswith("tiny-") and name in _tiny_configs(8):
            return tiny_model(name, dtype=precision, device=device)
        if name == REHEARSAL:
            tokenizer, config = tokenizer_and_config(name)
            return LanguageModel(_random_model(config, 0, precision).to(device), tokenizer, name)
        tokenizer = tokenizer or tokenizer_and_config(name)[0]
        source, options = _source(name)
        with _load_errors(name):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                downloads.with_safetensors(source, **options), dtype=precision, use_safetensors=True,
                attn_implementation="eager", **options,
            )  # fmt: skip
        return LanguageModel(model.to(device), tokenizer, name)


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turn a lack of memory, on any device, into one line with the way out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        ways = "pass dtype=float16 (or bfloat16), a smaller model, fewer n_demonstrations, or device=cpu"
        raise InputError(f"the memory is too small for {what} ({str(error).splitlines()[0]}): {ways}") from None


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot load model {name!r} ({reason}): pass a hub id while online, a folder with config.json, tokenizer "
            f"and *.safetensors, or one of {', '.join(downloads.MODELS)}"
        ) from None


def _source(name: str) -> tuple[str, dict[str, bool]]:
    """Folder or hub id to load from, and whether only local files may be used."""
    path = resolve_path(name)
    folder = path if (path / "config.json").is_file() else None
    if name in downloads.MODELS:
        folder = _checked_folder(name, downloads.cache_folder())
    return str(folder or name), {"local_files_only": folder is not None or not downloads.hub_is_reachable()}


@functools.cache
def _checked_folder(name: str, _cache: Path) -> Path:
    """The folder of a packaged model, whose checksums are verified once a process."""
    return downloads.model_folder(name)


def _check_special_tokens(name: str, tokenizer: object, config: transformers.PretrainedConfig) -> None:
    """BOS and EOS, which the token layout puts between demonstrations, must be what the weights were trained with."""
    for kind in ("bos", "eos"):
        own, trained = getattr(tokenizer, f"{kind}_token_id", None), getattr(config, f"{kind}_token_id", None)
        trained = [trained] if isinstance(trained, int) else trained
        if own is None:
            continue
        if own >= config.vocab_size or (trained and own not in trained):
            token = tokenizer.convert_ids_to_tokens(own)
            raise InputError(
                f"model {name!r}: {kind.upper()} is {token!r} (id {own}) for its tokenizer, but its config.json says "
                f"{kind}_token_id={trained} with {config.vocab_size} rows: the layout would put a wrong token between "
                "texts. Correct either in a local copy and pass its folder"
            )
