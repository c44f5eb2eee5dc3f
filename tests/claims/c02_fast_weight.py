"""Claims of page 02: demonstrations write a matrix, and adding it is one gradient step."""

import sympy
import torch

from claims.registry import Control, chapter
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("02_attention_as_a_fast_weight", drawn="sizes, projections, prompt, demonstrations and queries")
MAPS = ("identity", "elu1", "exp", "rff", "favor")
POSITIVE = ("elu1", "exp", "favor")  # so that a denominator exists
PLAIN = ("elu1", "exp")  # as many features as a key has entries, and other than these
RATES = (0.01, 0.37, 1.0, 7.3, 50.0)  # none of them a number of demonstrations but one


def features(name, d_k, generator):
    """The five feature maps, written again."""
    directions = torch.randn(40, d_k, generator=generator)
    return {
        "identity": lambda x: x,
        "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "exp": lambda x: x.exp(),
        "rff": lambda x: torch.cat([(directions @ x).cos(), (directions @ x).sin()]) / 40**0.5,
        "favor": lambda x: (directions @ x - x.square().sum(0) / 2).exp() / 40**0.5,
    }[name]


class Draw:
    """Projections, prompt and demonstrations of random sizes, not square, so that transposes show."""

    def __init__(self, seed: int, name: str = "elu1"):
        self.generator = torch.Generator().manual_seed(seed)
        d_in, self.d_k, self.d_v = torch.randperm(6, generator=self.generator)[:3].add(3).tolist()
        self.n, self.m = torch.randint(2, 15, (2,), generator=self.generator).tolist()
        self.w_k, self.w_q = (self.normal(self.d_k, d_in) / d_in**0.5 for _ in range(2))
        self.w_v = w_v = self.normal(self.d_v, d_in)
        own, self.shown, asked = self.normal(d_in, self.n), self.normal(d_in, self.m), self.normal(d_in, 6)
        self.phi = features(name, self.d_k, self.generator)
        self.keys, self.values = self.phi(self.w_k @ own), w_v @ own
        self.shown_keys, self.shown_values = self.phi(self.w_k @ self.shown), w_v @ self.shown
        self.raw_shown, self.raw_asked = self.w_k @ self.shown, self.w_q @ asked
        self.z = self.phi(self.raw_asked)
        self.base = write(self.values, self.keys)
        self.all_keys = torch.cat([self.shown_keys, self.keys], 1)
        self.all_values = torch.cat([self.shown_values, self.values], 1)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def attended(self, values=None, keys=None):
        """Linear attention token by token and query by query; to all tokens if none are given."""
        values, keys = (self.all_values, self.all_keys) if values is None else (values, keys)
        columns = [sum(v * float(k @ q) for v, k in zip(values.T, keys.T, strict=True)) for q in self.z.T]
        return torch.stack(columns, 1)


def write(values, keys):
    return sum(torch.outer(v, k) for v, k in zip(values.T, keys.T, strict=True))


def step(weight, inputs, targets, rate, factor=0.5, mean=True):
    """One step on squared errors, by autograd."""
    weight = weight.clone().requires_grad_(True)
    loss = factor * sum((weight @ x - y).square().sum() for x, y in zip(inputs.T, targets.T, strict=True))
    (gradient,) = torch.autograd.grad(loss / inputs.shape[1] if mean else loss, weight)
    return (weight - rate * gradient).detach()


@claim(
    "B3-fast-weight",
    statement="Linear attention to all tokens is a product with the matrix that they write, a map of the query's "
    "feature.",
    source="[B] equation 3; [C] equation 8; Schlag et al. 2021",
    controls=[Control("the same matrix on the query without its feature map", {"feature": False}, erratum=(8,))],
)
def fast_weight(seed, feature=True):
    d = Draw(seed)
    return error(write(d.all_values, d.all_keys) @ (d.z if feature else d.raw_asked), d.attended())


@claim(
    "B4-split",
    statement="Without feature map the layer's matrix is the prompt's plus the demonstrations' part.",
    source="[B] equation 4",
    controls=[Control("the prompt's part alone", {"added": 0})],
)
def split_plain(seed, added=1):
    d = Draw(seed, "identity")
    return error((d.base + added * write(d.shown_values, d.shown_keys)) @ d.z, d.attended())


@claim(
    "C5-split",
    statement="For every feature map attention to demonstrations and prompt is the sum of attention to each.",
    source="[C] equation 5, with the feature map on the query",
    controls=[
        Control(
            "the same sum for attention with Katharopoulos et al.'s denominator (the smallest error)",
            {"maps": POSITIVE, "denominator": True},
            erratum=(13,),
        )
    ],
)
def split(seed, maps=MAPS, denominator=False):
    def miss(d):
        def attend(values, keys):
            return d.attended(values, keys) / (d.attended(torch.ones_like(values), keys) if denominator else 1)

        parts = attend(d.values, d.keys) + attend(d.shown_values, d.shown_keys)
        return error(parts, attend(d.all_values, d.all_keys))

    return [miss(Draw(seed, name)) for name in maps]


@claim(
    "T3.1",
    statement="One step from the prompt's matrix on the implied training set gives the matrix with demonstrations and "
    "its outputs, for five feature maps and rates from 0.01 to 50.",
    source="[C] Theorem 3.1, corrected",
    controls=[
        Control("labels without the layer's own prediction", {"own_prediction": False}),
        Control("values in the labels without the factor M/rate", {"scaled": False}),
        Control("minus the values: the step then subtracts the demonstrations", {"sign": -1}, erratum=(19, 20)),
        Control("squares that are not halved", {"factor": 1.0}, erratum=(3,)),
        Control("the sum over demonstrations, not the mean, at the same rate and labels", {"mean": False}),
        Control("the query without feature map, as printed", {"feature": False, "maps": PLAIN}, erratum=(4,)),
        Control("keys without feature map as inputs", {"inputs": "raw keys", "maps": PLAIN}, erratum=(21,)),
        Control("values attached to queries, as observation 3 says", {"inputs": "queries"}, erratum=(6,)),
        Control("the base on one side only, as in the appendix's second line", {"base_too": False}, erratum=(18,)),
    ],
)
def one_step(
    seed,
    maps=MAPS,
    inputs="keys",
    sign=1,
    scaled=True,
    own_prediction=True,
    factor=0.5,
    mean=True,
    feature=True,
    base_too=True,
):
    """The matrix after the step beside its outputs, against what tokens write and token-by-token attention."""
    errors = []
    for d in (Draw(seed, name) for name in maps):
        xi = {"keys": d.shown_keys, "raw keys": d.raw_shown, "queries": d.phi(d.w_q @ d.shown)}[inputs]
        wanted = torch.cat([write(d.all_values, d.all_keys), d.attended()], 1)
        for rate in RATES:
            added = sign * (d.m / rate if scaled else 1) * d.shown_values
            targets = added + d.base @ xi if own_prediction else added
            after = step(d.base, xi, targets, rate, factor, mean) - (0 if base_too else d.base)
            errors.append(error(torch.cat([after, after @ (d.z if feature else d.raw_asked)], 1), wanted))
    return errors


@claim(
    "B4-values",
    statement="The values of the demonstrations are negative meta-gradients: with linearly independent key features "
    "the step on the implied loss is a sum of outer products of vectors with these features for one set of vectors "
    "alone, and these are the values, at every rate.",
    source="[B] section 2.2 and equation 4",
    controls=[
        Control("more demonstrations than features: the step does not determine the values", {"more": 2}),
        Control("labels that lack the layer's own prediction", {"own_prediction": False}),
        Control("the step taken from the matrix that it leads to", {"after": True}),
    ],
)
def values(seed, more=0, own_prediction=True, after=False):
    """The vectors are found from the change of the matrix; as many demonstrations as features, or `more`."""
    d = Draw(seed)
    count = d.d_k + more
    tokens, errors = d.normal(d.shown.shape[0], count), []
    xi, shown_values = d.phi(d.w_k @ tokens), d.w_v @ tokens
    start = d.base + write(shown_values, xi) if after else d.base
    for rate in RATES:
        labels = count / rate * shown_values + (d.base @ xi if own_prediction else 0)
        change = step(start, xi, labels, rate) - start
        errors.append(error(change @ torch.linalg.pinv(xi).T, shown_values))
    return errors


@claim(
    "T3.1-zero-base",
    statement="The whole layer is one step from the zero matrix on all tokens as pairs of key and rescaled value.",
    controls=[Control("the demonstrations alone", {"others": 0})],
)
def zero_base(seed, others=1):
    d, rate = Draw(seed), 0.37
    m = d.m + others * d.n
    after = step(torch.zeros_like(d.base), d.all_keys[:, :m], m / rate * d.all_values[:, :m], rate)
    return error(after @ d.z, d.attended())


@claim(
    "T3.1-svd",
    statement="As many pseudo-demonstrations as the update has rank, none of them a token's key, give the same step; "
    "the condition of the appendix that inputs are keys is sufficient and not necessary.",
    source="the book's own derivation; [C] appendix",
    status="refuted here",
    refutes="Pseudo-demonstrations have to be keys of tokens.",
    controls=[
        Control("one pseudo-demonstration fewer, the best there are", {"fewer": 1}),
        Control("the condition as printed: how far the pseudo-inputs are from keys", {"needed": True}, erratum=(22,)),
    ],
)
def svd(seed, fewer=0, needed=False):
    """Error of the update; or the smallest sine of the angle between an input and the key nearest to it."""
    d, rate = Draw(seed), 0.37
    added = write(d.shown_values, d.shown_keys)
    left, sizes, right = torch.linalg.svd(added, full_matrices=False)
    rank = int((sizes > 1e-12 * sizes[0]).sum())
    assert rank <= min(d.m, d.d_v, d.shown_keys.shape[0])
    kept = slice(rank - fewer)  # without the smallest: no fewer pairs come closer (Eckart and Young)
    inputs = right[kept].T
    targets = (rank - fewer) / rate * (left * sizes)[:, kept] + d.base @ inputs
    if needed:
        cosines = (inputs.T @ (d.shown_keys / d.shown_keys.norm(dim=0))).abs().max(1).values
        return float((1 - cosines.square()).sqrt().min())
    return error(step(d.base, inputs, targets, rate) - d.base, added)


@claim(
    "T3.1-symbolic",
    statement="In symbols, for 2 x 2 matrices: one step gives the matrix with demonstrations for every rate, and a "
    "second step adds V'(I - rate/M G)Phi'^T.",
    source="[C] Theorem 3.1, corrected; the book's own derivation for the second step",
    controls=[Control("the loss without its factor 1/2", {"factor": 2})],
    drawn="",
)
def symbolic(seed, factor=1):
    """Share of the entries of both differences that are not zero in symbols; `factor` of the loss."""
    W, V, K = (sympy.Matrix(2, 2, sympy.symbols(f"{name}:4")) for name in "wvk")
    rate, weight = sympy.Symbol("rate", positive=True), sympy.Matrix(2, 2, sympy.symbols("x:4"))
    labels = 2 / rate * V + W * K

    def step(start):
        loss = sum((weight * K - labels).applyfunc(lambda entry: entry**2)) * sympy.Rational(factor, 4)
        gradient = sympy.Matrix(2, 2, [sympy.diff(loss, entry) for entry in weight])
        return start - rate * gradient.subs(dict(zip(weight, start, strict=True)))

    once = step(W)
    second = V * (sympy.eye(2) - rate / 2 * K.T * K) * K.T
    differences = [once - W - V * K.T, step(once) - once - second]
    return [sum(sympy.expand(entry) != 0 for entry in difference) / 4 for difference in differences]
