"""
What a grid consists of: lists of jobs with what each costs and whether it is stored.

A product of parameters; the reproduction in its stages; finetuning behind fixed prompts. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iclgd_helpers import paths
from iclgd_helpers.data.tasks import TaskData
from iclgd_helpers.engine import checkpoints, models
from iclgd_helpers.engine.finetune import LEARNER_BYTES
from iclgd_helpers.experiments import clipping, cost, fixed_prompt, learning_rates, protocol, records, runs, sweeps
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
    """One run for each of several parameters, with its record in `folder`."""
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
    alike = [
        one.model_dump() for one in several if (one.model, one.task, one.seed) == (given.model, given.task, given.seed)
    ]
    values = given.model_dump()
    differing = [name for name in values if any(other[name] != values[name] for other in alike)]
    others = "".join(f", {name} {values[name]}" for name in differing)
    return f"{Path(given.model).name}/{given.task}/{given.seed}{others}"


def _run_job(
    name: str, given: ExperimentParameters, folder: Path, lock: str, flops: float, after: tuple[str, ...] = ()
) -> Job:
    return Job(
        name=name,
        call=f"{JOBS}:run",
        arguments={"given": _plain(given), "folder": str(folder)},
        lock=str(folder / f".{lock}.lock"),
        cost=flops,
        after=after,
        resources=_resources(given),
    )


def _plain(given: ExperimentParameters) -> dict[str, Any]:
    """Parameters for a worker of whichever environment: the data folder is named."""
    folder = data_folder(given) if given.data_source == "folder" else None
    return given.model_dump() | ({"data_folder": str(folder)} if folder else {})


def _resources(given: ExperimentParameters) -> dict[str, float]:
    return {"GPU": 1} if given.device.startswith(("cuda", "xpu")) else {}


# -------------------------------------------------------------------------------------------------------- reproduction
@dataclass(frozen=True)
class Item:
    """One job of the reproduction before anything is looked up; `changed` differs from the stage of cells."""

    stage: str
    model: str
    task: str
    seed: int
    changed: Mapping[str, Any]

    @property
    def name(self) -> str:
        order = f", order {self.changed['order']}" if "order" in self.changed else ""
        return f"{self.stage}: {Path(self.model).name}/{self.task}/{self.seed}{order}"

    def parameters(self, chosen: Mapping[str, float] | None = None) -> ExperimentParameters:
        """Of its run, at the chosen rates where they are given."""
        given = {"preset": "quick", "model": self.model, "task": self.task, "seed": self.seed}
        return resolve(given | {"max_examples": protocol.N_ROWS} | dict(self.changed) | {"chosen_rates": chosen})


def items(names: Sequence[str], stages: Sequence[str], tasks: Sequence[str]) -> list[Item]:
    """The reproduction in the order in which it is computed: of each model its stages, seeds before tasks."""
    found = []
    for model in dict.fromkeys(names):
        of_model = [item for task in dict.fromkeys(tasks) for item in _of_task(model, task)]
        for stage in (stage for stage in protocol.STAGES if stage in stages):
            of_stage = [item for item in of_model if item.stage == stage]
            found += sorted(of_stage, key=_seed_number) if stage == "cells" else of_stage
    return found


def _seed_number(item: Item) -> int:
    return protocol.SEEDS[item.task].index(item.seed)


def _of_task(model: str, task: str) -> Iterator[Item]:
    seeds, is_first = protocol.SEEDS[task], model == protocol.MODELS[0]
    few = protocol.N_SWEEP_DEMONSTRATIONS if is_first else protocol.N_SWEEP_DEMONSTRATIONS_OF_OTHERS
    sweep = PLAIN | {"n_demonstrations": few}
    yield Item("rates", model, task, seeds[0], sweep)
    for seed in seeds:
        is_conditioned = seed == seeds[0] and (is_first or task in protocol.ORDER_TASKS)
        yield Item("cells", model, task, seed, {} if is_conditioned else {"conditioning": False})
    if not is_first:
        return
    if task in protocol.ORDER_TASKS:
        yield from (Item("orders", model, task, seeds[0], PLAIN | {"order": order}) for order in protocol.ORDERS)
        yield from (Item("orders", model, task, seed, PLAIN) for seed in protocol.MORE_SEEDS)
    if task in protocol.UNEQUAL_TASKS:
        yield Item("unequal", model, task, seeds[0], PLAIN | {"equal_demonstrations": False})
    if task in protocol.CLIP_TASKS:
        yield Item("clips", model, task, seeds[0], sweep | {"max_examples": protocol.N_CLIP_ROWS})


def reproduction(names: Sequence[str], stages: Sequence[str], tasks: Sequence[str]) -> list[Planned]:
    """The items as jobs; runs wait for the choice of their learning rates where it is not stored."""
    wanted = items(names, stages, tasks)
    known = {(item.model, item.task): _Known.of(item.model, item.task) for item in wanted}
    return [_planned(item, known[item.model, item.task]) for item in wanted]


@dataclass(frozen=True)
class _Known:
    """What is looked up once for a model and task: data, content, the chosen rates if they are stored, the sizes."""

    data: TaskData
    model_content: str
    chosen: dict[str, float] | None
    plan: runs.Plan  # of the first seed: every seed costs as much
    unequal: runs.Plan | None

    @classmethod
    def of(cls, model: str, task: str) -> _Known:
        rates, first = list(_of_task(model, task))[:2]
        data, content = task_data(first.parameters()), checkpoints.content(model)
        stored = sweeps.stored("rates", rates.parameters(), data.checksum, content)
        chosen = stored["chosen"] if stored is not None and learning_rates.is_whole(stored) else None
        plan = runs.plan(first.parameters(), data)
        every = first.parameters().model_copy(update={"equal_demonstrations": False})
        unequal = runs.plan(every, data) if task in protocol.UNEQUAL_TASKS else None
        return cls(data, content, chosen, plan, unequal)


def _planned(item: Item, known: _Known) -> Planned:
    given, group = item.parameters(), f"{item.model} {item.stage}"
    work = _work(item.stage, given, known)
    if item.stage in ("rates", "clips"):
        call = "compare_learning_rates" if item.stage == "rates" else "compare_clips"
        module = learning_rates if item.stage == "rates" else clipping
        stored = sweeps.stored(item.stage, given, known.data.checksum, known.model_content)
        file = sweeps.path(item.stage, item.model, item.task)
        job = Job(item.name, f"{JOBS}:{call}", {"given": _plain(given)}, str(file.with_suffix(".lock")), work.flops)
        job = replace(job, resources=_resources(given))
        is_stored = stored is not None and module.is_whole(stored)
        return Planned(job, group, work.peak_memory_bytes + LEARNER_BYTES, is_stored)
    folder = paths.resolve_path(protocol.RECORDS)
    after = () if known.chosen else (next(_of_task(item.model, item.task)).name,)
    given = item.parameters(known.chosen)
    identity = records.run_id(given, known.data.checksum, known.model_content)
    is_stored = known.chosen is not None and records.find(identity, folder) is not None
    job = _run_job(item.name, given, folder, identity, work.flops, after)
    return Planned(job, group, work.peak_memory_bytes, is_stored)


def _plan_of(given: ExperimentParameters, known: _Known) -> runs.Plan:
    return known.plan if given.equal_demonstrations or known.unequal is None else known.unequal


def _work(stage: str, given: ExperimentParameters, known: _Known) -> cost.Cost:
    """Counted operations and memory; every seed counts as the task's first."""
    plan = _plan_of(given, known)
    shape = cost.Shape.of(plan.config)
    lengths = [len(plan.layout.training_sequence(e)) for e in plan.training[: given.n_demonstrations]]
    queries = [len(query.tokens) for query in plan.queries]
    prefix = len(plan.layout.prefix(plan.demonstrations))
    options: dict[str, Any] = {"controls": given.controls, "conditioning": given.conditioning, "chosen": METHODS}
    whole = cost.run_cost(shape, prefix, queries, lengths, **options)
    if stage not in ("rates", "clips"):
        return whole
    one = sum(cost.forward(shape, n, 1, 1).total for n in queries) / len(queries)
    steps = {m: sum(step(shape, n, n - 1).total for n in lengths) for m, step in cost.STEPS.items()}
    if stage == "rates":
        of_rates = sum(steps.values()) + 3 * protocol.N_RATE_ROWS * one
        flops = len(protocol.LEARNING_RATES) * of_rates + 2 * protocol.N_GATE_ROWS * one
    else:
        n_arms = len(protocol.CLIP_KINDS) * len(protocol.CLIP_FACTORS) + 2
        flops = n_arms * (steps["joint"] + protocol.N_CLIP_ROWS * one) + cost.forward(shape, prefix).total
    return replace(whole, stages={stage: cost.Work(flops)})


# ------------------------------------------------------------------------------------------------------- fixed prompts
def prompts(model: str, tasks: Sequence[str]) -> list[Planned]:
    """Finetuning behind fixed prompts: rates of each task, then its seeds, first seeds first."""
    found = []
    for task in dict.fromkeys(tasks):
        rates, of_seed = fixed_prompt.flops(model, task)
        stored = fixed_prompt.stored(model, task, "rates")
        first = f"prompts: {Path(model).name}/{task}, rates"
        common = {"model": model, "task": task, "device": "auto"}
        found.append(_prompt_job(first, "choose_prompt_rates", common, "rates", rates, stored is not None))
        for seed in protocol.PROMPT_SEEDS[task]:
            chosen = None if stored is None else stored["rates"]["chosen"]
            name, more = f"prompts: {Path(model).name}/{task}/{seed}", {"seed": seed, "chosen": chosen}
            is_stored = fixed_prompt.stored(model, task, seed) is not None
            after = () if chosen else (first,)
            call = "finetune_behind_prompts"
            found.append(_prompt_job(name, call, common | more, seed, of_seed, is_stored, after))
    return found


def _prompt_job(
    name: str, call: str, arguments: dict[str, Any], part: str | int, flops: float, is_stored: bool,
    after: tuple[str, ...] = (),
) -> Planned:  # fmt: skip
    model, task = arguments["model"], arguments["task"]
    lock = fixed_prompt.record_file(model, task, part).with_suffix(".lock")
    job = Job(name, f"{JOBS}:{call}", arguments, str(lock), flops, after)
    shape = cost.Shape.of(models.tokenizer_and_config(model)[1])
    memory = cost.weights_bytes(shape, "float32") + LEARNER_BYTES + len(fixed_prompt.ARMS) * cost.update_bytes(shape)
    return Planned(job, f"{Path(model).name} {task}", memory, is_stored)
