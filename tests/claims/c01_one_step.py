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

    def attention(self, values, keys=None, softmax=False):
        """Linear attention of the test inputs, by loops over tests and examples; or with softmax weights."""
        columns = []
        for query in self.tests.T:
            weights = torch.stack([key @ query for key in (self.inputs if keys is None else keys).T])
            weights = weights.softmax(0) if softmax else weights
            columns.append(sum(value * float(w) for value, w in zip(values.T, weights, strict=True)))
        return torch.stack(columns, 1)


@claim(
    "P2.1-dual",
    statement="One step on the mean of halved squares changes the outputs of a linear layer by linear attention with "
    "the inputs as keys and the scaled errors, target minus prediction, as values.",
    source="[C] Proposition 2.1; Irie et al. 2022",
    controls=[
        Control("a step on Huber's loss, whose error is cut off at 1/2", {"loss": "huber"}),
        Control("the errors that the layer makes after the step", {"after": True}),
        Control("softmax of the scalar products in their place", {"softmax": True}),
    ],
)
def proposition(seed, loss="halved", after=False, softmax=False):
    d = Draw(seed)
    losses = {"halved": d.halved, "huber": lambda u: F.huber_loss(u, d.targets, reduction="sum", delta=0.5) / d.n}
    step = d.update(losses[loss])
    errors = d.targets - (d.weight + step if after else d.weight) @ d.inputs
    return error(d.attention(d.rate / d.n * errors, softmax=softmax), step @ d.tests)


@claim(
    "P2.1-half",
    statement="Of a family of losses of one output (squared norms, products, quartic, cosine), for which Proposition "
    "2.1 is asked at many outputs and labels, the halved square alone satisfies it, up to terms of the label.",
    source="[C] equation 4, Proposition 2.1",
    status="conditional",
    drawn="sizes, outputs and labels",
    controls=[Control("asked at one output and one label: other losses of the family satisfy it too", {"draws": 1})],
)
def the_half(seed, draws=20):
    """Coefficients of the loss, by least squares: its gradient is to be output minus label wherever it is asked."""
    d = Draw(seed)
    family = [
        lambda u, y: u.square().sum(),
        lambda u, y: (u * y).sum(),
        lambda u, y: (u - y).square().sum().square(),
        lambda u, y: (u - y).cos().sum(),
        lambda u, y: u.square().sum().square(),
    ]
    rows, wanted = [], []
    for _ in range(draws):
        u, y = d.normal(d.d_out).requires_grad_(True), d.normal(d.d_out)
        rows.append(torch.stack([torch.autograd.grad(term(u, y), u)[0] for term in family], 1))
        wanted.append((u - y).detach())
    found = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)[:, None], driver="gelsd").solution[:, 0]
    return error(found, torch.tensor([0.5, -1, 0, 0, 0]))


@claim(
    "P2.1-rates",
    statement="The mean of squares needs half the rate, MSELoss d_out/2 times, the sum of halved squares 1/T times.",
    controls=[
        Control("the same losses at the untranslated rate (the smallest error)", {"translated": False}),
        Control("examples with weights of their own, which are no convention", {"weighted": True}),
    ],
)
def rates(seed, translated=True, weighted=False):
    d = Draw(seed)
    weights = d.normal(d.n).exp() if weighted else torch.ones(d.n)
    losses = [
        (lambda u: ((u - d.targets).square().sum(0) * weights).sum() / weights.sum(), 0.5),
        (lambda u: (F.mse_loss(u, d.targets, reduction="none") * weights).mean(), d.d_out / 2),
        (lambda u: (0.5 * (u - d.targets).square() * weights).sum(), 1 / d.n),
    ]
    change = d.update(d.halved)
    return [error(d.update(loss, d.rate * (factor if translated else 1)), change) for loss, factor in losses]


@claim(
    "P2.1-unsquared",
    statement="With linearly independent inputs and residuals of one length the mean of unsquared norms takes the step "
    "of Proposition 2.1, at a rate larger by that length; with residuals of different lengths no rate does.",
    source="[C] equation 4, read literally; the book's own derivation",
    status="conditional",
    controls=[Control("residuals of different lengths, at the best of all rates", {"equal": False}, erratum=(3,))],
)
def unsquared(seed, equal=True):
    d = Draw(seed)
    inputs, residuals = d.inputs[:, : d.d_in], d.errors[:, : d.d_in]  # as many as can be independent
    assert torch.linalg.matrix_rank(inputs) == inputs.shape[1] >= 2
    lengths = residuals.norm(dim=0)
    targets = d.weight @ inputs + (residuals / lengths * lengths[0] if equal else residuals)
    step = d.update(lambda u: torch.linalg.vector_norm(u - targets, dim=0).mean(), inputs=inputs)
    wanted = d.update(lambda u: 0.5 * (u - targets).square().sum(0).mean(), inputs=inputs)
    factor = lengths[0] if equal else (step * wanted).sum() / step.square().sum()
    return error(factor * step, wanted)


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


def steps_on_any_loss(d, decay=0.0, after=False):
    """Of three losses of the outputs: one step, with weight decay, and its scaled output gradients, or later ones."""
    classes = torch.randint(d.d_out, (d.n,), generator=d.generator)
    for loss in (
        lambda u: F.cross_entropy(u.T, classes),
        lambda u: F.huber_loss(u, d.targets, delta=0.5),
        lambda u: (u.sin() * d.targets).sum() + u.tanh().prod(0).sum(),
    ):
        step = d.update(loss) - d.rate * decay * d.weight
        outputs = ((d.weight + step if after else d.weight) @ d.inputs).requires_grad_(True)
        yield step, d.rate * torch.autograd.grad(loss(outputs), outputs)[0]


@claim(
    "B1-outer",
    statement="For every differentiable loss of the outputs (cross-entropy, Huber, an arbitrary one) the update of a "
    "linear layer is the sum of outer products of negative scaled output gradients and inputs.",
    source="[B] equation 1",
    controls=[
        Control("a loss with weight decay, which sees the weights other than through outputs", {"decay": 0.1}),
    ],
)
def outer(seed, decay=0.0):
    d = Draw(seed)
    return [
        error(sum(torch.outer(-a, x) for a, x in zip(gradients.T, d.inputs.T, strict=True)), step)
        for step, gradients in steps_on_any_loss(d, decay)
    ]


@claim(
    "B2-attention",
    statement="The updated layer predicts as the old layer plus linear attention, for every differentiable loss.",
    source="[B] equation 2",
    controls=[
        Control("softmax attention with the same keys and values", {"softmax": True}),
        Control("output gradients of the layer after the step", {"after": True}),
    ],
)
def attention(seed, softmax=False, after=False):
    d = Draw(seed)
    before = d.weight @ d.tests
    return [
        error(d.attention(-gradients, softmax=softmax), (d.weight + step) @ d.tests - before)
        for step, gradients in steps_on_any_loss(d, after=after)
    ]
