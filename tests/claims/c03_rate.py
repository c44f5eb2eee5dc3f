"""Claims of page 03: rate, labels, loss, number of steps, data and weights that the identity leaves open."""

import torch

from claims.registry import Control, chapter
from iclgd_helpers.theory.gradient_step import relative_error as error

claim = chapter("03_what_the_step_does_not_say", drawn="sizes, projections, prompt, demonstrations and queries")


class Draw:
    """Projections, prompt and demonstrations (elu + 1) of random sizes, with more outputs than features."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.d_in, self.d_k, self.n = 7, *torch.randint(3, 6, (1,), generator=self.generator).tolist(), 9
        self.d_v = self.d_k + 1
        self.m = int(torch.randint(2, 15, (), generator=self.generator))
        self.w_k, self.w_q = (self.normal(self.d_k, self.d_in) / self.d_in**0.5 for _ in range(2))
        self.w_v = self.normal(self.d_v, self.d_in)
        self.own, self.shown = self.normal(self.d_in, self.n), self.normal(self.d_in, self.m)
        self.base = self.w_v @ self.own @ self.features(self.own).T
        self.keys, self.values = self.features(self.shown), self.w_v @ self.shown
        self.update = sum(torch.outer(v, k) for v, k in zip(self.values.T, self.keys.T, strict=True))
        self.gram = self.keys.T @ self.keys
        flow = self.values @ self.gram
        self.critical = float(2 * self.m * (self.values * flow).sum() / flow.square().sum())
        self.bound = float(2 * self.m / torch.linalg.eigvalsh(self.gram)[-1])

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def features(self, tokens, projection=None):
        x = (self.w_k if projection is None else projection) @ tokens
        return torch.where(x > 0, x + 1, x.exp())

    def labels(self, rate):
        return self.m / rate * self.values + self.base @ self.keys

    def answers(self, z, values=None):
        """The layer's answers to query features with demonstrations (of the given values), token by token."""
        shown = zip((self.values if values is None else values).T, self.features(self.shown).T, strict=True)
        own = zip((self.w_v @ self.own).T, self.features(self.own).T, strict=True)
        pairs = [*shown, *own]
        return torch.stack([sum(v * (k @ q) for v, k in pairs) for q in z.T], 1)

    def measured_ratio(self, rate):
        """Implied loss after one step over that before, both evaluated as they stand."""
        y = self.labels(rate)
        return float(loss(step(self.base, self.keys, y, rate), self.keys, y) / loss(self.base, self.keys, y))


def loss(weight, inputs, targets):
    return (
        sum(0.5 * (weight @ x - y).square().sum() for x, y in zip(inputs.T, targets.T, strict=True)) / inputs.shape[1]
    )


def step(weight, inputs, targets, rate):
    weight = weight.clone().requires_grad_(True)
    return (weight - rate * torch.autograd.grad(loss(weight, inputs, targets), weight)[0]).detach()


@claim(
    "R-gauge",
    statement="The matrix after the implied step does not depend on the rate: the labels absorb it.",
    source="[C] Theorem 3.1",
    controls=[
        Control("labels that contain the outputs of another base", {"own_base": False}),
        Control("a second step", {"count": 2}),
    ],
)
def gauge(seed, own_base=True, count=1):
    """Each rate's change of the matrix, against that of the rate 0.1."""
    d = Draw(seed)
    outputs = (d.base if own_base else d.normal(*d.base.shape)) @ d.keys

    def change(rate):
        weight = d.base
        for _ in range(count):
            weight = step(weight, d.keys, d.m / rate * d.values + outputs, rate)
        return weight - d.base

    return [error(change(rate), change(0.1)) for rate in (0.01, 0.37, 1.0, d.m, 50.0)]


@claim(
    "R-ratio",
    statement="The implied loss after the step over that before is |V'(I - rate/M G)|^2 / |V'|^2.",
    controls=[Control("the formula without M", {"with_m": False})],
)
def ratio(seed, with_m=True):
    d = Draw(seed)
    share = 1 / d.m if with_m else 1

    def miss(rate):
        left = d.values - rate * share * d.values @ d.gram
        return abs(d.measured_ratio(rate) / float(left.square().sum() / d.values.square().sum()) - 1)

    return [miss(factor * d.critical) for factor in (0.1, 0.5, 1.0, 3.0)]


@claim(
    "R-critical",
    statement="The implied loss falls below the critical rate 2M tr(V'GV'^T)/|V'G|^2, rises above it and stays at it.",
    controls=[Control("half the critical rate, where the loss is lowest", {"factor": 1 / 2})],
)
def critical(seed, factor=1):
    d = Draw(seed)
    assert d.measured_ratio(0.9 * d.critical) < 1 < d.measured_ratio(1.1 * d.critical)
    return abs(d.measured_ratio(factor * d.critical) - 1)


@claim(
    "R-sufficient",
    statement="Below 2M/lambda, two over the largest eigenvalue of the Hessian, the implied loss falls for all "
    "values; the bound is attained, and never above the critical rate.",
    controls=[Control("values that do not lie along the top eigenvector: there it is not attained", {"top": False})],
)
def sufficient(seed, top=True):
    d = Draw(seed)
    assert d.bound <= d.critical * (1 + 1e-9) and d.measured_ratio(0.99 * d.bound) < 1
    if top:  # the worst case
        d.values = d.normal(d.d_v, 1) @ torch.linalg.eigh(d.gram)[1][:, -1:].T
    return abs(d.measured_ratio(d.bound) - 1)


@claim(
    "R-steps",
    statement="After k steps on the implied set the matrix is W_X + V' (sum over i < k of (I - rate/M G)^i) "
    "Phi'^T; from the second step on it depends on the rate.",
    controls=[Control("the same number of steps at another rate", {"factor": 1 / 3, "counts": (2, 5)})],
)
def steps(seed, factor=1, counts=(1, 2, 5)):
    d = Draw(seed)
    rate = 0.9 * d.bound
    shrink = torch.eye(d.m) - rate / d.m * d.gram

    def miss(count):
        weight, power, series = d.base, torch.eye(d.m), torch.zeros(d.m, d.m)
        for _ in range(count):
            weight = step(weight, d.keys, d.labels(factor * rate), factor * rate)
            series, power = series + power, power @ shrink
        return error(weight - d.base, d.values @ series @ d.keys.T)

    return [miss(count) for count in counts]


@claim(
    "R-limit",
    statement="Below 2M/lambda many steps on the implied set converge to W_X + M/rate V' Phi'^+, for dependent "
    "keys too: the limit scales as one over the rate.",
    controls=[Control("a rate above 2M/lambda: the steps diverge", {"of_bound": 1.1})],
    drawn="number of demonstrations, base, values and singular directions of the keys",
)
def limit(seed, of_bound=0.5):
    d = Draw(seed)
    rank = min(d.m, 3)  # dependent keys whose singular values are known, so that descent converges quickly
    left, right = torch.linalg.qr(d.normal(7, rank))[0], torch.linalg.qr(d.normal(d.m, rank))[0]
    keys = left @ torch.diag(torch.linspace(0.7, 1.3, rank)) @ right.T
    start, rate = d.normal(d.d_v, 7), of_bound * 2 * d.m / 1.3**2
    targets, weight = d.m / rate * d.values + start @ keys, start
    for _ in range(150):
        weight = step(weight, keys, targets, rate)
    return error(weight - start, d.m / rate * d.values @ torch.linalg.pinv(keys, rtol=1e-9))


@claim(
    "R-orthonormal",
    statement="With orthonormal keys and rate M one step fits every implied label.",
    status="conditional",
    controls=[Control("keys that are not orthonormal", {"noise": 0.5})],
)
def orthonormal(seed, noise=0.0):
    d = Draw(seed)
    keys = torch.linalg.qr(d.normal(d.m + 3, d.m))[0]
    start = d.normal(d.d_v, d.m + 3)
    keys = keys + noise * d.normal(d.m + 3, d.m) / (d.m + 3) ** 0.5
    targets = d.values + start @ keys
    return error(step(start, keys, targets, d.m) @ keys, targets)


@claim(
    "R-one-base",
    statement="At one base infinitely many losses of the outputs take the step: -1/rate sum <v_i, u_i> plus any "
    "function that is stationary at the base's outputs.",
    source="[B] section 4.1, third point",
    controls=[Control("the functions are stationary at the outputs of another base", {"own_base": False})],
    drawn="sizes, projections, prompt, demonstrations, another base and the size of the added function",
)
def one_base(seed, own_base=True):
    d = Draw(seed)
    rate, size = 0.37, float(torch.rand((), generator=d.generator)) + 0.5
    anchor = (d.base if own_base else d.normal(*d.base.shape)) @ d.keys
    added = {
        "the squared loss of [C]": lambda r: r.square().sum() / (2 * d.m),
        "a concave one": lambda r: -size * r.square().sum(),
        "waves": lambda r: size * (1 - r.cos()).sum(),
        "fourth powers": lambda r: size * r.pow(4).sum(),
    }

    def change(stationary):
        weight = d.base.clone().requires_grad_(True)
        outputs = weight @ d.keys
        value = -(d.values * outputs).sum() / rate + stationary(outputs - anchor)
        return -rate * torch.autograd.grad(value, weight)[0]

    return [error(change(stationary), d.update) for stationary in added.values()]


@claim(
    "R-every-base",
    statement="The linear loss takes the step from the base of every prompt, and differences of any such loss between "
    "two bases are those of the linear loss.",
    source="[B] section 4.1, third point",
    controls=[
        Control("the squared loss that is made for the first prompt", {"squared": True}),
        Control("demonstrations that have read the prompt, as above the first layer without a mask", {"mask": False}),
    ],
    drawn="sizes, projections, three prompts and demonstrations",
)
def every_base(seed, squared=False, mask=True):
    """A loss made with one prompt (outputs u -> -1/rate sum <v_i, u_i>, squared or not), tried with two others."""
    d = Draw(seed)
    rate, read = 0.37, d.normal(d.d_in, d.d_v) / d.d_v**0.5
    prompts = [d.own, *(d.normal(d.d_in, d.n) for _ in range(2))]
    bases = [sum(torch.outer(d.w_v @ x, d.features(x[:, None])[:, 0]) for x in prompt.T) for prompt in prompts]

    def written(base):  # by demonstrations whose states do, or do not, depend on the prompt
        states = d.shown if mask else d.shown + read @ base @ d.keys / base.norm()
        return d.w_v @ states, d.features(states)

    values, keys = written(bases[0])

    def loss_of_first(weight):
        outputs = weight @ keys
        moved = outputs - bases[0] @ keys
        return -(values * outputs).sum() / rate + (moved.square().sum() / (2 * d.m) if squared else 0)

    found = []
    for base in bases[1:]:
        weight = base.clone().requires_grad_(True)
        change = -rate * torch.autograd.grad(loss_of_first(weight), weight)[0]
        now = sum(torch.outer(v, k) for v, k in zip(*(m.T for m in written(base)), strict=True))
        forced = -float((now * (base - bases[0])).sum()) / rate  # the equation's right-hand side along the way
        difference = float(loss_of_first(base) - loss_of_first(bases[0]))
        found += [error(change, now), abs(difference / forced - 1)]
    return found


class Stack:
    """Updates of two layers (elu + 1) as functions of their bases, which stand in `weights`; `parts` splits them."""

    def __init__(self, seed: int):
        d = self.drawn = Draw(seed)
        self.m, self.d = d.m, 4
        self.start, self.targets = d.normal(4, d.m), d.normal(4, d.m)
        self.projections = [[d.normal(4, 4) / 2 for _ in range(3)] for _ in range(2)]
        self.weights = d.normal(2 * 4 * 4) / 4
        self.scales = [a @ a.T + torch.eye(16) for a in (d.normal(16, 16) / 4 for _ in range(2))]  # P of each layer

    def parts(self, flat):
        return flat.view(2, self.d, self.d)

    def next(self, weight, w_q, states):
        return states + weight @ self.drawn.features(states, w_q)

    def in_context(self, flat, mask=False):
        """What demonstrations write in each layer; tokens behind them, with unit keys, write the layer's base."""
        states, changes = self.start, []
        for weight, (w_k, w_q, w_v) in zip(self.parts(flat), self.projections, strict=True):
            keys, values = self.drawn.features(states, w_k), w_v @ states
            changes.append(values @ keys.T)
            scores = torch.cat([keys, torch.eye(self.d)], 1).T @ self.drawn.features(states, w_q)  # [token, reader]
            scores = scores.triu() if mask else scores  # none reads a later token
            states = states + torch.cat([values, weight], 1) @ scores
        return torch.stack(changes).flatten()

    def masked(self, flat):
        return self.in_context(flat, mask=True)

    def layer_causal(self, flat):
        """Each layer's step on its own squared loss; the layer below counts as a constant."""
        states, changes = self.start, []
        for weight, (_, w_q, _) in zip(self.parts(flat), self.projections, strict=True):
            after = self.next(weight, w_q, states)
            own = (after - self.targets).square().sum() / (2 * self.m)
            changes.append(-torch.autograd.grad(own, weight, create_graph=True)[0])
            states = after
        return torch.stack(changes).flatten()

    def common(self, flat):
        """The step on one squared loss after the last layer, each layer's gradient scaled by its own matrix."""
        states = self.start
        for weight, (_, w_q, _) in zip(self.parts(flat), self.projections, strict=True):
            states = self.next(weight, w_q, states)
        (gradient,) = torch.autograd.grad(
            (states - self.targets).square().sum() / (2 * self.m), flat, create_graph=True
        )
        return -torch.cat([p @ g for p, g in zip(self.scales, gradient.view(2, -1), strict=True)])

    def jacobian(self, updates):
        """d U_l / d B_m as blocks `[l, entry, m, entry]`."""
        return torch.autograd.functional.jacobian(getattr(self, updates), self.weights).view(2, 16, 2, 16)

    def linear(self, updates):
        """The error of the step on -sum_l <U_l, B_l>, in which U moves with the bases."""
        weights = self.weights.clone().requires_grad_(True)
        wanted = getattr(self, updates)(weights)
        (gradient,) = torch.autograd.grad(-(wanted * weights).sum(), weights)
        return error(-gradient, wanted.detach())


@claim(
    "R-stack",
    statement="Updates -P grad L of one loss, P constant and one block a layer, have a symmetric Jacobian once P is "
    "divided out; updates that depend on the bases below and on none above do not. Under a causal mask those of the "
    "forward pass depend on no base, and -sum_l <U_l, B_l> is their common loss.",
    source="[B] section 3.4, first point, and section 4.1, third point",
    controls=[
        Control("the updates of the forward pass without a mask", {"fields": ("in_context",)}),
        Control("layer-causal finetuning", {"fields": ("layer_causal",)}),
    ],
    drawn="number of demonstrations, states, targets, projections, bases and step matrices of two layers",
)
def stack(seed, fields=("common", "masked")):
    """
    How far the Jacobian of P^-1 U is from its transpose, in units of the Hessian of the squared common loss; and, for
    all updates but those of that loss, how far the step on -sum_l <U_l, B_l> is from them.
    """
    s = Stack(seed)
    for causal in ("in_context", "layer_causal"):
        jacobian = s.jacobian(causal)
        assert not jacobian[0, :, 1].any() and jacobian[1, :, 0].norm() > 1e-3

    def divided(updates):
        blocks = zip(s.scales, s.jacobian(updates), strict=True)
        return torch.cat([torch.linalg.solve(p, block.flatten(1)) for p, block in blocks])

    unit = divided("common").norm()
    errors = [float((divided(field) - divided(field).T).norm() / unit) for field in fields]
    return errors + [s.linear(field) for field in fields if field != "common"]


@claim(
    "R-linear-fall",
    statement="In that step the linear loss falls by the squared norm of the update.",
    controls=[Control("the squared loss, whose gradient at the base is the same", {"squared": True})],
)
def linear_fall(seed, squared=False):
    d = Draw(seed)

    def value(weight):
        if squared:
            return d.m * loss(weight, d.keys, d.values + d.base @ d.keys)
        return -sum(v @ (weight @ k) for v, k in zip(d.values.T, d.keys.T, strict=True))

    weight = d.base.clone().requires_grad_(True)
    moved = d.base - torch.autograd.grad(value(weight), weight)[0]
    return abs(float(value(d.base) - value(moved)) / float(d.update.square().sum()) - 1)


@claim(
    "R-task-gauge",
    statement="If values are c times the task's residuals at the base, the implied labels are the task's exactly at "
    "the rate c M.",
    controls=[
        Control("another rate", {"factor": 2}),
        Control("the base of another map", {"own_base": False}),
    ],
    drawn="numbers of examples and dimensions, the factor c, the task's examples and the base",
)
def task_gauge(seed, factor=1, own_base=True):
    """Values and keys are read off tokens (x, y) by constructed weights; c is on no list of the check's inputs."""
    d = Draw(seed)
    x, y, start = d.normal(d.d_k, d.m), d.normal(d.d_v, d.m), d.normal(d.d_v, d.d_k)
    c = float(torch.rand((), generator=d.generator)) + 0.1
    w_v, w_k = c * torch.cat([-start, torch.eye(d.d_v)], 1), torch.eye(d.d_k, d.d_k + d.d_v)
    tokens = torch.cat([x, y])
    values, keys, rate = w_v @ tokens, w_k @ tokens, factor * c * d.m
    base = start if own_base else d.normal(d.d_v, d.d_k)
    labels = d.m / rate * values + base @ keys
    written = base + sum(torch.outer(w_v @ e, w_k @ e) for e in tokens.T)
    return [error(labels, y), error(step(base, x, y, rate), written)]


@claim(
    "R-honest",
    statement="With the plain values as labels one step at rate M adds V'Phi'^T - W_X Phi'Phi'^T, the batch "
    "delta rule.",
    source="the book's own derivation; Widrow and Hoff 1960",
    controls=[Control("the second term left out, that is linear attention", {"second_term": 0})],
)
def honest(seed, second_term=1):
    d = Draw(seed)
    change = step(d.base, d.keys, d.values, d.m) - d.base
    return error(change, d.update - second_term * d.base @ d.keys @ d.keys.T)


@claim(
    "R-online",
    statement="One demonstration at a time, in either order, the implied steps give the batch step.",
    controls=[Control("the delta rule in the two orders", {"implied": False})],
)
def online(seed, implied=True):
    d = Draw(seed)
    rate, changes = 0.5 / float(d.keys.square().sum(0).max()), []
    for order in (range(d.m), reversed(range(d.m))):
        weight = d.base
        for i in order:
            key, target = d.keys[:, i : i + 1], d.values[:, i : i + 1] / rate
            weight = step(weight, key, target + weight @ key if implied else target, rate)
        changes.append(weight - d.base)
    return [error(*changes), *(error(change, d.update) for change in changes)]


@claim(
    "R-mixing",
    statement="Demonstrations mixed by any orthogonal matrix write the same update: the data are not identified.",
    controls=[Control("only the values mixed", {"mixed_keys": False})],
)
def mixing(seed, mixed_keys=True):
    d = Draw(seed)
    mix = torch.linalg.qr(d.normal(d.m, d.m))[0]
    keys, values = d.keys @ mix if mixed_keys else d.keys, d.values @ mix
    return error(step(d.base, keys, d.m * values + d.base @ keys, 1.0) - d.base, d.update)


@claim(
    "R-min-norm",
    statement="For queries that do not span the feature space the update projected on their span is the least that "
    "answers alike, and the only one of its norm.",
    controls=[
        Control("the update as it is", {"span": "all"}),
        Control("the update projected on the span of other queries", {"span": "others"}),
    ],
)
def min_norm(seed, span="own"):
    d = Draw(seed)
    asked, others = (d.features(d.normal(d.d_in, d.d_k - 1), d.w_q) for _ in range(2))
    basis = torch.linalg.qr({"own": asked, "others": others, "all": torch.eye(d.d_k)}[span])[0]
    taken = d.update @ basis @ basis.T
    equations = torch.kron(torch.eye(d.d_v), asked.T.contiguous())  # of the rows of D: D z = update z
    least = (torch.linalg.pinv(equations) @ (d.update @ asked).flatten()).view(d.d_v, d.d_k)
    null = torch.linalg.svd(asked.T)[2][-1:]  # an update along it answers nothing
    another = least + d.normal(d.d_v, 1) @ null
    assert error(another @ asked, d.update @ asked) < 1e-9
    longer = taken.square().sum() + (another - taken).square().sum()  # Pythagoras: every other one is longer
    return [error(taken, least), abs(float(another.square().sum() / longer) - 1)]


@claim(
    "R-value-weights",
    statement="For one fixed prompt a change of the value projection, V'Phi'^T (X Phi^T)^+, has the "
    "demonstrations' effect.",
    status="conditional",
    controls=[Control("the same change on another prompt", {"another": True})],
)
def value_weights(seed, another=False):
    d = Draw(seed)
    change = d.update @ torch.linalg.pinv(d.own @ d.features(d.own).T)
    prompt = d.normal(d.d_in, d.n) if another else d.own
    written = prompt @ d.features(prompt).T
    return error((d.w_v + change) @ written, d.w_v @ written + d.update)


@claim(
    "R-observation-1",
    statement="Demonstrations change the map that is applied to the query, not the query.",
    source="[C] observation 1",
    controls=[
        Control("the old map on the best of all changed queries (more outputs than features)", {"changed": "queries"})
    ],
)
def answers(seed, changed="map"):
    """To queries, against the layer's answers with demonstrations, token by token."""
    d = Draw(seed)
    z = d.features(d.normal(d.d_in, 5), d.w_q)
    expected = d.answers(z)
    if changed == "queries":
        return error(d.base @ (torch.linalg.pinv(d.base) @ expected), expected)
    return error(step(d.base, d.keys, d.m * d.values + d.base @ d.keys, 1.0) @ z, expected)


@claim(
    "R-no-update",
    statement="Demonstrations leave the layer as it is if V'Phi'^T = 0, although none of their values is zero; their "
    "labels contain the base's outputs on their key features.",
    source="[C] observation 2, with the feature map",
    controls=[
        Control("outputs on the keys without the feature map, as printed", {"feature": False}, erratum=(5,)),
        Control("values that do not cancel", {"cancel": False}),
    ],
)
def no_update(seed, feature=True, cancel=True):
    d = Draw(seed)
    shown = d.normal(d.d_in, d.d_k + 3)  # more demonstrations than features, so that values can cancel
    keys, values = d.features(shown), d.w_v @ shown
    if cancel:
        values = values @ (torch.eye(d.d_k + 3) - torch.linalg.pinv(keys) @ keys)
    assert values.norm(dim=0).min() > 1e-3
    outputs = d.base @ (keys if feature else d.w_k @ shown)
    return error(step(d.base, keys, (d.d_k + 3) * values + outputs, 1.0), d.base)


@claim(
    "R-observation-3",
    statement="The input to which a demonstration's value is attached, found from the layer's answers, is the feature "
    "of its key.",
    source="[C] observation 3",
    controls=[Control("the feature of its query", {"inputs": "queries"}, erratum=(6,))],
)
def attached(seed, inputs="keys"):
    """How the answers to queries z move with one value is <input, z>: the input follows from enough queries."""
    d = Draw(seed)
    z = d.features(d.normal(d.d_in, 2 * d.d_k), d.w_q)
    found = torch.autograd.functional.jacobian(lambda values: d.answers(z, values)[0], d.values)[:, 0]  # [query, token]
    fitted = torch.linalg.lstsq(z.T, found).solution
    return error(fitted, d.keys if inputs == "keys" else d.features(d.shown, d.w_q))


@claim(
    "R-precision",
    statement="On a base a million times larger than the update a small rate keeps the identity to rounding of "
    "the base.",
    status="conditional",
    tolerance=1e-7,
    controls=[Control("the rate 1e8, at which rounding eats the labels", {"rate": 1e8})],
)
def precision(seed, rate=0.01):
    d = Draw(seed)
    d.base = 1e6 * d.base * float(d.update.norm() / d.base.norm())
    return error(step(d.base, d.keys, d.labels(rate), rate) - d.base, d.update)
