"""What a run names, looked up before anything slow is loaded: its device, model, data, and identity."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from iclgd_helpers import paths, storage
from iclgd_helpers.data.demonstrations import reordered, select_demonstrations
from iclgd_helpers.data.sources import load, load_table
from iclgd_helpers.data.tasks import OWN, TASKS, Example, TaskData, from_file, own_task
from iclgd_helpers.engine import checkpoints
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import records
from iclgd_helpers.experiments.parameters import OWN_TABLE, ExperimentParameters


def task_data(given: ExperimentParameters) -> TaskData:
    """The examples that the parameters name; errors as for `load`, `from_file` and `own_task`."""
    if given.task == OWN:
        column = "label" if given.label_column is None else given.label_column
        task = own_task(given.template or "", given.verbalizers or "", column, given.label_values)
        return load_table(task, paths.resolve_path(given.data_file or ""))
    task = TASKS[given.task] if given.task_file is None else from_file(paths.resolve_path(given.task_file))[0]
    return load(task, given.data_source, data_folder(given))


def data_folder(given: ExperimentParameters) -> Path | None:
    """The folder of the six tasks: the parameter, else the environment variable `ICLGD_DATA`."""
    return paths.resolve_path(given.data_folder) if given.data_folder else paths.data_folder()


def drawn_demonstrations(given: ExperimentParameters, data: TaskData) -> list[Example]:
    """
    The demonstrations in the order in which they are shown; errors as for `select_demonstrations`.

    Balanced ones need each class of the task in the training split, not only those that happen to be there.
    """
    if given.balanced and (missing := missing_classes(data)):
        what = f"balanced=True, and no row of the training split has the label {missing[0]!r}"
        raise InputError(f"{what}: pass balanced=False, or add rows of that label")
    return reordered(select_demonstrations(data.train, given.n_demonstrations, given.seed, given.balanced), given.order)


def missing_classes(data: TaskData) -> list[str]:
    """Verbalizers of the classes of which the training split has no row."""
    there = {example.label for example in data.train}
    return [word for label, word in enumerate(data.task.verbalizers) if label not in there]


def check(several: Iterable[ExperimentParameters]) -> list[str]:
    """
    Look for what every run needs, each device, model and table once; the identities of the runs.

    Raises
    ------
    InputError
        for the first that is not there, cannot be read, or has too few rows.
    """
    several = list(several)
    for device in dict.fromkeys(given.device for given in several):
        check_device(device)
    models = {name: checkpoints.content(name) for name in dict.fromkeys(given.model for given in several)}
    tables: dict[str, list[ExperimentParameters]] = {}
    for given in several:
        table = given.model_dump_json(include={"task", "task_file", "data_source", "data_folder", *OWN_TABLE})
        tables.setdefault(table, []).append(given)
    identities = []
    for of_table in tables.values():
        data = task_data(of_table[0])
        for given in of_table:
            drawn_demonstrations(given, data)
            identities.append(records.run_id(given, data.checksum, models[given.model]))
    return identities


def check_device(device: str) -> None:
    """InputError unless PyTorch finds the device; `models.choose_device` tries later whether it computes."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu"):
        import torch  # slow to import, and seldom needed

        found = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}[kind].device_count()
        if int(number or 0) >= found:
            raise InputError(f"device {device!r} cannot be used here (PyTorch finds {found} of them): pass device=cpu")


def require_room(identities: Iterable[str], folder: Path) -> None:
    """InputError if a record is missing that could not be stored in `folder`."""
    if any(not (folder / identity).is_dir() for identity in identities):
        storage.require_writable(folder)
