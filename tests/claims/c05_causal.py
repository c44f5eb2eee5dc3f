"""Chapter 05: causal masks and the order of demonstrations."""

import itertools
from dataclasses import replace

import torch
from plain_stack import draw, forward, per_token, step

from claims.registry import Control, chapter
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("05_causal_masks_and_order", drawn="depth, widths, weights, demonstrations and prompt")


def layer(seed):
    """One causal layer: keys, values, queries (demonstrations first), M, and the outputs as a masked sum."""
    stack, shown, prompt = draw(seed)
    z, m = torch.cat([shown, prompt], 1), shown.shape[1]
    w_q, w_k, w_v = stack.layers[0][:3]
    keys, values, queries = stack.phi(w_k @ z), w_v @ z, stack.phi(w_q @ z)
    return keys, values, queries, m, values @ (keys.T @ queries).triu()


@claim(
    "L6.1-prompt",
    statement="A causal layer gives prompt token i what one step gives it, from the base that the prompt up to i "
    "has written, on all demonstrations.",
    source="[C] Lemma 6.1, corrected",
    controls=[
        Control("one letter for token and sample: the label of sample j has base j", {"label": "of the sample"}, (16,)),
        Control("one base for all tokens, of the whole prompt", {"one_base": True}),
    ],
    options={"of": "prompt"},
)
@claim(
    "L6.1-demonstrations",
    statement="A causal layer gives demonstration j what one step from zero gives it, on the demonstrations up to "
    "itself with labels (j / rate) v.",
    source="[C] Lemma 6.1, corrected",
    controls=[Control("the lemma as printed: all demonstrations for every token", {"literal": True}, erratum=(17,))],
    options={"of": "demonstrations"},
)
def tokens(seed, of, one_base=False, literal=False, label="of the token"):
    """Outputs of the prompt's tokens or of the demonstrations, each with its base and its training set."""
    keys, values, queries, m, expected = layer(seed)
    asking = slice(m, None) if of == "prompt" else slice(m)

    def base(i):
        written = slice(m, None if one_base else i + 1)  # empty for a demonstration
        return values[:, written] @ keys[:, written].T

    found = []
    for i in range(keys.shape[1])[asking]:
        shown = slice(m if literal else min(i + 1, m))
        weight = base(i).requires_grad_(True)
        loss = 0
        for j, (x, v) in enumerate(zip(keys[:, shown].T, values[:, shown].T, strict=True)):
            own = base(i) if label == "of the token" else base(m + j)  # beyond the prompt: all of it
            loss = loss + 0.5 * (weight @ x - (keys[:, shown].shape[1] / 0.7 * v + own @ x)).square().sum()
        (gradient,) = torch.autograd.grad(loss / keys[:, shown].shape[1], weight)
        found.append((weight - 0.7 * gradient).detach() @ queries[:, i])
    return error(torch.stack(found, 1), expected[:, asking])


@claim(
    "L6.1-same-update",
    statement="In a causal layer the demonstrations change the matrix of every prompt token by the same amount; only "
    "bases and labels depend on the token.",
    source="[C] Lemma 6.1",
    controls=[
        Control("the same comparison among the demonstrations' own matrices", {"of": "demonstrations"}),
        Control("a causal layer with a sliding window of three tokens", {"window": 3}),
    ],
)
def same_update(seed, of="prompt", window=None):
    keys, values, _, m, _ = layer(seed)
    updates = []
    for i in range(m, keys.shape[1]) if of == "prompt" else range(m - 1):
        first = max(0, i + 1 - window) if window else 0
        own, seen = slice(max(m, first), i + 1), slice(first, min(i + 1, m))  # own: empty for a demonstration
        base = values[:, own] @ keys[:, own].T
        n_seen = keys[:, seen].shape[1]
        after = step(base, keys[:, seen], values[:, seen], float(n_seen)) if n_seen else base
        updates.append(after - base)
    return [error(update, values[:, :m] @ keys[:, :m].T) for update in updates]


@claim(
    "L6.1-window",
    statement="In a causal softmax stack with a fixed mask (a sliding window, or any other), the step of each token on "
    "the demonstrations that it sees, from the base that the prompt's tokens in its sight write, gives every state.",
    controls=[
        Control("all demonstrations as samples of every prompt token", {"samples": "all"}),
        Control("the whole prompt up to the token as its base", {"base": "all"}),
    ],
    drawn="widths, weights, masks, demonstrations and prompt",
)
def masked(seed, samples="in sight", base="in sight"):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    m, n = (int(torch.randint(6, 10, (), generator=generator)) for _ in range(2))
    layers = [[normal(4, 6), normal(4, 6), normal(6, 6), normal(6, 6) / 6**0.5] for _ in range(3)]
    window = [list(range(max(0, i - 4), i + 1)) for i in range(m + n)]
    chosen = [[j for j in range(i) if normal(1) > 0] + [i] for i in range(m + n)]

    def attend(layer, z, sight):
        """Softmax of token i over the tokens `sight[i]`."""
        w_q, w_k, w_v, _ = layer
        z, out = z / z.norm(dim=0), []
        for i in range(m + n):
            scores = torch.stack([(w_k @ z[:, j]) @ (w_q @ z[:, i]) / 2 for j in sight[i]])
            out.append(sum(a * (w_v @ z[:, j]) for a, j in zip(scores.softmax(0), sight[i], strict=True)))
        return torch.stack(out, 1)

    def attend_by_steps(layer, z, sight):
        """A ratio of the rows of one kernel expansion after one step, for each token from its own base."""
        w_q, w_k, w_v, _ = layer
        z, out = z / z.norm(dim=0), []
        keys, rows = w_k @ z, torch.cat([w_v @ z, torch.ones(1, m + n)])
        for i in range(m + n):
            own = [j for j in sight[i] if j >= m] if base == "in sight" or i < m else range(m, i + 1)
            shown = [j for j in sight[i] if j < m] if samples == "in sight" or i < m else range(m)

            def at(point, coefficients, centres, keys=keys):
                return sum(
                    (c * torch.exp(keys[:, j] @ point / 2) for c, j in zip(coefficients, centres, strict=True)),
                    torch.zeros(7),
                )

            start = [rows[:, j] for j in own]
            before = [at(keys[:, j], start, own) for j in shown]
            labels = [len(shown) / 0.7 * rows[:, j] + f for j, f in zip(shown, before, strict=True)]
            change = [0.7 / len(shown) * (y - f) for y, f in zip(labels, before, strict=True)]
            query = w_q @ z[:, i]
            after = at(query, start, own) + at(query, change, shown)
            out.append(after[:-1] / after[-1])
        return torch.stack(out, 1)

    def run(attention, sight, z):
        for layer in layers:
            z = z + attention(layer, z, sight)
            z = z + layer[3] @ torch.tanh(z)
        return z[:, m:]

    start = normal(6, m + n)
    return [error(run(attend_by_steps, sight, start), run(attend, sight, start)) for sight in (window, chosen)]


@claim(
    "L6.1-deep",
    statement="In a causal stack of any depth, the steps token by token give every state of the forward pass.",
    source="[C] Lemma 6.1 and Theorem 4.1, corrected",
    controls=[
        Control(
            "the lemma as printed: demonstrations are updated with all demonstrations too",
            {"literal": True},
            erratum=(17,),
        )
    ],
)
def deep(seed, literal=False):
    stack, shown, prompt = draw(seed, causal=True)
    found, expected = per_token(stack, shown, prompt, literal), forward(stack, shown, prompt)[-1]
    return [error(found[:, first:], expected[:, first:]) for first in (0, shown.shape[1])]


@claim(
    "L6.1-reading-order",
    statement="With tokens in reading order the causal sum runs over keys j <= i, which is column i of the upper "
    "triangle of keys by queries.",
    source="[C] equation 11 and section 6",
    controls=[
        Control(
            "the labels of [C], sections 2 to 5, run backwards: the same formula then lets a token see only later ones",
            {"backwards": True},
            erratum=(15,),
        )
    ],
)
def reading_order(seed, backwards=False):
    keys, values, queries, _, expected = layer(seed)
    order = list(range(keys.shape[1]))  # order[label] is the place in the text; label i sees labels up to i
    order = order[::-1] if backwards else order
    out = torch.zeros_like(values)
    for i, asking in enumerate(order):
        for seen in order[: i + 1]:
            out[:, asking] += values[:, seen] * (keys[:, seen] @ queries[:, asking])
    return error(out, expected)


@claim(
    "L6.1-normalised",
    statement="Causal attention with Katharopoulos's denominator is exact too when numerator and denominator both take "
    "the step.",
    source="Katharopoulos et al. (2020), equations 8 to 12; cited in [C] equation 10",
    controls=[
        Control(
            "the sum of equation 5 with Katharopoulos's denominators: attention to the prompt plus attention to the "
            "demonstrations, each with its own",
            {"apart": True},
            erratum=(13,),
        )
    ],
)
def normalised(seed, apart=False):
    keys, values, queries, m, _ = layer(seed)
    counts = (keys.T @ queries).triu()
    rows = torch.cat([values, torch.ones(1, values.shape[1])])
    found = []
    for i in range(m, keys.shape[1]):
        base = rows[:, m : i + 1] @ keys[:, m : i + 1].T
        both = step(base, keys[:, :m], rows[:, :m], 2.0)
        parts = (base, both - base) if apart else (both,)
        found.append(sum(part[:-1] @ queries[:, i] / (part[-1] @ queries[:, i]) for part in parts))
    return error(torch.stack(found, 1), ((values @ counts) / counts.sum(0))[:, m:])


@claim(
    "L6.1-apart",
    statement="In a causal stack of any depth the demonstrations' states, beside any prompt, are those that the steps "
    "on the demonstrations alone give.",
    source="the book's own; not noted in [C]",
    controls=[Control("the same stack without the mask", {"causal": False})],
)
def apart(seed, causal=True):
    stack, shown, prompt = draw(seed, causal=causal)
    alone, m = per_token(stack, shown, prompt[:, :0]), shown.shape[1]
    return [error(forward(stack, shown, x)[-1][:, :m], alone) for x in (prompt, -2 * prompt[:, :1])]


@claim(
    "D-order-without-mask",
    statement="Without mask and positions the order of the demonstrations does not matter at any depth.",
    source="the book's own; compare Shen et al. (2023)",
    controls=[Control("the same stack with a causal mask", {"causal": True})],
)
@claim(
    "D-order-one-layer",
    statement="In one causal layer the prompt's outputs do not depend on the order of the demonstrations.",
    controls=[Control("two causal layers", {"depth": 2})],
    options={"causal": True, "depth": 1},
)
def change_of_order(seed, causal=False, depth=None):
    """How far the prompt's final states move, relatively, when the demonstrations come in reverse."""
    stack, shown, prompt = draw(seed, causal=causal)
    stack = replace(stack, layers=stack.layers[:depth])
    first, second = (forward(stack, x, prompt)[-1][:, shown.shape[1] :] for x in (shown, shown.flip(1)))
    return error(second, first)


@claim(
    "D-kaczmarz",
    statement="As tied causal layers are stacked from W_0 = 0, with rate times |x_j|^2 below 2n for every example, the "
    "query's answer tends to that of one pass of Kaczmarz, w = Xi C^-1 y with C the lower triangle of Xi^T Xi.",
    source="Ding et al. 2023; the closed form and the condition: the book's own derivation",
    controls=[
        Control("the same layers without a mask", {"causal": False}),
        Control("a rate that is too large for the longest example", {"share": 1.1}),
    ],
    drawn="examples, noise and query",
)
@claim(
    "D-least-squares",
    statement="Without a mask, and with rate times the largest eigenvalue of Xi^T Xi below 2n, the same layers tend to "
    "the least-squares solution.",
    source="Ding et al. 2023",
    controls=[
        Control("the same layers with a causal mask", {"causal": True}),
        Control("a rate that is too large for the largest eigenvalue", {"share": 1.1}),
    ],
    options={"causal": False, "target": "least squares"},
    drawn="examples, noise and query",
)
def tied_layers(seed, causal=True, target="one pass", share=0.5):
    """A query's answer after tied linear layers on tokens (x_j, residual of y_j), at a share of the critical rate."""
    generator = torch.Generator().manual_seed(seed)
    n, d = 12, 3
    x = torch.randn(d, n, generator=generator)
    x = x / x.norm(dim=0) * (0.8 + 0.4 * torch.rand(n, generator=generator))
    w_true, asked = torch.randn(d, generator=generator), torch.randn(d, generator=generator)
    y = w_true @ x + 0.3 * torch.randn(n, generator=generator)
    counts = (x.T @ x).triu() if causal else x.T @ x
    eta = share * 2 * n / float(torch.linalg.eigvals(counts).abs().max())
    slots, answer = y.clone(), torch.zeros(())
    for _ in range(1000):
        slots, answer = slots - eta / n * slots @ counts, answer + eta / n * slots @ (x.T @ asked)
    if target == "least squares":
        return error(answer, torch.linalg.lstsq(x.T, y[:, None]).solution[:, 0] @ asked)
    w = torch.zeros(d)
    for example, label in zip(x.T, y, strict=True):
        w = w + (label - w @ example) / (example @ example) * example
    closed = x @ torch.linalg.solve(torch.tril(x.T @ x), y)
    return [error(answer, w @ asked), error(answer, closed @ asked)]


@claim(
    "D-kaczmarz-mean",
    statement="For noiseless labels and independent examples whose directions have mean outer product I/d, one pass of "
    "Kaczmarz leaves the share (1 - 1/d)^n of the squared error, on average.",
    source="the book's own derivation; compare Strohmer and Vershynin 2009",
    controls=[Control("one direction of the three drawn twice as often, another never", {"directions": (0, 0, 1)})],
    drawn="the directions' frame, lengths and the task",
)
def mean_of_one_pass(seed, directions=(0, 1, 2)):
    """Mean over all sequences of four examples with directions from an orthonormal frame."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    w_true, lengths = torch.randn(3, generator=generator), 0.5 + torch.rand(4, generator=generator)
    left = []
    for sequence in itertools.product(directions, repeat=4):
        x = frame[:, list(sequence)] * lengths
        w = x @ torch.linalg.solve(torch.tril(x.T @ x), x.T @ w_true)
        left.append((w - w_true).square().sum())
    return error(torch.stack(left).mean(), (1 - 1 / 3) ** 4 * w_true.square().sum())
