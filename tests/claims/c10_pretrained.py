"""
Chapter 10: a language model's own forward pass, with one gradient step in place of its attention.

Here the step is put *into* transformers' classes, through their attention interface: projections, norms, positions and
feed-forward layers are the library's. The chapter goes the other way and writes the block out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import float64
import naive
import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from claims.registry import Control, Interval, chapter
from iclgd_helpers.data import sources
from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import models
from iclgd_helpers.measures import intervals
from iclgd_helpers.theory import gradient_step
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter(
    "10_inside_a_pretrained_model", drawn="weights of a small model of the family, demonstrations and questions"
)
N_QUESTIONS = 8


@dataclass
class Recursion:
    """`M` demonstration tokens stand behind token 0; what the attention does, and what it saw."""

    M: int
    rate: float = 1.0
    fault: str = ""
    linear: bool = False
    replaced: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> keys, values of own tokens
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> keys, values
    gates: list[Tensor] = field(default_factory=list)  # [head, token] a layer


def _attention(module, query, key, value, attention_mask=None, scaling=None, recursion=None, **_):
    """`[1, token, head, head_dim]`, one step for each token and key/value head."""
    run, layer = recursion, module.layer_idx
    n_heads, n_tokens = query.shape[1:3]
    n_kv = key.shape[1]
    run.seen[layer] = key[0], value[0]
    own_keys, own_values = run.replaced.get(layer, (key[0], value[0]))
    output, gate = torch.zeros_like(query[0]), torch.zeros(n_heads, n_tokens)
    for g in range(n_kv):
        consecutive = slice(g * n_heads // n_kv, (g + 1) * n_heads // n_kv)
        group = list(range(n_heads))[slice(g, None, n_kv) if run.fault == "cyclic" else consecutive]
        for i in range(n_tokens):
            own = [0, *range(run.M + 1, i + 1)]
            shown = list(range(1, run.M + 1 if run.fault == "all" else min(i, run.M) + 1)) if i else []
            base, demonstrations = (own_keys[g, own], own_values[g, own]), (key[0, g, shown], value[0, g, shown])
            answer = _linear_token if run.linear else _token
            output[group, i], gate[group, i] = answer(query[0, group, i], base, demonstrations, scaling, run)
    run.gates.append(gate)
    return output.transpose(0, 1)[None], None


def _token(queries, base, demonstrations, scaling, run):
    """Softmax: a kernel step for numerator and denominator; `[head, head_dim]` and the gate `[head]`."""
    (own_keys, own), (keys, shown) = base, demonstrations
    own, shown = (torch.cat([v, torch.ones(len(v), 1)], 1) for v in (own, shown))
    shift = max(float((scaling * keys @ torch.cat([own_keys, keys]).T).max()) if len(keys) else 0.0, 0.0)
    kernel = lambda a, b: torch.exp(scaling * a @ b.T - shift)  # noqa: E731
    before = kernel(queries, own_keys) @ own
    if not len(keys):
        return before[:, :-1] / before[:, -1:], torch.zeros(len(queries))
    predicted = kernel(keys, own_keys) @ own
    labels = len(keys) / run.rate * shown + (0 if run.fault == "no base in labels" else predicted)
    gradient = (predicted - labels) / len(keys)
    after = before - run.rate * kernel(queries, keys) @ gradient
    gate = 1 - before[:, -1] / after[:, -1]
    if run.fault == "no step in denominator":
        after[:, -1] = before[:, -1]
    return after[:, :-1] / after[:, -1:], gate


def _linear_token(queries, base, demonstrations, scaling, run):
    """[B] equation 3: neither softmax nor scale; the step on the weight by automatic differentiation."""
    (own_keys, own), (keys, shown) = base, demonstrations
    weight = own.T @ own_keys
    if len(keys):
        labels = len(keys) * shown.T + weight @ keys.T

        def loss(W):
            return (W @ keys.T - labels).square().sum(0).mean() / 2

        with torch.enable_grad():
            weight = gradient_step.gradient_step(weight, loss, 1.0)
    return (weight @ queries.T).T, torch.zeros(len(queries))


def _directly_linear(module, query, key, value, attention_mask=None, scaling=None, **_):
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    return ((query @ key.mT).tril() @ value).transpose(1, 2), None


AttentionInterface.register("iclgd_claims", _attention)
AttentionInterface.register("iclgd_linear", _directly_linear)


@dataclass(frozen=True)
class Prompt:
    """A tiny random model of transformers and a prompt for it: token 0, `M` demonstration tokens, the question."""

    model: torch.nn.Module
    tokens: Tensor
    M: int
    others: tuple[Tensor, ...]  # further prompts behind the same demonstrations

    def stock(self, tokens: Tensor | None = None, attention: str = "eager", **options) -> Tensor:
        """Logits `[token, vocabulary]` of the library's own pass, or of another attention's."""
        return self.run(tokens, attention, **options).logits[0]

    def run(self, tokens: Tensor | None, attention: str, **options):
        """What the library's classes return."""
        self.model.set_attn_implementation(attention)
        with float64.uncast(), torch.no_grad():
            return self.model((self.tokens if tokens is None else tokens)[None], **options)

    def recursion(self, tokens: Tensor | None = None, **options) -> tuple[Tensor, Recursion]:
        """Logits with one step in place of each attention layer, and what the recursion saw."""
        run = Recursion(self.M, **options)
        return self.stock(tokens, "iclgd_claims", recursion=run), run

    @property
    def own(self) -> list[int]:
        """Places of the prompt's own tokens."""
        return [0, *range(self.M + 1, len(self.tokens))]

    @property
    def alone(self) -> Tensor:
        """The prompt without demonstrations."""
        return self.tokens[self.own]

    def zero_shot_base(self, places: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values `[head, token, head_dim]` of each layer without demonstrations, own tokens at `places`."""
        run, found = Recursion(0), {}
        self.stock(self.alone, "iclgd_claims", recursion=run, position_ids=torch.tensor([places]))
        for layer, parts in run.seen.items():
            found[layer] = tuple(part.new_zeros(part.shape[0], len(self.tokens), part.shape[2]) for part in parts)
            for wide, part in zip(found[layer], parts, strict=True):
                wide[:, self.own] = part
        return found


@cache
def prompt(seed: int, family: str = "llama") -> Prompt:
    """Demonstrations and question drawn from `seed`; between one and three demonstrations."""
    generator = np.random.default_rng([10, seed])
    with float64.uncast():
        language_model = models.tiny_model(f"tiny-{family}", seed=seed, dtype=torch.float64)
        model = naive.stock(language_model)
    data = sources.load_task("snippets", "generated")
    layout = Layout.make(language_model.tokenizer, data.task, "eos")
    shown = select_demonstrations(data.train, int(generator.integers(1, 4)), seed, balanced=False)
    prefix = layout.prefix(shown)
    first = int(generator.integers(0, 200))
    asked = [layout.query(example, "prompt") for example in data.evaluation[first : first + N_QUESTIONS]]
    whole = [torch.tensor([*prefix, *query.tokens[: query.predict + 1]]) for query in asked]
    return Prompt(model, whole[0], len(prefix) - 1, tuple(whole))


@claim(
    "Q-logits",
    statement="In a Llama model, one kernel gradient step from the demonstrations in place of every attention layer, "
    "for each token and key/value head, gives the stock model's logits.",
    source="[C] Algorithm 1, Theorem 4.1 and Lemma 6.1, corrected; softmax as a ratio of two kernel steps: own",
    controls=[
        Control("from the second layer on, a reader's zero-shot base", {"base": "zero-shot states"}),
        Control("the first layer's base with its keys at their zero-shot positions", {"base": "zero-shot positions"}),
        Control("the denominator stays that of the base", {"fault": "no step in denominator"}),
        Control("query heads dealt to the groups in turn", {"fault": "cyclic"}),
        Control("Lemma 6.1 as printed: all M demonstration tokens for every function", {"fault": "all"}, erratum=(17,)),
    ],
)
@claim(
    "Q-rate",
    statement="Inside a Llama model too the rate of the implied step is a gauge: rates 0.01, 1 and M give one output.",
    source="[C] Theorem 3.1, corrected; own",
    controls=[Control("at rate M, labels without the base", {"rates": ("M",), "fault": "no base in labels"})],
    options={"rates": (0.01, 1.0, "M")},
)
@cache
def llama(seed: int, rates: tuple[float | str, ...] = (1.0,), base: str = "own", fault: str = "") -> list[float]:
    """Errors of the logits with one step in place of each attention layer."""
    given = prompt(seed)
    replaced = {}
    if base == "zero-shot states":
        replaced = given.zero_shot_base(given.own)
    elif base == "zero-shot positions":
        replaced = {0: given.zero_shot_base(list(range(len(given.own))))[0]}
    expected, errors = given.stock(), []
    for rate in rates:
        found, _ = given.recursion(rate=float(given.M) if rate == "M" else rate, fault=fault, replaced=replaced)
        errors += [error(found, expected), error(found[given.M + 1 :], expected[given.M + 1 :])]
    return errors


@claim(
    "Q-families",
    statement="The same recursion gives the logits of GPT-2, GPT-NeoX and OPT models: biases, LayerNorm, learned or "
    "partly rotary positions and parallel blocks make no difference.",
    controls=[Control("no step: the zero-shot logits", {"step": False})],
)
def q_families(seed: int, step: bool = True) -> list[float]:
    errors = []
    for family in ("gpt2", "gpt_neox", "opt"):
        given = prompt(seed, family)
        found = given.recursion()[0][given.own] if step else given.stock(given.alone)
        errors.append(error(found[1:], given.stock()[given.own][1:]))
    return errors


@claim(
    "Q-gate",
    statement="The gate Z_D / (Z_X + Z_D) of a head is the attention that the stock model pays to demonstrations.",
    source="own (page 04), inside a Llama model",
    controls=[Control("the share of visible tokens that are demonstrations", {"share": True})],
)
def q_gate(seed: int, share: bool = False) -> float:
    given = prompt(seed)
    paid = torch.stack(given.run(None, "eager", output_attentions=True).attentions)[:, 0]
    expected = paid[..., 1 : given.M + 1].sum(-1)  # [layer, head, token]
    if share:
        places = torch.arange(len(given.tokens))
        return error((places.clamp(max=given.M) / (places + 1)).expand_as(expected), expected)
    return error(torch.stack(given.recursion()[1].gates), expected)


@claim(
    "Q-linear",
    statement="With softmax and scale deleted, one step by automatic differentiation in every layer gives the logits "
    "of the linearised model.",
    source="[B] equations 3-4; [C] Theorem 4.1 and Lemma 6.1, corrected",
    controls=[Control("compared with the logits of the model as it is", {"attention": "eager"})],
)
def q_linear(seed: int, attention: str = "iclgd_linear") -> float:
    given = prompt(seed)
    return error(given.recursion(linear=True)[0], given.stock(attention=attention))


@claim(
    "Q-reading",
    statement="Linear attention with a softmax model's weights is another model: its logits at the answer are far from "
    "the softmax model's (mean relative error over questions, one tiny random Llama).",
    source="against reading [B] equation 3 as a description of the model that is used",
    status="empirical",
    side="above",
    controls=[Control("one kernel step in place of every softmax attention layer", {"softmax": True})],
)
def q_reading(seed: int, softmax: bool = False) -> Interval:
    given, errors = prompt(seed), []
    for tokens in given.others:
        found = given.recursion(tokens)[0] if softmax else given.stock(tokens, "iclgd_linear")
        errors.append(round(error(found[-1], given.stock(tokens)[-1]), 9))  # rounding errors are none
    return Interval(*intervals.over_examples(np.mean, np.array(errors)), len(errors), intervals.LEVEL)
