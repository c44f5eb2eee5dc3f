"""
Small softmax transformers that learn linear regression in context, and the experiments on them that page 11 draws.

A leading axis holds several models at once: in an experiment every task has its own copy of the weights. Networks are
trained in single precision; `CODE` and `SETTINGS` give the identity of their record (`experiments.own_records`).
"""

# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iclgd_helpers.measures import metrics

Weights = dict[str, Tensor]
Found = dict[str, Any]
Some = float | None

D, WIDTH, HEADS, LAYERS, HIDDEN = 4, 32, 2, 3, 128  # D: of a regression input; the others: of the network
ATTENTION = [f"{name}{layer}" for layer in range(LAYERS) for name in "QKVO"]
N_NETWORKS = 6
PRETRAINING: Found = {"steps": 2000, "prompts": 48, "queries": 8, "rate": 3e-3, "warm_up": 100}
LENGTH = 0.1  # of the step that `likeness_experiment` takes, in weight space; small: directions are compared
PASSES, PASS_RATES = (1, 2, 4, 8, 16), (0.01, 0.03, 0.1, 0.3, 1.0)
ARMS = ("no prompt", "true demonstrations", "shuffled demonstrations")
PROMPT: Found = {"steps": 160, "queries": 32, "test": 64, "rates": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "threshold": 0.1}
MARGIN = 0.05  # of the variance of y: a difference that "no difference" must not exceed


def make_model(seed: int) -> Weights:
    """Random weights: each matrix `[1, inputs, outputs]`."""
    g = torch.Generator().manual_seed(seed)

    def matrix(n_in: int, n_out: int) -> Tensor:
        return torch.randn(1, n_in, n_out, generator=g) / n_in**0.5

    weights = {"embed": matrix(D + 3, WIDTH), "read": matrix(WIDTH, 1)}
    for layer in range(LAYERS):
        weights |= {f"{name}{layer}": matrix(WIDTH, WIDTH) for name in "QKVO"}
        weights |= {f"up{layer}": matrix(WIDTH, HIDDEN), f"down{layer}": matrix(HIDDEN, WIDTH)}
    return weights


def tokens(x: Tensor, y: Tensor | None = None) -> Tensor:
    """(x, label or 0, known, asked) from x `[model, prompt, token, D]` and y `[model, prompt, token]`."""
    known = torch.full_like(x[..., :1], float(y is not None))
    label = torch.zeros_like(known) if y is None else y[..., None]
    return torch.cat([x, label, known, 1 - known], -1)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` times `matrix`, model by model."""
    return (x.flatten(1, 2) @ matrix).unflatten(1, x.shape[1:3])


def norm(x: Tensor) -> Tensor:
    """LayerNorm without weights."""
    return F.layer_norm(x, x.shape[-1:])


def block(weights: Weights, layer: int, x: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The stream after the layer, and what its attention added."""

    def heads(name: str) -> Tensor:
        return product(norm(x), weights[f"{name}{layer}"]).unflatten(-1, (HEADS, -1)).transpose(2, 3)

    scores = heads("Q") @ heads("K").mT / (WIDTH // HEADS) ** 0.5
    mixed = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ heads("V")
    update = product(mixed.transpose(2, 3).flatten(-2), weights[f"O{layer}"])
    hidden = F.gelu(product(norm(x + update), weights[f"up{layer}"]))
    return x + update + product(hidden, weights[f"down{layer}"]), update


def read(weights: Weights, x: Tensor) -> Tensor:
    """The prediction `[model, prompt, token]` from the stream."""
    return product(norm(x), weights["read"])[..., 0]


def start(weights: Weights, demos: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Embedded tokens, and who may attend to whom: everybody to the demonstrations, and to itself."""
    x = product(torch.cat([demos, queries], 2), weights["embed"])
    n = x.shape[2]
    return x, (torch.arange(n) < demos.shape[2]) | torch.eye(n, dtype=torch.bool)


def forward(weights: Weights, demos: Tensor, queries: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Predictions `[model, prompt, query]`, and what each layer's attention added at the queries."""
    x, allowed = start(weights, demos, queries)
    updates = []
    for layer in range(LAYERS):
        x, update = block(weights, layer, x, allowed)
        updates.append(update[:, :, demos.shape[2] :])
    return read(weights, x[:, :, demos.shape[2] :]), updates


def linear_tasks(shape: tuple[int, ...], n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[*shape, n, D]` and labels of a new linear task each, of variance one."""
    x, w = torch.randn(*shape, n, D, generator=g), torch.randn(*shape, D, 1, generator=g) / D**0.5
    return x, (x @ w)[..., 0]


def schedule(step: int) -> float:
    """Factor on the rate: a warm-up, then a linear decay in the second half."""
    return min(1, (step + 1) / PRETRAINING["warm_up"], 2 * (1 - step / PRETRAINING["steps"]))


def pretrain(seed: int, M: int) -> Weights:
    """A network trained with Adam on fresh prompts of 0 to `M` demonstrations."""
    weights = {name: value.requires_grad_() for name, value in make_model(seed).items()}
    g = torch.Generator().manual_seed(10_000 + seed)
    adam = torch.optim.Adam(weights.values(), lr=PRETRAINING["rate"])
    decay = torch.optim.lr_scheduler.LambdaLR(adam, schedule)
    for _ in range(PRETRAINING["steps"]):
        m = int(torch.randint(M + 1, (1,), generator=g))
        x, y = linear_tasks((1, PRETRAINING["prompts"]), M + PRETRAINING["queries"], g)
        predicted, _ = forward(weights, tokens(x[:, :, :m], y[:, :, :m]), tokens(x[:, :, M:]))
        adam.zero_grad()
        ((predicted - y[:, :, M:]) ** 2).mean().backward()
        adam.step()
        decay.step()
    return {name: value.detach() for name, value in weights.items()}


@torch.no_grad()
def labels_experiment(weights: Weights, M: int, g: torch.Generator) -> Found:
    """Error against the true function with right and wrong labels in the context, and without context."""
    x, y = linear_tasks((1, 500), M + 8, g)
    asked, truth = tokens(x[:, :, M:]), y[:, :, M:]
    demos, known = x[:, :, :M], y[:, :, :M]
    order = torch.rand(known.shape, generator=g).argsort(-1)
    given = {
        "true": known,
        "permuted": known.gather(-1, order),
        "flipped": -known,
        "random": torch.randn(known.shape, generator=g),
    }
    answers = {name: forward(weights, tokens(demos, labels), asked)[0] for name, labels in given.items()}
    answers["no prompt"] = forward(weights, tokens(demos[:, :, :0], known[:, :, :0]), asked)[0]
    found = {name: float(((answer - truth) ** 2).mean()) for name, answer in answers.items()}
    both = torch.stack([answers["true"].flatten(), -answers["flipped"].flatten()])
    lengths = [m for m in (0, 1, 2, 4, 8, M) if m <= M]
    curve = {m: forward(weights, tokens(demos[:, :, :m], known[:, :, :m]), asked)[0] for m in lengths}
    return {
        "error": found,
        "correlation_with_negated_flip": float(torch.corrcoef(both)[0, 1]),
        "error_by_length": {m: float(((answer - truth) ** 2).mean()) for m, answer in curve.items()},
    }


def moved(weights: Weights, names: list[str], gradients: Sequence[Tensor], rate: Any, length: Some) -> Weights:
    """A step down the gradients: of `length` in weight space, model by model, or else at `rate`."""
    if length is not None:
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        rate = (length / norms)[:, None, None]
    return weights | {n: weights[n].detach() - rate * gr for n, gr in zip(names, gradients, strict=True)}


def joint_step(weights: Weights, demos: Tensor, labels: Tensor, rate: Some = None, length: Some = None) -> Weights:
    """Attention weights after a step on the demonstrations without context; the loss at the top reaches all layers."""
    leaves = weights | {name: weights[name].detach().requires_grad_() for name in ATTENTION}
    predicted, _ = forward(leaves, demos[:, :, :0], demos)
    gradients = torch.autograd.grad(((predicted - labels) ** 2).mean((1, 2)).sum(), [leaves[n] for n in ATTENTION])
    return moved(weights, ATTENTION, gradients, rate, length)


def greedy_step(weights: Weights, demos: Tensor, labels: Tensor, rate: Some = None, length: Some = None) -> Weights:
    """The same from bottom to top: each layer has its own loss, on the states that the updated layer below gives."""
    x, allowed = start(weights, demos[:, :, :0], demos)
    for layer in range(LAYERS):
        names = [f"{name}{layer}" for name in "QKVO"]
        leaves = weights | {name: weights[name].detach().requires_grad_() for name in names}
        predicted = read(leaves, block(leaves, layer, x, allowed)[0])  # the layer's own loss
        gradients = torch.autograd.grad(((predicted - labels) ** 2).mean((1, 2)).sum(), [leaves[n] for n in names])
        weights = moved(weights, names, gradients, rate, length and length / LAYERS**0.5)
        x = block(weights, layer, x, allowed)[0].detach()  # the updated layer is what the next one sees
    return weights


Step = Callable[..., Weights]
STEPS: dict[str, Step] = {"joint": joint_step, "greedy": greedy_step}


def likeness(zero_shot: list[Tensor], in_context: list[Tensor], finetuned: list[Tensor]) -> dict[str, float]:
    """Means over tasks and questions in each layer, then over layers; each argument is a list over layers."""
    layers = list(zip(zero_shot, in_context, finetuned, strict=True))
    values = {
        "plain": [metrics.cosine(b - a, c - a) for a, b, c in layers],
        "normalised": [metrics.sim_aou(*three) for three in layers],
        "null": [metrics.sim_aou_null(*three) for three in layers],
    }
    return {name: float(torch.stack([v.nanmean() for v in value]).mean()) for name, value in values.items()}


def likeness_experiment(weights: Weights, M: int, g: torch.Generator, n_tasks: int = 16, n_queries: int = 32) -> Found:
    """Likeness of the in-context update and each kind of step, on true and on cyclically shifted labels."""
    x, y = linear_tasks((n_tasks, 1), M + n_queries, g)
    demos, known, asked = tokens(x[:, :, :M]), y[:, :, :M], tokens(x[:, :, M:])
    copies = {name: value.expand(n_tasks, -1, -1) for name, value in weights.items()}
    with torch.no_grad():
        zero_shot = forward(copies, demos[:, :, :0], asked)[1]
        in_context = forward(copies, tokens(x[:, :, :M], known), asked)[1]
    found = {}
    for name, step in STEPS.items():
        for which, labels in {"true": known, "shuffled": known.roll(1, -1)}.items():
            after = step(copies, demos, labels, length=LENGTH)
            with torch.no_grad():
                finetuned = forward(after, demos[:, :, :0], asked)[1]
            found[f"{name}, {which}"] = likeness(zero_shot, in_context, finetuned)
    return found


def errors_by_passes(
    weights: Weights, M: int, g: torch.Generator, step: Step, rate: float, n_tasks: int, n_queries: int = 64
) -> dict[int, float]:
    """Error on fresh questions, without context, after 1, 2, 4, … steps on the demonstrations."""
    x, y = linear_tasks((n_tasks, 1), M + n_queries, g)
    weights = {name: value.expand(n_tasks, -1, -1) for name, value in weights.items()}
    found = {}
    for number in range(1, max(PASSES) + 1):
        weights = step(weights, tokens(x[:, :, :M]), y[:, :, :M], rate=rate)
        if number in PASSES:
            with torch.no_grad():
                predicted, _ = forward(weights, tokens(x[:, :, :0]), tokens(x[:, :, M:]))
            found[number] = ((predicted - y[:, :, M:]) ** 2).mean().nan_to_num(1e9).clamp(max=1e9).item()
    return found


def passes_experiment(weights: Weights, M: int, seed: int) -> Found:
    """For each number of passes, the error at the rate that does best on tasks that are not reported."""

    def run(step: Step, rate: float, n_tasks: int, offset: int) -> dict[int, float]:
        return errors_by_passes(weights, M, torch.Generator().manual_seed(offset + seed), step, rate, n_tasks)

    found = {}
    for name, step in STEPS.items():
        trial = {rate: run(step, rate, 8, 30_000) for rate in PASS_RATES}  # tasks that are not reported
        best = {k: min(PASS_RATES, key=lambda rate, k=k: trial[rate][k]) for k in PASSES}  # type: ignore[misc]
        final = {rate: run(step, rate, 16, 40_000) for rate in set(best.values())}
        found[name] = {k: {"rate": best[k], "error": final[best[k]][k]} for k in PASSES}
    return found


def new_tasks(n_tasks: int, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tasks that pre-training has not seen: a linear function plus a sine of another."""
    x = torch.randn(n_tasks, 1, n, D, generator=g)
    w, v = torch.randn(2, n_tasks, 1, D, 1, generator=g) / D**0.5
    return x, (x @ w + 0.7 * torch.sin(2 * x @ v))[..., 0]


def split(x: Tensor, y: Tensor, M: int, arm: str) -> Tensor:
    """The prompt of one of ARMS, as tokens."""
    m = 0 if arm == "no prompt" else M
    labels = y[:, :, :m].roll(1, -1) if arm.startswith("shuffled") else y[:, :, :m]
    return tokens(x[:, :, :m], labels)


def finetune(weights: Weights, M: int, arm: str, rate: float, n_tasks: int, seed: int) -> tuple[Tensor, float]:
    """Relative error on test questions `[every second step, task]`, and processor seconds of a step and task."""
    g = torch.Generator().manual_seed(seed)
    need = M + PROMPT["test"] + PROMPT["steps"] * PROMPT["queries"]
    x, y = new_tasks(n_tasks, need, g)
    demos, (x, y) = split(x, y, M, arm), (x[:, :, M:], y[:, :, M:])
    test, truth = tokens(x[:, :, : PROMPT["test"]]), y[:, :, : PROMPT["test"]]
    leaves = {name: value.repeat(n_tasks, 1, 1).requires_grad_() for name, value in weights.items()}
    adam, curves, seconds = torch.optim.Adam(leaves.values(), lr=rate), [], 0.0
    for step in range(PROMPT["steps"] + 1):
        if step % 2 == 0:
            with torch.no_grad():
                error = ((forward(leaves, demos, test)[0] - truth) ** 2).mean((1, 2)) / y.var((1, 2))
            curves.append(error.nan_to_num(1e9))
        begin = time.process_time()
        batch = slice(PROMPT["test"] + step * PROMPT["queries"], PROMPT["test"] + (step + 1) * PROMPT["queries"])
        if step < PROMPT["steps"]:
            loss = ((forward(leaves, demos, tokens(x[:, :, batch]))[0] - y[:, :, batch]) ** 2).mean((1, 2)).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
        seconds += time.process_time() - begin
    return torch.stack(curves), seconds / PROMPT["steps"] / n_tasks


def steps_to_threshold(curves: Tensor) -> Tensor:
    """Steps of each task; one test interval beyond the last step if the threshold was not reached."""
    below = torch.cat([curves <= PROMPT["threshold"], torch.ones_like(curves[:1], dtype=torch.bool)])
    return 2 * below.int().argmax(0)


def prompt_experiment(weights: Weights, M: int, seed: int) -> Found:
    """Finetuning of all weights in each of ARMS, at the rate that does best on tasks that are not reported."""
    found = {}
    for arm in ARMS:
        trials = {rate: finetune(weights, M, arm, rate, 4, 50_000 + seed)[0] for rate in PROMPT["rates"]}
        rate = min(PROMPT["rates"], key=lambda r: float(steps_to_threshold(trials[r]).double().quantile(0.5)))
        curves, seconds = finetune(weights, M, arm, rate, 8, 60_000 + seed)
        steps = float(steps_to_threshold(curves).double().quantile(0.5))
        prompt = 0 if arm == "no prompt" else M
        found[arm] = {
            "rate": rate,
            "steps": steps,
            "tokens": steps * (PROMPT["queries"] + prompt),
            "tokens_not_shared": steps * PROMPT["queries"] * (1 + prompt),
            "cpu_seconds": steps * seconds,
            "curve": [round(value, 4) for value in curves.median(1).values.tolist()],
        }
    return found


def one_seed(seed: int, M: int) -> Found:
    """All that is recorded of the network with this pre-training seed."""
    begin = time.process_time()
    weights = pretrain(seed, M)
    found: Found = {"pretraining_cpu_seconds": time.process_time() - begin}
    found["labels"] = labels_experiment(weights, M, torch.Generator().manual_seed(20_000 + seed))
    for name, network in {"trained": weights, "untrained": make_model(seed)}.items():
        g = torch.Generator().manual_seed(25_000 + seed)
        found[f"likeness, {name}"] = likeness_experiment(network, M, g)
    found["passes"] = passes_experiment(weights, M, seed)
    found["prompt"] = prompt_experiment(weights, M, seed)
    return found | {"cpu_seconds": time.process_time() - begin}


CODE: list[Callable[..., Any]] = [make_model, tokens, product, norm, block, read, start, forward, linear_tasks]
CODE += [schedule, pretrain, moved, labels_experiment, joint_step, greedy_step, likeness, likeness_experiment]
CODE += [errors_by_passes, passes_experiment, new_tasks, split, finetune, steps_to_threshold, prompt_experiment]
CODE += [one_seed]
SETTINGS: Found = {"PRETRAINING": PRETRAINING, "PROMPT": PROMPT, "LENGTH": LENGTH, "PASSES": PASSES}
SETTINGS |= {"RATES": PASS_RATES, "MARGIN": MARGIN, "SIZES": [D, WIDTH, HEADS, LAYERS, HIDDEN]}
SETTINGS |= {"N_NETWORKS": N_NETWORKS}
