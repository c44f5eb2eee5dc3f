"""A cell of the simulated grid, which computes nothing. It imports next to nothing, as workers import it."""

from __future__ import annotations

from pathlib import Path

from iclgd_helpers import storage
from iclgd_helpers.experiments.performing import STORED


def store(folder: str, number: int) -> tuple[str, int]:
    """Look for the cell's record, else store one: what every job of a grid does."""
    record = Path(folder, f"{number}.json")
    if record.exists():
        return STORED, number
    storage.write_json(record, {"number": number})
    return "stored", number
