"""Chapter 05: causal masks and the order of demonstrations."""

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
    controls=[Control("one base for all tokens, of the whole prompt", {"one_base": True}, erratum=(16,))],
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
def tokens(seed, of, one_base=False, literal=False):
    """Outputs of the prompt's tokens or of the demonstrations, each with its base and its training set."""
    keys, values, queries, m, expected = layer(seed)
    asking = slice(m, None) if of == "prompt" else slice(m)
    found = []
    for i in range(keys.shape[1])[asking]:
        written = slice(m, None if one_base else i + 1)  # empty for a demonstration
        base = values[:, written] @ keys[:, written].T
        shown = slice(m if literal else min(i + 1, m))
        found.append(step(base, keys[:, shown], values[:, shown], 0.7) @ queries[:, i])
    return error(torch.stack(found, 1), expected[:, asking])


@claim(
    "L6.1-same-update",
    statement="In a causal layer the demonstrations change the matrix of every prompt token by the same amount; only "
    "bases and labels depend on the token.",
    source="[C] Lemma 6.1",
    controls=[Control("the same comparison among the demonstrations' own matrices", {"of": "demonstrations"})],
)
def same_update(seed, of="prompt"):
    keys, values, _, m, _ = layer(seed)
    updates = []
    for i in range(m, keys.shape[1]) if of == "prompt" else range(m - 1):
        base = values[:, m : i + 1] @ keys[:, m : i + 1].T  # zero for a demonstration
        seen = slice(min(i + 1, m))
        updates.append(step(base, keys[:, seen], values[:, seen], float(min(i + 1, m))) - base)
    return [error(update, values[:, :m] @ keys[:, :m].T) for update in updates]


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
            "as in [C], attention to the prompt plus attention to the demonstrations, each with its own denominator",
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
    statement="In a causal stack of any depth the demonstrations' states do not depend on the prompt.",
    source="the book's own; not noted in [C]",
    controls=[Control("the same stack without the mask", {"causal": False})],
)
def apart(seed, causal=True):
    stack, shown, prompt = draw(seed, causal=causal)
    first, second = (forward(stack, shown, x)[-1][:, : shown.shape[1]] for x in (prompt, prompt.flip(0)))
    return error(first, second)


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
