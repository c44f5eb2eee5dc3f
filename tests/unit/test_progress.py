"""How far something is: noted for whoever waits, shown as text, and of no harm where nobody does."""

import threading

from iclgd_helpers import progress


def test_steps_are_noted_whether_the_bar_is_shown_or_not(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.FILE, str(tmp_path / "now.json"))
    monkeypatch.setattr(progress, "SECONDS", 0)
    for disable in (False, True):
        with progress.Bar(total=3, desc="standard", disable=disable, leave=False) as bar:
            assert progress.noted(tmp_path / "now.json") == ("standard", 0, 3)
            bar.update(2)
            assert progress.noted(tmp_path / "now.json") == ("standard", 2, 3)
        assert progress.noted(tmp_path / "now.json") is None, "it is over"
    assert [path.name for path in tmp_path.iterdir()] == ["now.json"]


def test_it_is_noted_five_times_a_second_at_most(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.FILE, str(tmp_path / "now.json"))
    times = iter([10.0, 10.1, 10.3])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.Bar(total=9, desc="queries", disable=True) as bar:
        bar.update(1)
        assert progress.noted(tmp_path / "now.json") == ("queries", 0, 9)
        bar.update(1)
        assert progress.noted(tmp_path / "now.json") == ("queries", 2, 9)


def test_each_thread_notes_in_the_file_that_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.FILE, str(tmp_path / "now.json"))
    own = tmp_path / "own.json"
    with progress.noting(own):
        progress.note("queries", 1, 9)
        other = threading.Thread(target=progress.note, args=("other", 1, 2))
        other.start()
        other.join()
        assert progress.noted(own) == ("queries", 1, 9)
    assert not own.exists(), "it is over"
    progress.note("queries", 2, 9)
    assert progress.noted(tmp_path / "now.json") == ("queries", 2, 9) and not own.exists()


def test_a_stage_is_over_when_its_block_is(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.FILE, str(tmp_path / "now.json"))
    with progress.stage("loading the model"):
        assert progress.noted(tmp_path / "now.json") == ("loading the model", 0, None)
    assert progress.noted(tmp_path / "now.json") is None


def test_nothing_is_written_where_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.delenv(progress.FILE, raising=False)
    with progress.stage("loading the model"):
        pass
    monkeypatch.setenv(progress.FILE, str(tmp_path / "gone" / "now.json"))
    with progress.Bar(total=1, disable=True) as bar:
        bar.update()
    assert not list(tmp_path.iterdir())
    (tmp_path / "half").write_text("[1")
    assert progress.noted(tmp_path / "half") is None
