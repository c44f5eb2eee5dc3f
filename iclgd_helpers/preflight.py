"""What can be known of cells before anything slow is loaded: whether their devices, models and data are there."""

from __future__ import annotations

from collections.abc import Iterable

from iclgd_helpers import checkpoints, records, storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.parameters import OWN_TABLE, ExperimentParameters
from iclgd_helpers.paths import records_folder
from iclgd_helpers.tasks import select_demonstrations, task_data


def check(cells: Iterable[ExperimentParameters]) -> list[str]:
    """
    Look for what every cell needs, each device, model and table once; the identities of the cells.

    Raises
    ------
    InputError
        for the first that is not there, cannot be read, or has too few rows.
    """
    cells = list(cells)
    for device in dict.fromkeys(cell.device for cell in cells):
        check_device(device)
    models = {name: checkpoints.content(name) for name in dict.fromkeys(cell.model for cell in cells)}
    tables: dict[str, list[ExperimentParameters]] = {}
    for cell in cells:
        table = cell.model_dump_json(include={"task", "data_source", "data_folder", *OWN_TABLE})
        tables.setdefault(table, []).append(cell)
    identities = []
    for of_table in tables.values():
        data = task_data(of_table[0])
        for cell in of_table:
            select_demonstrations(data.train, cell.n_demonstrations, cell.seed, cell.balanced)
            identities.append(records.run_id(cell, data.checksum, models[cell.model]))
    return identities


def check_device(device: str) -> None:
    """InputError unless PyTorch finds the device; `models.choose_device` tries later whether it computes."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu"):
        import torch  # slow to import, and seldom needed

        found = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}[kind].device_count()
        if int(number or 0) >= found:
            raise InputError(f"device {device!r} cannot be used here (PyTorch finds {found} of them): pass device=cpu")


def require_room(identities: Iterable[str]) -> None:
    """InputError if a record is missing that could not be stored."""
    if any(not (records_folder() / identity).is_dir() for identity in identities):
        storage.require_writable(records_folder())
