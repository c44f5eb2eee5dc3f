"""One run: observe every arm on the same questions, compare, and keep a record."""

from __future__ import annotations

from pathlib import Path

from iclgd_helpers import paths, storage
from iclgd_helpers.engine import checkpoints
from iclgd_helpers.experiments import comparison, records, runs, updates
from iclgd_helpers.experiments.inputs import task_data
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.experiments.runs import Run


def run(given: ExperimentParameters, progress: bool = True, folder: Path | None = None) -> Record:
    """
    The record of a run: the stored one if there is one, else computed now and stored.

    Says which arms have diverged. `folder` is where records are kept, by default `paths.records_folder`.
    """
    folder = folder or paths.records_folder()
    data = task_data(given)
    record = records.find(records.run_id(given, data.checksum, checkpoints.content(given.model)), folder)
    if record is None:
        storage.require_writable(folder)
        record = compute(runs.prepare(given, data), progress)
        records.save(record, folder)
    if record.diverged:
        print("Diverged, so without accuracy, similarities and verdict: " + ", ".join(record.diverged))
    return record


def compute(run: Run, progress: bool = True) -> Record:
    """Finetune, observe and compare all arms of a run; questions beyond those compared are seen by two arms only."""
    clock, table = updates.Clock(), comparison.Table(run)
    compared, rest = run.queries[: run.n_compared], run.queries[run.n_compared :]
    tuned, arms = updates.trained_arms(run, clock, progress)
    with clock("observe"):
        table.fill(run, compared, arms, progress)
        table.fill(run, rest, {name: arms[name] for name in ("zero_shot", "in_context")}, progress)
    arms.clear()  # the updates are as large as the K/V weights, and the untrained weights need the room
    if run.parameters.controls:
        with run.model.untrained(updates.control_seed(run.parameters), run.parameters.untrained):
            more, untrained = updates.untrained_arms(run, clock, progress)
            tuned |= more
            with clock("observe_untrained"):
                table.fill(run, compared, untrained, progress)
    return Record(comparison.summary(run, table, tuned, clock), table.frame())
