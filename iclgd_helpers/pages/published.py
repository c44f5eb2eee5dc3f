"""Numbers that others published, from `results/published/`; the README there has their sources."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from iclgd_helpers.data.tasks import NAMES
from iclgd_helpers.experiments.protocol import SEEDS
from iclgd_helpers.paths import repository_root

FOLDER = repository_root() / "results" / "published"
TASKS = tuple(name for name in NAMES if name in SEEDS)


def table(number: int, path: Path = FOLDER / "paper_tables.csv") -> pd.DataFrame:
    """
    Table 1, 2 or 3 of Bar Natan, Deutch and Magar, one row a printed cell.

    Columns
    -------
    row : name of the row, as printed
    quantity : accuracy, jaccard, jaccard_correct, jaccard_incorrect (all in percent), sim_aou or sim_am
    arm : zero_shot, in_context, standard (finetuning), joint (layer-causal), joint_clipped, or random
    task : as this book names it, or average
    value, decimals, tolerance : the number, its printed decimals, and half a unit of the last of them
    """
    cells = pd.read_csv(path, dtype={"value": str})
    cells = cells[cells["table"] == number].drop(columns="table").reset_index(drop=True)
    if cells.empty:
        raise ValueError(f"there is no Table {number}: it is 1, 2 or 3")
    decimals = cells["value"].str.partition(".")[2].str.len()
    return cells.assign(value=cells["value"].astype(float), decimals=decimals, tolerance=0.5 * 10.0**-decimals)


def text() -> pd.DataFrame:
    """Numbers that the same paper gives in its text and captions: `statement`, `place`, `unit`, `value`."""
    return pd.read_csv(FOLDER / "paper_text.csv")


def archive() -> pd.DataFrame:
    """The authors' archived runs, one row a log or result file, with path, commit and date in their repository."""
    return pd.read_csv(FOLDER / "archive.csv")


def archived_gradient_norms() -> pd.DataFrame:
    """`[step, layer]` norms of one archived run as its log gives them, and the norm over all keys and values."""
    return pd.read_csv(FOLDER / "archive_gradient_norms.csv", index_col="step")


def dai_accuracies() -> pd.DataFrame:
    """Accuracies (percent) of Dai et al.'s 1.3 B model by task: their Table 1."""
    return pd.read_csv(FOLDER / "dai_accuracies.csv", index_col="task")


def dai_similarities() -> pd.DataFrame:
    """Dai et al.'s SimAOU, and SimAM before and after finetuning, of the same model by task: their Tables 3 and 4."""
    return pd.read_csv(FOLDER / "dai_similarities.csv", index_col="task")


def class_counts() -> pd.Series:
    """Number of evaluation rows of each `(task, label)` under the protocol."""
    return pd.read_csv(FOLDER / "class_counts.csv", index_col=["task", "label"])["n"]
