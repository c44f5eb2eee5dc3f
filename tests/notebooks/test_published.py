"""The published numbers are complete, with rounding and source, and the counts of classes are those of the data."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from iclgd_helpers.data.sources import load_task
from iclgd_helpers.pages import published


@pytest.mark.parametrize(("number", "cells"), [(1, 36), (2, 42), (3, 5)])
def test_tables_are_complete(number, cells):
    table = published.table(number)
    assert len(table) == cells and table.notna().all(axis=None)
    assert not table.duplicated(["quantity", "arm", "task"]).any()
    assert set(table["task"]) <= {*published.TASKS, "average"}
    assert table["value"].between(0, 100 if number == 1 else 1).all()


def test_tolerance_is_half_a_unit_of_the_last_printed_digit(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("table,row,quantity,arm,task,value\n4,r,q,a,cb,74\n4,r,q,a,mr,45.0\n4,r,q,a,subj,0.1091\n")
    table = published.table(4, file)
    assert table["decimals"].tolist() == [0, 1, 4]
    np.testing.assert_allclose(table["tolerance"], [0.5, 0.05, 0.00005])
    assert table["value"].tolist() == [74.0, 45.0, 0.1091]


def test_the_cell_with_two_digits_is_known_as_such():
    accuracy = published.table(1).set_index(["quantity", "arm", "task"])
    assert accuracy.loc[("accuracy", "standard", "sst2"), "tolerance"] == 0.5


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="no Table 7"):
        published.table(7)


def test_archived_runs_name_their_source():
    archive = published.archive()
    assert not archive.duplicated(["source_path", "commit"]).any()
    assert archive["commit"].str.fullmatch("[0-9a-f]{7}").all()
    assert pd.to_datetime(archive["commit_date"]).dt.year.eq(2023).all()
    assert not archive["source_path"].str.startswith("/").any()
    assert set(archive["method"]) == {"standard", "joint"}
    assert ((archive["clipping"] == "none") <= archive["clip_value"].isna()).all()


def test_counts_of_archived_runs_are_possible():
    archive = published.archive()
    size = archive["task"].map(published.class_counts().groupby("task").sum())
    assert (archive["n_finetuned"].dropna() == size[archive["n_finetuned"].notna()]).all()
    counted = archive.dropna(subset="fixed_both")
    for method in ("finetuned", "in_context"):
        assert (counted["fixed_both"] <= counted[f"fixed_{method}"]).all()
        changed = counted.dropna(subset=f"changed_{method}")
        assert (changed[f"fixed_{method}"] <= changed[f"changed_{method}"]).all()
        assert (changed["changed_same"] <= changed[f"changed_{method}"]).all()


def test_gradient_norms_are_of_32_steps_and_24_layers():
    norms = published.archived_gradient_norms()
    assert norms.shape == (32, 25) and norms.index.tolist() == list(range(1, 33)) and (norms > 0).all(axis=None)


def test_every_file_is_described_and_small():
    files = [path for path in published.FOLDER.iterdir() if path.suffix == ".csv"]
    readme = (published.FOLDER / "README.md").read_text()
    assert len(files) == 7 and all(f"`{path.name}`" in readme for path in files)
    assert sum(path.stat().st_size for path in files) < 300_000


def test_transcribed_similarities_have_the_printed_averages():
    found = published.dai_similarities()
    assert list(found.index) == list(published.dai_accuracies().index)
    assert found.mean().round(3).to_dict() == {"sim_aou": 0.186, "sim_am_zero_shot": 0.338, "sim_am": 0.442}


@pytest.mark.skipif("ICLGD_DATA" not in os.environ, reason="needs the six data sets: set ICLGD_DATA to their folder")
@pytest.mark.parametrize("task", published.TASKS)
def test_class_counts_are_those_of_the_evaluation_rows(task):
    rows = load_task(task, "folder", Path(os.environ["ICLGD_DATA"])).evaluation
    counted = pd.Series([row.label for row in rows]).value_counts().sort_index()
    assert counted.to_dict() == published.class_counts()[task].to_dict()
