"""Chapter 06: one step a layer, in a stack."""

import torch
from plain_stack import algorithm_1, draw, forward, step

from claims.registry import Control, chapter
from iclgd_helpers.theory.gradient_step import FEATURE_MAPS
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("06_depth", drawn="depth, widths, weights, demonstrations and prompt")


@claim(
    "T4.1-base",
    statement="The base of a layer is written by states that have already seen the demonstrations.",
    source="[C] Algorithm 1a, made precise",
    controls=[Control("the base that the model writes without demonstrations", {"base": "zero-shot"}, erratum=(12,))],
)
@claim(
    "T4.1-demonstrations-step",
    statement="Demonstrations pass through the updated matrix, like the prompt.",
    source="[C] Algorithm 1c",
    controls=[Control("demonstrations pass through the matrix before its update", {"demonstrations": "base"})],
)
@claim(
    "T4.1-demonstrations-move",
    statement="The next layer is trained on the demonstrations as this layer leaves them.",
    source="[C] Algorithm 1",
    controls=[Control("every layer is trained on the embedded demonstrations", {"demonstrations": "frozen"})],
)
@claim(
    "T4.1-one-residual",
    statement="A feed-forward layer is one residual update Z + FFN(Z).",
    source="[C] section 4, corrected",
    controls=[
        Control(
            "both residuals that the text gives it: FFN with a residual inside, and T + I",
            {"residuals": 2},
            erratum=(7,),
        )
    ],
)
@claim(
    "T4.1-query-feature",
    statement="The layer's matrix acts on phi(W_Q Z).",
    source="[C] equation 8, corrected",
    controls=[Control("equation 8 as printed: it acts on W_Q Z", {"query": "plain"}, erratum=(8,))],
)
@claim(
    "T4.1-key-feature",
    statement="The inputs of the training set are phi(W_K p').",
    source="[C] Algorithm 1b, whose argument of phi is missing",
    controls=[Control("W_K p' without phi", {"keys": "plain"}, erratum=(10,))],
)
@claim(
    "T4.1-feed-forward-goes-on",
    statement="After a feed-forward layer the algorithm goes on with the next layer.",
    source="[C] Algorithm 1, corrected",
    controls=[Control("it returns, as printed", {"feed_forward": "return"}, erratum=(9,))],
)
def algorithm(seed, phi="elu1", **fault):
    """Error of the prompt's final states by Algorithm 1 as corrected, or with a fault."""
    stack, shown, prompt = draw(seed, phi)
    m = shown.shape[1]
    return error(algorithm_1(stack, shown, prompt, **fault)[:, m:], forward(stack, shown, prompt)[-1][:, m:])


for name in FEATURE_MAPS:
    claim(
        f"T4.1-{name}",
        statement=f"Algorithm 1, corrected, gives the forward pass of a stack without mask ({name} features).",
        source="[C] Algorithm 1 and Theorem 4.1, corrected",
        controls=[
            Control("rate 1 with the mean loss, in place of the number of demonstrations", {"rate": 1.0}, erratum=(11,))
        ],
        options={"phi": name},
    )(algorithm)


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
    controls=[Control("the M demonstrations alone", {"demonstrations_alone": True})],
)
def learn_learn_unlearn(seed, demonstrations_alone=False):
    (shown, v), (seen, v_seen), (alone, v_alone) = fast_weights(seed, 2)
    expected = torch.cat([v, v_seen], 1) @ torch.cat([shown, seen], 1).T
    inputs, values = torch.cat([shown, seen, alone], 1), torch.cat([v, v_seen, -v_alone], 1)
    samples = slice(shown.shape[1] if demonstrations_alone else None)
    return error(step(v_alone @ alone.T, inputs[:, samples], values[:, samples], 3.0), expected)


@claim(
    "T4.1-no-drift-below",
    statement="At the first layer the drift is zero: there the zero-shot base is the base.",
    controls=[Control("the second layer", {"number": 1})],
)
def no_drift_below(seed, number=0):
    _, (seen, v_seen), (alone, v_alone) = fast_weights(seed, number)
    return error(v_seen @ seen.T, v_alone @ alone.T)


@claim(
    "T4.1-any-rate",
    statement="Any rate gives the same stack, if the labels are made for it.",
    source="[C] Theorem 3.1, applied to each layer",
    controls=[Control("labels for the rate M, step at twice that rate", {"factor": 2})],
)
def any_rate(seed, factor=1):
    (inputs, values), (seen, v_seen), _ = fast_weights(seed, 2)
    start = v_seen @ seen.T
    rates = (0.01, 0.37, 1.0, float(inputs.shape[1]), 50.0)
    found = [step(start, inputs, values, factor * rate, labels_rate=rate) for rate in rates]
    return [error(x, start + values @ inputs.T) for x in found]


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
