"""
What a run will do, before anything slow is loaded: its data, its identity, the tokens it lays out; then its model.

A run is one (model, task, seed) with all its arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from iclgd_helpers import progress
from iclgd_helpers.data.demonstrations import set_aside
from iclgd_helpers.data.tasks import Example, Task, TaskData, without_content
from iclgd_helpers.data.token_layout import Layout, Query
from iclgd_helpers.engine import checkpoints, models
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import arms, records
from iclgd_helpers.experiments.inputs import drawn_demonstrations, missing_classes, task_data
from iclgd_helpers.experiments.parameters import ExperimentParameters


@dataclass(frozen=True)
class Plan:
    """
    What a run will do, before any weights are loaded.

    `demonstrations` are those that fit into the context, in the order in which they are shown; `training` are those
    that are finetuned on. `calibration` are the texts on which each arm's prior is read: see `calibration_queries`.
    `identity` is that of the record; checksum and content are what it depends on. `counts` are the record's
    other entries on the texts, each only where there is something: see `_counts`.
    """

    parameters: ExperimentParameters
    identity: str
    data_checksum: str
    model_content: str
    config: PretrainedConfig
    layout: Layout
    demonstrations: list[Example]
    training: list[Example]
    queries: list[Query]
    calibration: list[Query]
    counts: dict[str, Any]

    @property
    def n_compared(self) -> int:
        """Number of queries, from the first, that every arm sees; zero-shot and in-context see all."""
        return min(self.parameters.max_compared or len(self.queries), len(self.queries))

    @property
    def arms(self) -> list[str]:
        """Names of the arms, those at chosen rates last."""
        given = self.parameters
        return arms.names(given.controls, given.chosen_rates or (), given.arms)


@dataclass(frozen=True)
class Run(Plan):
    """A plan with its model."""

    model: LanguageModel


def plan(given: ExperimentParameters, data: TaskData | None = None) -> Plan:
    """
    Load tokenizer and configuration, and lay out the tokens.

    Parameters
    ----------
    data
        what `task_data(given)` gives, where it has been loaded before.

    Raises
    ------
    InputError
        if anything named in the parameters is missing, damaged, or does not fit together.
    """
    data = data or task_data(given)
    drawn = drawn_demonstrations(given, data)
    tokenizer, config = models.tokenizer_and_config(given.model)
    layout = layout_of(given, tokenizer, data.task)
    everything = [layout.query(example, given.token_read) for example in data.evaluation]
    limit = min(given.max_context, models.context(config))
    short, shown = everything, drawn
    if given.too_long == "drop":
        short, shown = _short(layout, everything, drawn, limit)
    fitting = layout.fitting(shown, max(query.length for query in short), limit)
    training = fitting if given.equal_demonstrations else shown
    for example in training:
        if (length := len(layout.training_sequence(example).tokens)) > limit:
            raise InputError(
                f"the demonstration in row {example.row + 1} has {length} tokens, the context holds {limit}: shorten "
                "it, or pass equal_demonstrations=True, which leaves out what does not fit"
            )
    model_content, asked = checkpoints.content(given.model), short[given.first_row :][: given.max_examples]
    if not asked:
        rows = f"{len(short)} row" + "s" * (len(short) != 1)
        raise InputError(f"first_row={given.first_row} passes over all questions ({rows}): pass a smaller one")
    return Plan(
        parameters=given,
        identity=records.run_id(given, data.checksum, model_content),
        data_checksum=data.checksum,
        model_content=model_content,
        config=config,
        layout=layout,
        demonstrations=fitting,
        training=training,
        queries=asked,
        calibration=calibration_queries(given, data, layout, shown, max(query.length for query in short)),
        counts=_counts(data, asked, len(everything) - len(short), len(drawn) - len(shown)),
    )


def calibration_queries(
    given: ExperimentParameters, data: TaskData, layout: Layout, drawn: Sequence[Example], longest: int
) -> list[Query]:
    """
    The texts on which the prior of each arm is read.

    First come training rows that are no demonstrations, then texts without content (`tasks.without_content`), whose row
    is negative. No label of theirs is used for a prior.

    Rows longer than the longest question are passed over, so that each fits behind the demonstrations. There are fewer
    than asked for where the training split has no more.
    """
    if not given.n_calibration_rows:
        return []
    every = (layout.query(example, given.token_read) for example in set_aside(data.train, drawn))
    rows = list(islice((query for query in every if query.length <= longest), given.n_calibration_rows))
    empty = [layout.query(example, given.token_read) for example in without_content(data.task)]
    return rows + [query for query in empty if query.length <= longest]


def layout_of(given: ExperimentParameters, tokenizer: PreTrainedTokenizerBase, task: Task) -> Layout:
    """The layout with the format that the parameters name; errors as for `Layout.make`."""
    return Layout.make(
        tokenizer,
        task,
        given.separator,
        given.label_score,
        label_prefix=given.label_prefix,
        instruction=given.instruction,
        chat=given.chat,
    )


def _short(layout: Layout, queries: list[Query], drawn: list[Example], limit: int) -> tuple[list[Query], list[Example]]:
    """
    The questions and demonstrations that are not too long, by `too_long=drop`.

    A text is too long if it takes, with its label, more than half of the context (less what comes before the first
    prompt). So a demonstration fits beside every question. A demonstration is drawn before it is left out.
    """
    room = layout.room(limit)
    short = [query for query in queries if query.length <= room]
    shown = [example for example in drawn if len(layout.demonstration(example)) <= room]
    for what, left in (("question", short), ("demonstration", shown)):
        if not left:
            raise InputError(f"no {what} has {room} tokens or less, half of the context of {limit}: shorten the texts")
    return short, shown


def _counts(data: TaskData, queries: list[Query], n_questions: int, n_demonstrations: int) -> dict[str, Any]:
    """
    What a record counts, where there is any.

    Prompts that the tokenizer merges with a label; questions and demonstrations left out as too long; labels of which
    the training split has no row.
    """
    counts = {
        "merged_prompts": sum(query.is_merged for query in queries),
        "dropped_questions": n_questions,
        "dropped_demonstrations": n_demonstrations,
        "labels_not_in_training": missing_classes(data),
    }
    return {name: count for name, count in counts.items() if count}


def prepare(given: ExperimentParameters, data: TaskData | None = None) -> Run:
    """The plan with its model loaded; parameters and errors as for `plan` and `models.load_model`."""
    planned = plan(given, data)
    with progress.stage("loading the model"):
        model = models.load_model(given.model, given.dtype, given.device, planned.layout.tokenizer)
    return Run(**vars(planned), model=model)
