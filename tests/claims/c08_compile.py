"""Chapter 08: weight changes from the demonstrations alone, and the rank-1 patch of the MLP."""

import math
from itertools import combinations_with_replacement

import naive_transformer
import numpy as np
import torch
from torch.nn.functional import elu

from claims.registry import Control, chapter
from iclgd_helpers.theory import transformer
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("08_compiling_the_prompt", drawn="sizes, weights, demonstrations and prompts")


def material(seed, **kind):
    """Weights, demonstrations `[d_model, M]`, and three fresh prompts of different lengths."""
    rng = np.random.default_rng(seed)
    config = transformer.Config(**{"n_layers": 3, "d_model": 8, "n_heads": 2} | kind)
    generator = torch.Generator().manual_seed(seed)
    weights = transformer.random_weights(config, generator)
    lengths = [int(rng.integers(3, 10)), *map(int, rng.integers(1, 8, 3))]
    shown, *prompts = (torch.randn(8, n, generator=generator) for n in lengths)
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


@claim(
    "K-mask",
    statement="What is compiled beside one prompt serves every other prompt, if the mask is causal.",
    controls=[Control("without the mask: matrices made beside one prompt, used for another", {"causal": False})],
)
def compiled(seed, beside=1, added=True, attention="linear", causal=True):
    """Matrices made `beside` the first prompt or none; outputs for the others, against loops with demonstrations."""
    weights, shown, prompts = material(seed, attention=attention, causal=causal)
    m = shown.shape[1]
    made = transformer.forward(weights, torch.cat([shown, *prompts[:beside]], 1))
    branch = with_branch([written(heads, 0, m) for heads in made.heads])

    def miss(x):
        found = transformer.forward(weights, x, attend=branch if added else transformer.attention)
        return error(found.output, naive_transformer.forward(weights, x, shown)[-1][:, m:])

    return [miss(x) for x in prompts[beside:]]


for attention in ("linear", "normalised"):
    claim(
        f"K-{attention}",
        statement=f"In a causal {attention}-attention transformer, matrices made from the demonstrations alone replace "
        "them, exactly, on prompts that were not known then.",
        source="the book's own; compare the exact conversion of linearised attention by Chen et al. (2024)",
        controls=[Control("no added matrices: the zero-shot pass", {"added": False})],
        options={"beside": 0, "attention": attention},
    )(compiled)


def monomials(columns, degree, scale):
    """Features whose inner product is the series of exp(scale x.y) up to `degree`, one by one."""
    rows = []
    for n in range(degree + 1):
        for chosen in combinations_with_replacement(range(columns.shape[-2]), n):
            counts = [chosen.count(i) for i in range(columns.shape[-2])]
            size = math.sqrt(scale**n / math.prod(map(math.factorial, counts)))
            rows.append(size * torch.stack([columns[..., i, :] ** c for i, c in enumerate(counts)]).prod(0))
    return torch.stack(rows, -2)


@claim(
    "K-degree",
    statement="While no score exceeds about ten in size, monomials up to degree 40 make the compiled two-layer softmax "
    "transformer the original, to 1e-6.",
    status="conditional",
    tolerance=1e-6,
    controls=[
        Control("degree 1", {"degree": 1}),
        Control("queries, and with them the scores, twenty times as large", {"stretch": 20.0}),
    ],
)
@claim(
    "K-series",
    statement="Compiling a causal softmax transformer with monomials up to degree P is the same as cutting the "
    "demonstrations' exponentials after the P-th term.",
    controls=[Control("the softmax that is not cut", {"cut": False})],
    options={"degree": 3, "cut": True},
)
def polynomial_weights(seed, degree=40, cut=False, stretch=1.0):
    """The compiled softmax model against softmax, or softmax with the demonstrations' exponentials cut at `degree`."""
    weights, shown, (x, *_) = material(seed, attention="softmax", d_head=2, n_layers=2, norm="post")
    for layer in weights.layers:
        layer |= {name: stretch * layer[name] for name in ("w_q", "b_q")}
    past, scale = transformer.forward(weights, shown).heads, weights.config.d_head**-0.5
    updates = [h.values @ monomials(h.keys, degree, scale).mT for h in past]

    def branch(layer, queries):
        return updates[layer] @ monomials(queries, degree, scale)

    def series(layer, queries):
        scores = scale * past[layer].keys.mT @ queries
        return past[layer].values @ sum(scores**n / float(math.factorial(n)) for n in range(degree + 1))

    def output(of_demonstrations):
        def attend(config, heads, n_demonstrations, layer):
            own = heads.values @ torch.exp(scale * heads.keys.mT @ heads.queries).triu()
            sums = own + of_demonstrations(layer, heads.queries)
            return sums[:, :-1] / sums[:, -1:]

        return transformer.forward(weights, x, attend=attend).output

    exact = naive_transformer.forward(weights, x, shown)[-1][:, shown.shape[1] :]
    return error(output(branch), output(series) if cut else exact)


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


@claim(
    "K-patch",
    statement="A rank-1 change of the MLP's input weights and a change of its output bias do for one token what the "
    "context does, and for that token only.",
    source="Dherin et al. (2025), theorem 2.2; the book's own",
    controls=[
        Control("no patch", {"size": 0}),
        Control("the patch of the neighbouring token", {"neighbour": 1}),
    ],
)
def patch(seed, size=1, neighbour=0):
    """Of each token: its output of the block without context, under a token's patch, against the one with context."""
    (seen, alone), (a_seen, a_alone), mlp, w_1 = block(seed)

    def miss(i, j):
        change = torch.outer(w_1 @ (a_seen[:, j] - a_alone[:, j]), a_alone[:, j]) / a_alone[:, j].square().sum()
        out = alone[:, i] + mlp(a_alone[:, i], w_1 + size * change, size * (seen[:, j] - alone[:, j]))
        return error(out, seen[:, i] + mlp(a_seen[:, i]))

    return [miss(i, i + neighbour) for i in range(seen.shape[1] - neighbour)]


def attention_layer(seed):
    """Keys, values and the demonstrations' term of one layer, with 20 query features."""
    rng = np.random.default_rng(seed)
    d_v, d_f, shown = map(int, rng.integers([4, 4, 2], [8, 8, 4]))
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (elu(torch.randn(d_f, n, generator=generator)) + 1 for n in (shown, 20))
    return keys, torch.randn(d_v, shown, generator=generator), queries


@claim(
    "K-every-query",
    statement="The demonstrations' term of a linear-attention layer is one matrix for all queries.",
    source="[C] Theorem 3.1",
    controls=[
        Control("a rank-1 patch made for the first query", {"rank_one": True}),
        Control("a window: the later half of the queries does not see the first demonstration", {"window": True}),
    ],
)
def every_query(seed, rank_one=False, window=False):
    keys, values, queries = attention_layer(seed)
    hidden = [int(window and t >= queries.shape[1] // 2) for t in range(queries.shape[1])]
    expected = torch.stack(
        [
            sum(v * (k @ q) for k, v in zip(keys.T[first:], values.T[first:], strict=True))
            for q, first in zip(queries.T, hidden, strict=True)
        ],
        1,
    )
    first = torch.outer(expected[:, 0], queries[:, 0]) / queries[:, 0].square().sum()
    return error((first if rank_one else values @ keys.T) @ queries, expected)


@claim(
    "K-rank",
    statement="The rank of that matrix is at most the number of demonstrations.",
    source="[C] Theorem 3.1; the book's own",
    controls=[Control("a rank one lower", {"lower": 1})],
)
def rank(seed, lower=0):
    keys, values, _ = attention_layer(seed)
    sizes = torch.linalg.svdvals(values @ keys.T)
    return float(sizes[keys.shape[1] - lower] / sizes[0])
