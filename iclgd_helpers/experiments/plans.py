"""
What a grid consists of: lists of jobs with what each costs and whether it is stored.

A product of parameters; the reproduction in its stages; its confirmation on new rows; finetuning behind fixed prompts.
Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from iclgd_helpers import paths
from iclgd_helpers.data.tasks import TaskData
from iclgd_helpers.engine import checkpoints, models
from iclgd_helpers.engine.finetune import LEARNER_BYTES
from iclgd_helpers.experiments import (
    arms,
    clipping,
    cost,
    fixed_prompt,
    learning_rates,
    protocol,
    records,
    runs,
    sweeps,
)
from iclgd_helpers.experiments.arms import METHODS
from iclgd_helpers.experiments.inputs import data_folder, task_data
from iclgd_helpers.experiments.parameters import ExperimentParameters, resolve
from iclgd_helpers.experiments.performing import Job

JOBS = "iclgd_helpers.experiments.jobs"
PLAIN = {"controls": False, "conditioning": False}


@dataclass(frozen=True)
class Planned:
    """A job; the line of the estimate that it belongs to; bytes it needs at once; whether its result is stored."""

    job: Job
    group: str
    memory: int
    is_stored: bool


# ------------------------------------------------------------------------------------------------------------- product
def product(several: Sequence[ExperimentParameters], folder: Path) -> list[Planned]:
    """One run for each of several parameters, with its record in `folder`; errors as for `runs.plan`."""
    found = []
    for given in several:
        plan = runs.plan(given)
        name, whole = _name(given, several), cost.of_run(plan)
        job = _run_job(name, given, folder, plan.identity, whole.flops)
        is_stored = records.find(plan.identity, folder) is not None
        found.append(Planned(job, name, whole.peak_memory_bytes, is_stored))
    return found


def _name(given: ExperimentParameters, several: Sequence[ExperimentParameters]) -> str:
    """Model, task and seed, and what else differs between several runs."""
    key = (given.model, given.task, given.seed)
    alike = [one.model_dump() for one in several if (one.model, one.task, one.seed) == key]
    values = given.model_dump()
    differing = [name for name in values if any(other[name] != values[name] for other in alike)]
    return _short(given) + "".join(f", {name} {values[name]}" for name in differing)


def _short(given: ExperimentParameters) -> str:
    return f"{Path(given.model).name}/{given.task}/{given.seed}"


def _run_job(
    name: str, given: ExperimentParameters, folder: Path, identity: str, flops: float, after: tuple[str, ...] = ()
) -> Job:
    arguments = {"given": _plain(given), "folder": str(folder)}
    return Job(name, f"{JOBS}:run", arguments, str(folder / f".{identity}.lock"), flops, after, _resources(given))


def _plain(given: ExperimentParameters) -> dict[str, Any]:
    """Parameters for a worker of whichever environment: the data folder is named."""
    folder = data_folder(given) if given.data_source == "folder" else None
    return given.model_dump() | ({"data_folder": str(folder)} if folder else {})


def _resources(given: ExperimentParameters) -> dict[str, float]:
    return {"GPU": 1} if given.device.startswith(("cuda", "xpu")) else {}


# -------------------------------------------------------------------------------------------------------- reproduction
@dataclass(frozen=True)
class Item:
    """One job of the reproduction before anything is looked up: its stage, and parameters without chosen rates."""

    stage: str
    given: ExperimentParameters

    @property
    def name(self) -> str:
        """What messages call it; no two of a reproduction are the same."""
        return f"{self.stage}: {_short(self.given)}" + (f", order {self.given.order}" if self.given.order else "")


def items(names: Sequence[str], stages: Sequence[str], tasks: Sequence[str]) -> list[Item]:
    """The reproduction in the order in which it is computed: of each model its stages, seeds before tasks."""
    return [item for of_model in _every(names, tasks) for item in _ordered(of_model, stages)]


def _every(names: Sequence[str], tasks: Sequence[str]) -> list[dict[str, list[Item]]]:
    """For each model: task -> all its items."""
    return [{task: list(_of_task(model, task)) for task in dict.fromkeys(tasks)} for model in dict.fromkeys(names)]


def _ordered(of_model: Mapping[str, Sequence[Item]], stages: Sequence[str]) -> Iterator[Item]:
    for stage in (stage for stage in protocol.STAGES if stage in stages):
        of_stage = [item for of_task in of_model.values() for item in of_task if item.stage == stage]
        yield from sorted(of_stage, key=_seed_number) if stage == "runs" else of_stage


def _seed_number(item: Item) -> int:
    return protocol.SEEDS[item.given.task].index(item.given.seed)


def _of_task(model: str, task: str) -> Iterator[Item]:
    """All items of a model and task: the comparison of learning rates first, then the run of the first seed."""
    seeds, is_first = protocol.SEEDS[task], model == protocol.MODELS[0]
    few = protocol.N_SWEEP_DEMONSTRATIONS if is_first else protocol.N_SWEEP_DEMONSTRATIONS_OF_OTHERS
    sweep = {**PLAIN, "n_demonstrations": few}

    def item(stage: str, seed: int, changed: Mapping[str, Any]) -> Item:
        sizes = {"max_examples": protocol.N_ROWS, "max_compared": protocol.MAX_COMPARED}
        given = {"preset": "quick", "model": model, "task": task, "seed": seed, "conditioning": True, **sizes}
        given["n_calibration_rows"] = 0  # they were made before priors were read
        return Item(stage, resolve({**given, **changed}))

    yield item("rates", seeds[0], sweep)
    for seed in seeds:
        is_conditioned = seed == seeds[0] and (is_first or task in protocol.ORDER_TASKS)
        yield item("runs", seed, {} if is_conditioned else {"conditioning": False})
    if not is_first:
        return
    if task in protocol.ORDER_TASKS:
        yield from (item("orders", seeds[0], {**PLAIN, "order": order}) for order in protocol.ORDERS)
        yield from (item("orders", seed, PLAIN) for seed in protocol.MORE_SEEDS)
    if task in protocol.UNEQUAL_TASKS:
        yield item("unequal", seeds[0], {**PLAIN, "equal_demonstrations": False})
    if task in protocol.CLIP_TASKS:
        yield item("clips", seeds[0], {**sweep, "max_examples": protocol.N_CLIP_ROWS})


def reproduction(names: Sequence[str], stages: Sequence[str], tasks: Sequence[str]) -> list[Planned]:
    """The items as jobs; runs wait for the choice of their learning rates where it is not stored."""
    found = []
    for of_model in _every(names, tasks):
        wanted = list(_ordered(of_model, stages))
        known = {task: _Known.of(of_model[task]) for task in dict.fromkeys(item.given.task for item in wanted)}
        for item in wanted:
            planned = _sweep if item.stage in ("rates", "clips") else _run
            found.append(planned(item, known[item.given.task]))
    return found


@dataclass(frozen=True)
class _Known:
    """What is looked up once for a model and task."""

    data: TaskData
    model_content: str
    first: str  # name of the job that chooses the learning rates
    chosen: dict[str, float] | None  # the learning rates, if they are stored
    plan: runs.Plan  # of the first seed: every seed costs as much
    unequal: runs.Plan | None

    @classmethod
    def of(cls, of_task: Sequence[Item]) -> _Known:
        """Of all items of a model and task."""
        rates, given = of_task[0], of_task[1].given
        data, content = task_data(given), checkpoints.content(given.model)
        stored = sweeps.stored("rates", rates.given, data.checksum, content)
        chosen = stored["chosen"] if stored is not None and learning_rates.is_whole(stored) else None
        every = given.model_copy(update={"equal_demonstrations": False})
        unequal = runs.plan(every, data) if given.task in protocol.UNEQUAL_TASKS else None
        return cls(data, content, rates.name, chosen, runs.plan(given, data), unequal)

    def plan_of(self, given: ExperimentParameters) -> runs.Plan:
        """The plan that costs as much as a run with these parameters."""
        return self.plan if given.equal_demonstrations or self.unequal is None else self.unequal


def confirmation(names: Sequence[str], tasks: Sequence[str]) -> list[Planned]:
    """The confirmatory runs of each model, seeds before tasks, at the learning rates of the reproduction."""
    found = []
    for model in dict.fromkeys(names):
        known, several = {}, {task: _confirmatory(model, task) for task in dict.fromkeys(tasks)}
        for task, items in several.items():
            rates = next(_of_task(model, task))
            known[task] = _Known.of([rates, items[0]])
        for of_seed in zip_longest(*several.values()):  # a task may have fewer seeds
            found += [_run(item, known[item.given.task]) for item in of_seed if item]
    return found


def _confirmatory(model: str, task: str) -> list[Item]:
    """The confirmatory runs of a model and task."""
    given = {
        "preset": "quick",
        "model": model,
        "task": task,
        "conditioning": False,
        "arms": list(protocol.CONFIRMATORY_ARMS),
        "first_row": protocol.first_row(task),
        "max_examples": protocol.N_CONFIRMATORY_ROWS,
        "max_compared": protocol.N_CONFIRMATORY_ROWS,
        "n_calibration_rows": protocol.N_CALIBRATION_ROWS,
    }
    return [Item("confirmation", resolve({**given, "seed": seed})) for seed in protocol.CONFIRMATORY_SEEDS[task]]


def _run(item: Item, known: _Known) -> Planned:
    """A run, at the chosen learning rates where they are known, else after they are chosen."""
    work, folder = _run_cost(item.given, known), paths.resolve_path(_folder(item.stage))
    given = item.given.model_copy(update={"chosen_rates": arms.among(known.chosen, item.given.arms)})
    identity = records.run_id(given, known.data.checksum, known.model_content)
    is_stored = known.chosen is not None and records.find(identity, folder) is not None
    after = () if known.chosen else (known.first,)
    job = _run_job(item.name, given, folder, identity, work.flops, after)
    return Planned(job, f"{given.model} {item.stage}", work.peak_memory_bytes, is_stored)


def _folder(stage: str) -> str:
    """The folder of a stage's records."""
    return protocol.CONFIRMATION if stage == "confirmation" else protocol.RECORDS


def _sweep(item: Item, known: _Known) -> Planned:
    """A comparison of learning rates, or of bounds of clipping."""
    given, work = item.given, _sweep_cost(item, known)
    arguments: dict[str, Any] = {"given": _plain(given)}
    if item.stage == "rates":
        call, is_whole = "compare_learning_rates", learning_rates.is_whole
        arguments["n_shown"] = known.plan.parameters.n_demonstrations
    else:
        call, is_whole = "compare_clips", clipping.is_whole
    stored = sweeps.stored(item.stage, given, known.data.checksum, known.model_content)
    lock = sweeps.path(item.stage, given.model, given.task).with_suffix(".lock")
    job = Job(item.name, f"{JOBS}:{call}", arguments, str(lock), work.flops, resources=_resources(given))
    is_stored = stored is not None and is_whole(stored)
    return Planned(job, f"{given.model} {item.stage}", work.peak_memory_bytes + LEARNER_BYTES, is_stored)


def _run_cost(given: ExperimentParameters, known: _Known) -> cost.Cost:
    """Operations and memory of a run at given and chosen learning rates; every seed counts as the task's first."""
    plan = known.plan_of(given)
    prefix, queries, lengths = cost.lengths(plan)
    options: dict[str, Any] = {"controls": given.controls, "conditioning": given.conditioning, "chosen": METHODS}
    options["only"] = given.arms
    options["calibration_lengths"] = [len(query.tokens) for query in plan.calibration]
    return cost.run_cost(cost.Shape.of(plan.config), prefix, queries, lengths[: given.n_demonstrations], **options)


def _sweep_cost(item: Item, known: _Known) -> cost.Cost:
    """The same of a comparison of settings, which needs as much memory as a run."""
    plan = known.plan_of(item.given)
    shape, (prefix, queries, lengths) = cost.Shape.of(plan.config), cost.lengths(plan)
    lengths = lengths[: item.given.n_demonstrations]
    one = sum(cost.forward(shape, n, 1, 1).total for n in queries) / len(queries)
    steps = {method: sum(step(shape, n, n - 1).total for n in lengths) for method, step in cost.STEPS.items()}
    if item.stage == "rates":
        of_rate = sum(steps.values()) + 3 * protocol.N_RATE_ROWS * one
        flops = len(protocol.LEARNING_RATES) * of_rate + 2 * protocol.N_GATE_ROWS * one
    else:
        n_arms = len(protocol.CLIP_KINDS) * len(protocol.CLIP_FACTORS) + 2
        flops = n_arms * (steps["joint"] + protocol.N_CLIP_ROWS * one) + cost.forward(shape, prefix).total
    return replace(_run_cost(item.given, known), stages={item.stage: cost.Work(flops)})


# ------------------------------------------------------------------------------------------------------- fixed prompts
def prompts(model: str, tasks: Sequence[str]) -> list[Planned]:
    """Finetuning behind fixed prompts: learning rates of each task, then its seeds, first seeds first."""
    shape = cost.Shape.of(models.tokenizer_and_config(model)[1])
    memory = cost.weights_bytes(shape, "float32") + LEARNER_BYTES + len(fixed_prompt.ARMS) * cost.update_bytes(shape)
    return [
        Planned(job, f"{Path(model).name} {task}", memory, is_stored)
        for task in dict.fromkeys(tasks)
        for job, is_stored in _of_prompts(model, task)
    ]


def _of_prompts(model: str, task: str) -> Iterator[tuple[Job, bool]]:
    """The jobs of a task, and whether the result of each is stored."""

    def lock(part: str | int) -> str:
        return str(fixed_prompt.record_file(model, task, part).with_suffix(".lock"))

    rates_flops, seed_flops = fixed_prompt.flops(model, task)
    stored = fixed_prompt.stored(model, task, "rates")
    chosen = None if stored is None else stored["rates"]["chosen"]
    name, common = f"prompts: {Path(model).name}/{task}", {"model": model, "task": task, "device": "auto"}
    rates = Job(f"{name}, rates", f"{JOBS}:choose_prompt_rates", common, lock("rates"), rates_flops)
    yield rates, stored is not None
    after, known = ((), {"needed": {rates.name: chosen}}) if chosen else ((rates.name,), {})
    for seed in protocol.PROMPT_SEEDS[task]:
        arguments = {**common, "seed": seed, **known}
        job = Job(f"{name}/{seed}", f"{JOBS}:finetune_behind_prompts", arguments, lock(seed), seed_flops, after)
        yield job, fixed_prompt.stored(model, task, seed) is not None
