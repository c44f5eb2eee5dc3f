"""Chapter 08: weight changes from the demonstrations alone, and the rank-1 patch of the MLP."""

import math
from itertools import combinations_with_replacement

import naive_transformer
import numpy as np
import torch
from torch.nn.functional import elu
from torch.utils.flop_counter import FlopCounterMode

from claims.registry import Exact, claim
from iclgd_helpers.theory import transformer
from iclgd_helpers.theory.gradient_step import relative_error

HERE = {"notebook": "08_compiling_the_prompt", "status": "identity"}


def material(seed, **kind):
    """Weights, demonstrations `[d_model, M]`, and three fresh prompts of different lengths."""
    rng = np.random.default_rng(seed)
    config = transformer.Config(**{"n_layers": 3, "d_model": 8, "n_heads": 2} | kind)
    generator = torch.Generator().manual_seed(seed)
    weights = transformer.random_weights(config, generator)
    lengths = [int(rng.integers(3, 10)), *map(int, rng.integers(1, 8, 3))]
    shown, *prompts = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in lengths)
    return weights, shown, prompts


def written(heads, first, last):
    """Fast weight of tokens `first` to `last`, `[head, d_v, feature]`, as a sum of outer products."""
    return sum(heads.values[:, :, j, None] * heads.keys[:, None, :, j] for j in range(first, last))


def with_branch(updates):
    """Attention to the prompt alone, plus a constant matrix applied to the query's feature."""

    def attend(config, heads, n_demonstrations, layer):
        n = heads.keys.shape[-1]
        out = []
        for t in range(n):
            weight = updates[layer] + written(heads, 0, t + 1 if config.causal else n)
            out.append(torch.einsum("hvf,hf->hv", weight, heads.queries[:, :, t]))
        out = torch.stack(out, -1)
        return out if config.attention == "linear" else out[:, :-1] / out[:, -1:]

    return attend


def largest_error(weights, shown, prompts, attend):
    """Against the pass with demonstrations, in plain loops."""
    m = shown.shape[1]
    errors = []
    for x in prompts:
        expected = naive_transformer.forward(weights, x, shown)[-1][:, m:]
        errors.append(relative_error(transformer.forward(weights, x, attend=attend).output, expected))
    return max(errors), min(errors)


def compiled(seed, attention):
    weights, shown, prompts = material(seed, attention=attention)
    alone = transformer.forward(weights, shown)
    updates = [written(heads, 0, shown.shape[1]) for heads in alone.heads]
    worst, _ = largest_error(weights, shown, prompts, with_branch(updates))
    _, least = largest_error(weights, shown, prompts, transformer.attention)
    return Exact(worst, least)


for attention in ("linear", "normalised"):

    @claim(
        f"K-{attention}",
        statement=f"In a causal {attention}-attention transformer, matrices made from the demonstrations alone replace "
        "them, exactly, on prompts that were not known then.",
        source="the book's own; compare the exact conversion of linearised attention by Chen et al. (2024)",
        control="no added matrices: the zero-shot pass",
        **HERE,
    )
    def compile_demonstrations(seed, attention=attention):
        return compiled(seed, attention)


@claim(
    "K-mask",
    statement="What is compiled beside one prompt serves every other prompt, if the mask is causal.",
    source="the book's own",
    control="without the mask: matrices made beside one prompt, used for another",
    **HERE,
)
def mask(seed):
    errors = []
    for causal in (True, False):
        weights, shown, prompts = material(seed, causal=causal)
        beside = transformer.forward(weights, prompts[0], shown)
        updates = [written(heads, 0, shown.shape[1]) for heads in beside.heads]
        worst, _ = largest_error(weights, shown, prompts[1:], with_branch(updates))
        errors.append(worst)
    return Exact(*errors)


def monomials(columns, degree, scale):
    """Features whose inner product is the series of exp(scale x.y) up to `degree`, one by one."""
    rows = []
    for n in range(degree + 1):
        for chosen in combinations_with_replacement(range(columns.shape[-2]), n):
            counts = [chosen.count(i) for i in range(columns.shape[-2])]
            size = math.sqrt(scale**n / math.prod(map(math.factorial, counts)))
            rows.append(size * torch.stack([columns[..., i, :] ** c for i, c in enumerate(counts)]).prod(0))
    return torch.stack(rows, -2)


def softmax_branch(updates, degree):
    """Softmax attention to the prompt, plus matrices applied to the monomials of the query."""

    def attend(config, heads, n_demonstrations, layer):
        scale = config.d_head**-0.5
        own = heads.values @ torch.exp(scale * heads.keys.mT @ heads.queries).triu()
        sums = own + updates[layer] @ monomials(heads.queries, degree, scale)
        return sums[:, :-1] / sums[:, -1:]

    return attend


def softmax_material(seed):
    return material(seed, attention="softmax", d_head=2, n_layers=2, norm="post")


def softmax_updates(weights, shown, degree):
    heads = transformer.forward(weights, shown).heads
    return [h.values @ monomials(h.keys, degree, weights.config.d_head**-0.5).mT for h in heads]


def polynomial_weights(seed, degree):
    """Error of the compiled softmax model against softmax with the demonstrations' exponentials cut at `degree`."""
    weights, shown, prompts = softmax_material(seed)
    m, x = shown.shape[1], prompts[0]
    past = transformer.forward(weights, shown).heads

    def cut(config, heads, n_demonstrations, layer):
        scale = config.d_head**-0.5
        own = heads.values @ torch.exp(scale * heads.keys.mT @ heads.queries).triu()
        scores = scale * past[layer].keys.mT @ heads.queries
        sums = own + past[layer].values @ sum(scores**n / float(math.factorial(n)) for n in range(degree + 1))
        return sums[:, :-1] / sums[:, -1:]

    found = transformer.forward(weights, x, attend=softmax_branch(softmax_updates(weights, shown, degree), degree))
    exact = naive_transformer.forward(weights, x, shown)[-1][:, m:]
    series = transformer.forward(weights, x, attend=cut)
    return relative_error(found.output, series.output), relative_error(found.output, exact)


@claim(
    "K-series",
    statement="Compiling a causal softmax transformer with monomials up to degree P is the same as cutting the "
    "demonstrations' exponentials after the P-th term.",
    source="the book's own",
    control="the softmax that is not cut",
    **HERE,
)
def series(seed):
    return Exact(*polynomial_weights(seed, 3))


@claim(
    "K-degree",
    statement="With monomials up to degree 40 the compiled two-layer softmax transformer is the original.",
    source="the book's own",
    notebook="08_compiling_the_prompt",
    status="conditional",
    tolerance=1e-6,
    control="degree 1",
)
def degree(seed):
    return Exact(polynomial_weights(seed, 40)[1], polynomial_weights(seed, 1)[1])


def block(seed):
    """An attention-and-MLP block: inputs and streams of the MLP with and without context, and the MLP itself."""
    weights, shown, prompts = material(seed, n_layers=1, norm="pre")
    layer = weights.layers[0]
    prompt = torch.cat(prompts, 1)
    streams = [transformer.forward(weights, prompt, x).attended[0] for x in (shown, None)]
    streams[0] = streams[0][:, shown.shape[1] :]
    norm = (layer["norm_2_gain"], layer["norm_2_bias"])
    inputs = [torch.stack([naive_transformer.normed(x, *norm) for x in s.T], 1) for s in streams]

    def mlp(a, w_1=layer["w_1"], added=0.0):
        return layer["w_2"] @ naive_transformer.gelu(w_1 @ a + layer["b_1"][:, 0]) + layer["b_2"][:, 0] + added

    return streams, inputs, mlp, layer["w_1"]


def patched(seed):
    """Outputs `[asking, patch]` of the block without context under each token's patch, and those with context."""
    (seen, alone), (a_seen, a_alone), mlp, w_1 = block(seed)
    n = seen.shape[1]
    wanted = [seen[:, i] + mlp(a_seen[:, i]) for i in range(n)]
    plain = [alone[:, i] + mlp(a_alone[:, i]) for i in range(n)]
    table = torch.zeros(n, n, dtype=torch.float64)
    for j in range(n):
        change = torch.outer(w_1 @ (a_seen[:, j] - a_alone[:, j]), a_alone[:, j]) / a_alone[:, j].square().sum()
        for i in range(n):
            out = alone[:, i] + mlp(a_alone[:, i], w_1 + change, seen[:, j] - alone[:, j])
            table[i, j] = relative_error(out, wanted[i])
    return table, [relative_error(p, w) for p, w in zip(plain, wanted, strict=True)]


@claim(
    "K-patch",
    statement="A rank-1 change of the MLP's input weights and a change of its output bias do for one token what the "
    "context does.",
    source="Dherin et al. (2025), theorem 2.2",
    control="no patch",
    **HERE,
)
def patch(seed):
    table, plain = patched(seed)
    return Exact(float(table.diag().max()), min(plain))


@claim(
    "K-patch-one-token",
    statement="That patch belongs to one token: it is right where it was made.",
    source="the book's own; compare Dherin et al. (2025)",
    control="the patch of the neighbouring token",
    **HERE,
)
def patch_one_token(seed):
    table, _ = patched(seed)
    return Exact(float(table.diag().max()), float(table.diag(1).min()))


def attention_layer(seed, m=None):
    """Keys, values and the demonstrations' term of one layer, with 20 query features."""
    rng = np.random.default_rng(seed)
    d_v, d_f, shown = map(int, rng.integers([4, 4, 2], [8, 8, 4]))
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (elu(torch.randn(d_f, n, generator=generator, dtype=torch.float64)) + 1 for n in (shown, 20))
    return keys, torch.randn(d_v, shown, generator=generator, dtype=torch.float64), queries


@claim(
    "K-every-query",
    statement="The demonstrations' term of a linear-attention layer is one matrix for all queries.",
    source="[C] Theorem 3.1",
    control="a rank-1 patch made for the first query",
    **HERE,
)
def every_query(seed):
    keys, values, queries = attention_layer(seed)
    expected = torch.stack([sum(v * (k @ q) for k, v in zip(keys.T, values.T, strict=True)) for q in queries.T], 1)
    first = torch.outer(expected[:, 0], queries[:, 0]) / queries[:, 0].square().sum()
    update = values @ keys.T
    return Exact(relative_error(update @ queries, expected), relative_error(first @ queries, expected))


@claim(
    "K-rank",
    statement="The rank of that matrix is at most the number of demonstrations.",
    source="[C] Theorem 3.1; the book's own",
    control="a rank one lower",
    **HERE,
)
def rank(seed):
    keys, values, _ = attention_layer(seed)
    sizes = torch.linalg.svdvals(values @ keys.T)
    m = keys.shape[1]
    return Exact(float(sizes[m] / sizes[0]), float(sizes[m - 1] / sizes[0]))


@claim(
    "K-cost",
    statement="Per query, M demonstrations cost M (d_v + d_phi) multiplications in attention, d_v d_phi once compiled.",
    source="the book's own, counted by PyTorch",
    control="the count for attention, used for the compiled form",
    **HERE,
)
def cost(seed):
    keys, values, queries = attention_layer(seed)
    keys, values = keys.repeat(1, 30), values.repeat(1, 30)
    (d_v, m), d_f = values.shape, keys.shape[0]

    def count(compute):
        with FlopCounterMode(display=False) as counter:
            compute()
        return counter.get_total_flops() / 2 / queries.shape[1]

    update = values @ keys.T
    attended = count(lambda: values @ (keys.T @ queries))
    once = count(lambda: update @ queries)
    wanted = m * (d_v + d_f), d_v * d_f
    return Exact(abs(attended / wanted[0] - 1) + abs(once / wanted[1] - 1), abs(attended / once - 1))
