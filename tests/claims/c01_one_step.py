"""Claims of page 01: one gradient step of a linear layer is linear attention to its training examples."""

import torch
from torch.nn import functional as F

from claims.registry import Control, chapter
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("01_one_step", drawn="sizes, weights, examples and test inputs")


class Draw:
    """A linear layer, training examples and test inputs; at least two examples, so that sum and mean differ."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(2, 10, (2,), generator=self.generator).tolist()
        self.d_in, self.d_out = sizes[0], sizes[1] + 1  # MSELoss needs no other rate for two outputs
        self.n = int(torch.randint(2, 20, (), generator=self.generator))
        self.weight = self.normal(self.d_out, self.d_in)
        self.inputs, self.targets = self.normal(self.d_in, self.n), self.normal(self.d_out, self.n)
        self.errors = self.targets - self.weight @ self.inputs
        self.tests = self.normal(self.d_in, 5)
        self.rate = float(torch.rand((), generator=self.generator)) + 0.1

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def update(self, loss_of_outputs, rate=None, weight=None, inputs=None):
        """Change of the weight in one step, by autograd."""
        weight = (self.weight if weight is None else weight).clone().requires_grad_(True)
        loss = loss_of_outputs(weight @ (self.inputs if inputs is None else inputs))
        return -(self.rate if rate is None else rate) * torch.autograd.grad(loss, weight)[0]

    def halved(self, outputs):
        return sum(0.5 * (u - y).square().sum() for u, y in zip(outputs.T, self.targets.T, strict=True)) / self.n

    def attention(self, values, keys=None):
        """Linear attention of the test inputs, by loops over tests and examples."""
        keys = self.inputs if keys is None else keys
        columns = [sum(v * float(k @ q) for v, k in zip(values.T, keys.T, strict=True)) for q in self.tests.T]
        return torch.stack(columns, 1)


@claim(
    "P2.1-dual",
    statement="One step on the mean of halved squares changes the outputs of a linear layer by linear attention with "
    "the inputs as keys and the scaled errors, target minus prediction, as values.",
    source="[C] Proposition 2.1; Irie et al. 2022",
    controls=[Control("errors with the opposite sign, as in the appendix of [C]", {"sign": -1}, erratum=(19,))],
)
@claim(
    "P2.1-half",
    statement="Proposition 2.1 needs the factor 1/2 in the squared loss.",
    source="[C] equation 4, Proposition 2.1",
    status="conditional",
    controls=[Control("the squared norm without the 1/2, at the same rate", {"factor": 1}, erratum=(3,))],
)
def proposition(seed, sign=1, factor=1 / 2):
    d = Draw(seed)
    change = d.update(lambda u: 2 * factor * d.halved(u)) @ d.tests
    return error(change, d.attention(sign * d.rate / d.n * d.errors))


@claim(
    "P2.1-rates",
    statement="The mean of squares needs half the rate, MSELoss d_out/2 times, the sum of halved squares 1/T times.",
    controls=[Control("the same losses at the untranslated rate (the smallest error)", {"translated": False})],
)
def rates(seed, translated=True):
    d = Draw(seed)
    losses = [
        (lambda u: (u - d.targets).square().sum(0).mean(), 0.5),
        (lambda u: F.mse_loss(u, d.targets), d.d_out / 2),
        (lambda u: 0.5 * (u - d.targets).square().sum(), 1 / d.n),
    ]
    change = d.update(d.halved)
    return [error(d.update(loss, d.rate * (factor if translated else 1)), change) for loss, factor in losses]


@claim(
    "P2.1-unsquared",
    statement="The mean of unsquared norms gives linear attention with errors of unit length; read as [C]'s l2 loss, "
    "it makes Proposition 2.1 false at every rate (two or more examples).",
    source="[C] equation 4, read literally",
    status="refuted here",
    controls=[
        Control("the best of all rates for the errors that the proposition prints", {"as_printed": True}, erratum=(3,))
    ],
)
def unsquared(seed, as_printed=False):
    d = Draw(seed)
    step = d.update(lambda u: torch.linalg.vector_norm(u - d.targets, dim=0).mean())
    if as_printed:
        wanted = d.update(d.halved)
        return error((step * wanted).sum() / step.square().sum() * step, wanted)
    return error(step @ d.tests, d.attention(d.rate / d.n * d.errors / d.errors.norm(dim=0)))


@claim(
    "P2.1-history",
    statement="After any number of online steps a linear layer is its initial value plus linear attention over all "
    "steps, with the errors made at the time.",
    source="Irie et al. 2022, section 3",
    controls=[Control("the errors of the initial layer for all steps", {"at_the_time": False})],
)
def history(seed, at_the_time=True):
    d = Draw(seed)
    rate, weight, values = 0.5 / float(d.inputs.square().sum(0).max()), d.weight.clone(), []
    order = torch.cat([torch.randperm(d.n, generator=d.generator) for _ in range(3)])
    for i in order.tolist():
        x, y = d.inputs[:, i : i + 1], d.targets[:, i : i + 1]
        values.append(rate * (y - (weight if at_the_time else d.weight) @ x))
        weight = weight + d.update(lambda u, y=y: 0.5 * (u - y).square().sum(), rate, weight, x)
    return error(d.attention(torch.cat(values, 1), d.inputs[:, order]), (weight - d.weight) @ d.tests)


def steps_on_any_loss(d):
    """Of three losses of the outputs: one step, and its scaled output gradients."""
    classes = torch.randint(d.d_out, (d.n,), generator=d.generator)
    for loss in (
        lambda u: F.cross_entropy(u.T, classes),
        lambda u: F.huber_loss(u, d.targets, delta=0.5),
        lambda u: (u.sin() * d.targets).sum() + u.tanh().prod(0).sum(),
    ):
        outputs = (d.weight @ d.inputs).requires_grad_(True)
        yield d.update(loss), d.rate * torch.autograd.grad(loss(outputs), outputs)[0]


@claim(
    "B1-outer",
    statement="For every differentiable loss of the outputs (cross-entropy, Huber, an arbitrary one) the update of a "
    "linear layer is the sum of outer products of negative scaled output gradients and inputs.",
    source="[B] equation 1",
    controls=[Control("the outer products without the minus sign", {"sign": 1})],
)
def outer(seed, sign=-1):
    d = Draw(seed)
    return [
        error(sum(torch.outer(sign * a, x) for a, x in zip(gradients.T, d.inputs.T, strict=True)), step)
        for step, gradients in steps_on_any_loss(d)
    ]


@claim(
    "B2-attention",
    statement="The updated layer predicts as the old layer plus linear attention, for every differentiable loss.",
    source="[B] equation 2",
    controls=[
        Control(
            "the rate and the sign both inside and outside the values, as when [B]'s and [C]'s conventions are mixed",
            {"mixed": True},
        )
    ],
)
def attention(seed, mixed=False):
    d = Draw(seed)
    outside = d.rate / d.n if mixed else 1.0
    before = d.weight @ d.tests
    return [
        error(outside * d.attention(-gradients), (d.weight + step) @ d.tests - before)
        for step, gradients in steps_on_any_loss(d)
    ]
