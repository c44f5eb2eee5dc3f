"""Chapter 06: one step a layer, in a stack."""

import torch
from plain_stack import algorithm_1, draw, feed_forward, forward, step

from claims.registry import Control, chapter
from iclgd_helpers.theory.gradient_step import FEATURE_MAPS
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("06_depth", drawn="depth, widths, weights, demonstrations and prompt")


ENTRYWISE = ("elu1", "exp")  # phi can be left out: the shape stays, the numbers do not


@claim(
    "T4.1",
    statement="Algorithm 1, corrected, gives the forward pass of a stack without mask: for five feature maps.",
    source="[C] Algorithm 1, equation 8 and Theorem 4.1, corrected",
    controls=[
        Control(
            "a reader's zero-shot base: written by the model without demonstrations",
            {"base": "zero-shot"},
            erratum=(12,),
        ),
        Control("demonstrations pass through the matrix before its update", {"demonstrations": "base"}),
        Control("every layer is trained on the embedded demonstrations", {"demonstrations": "frozen"}),
        Control("both residuals of the text: FFN with a residual inside, and T + I", {"residuals": 2}, erratum=(7,)),
        Control(
            "equation 8 as printed: the matrix acts on W_Q Z, without phi",
            {"query": "plain", "maps": ENTRYWISE},
            erratum=(8,),
        ),
        Control("it returns after a feed-forward layer, as printed", {"feed_forward": "return"}, erratum=(9,)),
        Control("the empty argument of phi() filled with W_Q p'", {"keys": "query"}, erratum=(10,)),
        Control("training inputs W_K p' without phi", {"keys": "plain", "maps": ENTRYWISE}),
        Control("rate M as printed, on the sum of halved squares", {"loss": "sum", "maps": ("elu1",)}, erratum=(11,)),
        Control("rate 1 on the mean of halved squares", {"rate": 1.0}),
    ],
)
def algorithm(
    seed,
    maps=tuple(FEATURE_MAPS),
    base="current",
    demonstrations="updated",
    residuals=1,
    query="phi",
    keys="phi",
    loss="mean",
    rate=None,
    feed_forward="assign",
):
    """Of each feature map: error of the prompt's final states by Algorithm 1 as corrected, or with a fault."""
    fault = {
        "base": base,
        "demonstrations": demonstrations,
        "residuals": residuals,
        "query": query,
        "keys": keys,
        "loss": loss,
        "feed_forward": feed_forward,
    } | ({} if rate is None else {"rate": rate})

    def miss(phi):
        stack, shown, prompt = draw(seed, phi)
        m = shown.shape[1]
        return error(algorithm_1(stack, shown, prompt, **fault)[:, m:], forward(stack, shown, prompt)[-1][:, m:])

    return [miss(phi) for phi in maps]


def greedy(stack, shown, prompt, steps, labels, at_once):
    """The matrix of each layer, trained from the bottom up on the demonstrations' current states, sample by sample."""
    z, m, matrices = torch.cat([shown, prompt], 1), shown.shape[1], []
    for layer in stack.layers:
        w_q, w_k, w_v = layer[:3]
        base = (w_v @ z[:, m:]) @ stack.phi(w_k @ z[:, m:]).T
        inputs = stack.phi(w_k @ z[:, :m])
        rate = 0.5 * m / torch.linalg.svdvals(inputs)[0] ** 2  # every quadratic of these inputs falls at this rate
        targets = z[:, :m] if labels == "the layer's input" else m / rate * w_v @ z[:, :m] + base @ inputs
        matrix = base
        for _ in range(steps):
            errors = [torch.outer(matrix @ x - y, x) for x, y in zip(inputs.T, targets.T, strict=True)]
            matrix = matrix - rate * sum(errors) / m
        matrices.append(matrix)
        z = z + (base if at_once else matrix) @ stack.phi(w_q @ z)
        z = z + feed_forward(layer, z)
    return matrices


@claim(
    "T4.1-sweep",
    statement="Greedy layer-wise training with one step a layer, on the implied labels of the current states, from the "
    "base that the current prompt writes, is the forward pass (at a rate at which the loss falls).",
    source="[C] section 5, made exact; compare Bengio et al. (2007)",
    controls=[
        Control("two steps a layer on the same pairs", {"steps": 2}),
        Control("an autoencoder's objective, written beforehand: the layer's input", {"labels": "the layer's input"}),
        Control("weights kept from another prompt", {"kept": True}),
        Control("all layers at once, on the states before any of them was trained", {"at_once": True}),
    ],
)
def sweep(seed, steps=1, labels="implied", at_once=False, kept=False):
    stack, shown, prompt = draw(seed)
    m, other = shown.shape[1], torch.randn(prompt.shape, generator=torch.Generator().manual_seed(int(seed) + 1))
    z = torch.cat([shown, prompt], 1)
    for layer, matrix in zip(
        stack.layers, greedy(stack, shown, other if kept else prompt, steps, labels, at_once), strict=True
    ):
        z = z + matrix @ stack.phi(layer[0] @ z)
        z = z + feed_forward(layer, z)
    return error(z[:, m:], forward(stack, shown, prompt)[-1][:, m:])


def fast_weights(seed, number):
    """Of one layer: features and values of demonstrations, seen prompt and zero-shot prompt."""
    stack, shown, prompt = draw(seed)
    m = shown.shape[1]
    seen, alone = forward(stack, shown, prompt)[number], forward(stack, shown[:, :0], prompt)[number]
    _, w_k, w_v = stack.layers[number][:3]
    return [(stack.phi(w_k @ z), w_v @ z) for z in (seen[:, :m], seen[:, m:], alone)]


@claim(
    "T4.1-learn-learn-unlearn",
    statement="From the zero-shot base, one step on M + 2N samples gives a deep layer's matrix: demonstrations, the "
    "prompt's tokens as they are now, and the same tokens as they were, with values negated.",
    source="the book's own; the gap in [C] Theorem 4.1",
    controls=[
        Control(
            "the M demonstrations alone: equation 4 of [B], read into a deep layer",
            {"samples": "demonstrations"},
            erratum=(30,),
        ),
        Control("learn and learn: the tokens as they were are left out", {"samples": "learned"}),
        Control("the tokens as they were with their values as they are", {"sign": 1}),
    ],
)
def learn_learn_unlearn(seed, samples="all", sign=-1):
    (shown, v), (seen, v_seen), (alone, v_alone) = fast_weights(seed, 2)
    expected = torch.cat([v, v_seen], 1) @ torch.cat([shown, seen], 1).T
    inputs, values = torch.cat([shown, seen, alone], 1), torch.cat([v, v_seen, sign * v_alone], 1)
    m, n = shown.shape[1], seen.shape[1]
    used = slice({"all": m + 2 * n, "learned": m + n, "demonstrations": m}[samples])
    return error(step(v_alone @ alone.T, inputs[:, used], values[:, used], 3.0), expected)


@claim(
    "T4.1-any-rate",
    statement="Any rate gives the same stack, if each layer's labels are made for it.",
    source="[C] Theorem 3.1, applied to each layer",
    controls=[Control("labels for half the rate of the step", {"labels_for": 0.5})],
)
def any_rate(seed, labels_for=1.0):
    stack, shown, prompt = draw(seed)
    m = shown.shape[1]
    expected = forward(stack, shown, prompt)[-1][:, m:]
    rates = (0.01, 0.37, 1.0, 50.0)
    found = [algorithm_1(stack, shown, prompt, rate=rate, labels_rate=labels_for * rate) for rate in rates]
    return [error(x[:, m:], expected) for x in found]


@claim(
    "T4.1-second-step",
    statement="A second step with labels made anew counts the demonstrations twice, at every rate.",
    source="[C] section 5 on one pass; the book's own",
    controls=[Control("a second step on the pairs of the first: what it adds depends on the rate", {"anew": False})],
)
def second_step(seed, anew=True):
    (inputs, values), (seen, v_seen), _ = fast_weights(seed, 2)
    start, m = v_seen @ seen.T, inputs.shape[1]
    once = start + sum(torch.outer(v, x) for v, x in zip(values.T, inputs.T, strict=True))
    found = []
    for rate in (0.01, 0.37, 1.0, float(m)):
        first = step(start, inputs, values, rate)
        left = (
            values if anew else values - rate / m * (first - start) @ inputs
        )  # labels of the first step, seen from W_1
        found.append(error(step(first, inputs, left, rate), 2 * once - start))
    return found


@claim(
    "D-degree",
    statement="The states of L linear attention layers without norm are a polynomial of degree 3^L in the tokens.",
    controls=[Control("degree 3^L - 1", {"missing": 1})],
)
def degree(seed, missing=0):
    stack, shown, prompt = draw(seed, "identity")
    z, depth, n_points = torch.cat([shown, prompt], 1).to(torch.complex128), 2 + seed % 2, 64
    states = []
    for point in range(n_points):  # coefficients by a Fourier transform over the unit circle
        columns = z * torch.exp(torch.tensor(2j * torch.pi * point / n_points, dtype=torch.complex128))
        for w_q, w_k, w_v, *_ in stack.layers[:depth]:
            q, k, v = (w.to(z) @ columns for w in (w_q, w_k, z.shape[1] * w_v))
            columns = columns + v @ (k.T @ q)
        states.append(columns)
    sizes = torch.fft.fft(torch.stack(states), dim=0).abs().amax((1, 2))
    return float(sizes[3**depth + 1 - missing :].max() / sizes.max())
