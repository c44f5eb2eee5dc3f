"""
What a run costs before it is made: floating-point operations, bytes of memory and moved, time at a measured speed.

One multiply-add counts as two operations. Only matrix products are counted: norms, softmax and activations are left
out. Attention counts the query-key pairs that the causal mask (and a sliding window) leaves. `full=True` counts whole
rectangles instead, as a plain implementation multiplies them and as torch's counter reports them. Padding is not work:
give padded lengths to count it too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from iclgd_helpers.engine import checkpoints, finetune, parts, prefix_attention
from iclgd_helpers.engine.models import PROBE_TOKENS, choose_device
from iclgd_helpers.engine.observe import BATCH_TOKENS
from iclgd_helpers.experiments.arms import ArmKind, kind, names
from iclgd_helpers.experiments.runs import Plan
from iclgd_helpers.experiments.updates import N_PERTURBED_QUERIES

PARALLEL = frozenset("phi cohere gptj".split())  # attention and feed-forward read the same input; others say so
SAYS_PARALLEL = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Work:
    """Floating-point operations by kind: linear layers, attention products, vocabulary projection."""

    linear: float = 0
    attention: float = 0
    head: float = 0

    @property
    def total(self) -> float:
        """All kinds."""
        return self.linear + self.attention + self.head

    def __add__(self, other: Work) -> Work:
        return Work(self.linear + other.linear, self.attention + other.attention, self.head + other.head)

    def __mul__(self, times: float) -> Work:
        return Work(self.linear * times, self.attention * times, self.head * times)


@dataclass(frozen=True)
class Shape:
    """
    Sizes of a causal language model; no weights are needed.

    `n_kv` counts the entries of the K and V projections (biases included). `n_stored` counts those of the matrices that
    hold them, which in a fused projection include Q. `windows`: how many tokens a layer sees, None for all.
    `feed_forward`: entries of the matrices behind attention that a token meets, layer by layer; of experts, those that
    it is sent to.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    gated: bool
    feed_forward: tuple[int, ...]
    parallel: bool  # attention and feed-forward read the same input (GPT-NeoX)
    fused: bool
    vocabulary: int
    d_embedding: int
    windows: tuple[int | None, ...]
    n_parameters: int
    n_kv: int
    n_stored: int

    @classmethod
    def of(cls, config: transformers.PretrainedConfig) -> Shape:
        """
        The shape of the model that `config` describes.

        Raises
        ------
        InputError
            if its parts cannot be found.
        """
        kind = config.model_type
        name = config.name_or_path or kind
        with checkpoints.reading(name), torch.device("meta"):  # parameters without storage
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        found = parts.find(model, name)
        heads, d_model = config.num_attention_heads, config.hidden_size
        head_dim = getattr(config, "head_dim", None) or d_model // heads
        projections = [getattr(attention, name) for attention in found.attentions for name in found.projections]
        stored = sum(p.numel() for projection in projections for p in projection.parameters())
        fused = len(found.projections) == 1
        outputs = parts.n_outputs(projections[0])
        d_key = (outputs - heads * head_dim) // 2 if fused else outputs
        biases = 2 * d_key if projections[0].bias is not None else 0
        matrices = [_feed_forward(*pair, config) for pair in zip(found.layers, found.attentions, strict=True)]
        gated = any("gate" in name for of_layer in matrices for name in of_layer)
        feed_forward = tuple(sum(of_layer.values()) for of_layer in matrices)
        return cls(
            n_layers=config.num_hidden_layers,
            d_model=d_model,
            n_heads=heads,
            n_kv_heads=d_key // head_dim,
            head_dim=head_dim,
            d_ff=max(feed_forward) // ((3 if gated else 2) * d_model),
            gated=gated,
            feed_forward=feed_forward,
            parallel=kind in PARALLEL or any(getattr(config, name, False) for name in SAYS_PARALLEL),
            fused=fused,
            vocabulary=config.vocab_size,
            d_embedding=getattr(config, "word_embed_proj_dim", None) or d_model,
            windows=_windows(config),
            n_parameters=sum(p.numel() for p in model.parameters()),
            n_kv=config.num_hidden_layers * (2 * d_model * d_key + biases),
            n_stored=stored,
        )

    @property
    def d_query(self) -> int:
        """Entries of a token's queries, over all heads."""
        return self.n_heads * self.head_dim

    @property
    def d_key(self) -> int:
        """Entries of a token's keys, over all heads."""
        return self.n_kv_heads * self.head_dim

    def truncated(self, n_layers: int) -> Shape:
        """The same model with its first `n_layers` layers; parameter counts are left as they were."""
        few: dict[str, Any] = {"windows": self.windows[:n_layers], "feed_forward": self.feed_forward[:n_layers]}
        return replace(self, n_layers=n_layers, **few)

    # Entries of one layer's matrices.
    @property
    def _qkv(self) -> int:
        return self.d_model * (self.d_query + 2 * self.d_key)

    @property
    def _out(self) -> int:
        return self.d_query * self.d_model

    @property
    def _matrices(self) -> int:
        """All that a token is multiplied with, the head left out."""
        return self.n_layers * (self._qkv + self._out) + sum(self.feed_forward) + 2 * self._projections

    @property
    def _projections(self) -> int:
        """Entries between a narrower embedding and the layers, in one direction (OPT 350M)."""
        return self.d_model * self.d_embedding if self.d_embedding != self.d_model else 0


def _feed_forward(layer: nn.Module, attention: nn.Module, config: transformers.PretrainedConfig) -> dict[str, int]:
    """Name of a matrix beside attention -> how many of its entries a token meets; experts lie side by side in one."""
    norms = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
    others = {id(p) for module in (attention, *norms) for p in module.parameters()}
    chosen = getattr(config, "num_experts_per_tok", None)
    return {
        name: parameter.numel() if parameter.ndim == 2 else parameter.numel() // len(parameter) * (chosen or 1)
        for name, parameter in layer.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in others and not name.endswith("bias")
    }


def _windows(config: transformers.PretrainedConfig) -> tuple[int | None, ...]:
    n_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if config.model_type == "gpt_neo":
        return tuple(config.window_size if kind == "local" else None for kind in config.attention_layers)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] * n_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# --------------------------------------------------------------------------------------------------------- operations
def pairs(tokens: int, prefix: int = 0, window: int | None = None, full: bool = False) -> int:
    """Query-key pairs of `tokens` tokens behind `prefix` others: what causality (and `window`) leaves of them."""
    if full:
        return tokens * (prefix + tokens)
    if window is None or prefix + tokens <= window:
        return tokens * prefix + tokens * (tokens + 1) // 2
    growing = max(0, window - prefix)  # tokens that still see everything before them
    return growing * prefix + growing * (growing + 1) // 2 + (tokens - growing) * window


def _attention(
    shape: Shape, tokens: int, prefix: int, full: bool, products: int = 2, layers: slice = slice(None)
) -> int:
    """`products` matrix products over the pairs (2 in a forward pass: scores, and weights times values)."""
    seen = sum(pairs(tokens, prefix, window, full) for window in shape.windows[layers])
    return 2 * products * shape.d_query * seen


def head(shape: Shape, rows: int) -> Work:
    """The vocabulary projection at `rows` positions; its input gradient costs the same."""
    return Work(head=2 * rows * shape.d_embedding * shape.vocabulary)


def forward(shape: Shape, tokens: int, prefix: int = 0, rows: int = 0, full: bool = False) -> Work:
    """Forward pass of `tokens` tokens behind `prefix` cached ones, with the vocabulary projection at `rows`."""
    return Work(2 * tokens * shape._matrices, _attention(shape, tokens, prefix, full)) + head(shape, rows)


def recording(shape: Shape, tokens: int, n_classes: int) -> Work:
    """What observing a query adds: scores of one position, and the verbalizers' logits at every layer."""
    scores = 2 * shape.n_layers * shape.d_query * tokens
    return Work(2 * shape.n_layers * shape._projections, scores, 2 * shape.n_layers * shape.d_embedding * n_classes)


def _layers_backward(shape: Shape, tokens: int) -> int:
    """Linear part of all layers' backward passes, each from its output down to its K and V matrices' gradients."""
    gradients = shape._qkv if shape.fused else 2 * shape.d_model * shape.d_key  # a fused matrix has one gradient
    behind = 0 if shape.parallel else sum(shape.feed_forward)
    return 2 * tokens * (shape.n_layers * (shape._out + gradients) + behind)


def _cut_off_products(shape: Shape) -> int:
    """Products in the backward pass of attention whose input has no gradient: that of the queries is not needed."""
    return 4 if shape.fused else 3  # but a fused matrix makes no difference between queries and keys


def standard_step(shape: Shape, tokens: int, rows: int, full: bool = False) -> Work:
    """One step of standard finetuning: backward through the head and all layers, gradients of K and V only."""
    # Every layer but the lowest passes the gradient on to its input.
    passed = (shape.n_layers - 1) * shape._qkv + (sum(shape.feed_forward[1:]) if shape.parallel else 0)
    linear = _layers_backward(shape, tokens) + 2 * tokens * (passed + shape._projections)
    lowest = _attention(shape, tokens, 0, full, _cut_off_products(shape), slice(0, 1))
    backward = Work(linear, lowest + _attention(shape, tokens, 0, full, 4, slice(1, None)))
    return forward(shape, tokens, 0, rows, full) + backward + head(shape, rows)


def joint_step(shape: Shape, tokens: int, rows: int, full: bool = False) -> Work:
    """One layer-causal step: every layer pays the head, forward and back, but no gradient passes between layers."""
    lens = shape.n_layers * 2 * 2 * tokens * shape._projections
    own = Work(
        _layers_backward(shape, tokens) + lens,
        _attention(shape, tokens, 0, full, _cut_off_products(shape)),
    )
    return forward(shape, tokens, 0, 0, full) + own + head(shape, rows) * (2 * shape.n_layers)


def sequential_step(shape: Shape, tokens: int, rows: int, full: bool = False) -> Work:
    """A layer-causal step in which each layer runs again after its update."""
    again = forward(shape, tokens, 0, 0, full) + Work(-4 * tokens * shape._projections)
    return joint_step(shape, tokens, rows, full) + again


STEPS = {"standard": standard_step, "joint": joint_step, "sequential": sequential_step}


def loss_rows(tokens: int, loss: str, label_rows: int = 1) -> int:
    """Positions of a training sequence that go through the head; `label_rows` are those that predict labels."""
    return tokens - 1 if loss == "all" else label_rows


# -------------------------------------------------------------------------------------------------------------- bytes
def weights_bytes(shape: Shape, dtype: str) -> int:
    """All parameters."""
    return shape.n_parameters * ITEMSIZE[dtype]


def update_bytes(shape: Shape) -> int:
    """One set of K/V projections, in float32."""
    return shape.n_stored * ITEMSIZE["float32"]


def prefix_bytes(shape: Shape, tokens: int, dtype: str) -> int:
    """Keys and values of a prefix in all layers."""
    return 2 * shape.n_layers * shape.d_key * tokens * ITEMSIZE[dtype]


def batch_bytes(shape: Shape, lengths: Sequence[int], prefix: int, arms: int, dtype: str) -> int:
    """Largest need of one batch: a layer's activations, scores or logits, and what all arms observed of it."""
    size, rows, longest = ITEMSIZE[dtype], len(lengths), max(lengths)
    tokens = rows * longest
    widest = max((3 if shape.gated else 2) * shape.d_ff, 2 * shape.d_query + 2 * shape.d_key)
    at_once = min(prefix_attention.SCORES_AT_ONCE, shape.n_heads * tokens * (prefix + longest))
    scores = 2 * at_once * 4  # no fused kernel
    logits = rows * shape.vocabulary * (size + 8)
    observed = rows * shape.n_layers * (shape.d_model + shape.n_heads * longest) * 4
    return tokens * (3 * shape.d_model + widest) * size + max(scores, logits) + arms * observed


def training_bytes(shape: Shape, tokens: int, rows: int, dtype: str) -> int:
    """A standard step: what the backward pass needs of every layer, the logits, gradients and master copies."""
    size = ITEMSIZE[dtype]
    kept = 6 * shape.d_model + 2 * (shape.d_query + shape.d_key) + (4 if shape.gated else 2) * shape.d_ff
    logits = rows * min(shape.vocabulary, finetune.WORDS_AT_ONCE)
    return shape.n_layers * tokens * kept * size + logits * (size + 8) + 3 * update_bytes(shape)


# ------------------------------------------------------------------------------------------------------- bytes moved
PASSES = {"standard": 2, "joint": 2, "sequential": 3}  # of a step through the layers' matrices: forward, back, again


def pass_bytes(shape: Shape, tokens: int, prefix: int = 0, rows: int = 0, dtype: str = "float16") -> int:
    """
    Bytes that a forward pass moves between memory and processor, at least.

    ``size (M + [rows > 0] d V + rows V + 2 L d_k (prefix + tokens))``. M entries of the layers' matrices are read once,
    whatever the number of tokens. The head, d V, is read where a position is projected, and its logits are written. Of
    the keys and values of L layers, those of the prefix are read and the pass's own written. What passes from product
    to product is left out, for it may stay in a cache. Of experts, those of one token are counted.
    """
    head_read = shape.d_embedding * shape.vocabulary if rows else 0
    keys_values = 2 * shape.n_layers * shape.d_key * (prefix + tokens)
    return ITEMSIZE[dtype] * (shape._matrices + head_read + rows * shape.vocabulary + keys_values)


def step_bytes(shape: Shape, method: str, tokens: int, dtype: str = "float16") -> int:
    """
    Bytes that a finetuning step moves, at least: what each pass through the layers and the head reads, and the update.

    ``size (passes M + heads d V) + 4 U``: see `PASSES`. The head is read once, with its gradient. A sequential step
    reads it for each layer, a joint one for as many layers as fit into `STEP_TOKENS` rows. U is `update_bytes`:
    gradients are written and read, weights read and written.
    """
    turns = -(-shape.n_layers * tokens // finetune.STEP_TOKENS)
    heads = {"standard": 1, "joint": turns, "sequential": shape.n_layers}[method]
    read = PASSES[method] * shape._matrices + heads * shape.d_embedding * shape.vocabulary
    return ITEMSIZE[dtype] * read + 4 * update_bytes(shape)


def run_bytes(
    shape: Shape,
    prefix: int,
    query_lengths: Sequence[int],
    training_lengths: Sequence[int],
    *,
    n_compared: int | None = None,
    controls: bool = True,
    dtype: str = "float16",
    bare: int = 1,
    batch_tokens: int = 2**14,
) -> dict[str, float]:
    """Bytes that the stages of `run_cost` move, by the same names and parameters, in half precision by default."""
    tuning = {method: sum(step_bytes(shape, method, tokens, dtype) for tokens in training_lengths) for method in STEPS}
    moved: dict[str, float] = {f"finetune {method}": size for method, size in tuning.items()}
    if controls:
        moved["finetune controls"] = 2 * tuning["standard"]
    compared = query_lengths[:n_compared]
    before = [prefix if kind(name).in_context else bare for name in names(controls)]

    def scoring(prefixes: Sequence[int], lengths: Sequence[int]) -> float:
        return sum(_scoring_bytes(shape, tokens, lengths, dtype, batch_tokens) for tokens in prefixes)

    moved["observe, all arms"] = scoring(before, compared)
    moved["observe, other questions"] = scoring([bare, prefix], query_lengths[len(compared) :])
    return moved


def _scoring_bytes(shape: Shape, prefix: int, lengths: Sequence[int], dtype: str, batch_tokens: int) -> float:
    """The prefix once, and then every batch: which reads the matrices, the head, and the prefix's keys and values."""
    ordered, moved = sorted(lengths, reverse=True), float(pass_bytes(shape, prefix, dtype=dtype))
    while ordered:
        at_once = max(1, batch_tokens // ordered[0])
        batch, ordered = ordered[:at_once], ordered[at_once:]
        moved += pass_bytes(shape, sum(batch), prefix, len(batch), dtype)
    return moved


# --------------------------------------------------------------------------------------------------------------- run
@dataclass(frozen=True)
class Cost:
    """
    `stages`: operations by stage of the run; `memory`: bytes that are there at the same time, by what they hold.

    Peak memory is of the model and its data: the interpreter and its libraries (about half a gigabyte) come on top.
    """

    stages: dict[str, Work]
    memory: dict[str, int]

    @property
    def flops(self) -> float:
        """Operations of all stages."""
        return sum(work.total for work in self.stages.values())

    @property
    def peak_memory_bytes(self) -> int:
        """All that is there at the same time."""
        return sum(self.memory.values())

    def table(self, flops: float | None = None) -> list[dict[str, Any]]:
        """One row a stage, then the sum: TFLOP by kind, and seconds at `flops` FLOP/s."""
        rows = []
        for name, work in (*self.stages.items(), ("all", sum(self.stages.values(), Work()))):
            kinds = {kind: getattr(work, kind) / 1e12 for kind in ("linear", "attention", "head", "total")}
            rows.append({"stage": name, **kinds, **({"seconds": work.total / flops} if flops else {})})
        return rows


def run_cost(
    shape: Shape,
    prefix: int,
    query_lengths: Sequence[int],
    training_lengths: Sequence[int],
    *,
    n_compared: int | None = None,
    calibration_lengths: Sequence[int] = (),
    controls: bool = True,
    chosen: Sequence[str] = (),
    only: Collection[str] | None = None,
    conditioning: bool = True,
    dtype: str = "float32",
    loss: str = "all",
    n_classes: int = 2,
    query_rows: int = 1,
    label_rows: int = 1,
    bare: int = 1,
    batch_tokens: int = BATCH_TOKENS["cpu"],
) -> Cost:
    """
    Cost of everything that `experiment.compute` does for one run.

    Parameters
    ----------
    prefix : tokens of the in-context prefix, BOS included; the shuffled one is as long.
    query_lengths, training_lengths : tokens of each query (those of labels included), and of each training sequence
        (BOS and label included).
    n_compared : queries that all arms see, from the first; zero-shot and in-context see all of them.
    calibration_lengths : tokens of each text on which priors are read; all arms see it.
    chosen : methods that are run at a chosen rate, too.
    only : the arms that are run beside zero-shot and in-context; by default all, with controls if asked for.
    conditioning : whether each method is run again with perturbed weights (never below float32).
    query_rows, label_rows : positions of a query, and of a training sequence, that predict labels' tokens; more than 1
        for labels of several tokens.
    bare : tokens before a query without demonstrations: BOS, and what an instruction or a chat template adds.
    batch_tokens : padded query tokens in a batch.
    """
    compared = query_lengths[:n_compared]
    arms = {name: kind(name) for name in names(controls, chosen, only)}
    before = {name: prefix if arm.in_context else bare for name, arm in arms.items()}
    steps = [(tokens, loss_rows(tokens, loss, label_rows)) for tokens in training_lengths]
    tuning = {method: sum((STEPS[method](shape, *step) for step in steps), Work()) for method in STEPS}

    def observing(prefixes: Sequence[int], lengths: Sequence[int]) -> Work:
        return _observing(shape, prefixes, lengths, query_rows, n_classes)

    methods = [method for method in STEPS if method in arms]
    stages = {f"finetune {method}": tuning[method] for method in methods}
    if trained := sum(name in arms for name in ("standard_shuffled", "untrained_standard")):
        stages["finetune controls"] = tuning["standard"] * trained
    if again := [method for method in chosen if method in methods]:
        stages["finetune at chosen rates"] = sum((tuning[method] for method in again), Work())
    if conditioning and ITEMSIZE[dtype] >= 4:
        read = observing([bare, bare], query_lengths[:N_PERTURBED_QUERIES]) * len(methods)
        stages["conditioning"] = sum((tuning[method] for method in methods), read)
    stages["observe, all arms"] = observing(list(before.values()), [*compared, *calibration_lengths]) + _probe(shape)
    stages["observe, other questions"] = observing([bare, prefix], query_lengths[len(compared) :])
    observing_bytes = _observing_bytes(shape, prefix, query_lengths, len(_trained(arms)), dtype, batch_tokens)
    memory = {
        "weights": weights_bytes(shape, dtype),
        "K/V updates, or random weights of a control": _changed_bytes(shape, arms, dtype),
        "prefixes": sum(prefix_bytes(shape, tokens, dtype) for tokens in before.values()),
        "activations": max(observing_bytes, training_bytes(shape, *max(steps), dtype) - update_bytes(shape)),
    }
    return Cost(stages, memory)


def _observing(shape: Shape, prefixes: Sequence[int], query_lengths: Sequence[int], rows: int, n_classes: int) -> Work:
    """Every query behind every prefix, and the prefixes themselves, which are read once."""
    work = Work()
    for prefix in prefixes:
        work += forward(shape, prefix)
        for tokens in query_lengths:
            work += forward(shape, tokens, prefix, rows) + recording(shape, tokens, n_classes)
    return work


def _probe(shape: Shape) -> Work:
    """What `LanguageModel.first_layer_sees_the_prompt` computes."""
    scores = Work(attention=2 * shape.n_layers * shape.d_query * PROBE_TOKENS)
    return (forward(shape, PROBE_TOKENS) + scores) * 2


def _trained(arms: Mapping[str, ArmKind]) -> list[ArmKind]:
    return [arm for name, arm in arms.items() if not name.startswith("untrained")]


def _changed_bytes(shape: Shape, arms: Mapping[str, ArmKind], dtype: str) -> int:
    """The updates of the trained arms, which are given up before random weights take the place of the model's own."""
    # While a control is made from another update, the change stands beside it, and so do the original values in
    # float32 where the model does not hold them itself.
    controls, untrained = {"random_update", "norm_matched"} & set(arms), "untrained_zero_shot" in arms
    beside = bool(controls) * (1 if ITEMSIZE[dtype] >= 4 else 2)
    updates = (sum(arm.updated for arm in _trained(arms)) + beside) * update_bytes(shape)
    return max(updates, weights_bytes(shape, dtype) + update_bytes(shape) if untrained else 0)


def _observing_bytes(
    shape: Shape, prefix: int, query_lengths: Sequence[int], n_arms: int, dtype: str, batch_tokens: int
) -> int:
    # Longest first, as observe.batches packs them; a short batch holds more queries, so both ends are looked at.
    ends = (max(query_lengths), min(query_lengths))
    batches = [[length] * min(len(query_lengths), max(1, batch_tokens // length)) for length in ends]
    observing = (batch_bytes(shape, batch, prefix, n_arms, dtype) for batch in batches)
    return max(*observing, batch_bytes(shape, [prefix], 0, 0, dtype))


def lengths(plan: Plan) -> tuple[int, list[int], list[int]]:
    """Tokens of a run's in-context prefix, of each query, and of each training sequence."""
    layout = plan.layout
    queries = [len(query.tokens) for query in plan.queries]
    training = [layout.training_sequence(example).length(plan.parameters.loss) for example in plan.training]
    return len(layout.prefix(plan.demonstrations)), queries, training


def of_run(plan: Plan) -> Cost:
    """Cost of a planned run: its tokens and its model's configuration are known, weights are not needed."""
    given = plan.parameters
    device = choose_device(given.device).split(":")[0]
    scored = plan.queries[0].labels
    tokens = list(map(len, scored))
    in_training = sum(tokens) if given.loss == "label_space" and max(tokens) > 1 else max(tokens)
    return run_cost(
        Shape.of(plan.config),
        *lengths(plan),
        n_compared=plan.n_compared,
        calibration_lengths=[len(query.tokens) for query in plan.calibration],
        controls=given.controls,
        chosen=tuple(given.chosen_rates or ()),
        only=given.arms,
        conditioning=given.conditioning,
        dtype=given.dtype,
        loss=given.loss,
        n_classes=len(scored),
        query_rows=1 + sum(n - 1 for n in tokens),
        label_rows=in_training,
        bare=len(plan.layout.prefix()),
        batch_tokens=BATCH_TOKENS.get(device, 2**14),  # as `observe.batches` has it
    )


# --------------------------------------------------------------------------------------------------------------- time
def device_rate(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product on the device, now: what no run of a model exceeds."""
    device, best = choose_device(device), 0.0
    side = 8192 if device.startswith("cuda") else 2048
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
