"""One run: observe every arm on the same queries, compare, and keep a record."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from iclgd_helpers import paths, storage
from iclgd_helpers.engine import checkpoints
from iclgd_helpers.experiments import comparison, records, runs, updates
from iclgd_helpers.experiments.inputs import task_data
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.experiments.runs import Run


def run(given: ExperimentParameters, progress: bool = True) -> Record:
    """The record of a run; parameters and errors as for `record_of`. Says what it should, see `remarks`."""
    record, _is_new = record_of(given, progress)
    for line in record.remarks:
        print(line)
    if record.diverged:
        print("Diverged, so without accuracy, similarities and verdict: " + ", ".join(record.diverged))
    return record


def record_of(given: ExperimentParameters, progress: bool = True, folder: Path | None = None) -> tuple[Record, bool]:
    """
    The record of a run, and whether it was computed and stored now: the stored one is taken if there is one.

    Parameters
    ----------
    given : complete parameters, as `parameters.resolve` makes them.
    progress : whether bars are shown.
    folder : where records are kept, by default `paths.records_folder`.

    Raises
    ------
    InputError
        if what the parameters name is not there or does not fit together, or the record could not be stored.
    """
    folder = folder or paths.records_folder()
    data = task_data(given)
    record = records.find(records.run_id(given, data.checksum, checkpoints.content(given.model)), folder)
    if record is not None:
        return record, False
    storage.require_writable(folder)
    record = compute(runs.prepare(given, data), progress)
    records.save(record, folder)
    return record, True


def compute(run: Run, progress: bool = True) -> Record:
    """Finetune, observe and compare all arms of a run; queries beyond those compared are seen by two arms only."""
    seconds: dict[str, float] = {}
    compared, rest = run.queries[: run.n_compared], run.queries[run.n_compared :]
    tuned, arms = updates.trained_arms(run, seconds, progress)
    asked = [*compared, *run.calibration]  # one pass: what stands before the questions is read once
    with updates.timed(seconds, "observe"):
        seen = comparison.observed(run, asked, arms, comparison.comparisons_of(arms), progress, len(compared))
        columns, priors = comparison.split(seen, len(compared))
        two = {name: arms[name] for name in ("zero_shot", "in_context")}
        for column, values in comparison.observed(run, rest, two, {}, progress).items():
            columns[column] = np.concatenate([columns[column], values])
    arms.clear()  # the updates are as large as the K/V weights, and the untrained weights need the room
    if any(name.startswith("untrained") for name in run.arms):
        with run.model.untrained(updates.control_seed(run.parameters), run.parameters.untrained):
            more, arms = updates.untrained_arms(run, seconds, progress)
            tuned |= more
            with updates.timed(seconds, "observe_untrained"):
                seen = comparison.observed(run, asked, arms, comparison.comparisons_of(arms), progress, len(compared))
                more_columns, more_priors = comparison.split(seen, len(compared))
                columns, priors = columns | more_columns, priors | more_priors
    found = comparison.summary(run, columns, priors, tuned, seconds)
    examples = comparison.frame(run.queries, columns)
    calibration = comparison.frame(run.calibration, priors) if run.calibration else None
    return Record(storage.plain(found), examples, calibration)  # plain: the same whether computed or read back
