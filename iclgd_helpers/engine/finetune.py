"""
Finetuning of the key and value projections: standard, and layer-causal.

One stochastic gradient step for each demonstration, in order, at a fixed rate: no momentum, no decay (protocol of Dai
et al. 2023 and Bar Natan et al.). The result is a `KVUpdate`; the model itself is as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from iclgd_helpers.data.token_layout import TokenTree, TrainingSequence
from iclgd_helpers.engine.models import KVUpdate, LanguageModel, Trainable, enough_memory
from iclgd_helpers.engine.prefix_attention import Call, precise_dtype
from iclgd_helpers.errors import InputError

METHODS = ("standard", "joint", "sequential")
LOSS_SCALE = 2.0**12  # of float16; a power of two, so that scaling itself rounds nothing
LEARNER_BYTES, STEP_TOKENS = 2**30, 512  # weights of the learners, and tokens before the head, held side by side
WORDS_AT_ONCE = 4096  # rows of the head that are multiplied while they are in a cache
FEW_ROWS = 256  # up to so many, one product of a BLAS library leaves its threads waiting for each other

Inputs = tuple[Tensor, ...]  # what a layer's module is called with
Keywords = dict[str, Any]
Recompute = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """
    What a step does.

    Attributes
    ----------
    learning_rate
        of plain gradient descent.
    loss
        `all`: mean over the tokens after BOS of -log p; `label`: -s_y, where s_c is the score of class c's label
        (`Layout.label_score`) and y the example's class; `label_space`: log Σ_c exp(s_c) - s_y.
    clip, clip_value
        L2 norm of all K/V gradients together (`global`), of each layer's (`per_layer`), or a bound on each entry
        (`elementwise`); `none`.
    """

    learning_rate: float
    loss: str = "all"
    clip: str = "none"
    clip_value: float | None = None

    @property
    def bound(self) -> float:
        """`clip_value` where something is clipped."""
        if self.clip_value is None:
            raise ValueError(f"clip={self.clip} needs a clip_value")
        return self.clip_value


@dataclass(frozen=True)
class Learner:
    """One of several finetunings that run side by side: its examples, its settings, and the weights it starts from."""

    sequences: Sequence[TrainingSequence]
    settings: Settings
    start: KVUpdate | None = None


@dataclass(frozen=True)
class Finetuned:
    """
    What finetuning gave.

    Attributes
    ----------
    update
        the weights after the last step.
    losses
        `[step, 1]` (standard) or `[step, layer]` (layer-causal), before each step, nats.
    gradient_norms
        `[step, layer]`, L2 over a layer's K and V entries, of this step alone, before clipping.
    """

    update: KVUpdate
    losses: Tensor
    gradient_norms: Tensor

    @property
    def diverged(self) -> bool:
        """Whether a loss or a weight is no finite number any more."""
        return not all(bool(tensor.isfinite().all()) for tensor in (self.losses, *self.update.values))


def finetune(
    language_model: LanguageModel, sequences: Sequence[TrainingSequence], method: str, settings: Settings
) -> Finetuned:
    """One step for each of `sequences`; methods and errors as in `finetune_together`."""
    return finetune_together(language_model, [Learner(sequences, settings)], method)[0]


def finetune_together(
    language_model: LanguageModel,
    learners: Sequence[Learner],
    method: str,
    on_step: Callable[[], object] = lambda: None,
) -> list[Finetuned]:
    """
    Finetune each learner by itself, with one pass of the model for all: they share every weight but K and V.

    `standard` descends the final loss. `joint` and `sequential` give each layer the detached output of the layer
    below and a loss of its own through the final norm and the head. `joint` updates all layers at once (the original
    code); `sequential` updates each layer before the next one is computed (the paper's text).

    Parameters
    ----------
    learners
        of one loss and number of steps. Those whose i-th sequences are equally long share the passes.
    method
        one of `METHODS`.
    on_step
        called once for each step of each learner.

    Returns
    -------
    what each learner's finetuning gave, in their order.

    Raises
    ------
    InputError
        for an unknown method, and for global clipping with `sequential`: the global norm is not known when the first
        layer is updated.
    """
    if method not in METHODS:
        raise InputError(f"unknown finetuning method {method!r}: known are {', '.join(METHODS)}")
    if method == "sequential" and any(learner.settings.clip == "global" for learner in learners):
        raise InputError(
            "clip=global needs all gradients before any update: use per_layer or elementwise for sequential"
        )
    alike: dict[Any, list[int]] = {}
    for number, learner in enumerate(learners):
        shape = tuple((len(sequence.trunk), len(sequence.answer), sequence.labels) for sequence in learner.sequences)
        alike.setdefault(shape, []).append(number)
    results: dict[int, Finetuned] = {}
    for numbers in alike.values():
        at_once = _learners_at_once(language_model, [learners[i] for i in numbers])
        for group in (numbers[first : first + at_once] for first in range(0, len(numbers), at_once)):
            finetuned = _finetune_group(language_model, [learners[i] for i in group], method, on_step)
            results |= dict(zip(group, finetuned, strict=True))
    return [results[number] for number in range(len(learners))]


def _finetune_group(
    language_model: LanguageModel,
    group: Sequence[Learner],
    method: str,
    on_step: Callable[[], object],
) -> Iterator[Finetuned]:
    """All steps of learners whose weights are held side by side."""
    step = {"standard": _standard_step, "joint": _joint_step, "sequential": _sequential_step}[method]
    losses, norms = [], []
    with _training(language_model, group) as descent:
        for sequences in zip(*(learner.sequences for learner in group), strict=True):
            loss, norm = step(descent, Targets.of(sequences, descent.loss, language_model.device))
            losses.append(loss.cpu())
            norms.append(norm)
            for _learner in group:
                on_step()
        updates = descent.updates()
    return map(Finetuned, updates, torch.stack(losses, 1), torch.stack(norms, 1))


def _learners_at_once(language_model: LanguageModel, learners: Sequence[Learner]) -> int:
    """How many learners' weights, and tokens of a step, are held side by side."""
    one = sum(trainable.parameter.numel() for trainable in language_model.trainables) * 4
    longest = max((len(sequence.tokens) for learner in learners for sequence in learner.sequences), default=1)
    return max(1, min(LEARNER_BYTES // one, STEP_TOKENS // longest))


class _Descent:
    """
    The trainable weights of a group of learners, `[learner, …]`; those of a half-precision model are held in float32.

    Losses and norms are `[learner, layer]`.
    """

    def __init__(self, language_model: LanguageModel, learners: Sequence[Learner]) -> None:
        self.language_model, self.learners = language_model, learners
        self.loss = learners[0].settings.loss
        self.trainables = language_model.trainables
        starts = [(learner.start or language_model.original()).values for learner in learners]
        self.weights = [torch.stack(values).requires_grad_() for values in zip(*starts, strict=True)]
        self.rates = self._for_each([learner.settings.learning_rate for learner in learners])
        bounds = [s.bound if s.clip == "elementwise" else torch.inf for s in (x.settings for x in learners)]
        self.bounds = self._for_each(bounds) if min(bounds) < torch.inf else None
        self.scale = LOSS_SCALE if language_model.dtype == torch.float16 else 1.0
        self.of_layer: list[list[int]] = [[] for _ in range(language_model.n_layers)]
        for index, trainable in enumerate(self.trainables):
            self.of_layer[trainable.layer].append(index)

    def _for_each(self, values: Sequence[float]) -> Tensor:
        """A number of each learner, in the weights' dtype."""
        return torch.tensor(values, dtype=self.weights[0].dtype, device=self.weights[0].device)

    def updates(self) -> list[KVUpdate]:
        """The learners' present weights."""
        held = [weight.detach().unbind() for weight in self.weights]
        return [KVUpdate(values) for values in zip(*held, strict=True)]

    def gradients(self, losses: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Gradient of the sum of `losses` (`[…, learner]`) for the weights of these layers, Q entries set to 0."""
        chosen = [index for layer in layers for index in self.of_layer[layer]]
        grads = self._unscaled(losses, [self.weights[i] for i in chosen])
        return {i: self.trainables[i].masked(gradient) for i, gradient in zip(chosen, grads, strict=True)}

    def _unscaled(self, losses: Tensor, weights: list[Tensor]) -> Sequence[Tensor]:
        """
        Gradients computed from a multiple of the loss, so that float16 does not round small ones to 0.

        Where they overflow, a smaller multiple is tried: no step is skipped, as the original code's loss scaling would.
        A learner whose loss is no number any more has diverged, which no multiple mends.
        """
        if self.scale == 1.0:
            return torch.autograd.grad(losses.sum(), weights)
        alive = losses.detach().view(-1, len(self.learners)).isfinite().all(0)
        while True:
            scaled = torch.autograd.grad(losses.sum() * self.scale, weights, retain_graph=True)
            if all(bool(gradient[alive].isfinite().all()) for gradient in scaled):
                return [gradient / self.scale for gradient in scaled]
            if self.scale < 1 / LOSS_SCALE:
                raise InputError("gradients overflow in float16: pass dtype=bfloat16 or dtype=float32")
            self.scale /= 2

    def norms(self, gradients: dict[int, Tensor]) -> Tensor:
        """L2 norm over each layer's gradients, `[learner, layer]`; 0 for a layer without any."""
        squares = torch.zeros(len(self.learners), len(self.of_layer), dtype=torch.float64)
        for index, gradient in gradients.items():
            norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
            squares[:, self.trainables[index].layer] += norm.square().cpu()
        return squares.sqrt()

    @torch.no_grad()
    def descend(self, gradients: dict[int, Tensor], norms: Tensor) -> None:
        """Clip and take the step."""
        factors = torch.stack([_factors(norm, x.settings) for norm, x in zip(norms, self.learners, strict=True)])
        lengths = self.rates[:, None] * factors.to(self.rates)  # [learner, layer]
        for index, gradient in gradients.items():
            ones = (1,) * (gradient.ndim - 1)
            if self.bounds is not None:
                bound = self.bounds.view(-1, *ones)
                gradient = gradient.clamp(-bound, bound)
            length = lengths[:, self.trainables[index].layer].view(-1, *ones)
            self.weights[index].addcmul_(gradient, length, value=-1)


def _factors(norms: Tensor, settings: Settings) -> Tensor:
    """What clipping by norm multiplies each layer's gradients with, `[layer]`."""
    if settings.clip not in ("global", "per_layer"):
        return torch.ones_like(norms)
    size = norms.square().sum().sqrt().expand_as(norms) if settings.clip == "global" else norms
    return (settings.bound / size.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)


@contextmanager
def _training(language_model: LanguageModel, learners: Sequence[Learner]) -> Iterator[_Descent]:
    """
    Sequence i of a batch is projected to keys and values by the weights of learner i; the model itself is untouched.

    A half-precision model computes in its own precision, but the weights, their gradients and the steps are float32:
    a step too small for half precision is not lost before the next one is added.
    """
    mixed: AbstractContextManager[object] = nullcontext()
    if language_model.dtype.itemsize < 4:  # a cache of cast weights would hide each step from the passes that follow
        mixed = torch.autocast(language_model.device.type, language_model.dtype, cache_enabled=False)
    patched: list[nn.Module] = []
    try:
        with mixed, enough_memory("a finetuning step"):
            descent = _Descent(language_model, learners)
            for projection, parts in _projections(descent).items():
                linear = isinstance(projection, nn.Linear)
                projection.forward = functools.partial(_project, descent.weights, parts, linear)
                patched.append(projection)
            yield descent
    finally:
        for projection in patched:
            del projection.forward  # the class's own is found again


def _projections(descent: _Descent) -> dict[nn.Module, dict[str, int]]:
    """Each module that projects to keys or values: which weight of the descent is its `weight`, its `bias`."""
    found: dict[nn.Module, dict[str, int]] = {}
    for index, trainable in enumerate(descent.trainables):
        projection, _, part = trainable.name.rpartition(".")
        module = getattr(descent.language_model.attentions[trainable.layer], projection)
        found.setdefault(module, {})[part] = index
    return found


def _project(weights: list[Tensor], parts: dict[str, int], linear: bool, states: Tensor) -> Tensor:
    """`states` (`[learner, token, d_in]`) times each learner's own weight, plus its bias: `[learner, token, d_out]`."""
    weight = weights[parts["weight"]]  # [learner, d_out, d_in] of nn.Linear; GPT-2's Conv1D has [learner, d_in, d_out]
    product = states @ (weight.transpose(1, 2) if linear else weight)
    return product + weights[parts["bias"]][:, None].to(product.dtype) if "bias" in parts else product


@dataclass(frozen=True)
class Targets:
    """
    What one step of several learners reads and predicts; their sequences are equally long.

    Attributes
    ----------
    tokens
        `[learner, token]`, what the model reads.
    places
        `[target]`, index of the token at which each target is predicted.
    words
        `[learner, target]`, the tokens to be predicted.
    classes
        `[learner]`, the examples' classes, for a loss over the classes; else None.
    labels
        `[class][token]`, whose tokens the targets then are, one label behind the other; all of one token: they are
        predicted at the same place, and the targets are left out.
    is_mean
        whether a sequence's loss, or its label's score, is the mean over targets and not the sum.
    tree
        which kind of sequence the tokens are.
    """

    tokens: Tensor
    places: Tensor
    words: Tensor
    classes: Tensor | None
    labels: tuple[tuple[int, ...], ...]
    is_mean: bool
    tree: TokenTree | None = None

    @classmethod
    def of(cls, sequences: Sequence[TrainingSequence], loss: str, device: torch.device) -> Targets:
        """The targets of a loss, see `Settings`."""
        first, tree, classes = sequences[0], None, None
        rows, start = [sequence.tokens for sequence in sequences], len(first.trunk)
        places = list(range(len(first.tokens) - 1))
        if loss == "label":
            places = places[start - 1 : start - 1 + len(first.labels[first.label])]
        words = [[row[place + 1] for place in places] for row in rows]
        if loss == "label_space":
            classes = torch.tensor([sequence.label for sequence in sequences], device=device)
            places, words = [start - 1], [[] for _row in rows]
            if (tree := first.tree) is not None:
                rows = [TokenTree.of(sequence.trunk, sequence.labels).tokens for sequence in sequences]
                places = [place for label in tree.places for place in label]
                words = [[word for label in sequence.labels for word in label] for sequence in sequences]
        return cls(
            tokens=torch.tensor(rows, device=device),
            places=torch.tensor(places, device=device),
            words=torch.tensor(words, dtype=torch.long, device=device),
            classes=classes,
            labels=first.labels,
            is_mean=loss == "all" or first.label_score == "mean",
            tree=tree,
        )

    def repeated(self, times: int) -> Targets:
        """The same for `times` as many sequences."""
        classes = None if self.classes is None else self.classes.repeat(times)
        return replace(self, tokens=self.tokens.repeat(times, 1), words=self.words.repeat(times, 1), classes=classes)

    @property
    def call(self) -> Call:
        """What the forward pass must know of them."""
        return Call(tree=self.tree)


def sequence_loss(language_model: LanguageModel, states: Tensor, targets: Targets) -> Tensor:
    """
    Loss of each sequence, `[sequence]`, nats. Only the positions that it reads go through the head.

    Parameters
    ----------
    states
        `[sequence, token, d_model]`, after the final norm.
    targets
        what the sequences are to predict.
    """
    rows = states[:, targets.places].flatten(0, 1)
    if targets.classes is not None and targets.tree is None:
        logits = language_model.logits(rows, [label[0] for label in targets.labels])
        return nn.functional.cross_entropy(logits.to(precise_dtype(logits)), targets.classes, reduction="none")
    words = targets.words.flatten()
    bias: Tensor | None = language_model.head.bias
    scale = language_model.logit_scale
    if scale != 1:  # of the logits: the same factor on states and bias
        rows, bias = rows * scale, None if bias is None else bias * scale
    losses: Tensor = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]  # torch's own
        rows, language_model.head.weight, words, bias, language_model.logit_cap
    )
    losses = losses.view(targets.words.shape)
    if targets.classes is None:
        return losses.mean(1) if targets.is_mean else losses.sum(1)
    of_labels = torch.split(losses, [len(label) for label in targets.labels], dim=1)
    scores = torch.stack([-(one.mean(1) if targets.is_mean else one.sum(1)) for one in of_labels], 1)
    return nn.functional.cross_entropy(scores, targets.classes, reduction="none")


class _VocabularyLoss(torch.autograd.Function):
    """
    Cross-entropy of `states` (`[row, d_model]`) through the head `weight` (`[word, d_model]`), for each row, nats.

    `bias` (`[word]`) is added to the logits, and `cap` then squeezes them: `cap * tanh(logit / cap)`.

    The gradient, `E_p[weight] - weight[target]`, is summed in the same pass over the vocabulary as the normaliser: the
    head is read once, and a row never has more than `WORDS_AT_ONCE` logits. A cap multiplies each word's part with its
    slope, `1 - (logit / cap)²`.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, cap: float | None = None
    ) -> Tensor:
        precise, parts = precise_dtype(weight), _parts(states)
        largest = states.new_full((len(states), 1), -torch.inf, dtype=precise)  # of the logits so far
        normaliser = torch.zeros_like(largest)
        expected = torch.zeros(states.shape, dtype=precise, device=states.device)
        for start in range(0, len(weight), WORDS_AT_ONCE):
            block = weight[start : start + WORDS_AT_ONCE]
            words = block.reshape(parts if len(block) % parts == 0 else 1, -1, block.shape[1])  # [part, word, d_model]
            logits = torch.bmm(states.expand(len(words), -1, -1), words.mT).to(precise)  # [part, row, word]
            if bias is not None:
                logits += bias[start : start + WORDS_AT_ONCE].view(len(words), 1, -1)
            slope = None
            if cap is not None:
                logits, slope = _squeezed(logits, cap)
            before, largest = largest, torch.maximum(largest, logits.amax((0, 2))[:, None])
            shrink = (before - largest).exp()
            share = logits.sub_(largest).exp_()
            normaliser = normaliser * shrink + share.sum((0, 2))[:, None]
            share = share if slope is None else share * slope
            expected = expected.mul_(shrink).add_(torch.bmm(share.to(words.dtype), words).sum(0).to(precise))
        target = weight[targets].to(precise)
        reached = (states.to(precise) * target).sum(1)
        if bias is not None:
            reached = reached + bias[targets]
        if cap is not None:
            reached, slope = _squeezed(reached, cap)
            target = target * slope[:, None]
        ctx.save_for_backward(expected.div_(normaliser).sub_(target))
        ctx.dtype = states.dtype
        return (largest + normaliser.log())[:, 0] - reached

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (of_states,) = ctx.saved_tensors
        return (gradient[:, None] * of_states).to(ctx.dtype), None, None, None, None


def _parts(states: Tensor) -> int:
    """In how many products, a thread for each, the head is multiplied with `states` (`[row, d_model]`)."""
    alone = states.device.type != "cpu" or states.dtype.itemsize < 4 or len(states) > FEW_ROWS
    return 1 if alone else torch.get_num_threads()


def _squeezed(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Logits under a cap, and the slope of the cap at each."""
    share = torch.tanh(logits / cap)
    return share * cap, 1 - share.square()


def _standard_step(descent: _Descent, targets: Targets) -> tuple[Tensor, Tensor]:
    model = descent.language_model
    loss = sequence_loss(model, model.hidden(targets.tokens, call=targets.call), targets)
    gradients = descent.gradients(loss, range(model.n_layers))
    norms = descent.norms(gradients)
    descent.descend(gradients, norms)
    return loss.detach()[:, None], norms


def _joint_step(descent: _Descent, targets: Targets) -> tuple[Tensor, Tensor]:
    model = descent.language_model
    losses: list[Tensor] = []
    gradients: dict[int, Tensor] = {}
    waiting: dict[int, Tensor] = {}  # layer -> its states before the head

    def through_the_head() -> None:
        """The waiting layers' losses in one product, which reads the head's many rows once; frees their graphs."""
        loss = sequence_loss(model, torch.cat(list(waiting.values())), targets.repeated(len(waiting)))
        gradients.update(descent.gradients(loss, list(waiting)))
        losses.append(loss.detach().view(len(waiting), len(targets.tokens)))
        waiting.clear()

    def on_layer(layer: int, output: Tensor, _recompute: Recompute) -> None:
        waiting[layer] = model.lens(output)
        if (len(waiting) + 1) * targets.tokens.numel() > STEP_TOKENS or layer == model.n_layers - 1:
            through_the_head()

    layer_by_layer(model, targets, on_layer)
    norms = descent.norms(gradients)
    descent.descend(gradients, norms)
    return torch.cat(losses).T, norms


def _sequential_step(descent: _Descent, targets: Targets) -> tuple[Tensor, Tensor]:
    model = descent.language_model
    losses: list[Tensor] = []
    norms = torch.zeros(len(targets.tokens), model.n_layers, dtype=torch.float64)

    def on_layer(layer: int, output: Tensor, recompute: Recompute) -> object:
        loss = sequence_loss(model, model.lens(output), targets)
        losses.append(loss.detach())
        gradients = descent.gradients(loss, [layer])
        norms[:, layer] = descent.norms(gradients)[:, layer]
        descent.descend(gradients, norms)
        return recompute()  # the next layer sees what the updated layer computes

    layer_by_layer(model, targets, on_layer)
    return torch.stack(losses, 1), norms


def layer_by_layer(
    language_model: LanguageModel, targets: Targets, on_layer: Callable[[int, Tensor, Recompute], object]
) -> None:
    """
    Forward pass in which each layer receives the detached output of the layer below.

    `on_layer(layer, output, recompute)` is called with the layer's output `[1, token, d_model]`, whose graph reaches
    back to the layer's own input only. What it returns replaces the output; `recompute()` runs the layer again.
    """
    handles = []
    for index, module in enumerate(language_model.layers):

        def detach(_module: nn.Module, inputs: Inputs, keywords: Keywords) -> tuple[Inputs, Keywords]:
            return (inputs[0].detach(), *inputs[1:]), keywords

        def after(module: nn.Module, inputs: Inputs, keywords: Keywords, output: Any, index: int = index) -> object:
            def recompute() -> object:
                with torch.no_grad():
                    return module.forward(inputs[0].detach(), *inputs[1:], **keywords)

            return on_layer(index, output[0] if isinstance(output, tuple) else output, recompute)

        handles.append(module.register_forward_pre_hook(detach, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        language_model.hidden(targets.tokens, call=targets.call)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def drift(language_model: LanguageModel, update: KVUpdate) -> Tensor:
    """Relative change `‖W' − W‖ / ‖W‖` of each layer's K and V entries together; `[layer]`."""
    change = torch.zeros(language_model.n_layers, dtype=torch.float64)
    size = torch.zeros_like(change)
    for trainable, value in zip(language_model.trainables, update.values, strict=True):
        before = trainable.masked(trainable.parameter.data).double()
        change[trainable.layer] += (trainable.masked(value).double() - before).square().sum().cpu()
        size[trainable.layer] += before.square().sum().cpu()
    return (change / size).sqrt()


@torch.no_grad()
def scaled_to(language_model: LanguageModel, update: KVUpdate, norm: float) -> KVUpdate:
    """The update in the same direction whose change has L2 norm `norm` over all K/V entries."""
    changes = _changes(language_model, update)
    return _moved(language_model, changes, norm / max(_norm(changes), torch.finfo(torch.float64).tiny))


@torch.no_grad()
def random_update(language_model: LanguageModel, seed: int, norm: float) -> KVUpdate:
    """An isotropic Gaussian change of all K/V entries, of L2 norm `norm`; the seed determines it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(trainable: Trainable) -> Tensor:
        drawn = torch.randn(trainable.parameter.shape, generator=generator)
        return trainable.masked(drawn.to(trainable.parameter.device, precise_dtype(trainable.parameter)))

    noises = [noise(trainable) for trainable in language_model.trainables]
    return _moved(language_model, noises, norm / _norm(noises))


@torch.no_grad()
def perturbed(language_model: LanguageModel, seed: int, relative: float) -> KVUpdate:
    """Every K/V entry times 1 + `relative` × a standard normal draw; the seed determines it."""
    generator = torch.Generator().manual_seed(seed)

    def moved(trainable: Trainable) -> Tensor:
        noise = torch.randn(trainable.parameter.shape, generator=generator).to(trainable.parameter)
        return trainable.parameter.data * (1 + relative * trainable.masked(noise))

    return KVUpdate(tuple(moved(trainable) for trainable in language_model.trainables))


def update_norm(language_model: LanguageModel, update: KVUpdate) -> float:
    """L2 norm of an update's change over all K/V entries."""
    return _norm(_changes(language_model, update))


def _changes(language_model: LanguageModel, update: KVUpdate) -> list[Tensor]:
    return [new - old for new, old in zip(update.values, language_model.original().values, strict=True)]


def _moved(language_model: LanguageModel, changes: Sequence[Tensor], factor: float) -> KVUpdate:
    """The model's own values, plus `factor` times the changes."""
    pairs = zip(language_model.original().values, changes, strict=True)
    return KVUpdate(tuple(old + factor * change for old, change in pairs))


@torch.no_grad()
def kept_by_rounding(language_model: LanguageModel, update: KVUpdate) -> float:
    """
    Share of an update's norm that is left, along the update, once the model's precision has rounded the new weights.

    `⟨applied, asked⟩ / ‖asked‖²`: 1 in float32 up to rounding; 0 if every entry falls back to its old value.
    """
    product, square = 0.0, 0.0
    for trainable, value in zip(language_model.trainables, update.values, strict=True):
        old = trainable.parameter.data.double()
        asked, applied = value.double() - old, value.to(language_model.dtype).double() - old
        product, square = product + float((asked * applied).sum()), square + float(asked.square().sum())
    return product / square if square else 1.0


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
