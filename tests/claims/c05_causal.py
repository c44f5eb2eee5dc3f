"""Chapter 05: causal masks and the order of demonstrations."""

import torch
from plain_stack import draw, forward, per_token, step, with_mask

from claims.registry import Exact, claim
from iclgd_helpers.theory.gradient_step import relative_error

HERE = {"notebook": "05_causal_masks_and_order", "status": "identity"}


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
    control="one base for all tokens, of the whole prompt",
    erratum=(16,),
    **HERE,
)
def prompt_tokens(seed):
    keys, values, queries, m, expected = layer(seed)
    n = keys.shape[1]
    right, wrong = [], []
    for i in range(m, n):
        for end, into in ((i + 1, right), (n, wrong)):
            base = values[:, m:end] @ keys[:, m:end].T
            into.append(step(base, keys[:, :m], values[:, :m], 0.7) @ queries[:, i])
    right, wrong = (relative_error(torch.stack(x, 1), expected[:, m:]) for x in (right, wrong))
    return Exact(right, wrong)


@claim(
    "L6.1-demonstrations",
    statement="A causal layer gives demonstration j what one step from zero gives it, on the demonstrations up to "
    "itself with labels (j / rate) v.",
    source="[C] Lemma 6.1, corrected",
    control="the lemma as printed: all demonstrations for every token",
    erratum=(17,),
    **HERE,
)
def demonstration_tokens(seed):
    keys, values, queries, m, expected = layer(seed)
    zero = torch.zeros(values.shape[0], keys.shape[0], dtype=torch.float64)
    right = [step(zero, keys[:, :j], values[:, :j], 0.7) @ queries[:, j - 1] for j in range(1, m + 1)]
    wrong = [step(zero, keys[:, :m], values[:, :m], 0.7) @ queries[:, j] for j in range(m)]
    right, wrong = (relative_error(torch.stack(x, 1), expected[:, :m]) for x in (right, wrong))
    return Exact(right, wrong)


@claim(
    "L6.1-same-update",
    statement="In a causal layer the demonstrations change the matrix of every prompt token by the same amount; only "
    "bases and labels depend on the token.",
    source="[C] Lemma 6.1",
    control="the same comparison among the demonstrations' own matrices",
    **HERE,
)
def same_update(seed):
    keys, values, _, m, _ = layer(seed)
    expected = values[:, :m] @ keys[:, :m].T
    updates = []
    for i in range(m, keys.shape[1]):
        base = values[:, m : i + 1] @ keys[:, m : i + 1].T
        updates.append(step(base, keys[:, :m], values[:, :m], float(m)) - base)
    zero = torch.zeros_like(expected)
    own = [step(zero, keys[:, :j], values[:, :j], float(j)) for j in range(1, m)]
    return Exact(
        max(relative_error(update, expected) for update in updates),
        max(relative_error(update, expected) for update in own),
    )


@claim(
    "L6.1-deep",
    statement="In a causal stack of any depth, the steps token by token give every state of the forward pass.",
    source="[C] Lemma 6.1 and Theorem 4.1, corrected",
    control="the lemma as printed: demonstrations are updated with all demonstrations too",
    erratum=(17,),
    **HERE,
)
def deep(seed):
    stack, shown, prompt = draw(seed, causal=True)
    expected = forward(stack, shown, prompt)[-1]
    m = shown.shape[1]
    right = relative_error(per_token(stack, shown, prompt), expected)
    return Exact(right, relative_error(per_token(stack, shown, prompt, literal=True)[:, m:], expected[:, m:]))


@claim(
    "L6.1-reading-order",
    statement="With tokens in reading order the causal sum runs over keys j <= i, which is column i of the upper "
    "triangle of keys by queries.",
    source="[C] equation 11 and section 6",
    control="the labels of [C], sections 2 to 5, run backwards: the same formula then lets a token see only later ones",
    erratum=(15,),
    **HERE,
)
def reading_order(seed):
    keys, values, queries, _, expected = layer(seed)
    n = keys.shape[1]

    def summed(order):  # order[label] is the place in the text; token with label i sees labels up to i
        out = torch.zeros_like(values)
        for i in range(n):
            for j in range(i + 1):
                out[:, order[i]] += values[:, order[j]] * (keys[:, order[j]] @ queries[:, order[i]])
        return out

    forwards = relative_error(summed(range(n)), expected)
    return Exact(forwards, relative_error(summed(range(n - 1, -1, -1)), expected))


@claim(
    "L6.1-normalised",
    statement="Causal attention with Katharopoulos's denominator is exact too when numerator and denominator both take "
    "the step.",
    source="Katharopoulos et al. (2020), equations 8 to 12; cited in [C] equation 10",
    control="as in [C], attention to the prompt plus attention to the demonstrations, each with its own denominator",
    erratum=(13,),
    **HERE,
)
def normalised(seed):
    keys, values, queries, m, _ = layer(seed)
    counts = (keys.T @ queries).triu()
    expected = ((values @ counts) / counts.sum(0))[:, m:]
    rows = torch.cat([values, torch.ones(1, values.shape[1], dtype=torch.float64)])
    right, wrong = [], []
    for i in range(m, keys.shape[1]):
        base = rows[:, m : i + 1] @ keys[:, m : i + 1].T
        both = step(base, keys[:, :m], rows[:, :m], 2.0) @ queries[:, i]
        right.append(both[:-1] / both[-1])
        own, shown = base @ queries[:, i], rows[:, :m] @ keys[:, :m].T @ queries[:, i]
        wrong.append(own[:-1] / own[-1] + shown[:-1] / shown[-1])
    return Exact(*(relative_error(torch.stack(x, 1), expected) for x in (right, wrong)))


@claim(
    "L6.1-apart",
    statement="In a causal stack of any depth the demonstrations' states do not depend on the prompt.",
    source="the book's own; not noted in [C]",
    control="the same stack without the mask",
    **HERE,
)
def apart(seed):
    stack, shown, prompt = draw(seed, causal=True)
    m, other = shown.shape[1], prompt.flip(0)

    def moved(kind):
        first, second = (forward(kind, shown, x)[-1][:, :m] for x in (prompt, other))
        return relative_error(first, second)

    return Exact(moved(stack), moved(with_mask(stack, False)))


def change_of_order(stack, shown, prompt):
    """How far the prompt's final states move, relatively, when the demonstrations come in reverse."""
    m = shown.shape[1]
    first, second = (forward(stack, x, prompt)[-1][:, m:] for x in (shown, shown.flip(1)))
    return relative_error(second, first)


@claim(
    "D-order-without-mask",
    statement="Without mask and positions the order of the demonstrations does not matter at any depth.",
    source="the book's own; compare Shen et al. (2023)",
    control="the same stack with a causal mask",
    **HERE,
)
def order_without_mask(seed):
    stack, shown, prompt = draw(seed)
    return Exact(
        change_of_order(stack, shown, prompt),
        change_of_order(with_mask(stack, True), shown, prompt),
    )


@claim(
    "D-order-one-layer",
    statement="In one causal layer the prompt's outputs do not depend on the order of the demonstrations.",
    source="the book's own",
    control="two causal layers",
    **HERE,
)
def order_one_layer(seed):
    stack, shown, prompt = draw(seed, causal=True)
    one, two = (type(stack)(stack.layers[:depth], stack.phi, True) for depth in (1, 2))
    return Exact(change_of_order(one, shown, prompt), change_of_order(two, shown, prompt))
