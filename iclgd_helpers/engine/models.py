"""
Causal language models: loading, and one adapter for every architecture.

`parts` finds where a family keeps its parts; beside `own_attention`, nothing in the package knows an architecture.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from iclgd_helpers import pinned_downloads
from iclgd_helpers.data import synthetic
from iclgd_helpers.data.token_layout import TokenTree
from iclgd_helpers.engine import checkpoints, parts, prefix_attention, self_check
from iclgd_helpers.engine.families import REHEARSAL, TESTED, TINY
from iclgd_helpers.errors import InputError, reason
from iclgd_helpers.paths import cache_folder

PROBE_TOKENS = 4  # of the short passes that try a model out
# transformers' plain code for both: its faster products of experts do not exist in every precision.
PLAIN_CODE = {"attn_implementation": "eager", "experts_implementation": "eager"}
TRAINED_LENGTH = 2048  # of BLOOM, whose positions have no end and whose configurations name none


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

    def __init__(
        self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, name: str
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.context = context(model.config)
        self.logit_scale, self.logit_cap = _after_the_head(model.config)
        _keep_freed_memory()
        if model.config.model_type in TESTED:
            self._adopt()
        else:
            with self_check.only_exact(model, name):
                expected = self_check.stock_logits(model)
                windows = self._adopt()
                self_check.check(model, name, self._read, expected, windows)

    def _adopt(self) -> list[int | None]:
        """Find the model's parts, and let its attention layers run here; returns each layer's window."""
        found = parts.find(self.model, self.name)
        self.layers, self.attentions, self.head = found.layers, found.attentions, found.head
        parts.route(self.model, found.attentions)
        probe = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.model.config.vocab_size
        measured = parts.measure(self.model, found, lambda call: self.hidden(probe, call=call), self.name)
        self.outputs, self.final_norm = measured.outputs, nn.Sequential(*measured.after)  # an old OPT has none
        self.trainables = [
            Trainable(layer, f"{child}.{part}", parameter, _kv_mask(parameter, projection, makes_kv[child]))
            for layer, makes_kv in enumerate(measured.makes_kv)
            for child in found.projections
            for projection in [getattr(self.attentions[layer], child)]
            for part, parameter in projection.named_parameters()
        ]
        return measured.windows

    @property
    def n_layers(self) -> int:
        """How many blocks it has."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of what the layers compute."""
        return self.head.weight.dtype

    def hidden(self, tokens: Tensor, start: int = 0, call: prefix_attention.Call | None = None) -> Tensor:
        """
        Final-normed hidden states `[batch, token, d_model]` of `tokens` (`[batch, token]`) at positions from `start`.

        With a packing in `call` the batch is 1, and every query begins at `start`; with a tree, all sequences are such.

        Raises
        ------
        InputError
            if they reach beyond the model's context, where it would give numbers that nobody trained.
        """
        if call is not None and call.packing is not None:
            length, positions = call.packing.length, call.packing.positions
        elif call is not None and call.tree is not None:
            length, positions = max(call.tree.depth) + 1, torch.tensor(call.tree.depth, device=tokens.device)
        else:
            length, positions = tokens.shape[1], torch.arange(tokens.shape[1], device=tokens.device)
        if start + length > self.context:
            raise InputError(
                f"a sequence of {start + length} tokens is longer than the model's context of {self.context}"
            )
        call = call or prefix_attention.Call()
        call.positions = start + positions
        with prefix_attention.present(call):
            output = self.model.base_model(
                input_ids=tokens, position_ids=call.positions.expand(len(tokens), -1), use_cache=False
            )
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, states: Tensor, words: Sequence[int] | None = None) -> Tensor:
        """Logits `[…, word]` of `states` (`[…, d_model]`, after the final norm), of some words or of all."""
        weight: Tensor = self.head.weight
        bias: Tensor | None = self.head.bias
        if words is not None:
            weight, bias = weight[list(words)], None if bias is None else bias[list(words)]
        logits = nn.functional.linear(states, weight, bias)
        logits = logits if self.logit_scale == 1 else logits * self.logit_scale
        return logits if self.logit_cap is None else torch.tanh(logits / self.logit_cap) * self.logit_cap

    @functools.cached_property
    @torch.no_grad()
    def first_layer_sees_the_prompt(self) -> bool:
        """
        Whether attention scores within a question can differ in layer 0 when a prompt stands before it.

        Its inputs are the tokens and their positions alone. Measured: the same few tokens at two places. Rotary
        positions, and none, give the same scores up to rounding; learned and sinusoidal ones give others.
        """
        tokens = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.model.config.vocab_size
        scores = []
        for start in (0, max(1, min(32, self.context - PROBE_TOKENS))):
            call = prefix_attention.Call(read=torch.tensor([PROBE_TOKENS - 1], device=self.device))
            self.hidden(tokens, start, call)
            scores.append(call.scores[0].double())
        rounding = 0.05 if self.dtype.itemsize < 4 else 1e-3
        return bool((scores[1] - scores[0]).norm() > rounding * scores[0].norm())

    def lens(self, states: Tensor) -> Tensor:
        """Logit lens: `states` (`[..., d_model]`, a layer's output) through the final norm; the head comes after."""
        normed: Tensor = self.final_norm(states)
        return normed

    @torch.no_grad()
    def prefix(self, tokens: Sequence[int]) -> prefix_attention.Prefix:
        """Keys and values of `tokens`, computed once."""
        prefix = prefix_attention.Prefix(length=len(tokens))
        self.hidden(torch.tensor([list(tokens)], device=self.device), call=prefix_attention.Call(capture=prefix))
        return prefix

    def _read(self, before: list[int], ends: list[list[int]]) -> list[Tensor]:
        """Logits `[token, word]` of each of several ends behind the same tokens."""
        packing = prefix_attention.Packing.of([TokenTree.of(end, ()) for end in ends], self.device)
        tokens = torch.tensor([[token for end in ends for token in end]], device=self.device)
        call = prefix_attention.Call(prefix=self.prefix(before), packing=packing)
        logits = self.logits(self.hidden(tokens, start=len(before), call=call)[0])
        return list(torch.split(logits, [len(end) for end in ends]))

    def original(self) -> KVUpdate:
        """The present values of the trainable parameters: the update that changes nothing."""
        return KVUpdate(
            tuple(t.parameter.data.to(prefix_attention.precise_dtype(t.parameter)) for t in self.trainables)
        )

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
        generator, config = torch.Generator().manual_seed(seed), self.model.config
        std = float(getattr(config, "initializer_range", 0.0) or getattr(config, "init_std", 0.02))
        neutral = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma's norms store weight - 1
        norms = [m for m in self.model.modules() if "norm" in type(m).__name__.lower()]
        of_norms = {id(parameter): part for norm in norms for part, parameter in norm.named_parameters()}
        biases = {id(p) for name, p in self.model.named_parameters() if name.endswith("bias")}  # experts' have two axes
        scope = self.layers if what == "blocks" else self.model
        chosen = [p for p in scope.parameters() if what == "everything" or id(p) not in of_norms]
        before = [parameter.data for parameter in chosen]
        try:
            for parameter in chosen:
                drawn = torch.zeros(parameter.shape, dtype=torch.float32)
                if of_norms.get(id(parameter), "").endswith("weight"):
                    drawn.fill_(neutral)
                elif parameter.ndim > 1 and id(parameter) not in biases:
                    drawn.normal_(0.0, std, generator=generator)
                parameter.data = drawn.to(parameter)
            yield
        finally:
            for parameter, data in zip(chosen, before, strict=True):
                parameter.data = data


def _kv_mask(parameter: nn.Parameter, projection: nn.Module, makes_kv: Tensor) -> Tensor | None:
    """
    True on the entries of a projection's weight or bias that make keys or values; None if all do.

    `makes_kv` is `[output]`; a weight is `[output, input]`, but GPT-2's Conv1D has `[input, output]`.
    """
    if bool(makes_kv.all()):
        return None
    by_rows = parameter.ndim > 1 and isinstance(projection, nn.Linear)
    return makes_kv[:, None] if by_rows else makes_kv


def _after_the_head(config: transformers.PretrainedConfig) -> tuple[float, float | None]:
    """What logits are multiplied with (Cohere, Granite), and the bound that they are squeezed under (Gemma 2)."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


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


# ------------------------------------------------------------------------------------------------------------ loading
def _tiny_configs(vocabulary: int) -> dict[str, transformers.PretrainedConfig]:
    """Two- to four-layer configurations of the six tested families, for random models in memory."""
    ids: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    gqa: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
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


def _rehearsal_config(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PretrainedConfig:
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


def _random_model(config: transformers.PretrainedConfig, seed: int, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model with the weights that its class starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **PLAIN_CODE)


def choose_device(device: str) -> str:
    """
    `auto` is a GPU where there is one, else the CPU.

    Raises
    ------
    InputError
        for a device that is not there, or that holds no numbers.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        number = float(torch.ones(1, device=device).sum())
        index = torch.device(device).index or 0
        if number != 1 or (device.startswith("cpu") and index > 0):
            raise ValueError("there is one processor")
    except Exception as error:  # of every backend: each has its own words for not being there
        raise InputError(f"device {device!r} cannot be used here ({reason(error)}): pass device=cpu") from None
    return device


def context(config: transformers.PretrainedConfig) -> int:
    """
    Tokens of the longest sequence that the model takes.

    Where rotary factors change at a length (`longrope`), a prompt behind a prefix must stay below it: the prefix's keys
    are made before the whole length is known. Those of `dynamic` change beyond `max_position_embeddings` only.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    several = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    changes = [
        rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for rope in several
        if rope.get("rope_type") == "longrope"
    ]
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    given = next((getattr(config, name) for name in names if getattr(config, name, None)), TRAINED_LENGTH)
    return int(min([given, *filter(None, changes)]))


def tokenizer_and_config(name: str) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PretrainedConfig]:
    """
    What a model is, without its weights; `name` as in `load_model`.

    Raises
    ------
    InputError
        if there is no such model, it cannot be reached, or its parts contradict each other.
    """
    if name == REHEARSAL:
        tokenizer = tokenizer_and_config("SmolLM2-135M-Instruct")[0]
        return tokenizer, _rehearsal_config(tokenizer)
    if name in TINY:
        tokenizer = synthetic.tiny_tokenizer()
        return tokenizer, _tiny_configs(len(tokenizer))[name]
    found = _checkpoint(name)
    with checkpoints.reading(name), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(found.source, trust_remote_code=False, **found.options)
        config = transformers.AutoConfig.from_pretrained(found.source, trust_remote_code=False, **found.options)
    checkpoints.check_tokenizer(name, tokenizer, config)
    return tokenizer, config


def load_model(
    name: str, dtype: str, device: str, tokenizer: transformers.PreTrainedTokenizerBase | None = None
) -> LanguageModel:
    """
    Load a model: one of `pinned_downloads.MODELS`, a random one (`TINY`, `REHEARSAL`), a local folder, or a hub id.

    Weights come from safetensors (a lone `.bin` is converted once); code of a model's repository is never run. A
    `tokenizer` that was loaded and checked before is taken over.

    Raises
    ------
    InputError
        if there is no such model, it cannot be reached, its architecture is not supported, its weights are not all
        there or not finite, the device is missing, or its memory is too small.
    """
    device, precision = choose_device(device), getattr(torch, dtype)
    with enough_memory(f"the weights of {name!r}"):
        if name in TINY:
            return tiny_model(name, dtype=precision, device=device)
        if name == REHEARSAL:
            tokenizer, config = tokenizer_and_config(name)
            return LanguageModel(_random_model(config, 0, precision).to(device), tokenizer, name)
        tokenizer = tokenizer or tokenizer_and_config(name)[0]
        return LanguageModel(_trained_model(name, precision).to(device), tokenizer, name)


def _checkpoint(name: str) -> checkpoints.Checkpoint:
    """Where a trained model lies; a packaged one is its pinned name."""
    if name not in pinned_downloads.MODELS:
        return checkpoints.find(name)
    folder = _checked_folder(name, cache_folder())
    return checkpoints.Checkpoint(name, folder, name, {"local_files_only": True})


@functools.cache
def _checked_folder(name: str, _cache: Path) -> Path:
    """The folder of a packaged model, whose checksums are verified once a process."""
    return pinned_downloads.model_folder(name)


def _trained_model(name: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """
    A checkpoint's model, every weight of which is there, fits and is finite.

    Raises
    ------
    InputError
        naming what is not.
    """
    found = _checkpoint(name)
    folder = checkpoints.weights_folder(found)
    options = {"dtype": dtype, **PLAIN_CODE}
    with checkpoints.reading(name), _quiet():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
        checkpoints.check_weights(name, folder, sum(t.numel() for t in [*empty.parameters(), *empty.buffers()]))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=False, **options,
        )  # fmt: skip
    checkpoints.check_loaded(name, report)
    broken = [key for key, weight in model.state_dict().items() if not bool(weight.isfinite().all())]
    if broken:
        raise InputError(f"model {name!r}: weights that are no finite numbers in {', '.join(broken[:3])}")
    _try_out(name, model)
    if found.folder and _checkpoint(name).content != found.content:
        raise InputError(f"model {name!r} was changed while it was read: run again")
    return model


@torch.no_grad()
def _try_out(name: str, model: transformers.PreTrainedModel) -> None:
    """A few tokens through transformers' own code: a configuration may fit its weights and yet compute nothing."""
    if model.config.model_type == "xglm" and model.dtype == torch.float64:
        return  # its own mask does not exist in float64
    with checkpoints.reading(name):
        logits = model.eval()(torch.arange(PROBE_TOKENS)[None] % model.config.vocab_size, use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise InputError(f"model {name!r} computes no finite numbers in {model.dtype}: is its config.json its own?")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports that transformers logs and the bars it draws while loading; what is wrong is raised."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turn a lack of memory, on any device, into one line with the way out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        ways = "pass dtype=float16 (or bfloat16), a smaller model, fewer n_demonstrations, or device=cpu"
        raise InputError(f"the memory is too small for {what} ({reason(error)}): {ways}") from None
