"""
What a run will do, before anything slow is loaded: its data, its identity, the tokens it lays out; then its model.

A run is one (model, task, seed) with all its arms.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from iclgd_helpers.data.demonstrations import reordered, select_demonstrations
from iclgd_helpers.data.tasks import Example, TaskData
from iclgd_helpers.data.token_layout import Layout, Query
from iclgd_helpers.engine import checkpoints, models
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import records
from iclgd_helpers.experiments.inputs import task_data
from iclgd_helpers.experiments.parameters import ExperimentParameters


@dataclass(frozen=True)
class Plan:
    """
    What a run will do, before any weights are loaded.

    `demonstrations` are those that fit into the context, in the order in which they are shown; `training` are those
    that are finetuned on. `identity` is that of the record; checksum and content are what it depends on.
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

    @property
    def n_compared(self) -> int:
        """Number of queries, from the first, that every arm sees; zero-shot and in-context see all."""
        return min(self.parameters.max_compared or len(self.queries), len(self.queries))


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
    drawn = select_demonstrations(data.train, given.n_demonstrations, given.seed, given.balanced)
    drawn = reordered(drawn, given.order)
    tokenizer, config = models.tokenizer_and_config(given.model)
    layout = Layout.make(tokenizer, data.task, given.separator, given.label_score)
    everything = [layout.query(example, given.token_read) for example in data.evaluation]
    limit = min(given.max_context, models.context(config))
    fitting = layout.fitting(drawn, max(query.length for query in everything), limit)
    training = fitting if given.equal_demonstrations else drawn
    for example in training:
        if (length := len(layout.training_sequence(example).tokens)) > limit:
            raise InputError(
                f"the demonstration in row {example.row + 1} has {length} tokens, the context holds {limit}: shorten "
                "it, or pass equal_demonstrations=True, which leaves out what does not fit"
            )
    model_content = checkpoints.content(given.model)
    return Plan(
        parameters=given,
        identity=records.run_id(given, data.checksum, model_content),
        data_checksum=data.checksum,
        model_content=model_content,
        config=config,
        layout=layout,
        demonstrations=fitting,
        training=training,
        queries=everything[: given.max_examples],
    )


def prepare(given: ExperimentParameters, data: TaskData | None = None) -> Run:
    """The plan with its model loaded; parameters and errors as for `plan` and `models.load_model`."""
    planned = plan(given, data)
    model = models.load_model(given.model, given.dtype, given.device, planned.layout.tokenizer)
    return Run(**vars(planned), model=model)
