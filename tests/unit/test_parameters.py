"""Parameters: where a value comes from, and one clear line for each wrong one."""

import os
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

from iclgd_helpers import paths
from iclgd_helpers.data.tasks import SETTINGS
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import inputs, parameters, runs
from iclgd_helpers.experiments.parameters import TheoryParameters, resolve, validate_for_notebook

PRESETS = {name: yaml.safe_load((parameters.PRESETS / f"{name}.yaml").read_text()) for name in parameters.presets()}


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ICLGD_DATA", raising=False)


def message(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# ------------------------------------------------------------------------------------------ where values come from
def test_default_is_the_quick_preset():
    assert resolve({}) == resolve({"preset": "quick"}) == resolve(dict.fromkeys(["preset", "model", "seed", "task"]))
    assert resolve({}).preset == "quick" and resolve({}).task == "snippets"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", [task for task in SETTINGS if task != "own"])
def test_given_before_task_before_preset(preset: str, task: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolved = resolve({"preset": preset, "task": task})
    for name in ("n_demonstrations", "learning_rate", "separator", "balanced", "seed"):
        assert getattr(resolved, name) == SETTINGS[task][name]
    assert resolved.model == PRESETS[preset]["model"]
    assert resolved.dtype == {"auto": "float32"}.get(PRESETS[preset]["dtype"], PRESETS[preset]["dtype"])
    assert resolved.max_examples == min(SETTINGS[task]["row_cap"], PRESETS[preset]["max_examples"])
    given = {"seed": 77, "n_demonstrations": 3, "learning_rate": 0.125, "max_examples": 5000, "model": "tiny-opt"}
    other = resolve({"preset": preset, "task": task} | given)
    assert {name: getattr(other, name) for name in given} == given
    assert other.model_copy(update=resolved.model_dump(include=set(given))) == resolved


def test_half_precision_on_a_gpu_only(monkeypatch):
    """`dtype=auto` is resolved before the record's identity is made, so that records of both kinds stay apart."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve({"preset": "paper"}).dtype == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve({"preset": "paper"}).dtype == resolve({"preset": "paper", "device": "cuda:1"}).dtype == "float16"
    assert resolve({"preset": "paper", "device": "cpu"}).dtype == "float32"
    assert resolve({"preset": "paper", "dtype": "bfloat16"}).dtype == "bfloat16"


def test_protocol_values_hold_under_any_preset():
    """Demonstrations, first seed and rate of the original runs."""
    protocol = {
        "cb": (3, 0.08), "sst2": (2, 0.0005), "sst5": (5, 0.00016), "subj": (4, 0.003), "mr": (5, 0.003),
        "agnews": (3, 0.2),
    }  # fmt: skip
    for task, (seed, rate) in protocol.items():
        for preset in PRESETS:
            r = resolve({"preset": preset, "task": task})
            assert (r.n_demonstrations, r.seed, r.learning_rate, r.separator, r.balanced) == (
                32,
                seed,
                rate,
                "eos",
                False,
            )
    assert resolve({"task": "cb", "seed": 4, "preset": "smoke"}).seed == 4


def test_zero_and_false_are_values():
    resolved = resolve({"seed": 0, "task": "cb", "learning_rate": 0.0, "controls": False})
    assert resolved.seed == 0 and resolved.learning_rate == 0.0 and resolved.controls is False


def test_source_follows_the_folder(monkeypatch: pytest.MonkeyPatch):
    assert resolve({"task": "cb"}).data_source == "hub"
    assert resolve({"task": "cb", "preset": "smoke"}).data_source == "generated"
    assert resolve({"task": "snippets"}).data_source == "pypi"
    assert resolve({"task": "cb", "data_folder": "data"}).data_source == "folder"
    monkeypatch.setenv("ICLGD_DATA", "../elsewhere")
    assert resolve({"task": "cb"}).data_source == "folder" and resolve({}).data_source == "pypi"
    assert inputs.data_folder(resolve({"task": "cb"})) == (paths.repository_root() / "../elsewhere").resolve()
    given = resolve({"task": "cb", "data_folder": "nearer"})
    assert inputs.data_folder(given) == (paths.repository_root() / "nearer").resolve()


def test_relative_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = paths.resolve_path("some/where")
    monkeypatch.chdir(tmp_path)
    assert paths.resolve_path("some/where") == before
    assert paths.resolve_path(tmp_path / "x") == tmp_path / "x"


# -------------------------------------------------------------------------------------------------- wrong values
WRONG = [  # what is given, and what the one line has to name
    (("sed", 3), ("'sed'", "did you mean 'seed'")),
    (("n_demonstration", 3), ("'n_demonstration'", "did you mean 'n_demonstrations'")),
    (("seed", "three"), ("seed='three'", "integer")),
    (("seed", -1), ("seed=-1", "greater than or equal to 0")),
    (("seed", 1.5), ("seed=1.5", "integer")),
    (("seed", True), ("seed=True", "integer")),
    (("n_demonstrations", -1), ("n_demonstrations=-1", "greater than or equal to 1")),
    (("n_demonstrations", 0), ("n_demonstrations=0",)),
    (("seed", "3 "), ("seed='3 '", "integer")),
    (("seed", "0x3"), ("seed='0x3'", "integer")),
    (("seed", "1.5"), ("seed=1.5", "integer")),
    (("seed", 2.0**53), ("seed=9007199254740992", "integer")),
    (("seed", "9" * 5000), ("seed=inf", "integer")),
    (("seed", [[1]]), ("seed=[[1]]", "integer")),
    (("max_examples", 0), ("max_examples=0",)),
    (("learning_rate", -0.1), ("learning_rate=-0.1",)),
    (("learning_rate", float("nan")), ("learning_rate=nan", "finite")),
    (("learning_rate", float("inf")), ("learning_rate=inf", "finite")),
    (("learning_rate", "1e400"), ("learning_rate=inf", "finite")),
    (("learning_rate", "nan"), ("learning_rate='nan'", "number")),
    (("learning_rate", True), ("learning_rate=True", "number")),
    (("balanced", 1), ("balanced=1", "boolean")),
    (("balanced", "yes"), ("balanced='yes'", "boolean")),
    (("task", ("a", {})), ("unknown task ('a', {})", "cb, sst2")),
    (("model", "m\ud800"), ("model='m\\ud800'", "half a character")),
    (("dtype", "x" * 10**6), ("dtype='xxx", " … ", "'float32'")),
    (("device", "cpu:99"), ("'cpu:99'", "device=cpu")),
    (("device", "meta"), ("'meta'", "cuda")),
    (("device", "cuda:٣"), ("'cuda:٣'", "cuda:0")),
    (("task", "nonsense"), ("'nonsense'", "cb, sst2, sst5")),
    (("task", "sst3"), ("'sst3'", "did you mean 'sst")),
    (("preset", "smok"), ("'smok'", "did you mean 'smoke'")),
    (("preset", "../presets/quick"), ("'../presets/quick'", "paper, quick, smoke")),
    (("preset", "tasks"), ("'tasks'", "paper, quick, smoke")),
    (("model", 7), ("model=7", "string")),
    (("dtype", "int8"), ("dtype='int8'", "'float32'")),
    (("separator", ""), ("separator=''", "at least 1 character")),
    (("instruction", ""), ("instruction=''", "at least 1 character")),
    (("too_long", "shorten"), ("too_long='shorten'", "'drop'")),
    (("data_source", "disk"), ("data_source='disk'", "'folder'")),
    (("clip", "global"), ("clip='global'", "give both, or neither")),
    (("clip", "l-infinity"), ("clip='l-infinity'", "'elementwise'")),
    (("clip_value", 1.0), ("clip_value=1.0", "give both, or neither")),
    (("clip_value", 0.0), ("clip_value=0.0", "greater than 0")),
    (("loss", "everything"), ("loss='everything'", "'label_space'")),
    (("max_context", 0), ("max_context=0",)),
]


@pytest.mark.parametrize("given", [(*given, parts) for given, parts in WRONG], ids=lambda g: f"{g[0]}={g[1]!r:.20}")
def test_wrong_value(given: tuple):
    name, value, parts = given
    line = message(resolve, {name: value})
    for part in parts:
        assert part in line


NUMBERS = [  # name, as it may be written, as it is meant: YAML 1.1 reads `1e-3` as a text and `1.0e+1` as a fraction
    ("learning_rate", "1e-3", 1e-3),
    ("learning_rate", ".5", 0.5),
    ("learning_rate", 1, 1.0),
    ("clip_value", "1E+2", 100.0),
    ("seed", "3", 3),
    ("seed", "+7", 7),
    ("seed", 3.0, 3),
    ("max_examples", 1.0e1, 10),
    ("max_examples", "1e1", 10),
    ("max_compared", "12", 12),
    ("max_context", "64.0", 64),
]


@pytest.mark.parametrize(("name", "written", "meant"), NUMBERS)
def test_a_number_that_is_written_as_one_is_one(name: str, written: object, meant: float):
    clip = {"clip": "global"} if name == "clip_value" else {}
    found = resolve({name: written} | clip)
    assert found == resolve({name: meant} | clip)
    assert type(getattr(found, name)) is type(meant)


def test_what_a_page_has_of_its_own():
    found = parameters.own({"n_questions": "3", "store": True, "seed": "x", "other": 1})
    assert found == {"n_questions": 3, "store": True}


OWN_WRONG = [("store", "yes"), ("store", 1), ("n_clip_values", 13), ("n_sweep_examples", 0), ("n_questions", 1)]
OWN_WRONG += [("device_bandwidth", 0), ("device_bandwidth", "fast")]
OWN_WRONG += [("device_tflops", 0), ("device_tflops", float("nan")), ("bench_file", None), ("other_model", 7)]


@pytest.mark.parametrize(("name", "value"), OWN_WRONG)
def test_wrong_value_of_a_pages_own(name: str, value: object):
    assert f"{name}=" in message(parameters.own, {name: value})


def test_texts_may_look_like_numbers():
    assert {"label_column", "data_folder", "model", "task", "bench_file", "loss"} <= parameters.text_names()
    assert not {"seed", "learning_rate", "balanced", "store", "device_tflops"} & parameters.text_names()


def test_folder_without_its_source():
    line = message(resolve, {"task": "cb", "data_folder": "data", "data_source": "hub"})
    assert "data_folder" in line and "data_source=folder" in line


def prepare(**given) -> runs.Run:
    return runs.prepare(resolve({"preset": "smoke"} | given))


UNUSABLE = {
    "more demonstrations than rows": ({"n_demonstrations": 301}, ("n_demonstrations=301", "300 rows")),
    "no such folder": ({"task": "cb", "data_folder": "/nowhere"}, ("'cb'", "'/nowhere'")),
    "folder not named": ({"task": "cb", "data_source": "folder"}, ("data_folder", "ICLGD_DATA")),
    "task without that source": ({"task": "cb", "data_source": "pypi"}, ("'cb'", "data_source=pypi")),
    "no such model": ({"model": "nonsense/no-such-model"}, ("'nonsense/no-such-model'", "SmolLM2-135M-Instruct")),
    "folder that is no model": ({"model": "tests"}, ("'tests'", "config.json")),
    "no such device": ({"device": "nonsense"}, ("'nonsense'", "device=cpu")),
    "device that is not there": ({"device": "cuda:63"}, ("'cuda:63'", "device=cpu")),
    "texts longer than the context": ({"task": "agnews", "max_context": 20}, ("32 tokens", "holds 20")),
    "no demonstration fits": ({"task": "agnews", "max_context": 40}, ("no demonstration fits", "in 40")),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_value(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ICLGD_RECORDS", str(tmp_path))
    given, parts = UNUSABLE[case]
    line = message(lambda: prepare(**given))
    for part in parts:
        assert part in line
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------------ notebooks
def notebook(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_notebook_takes_its_own_parameters_only(tmp_path: Path):
    path = notebook(tmp_path / "page.ipynb", 'preset = "smoke"\nseed = None\nmodel = None\nn_bars = 3')
    assert validate_for_notebook(path, {"seed": 5}) == resolve({"preset": "smoke", "seed": 5})
    assert validate_for_notebook(path, {"n_bars": 4}) == resolve({"preset": "smoke"})
    assert "did you mean 'seed'" in message(validate_for_notebook, path, {"sed": 5})
    assert "page.ipynb" in message(validate_for_notebook, path, {"learning_rate": 0.1})  # not on this page
    own = notebook(tmp_path / "own.ipynb", 'preset = "smoke"\nn_questions = 32')
    assert "n_questions=1" in message(validate_for_notebook, own, {"n_questions": 1})
    assert "'three'" in message(validate_for_notebook, path, {"seed": "three"})


def test_theory_notebook(tmp_path: Path):
    path = notebook(tmp_path / "theory.ipynb", "seed = 0\nn_demonstrations = 16")
    assert validate_for_notebook(path, {"seed": 2}) == TheoryParameters(seed=2, n_demonstrations=16)
    for wrong in (
        {"n_demonstrations": 0},
        {"n_demonstrations": 10**9},
        {"learning_rate": 1e300},
        {"learning_rate": 1e-12},
    ):
        assert f"{next(iter(wrong))}=" in message(parameters.theory, wrong)
    assert "n_demonstrations=0" in message(validate_for_notebook, path, {"n_demonstrations": 0})
    assert "did you mean" in message(validate_for_notebook, path, {"n_demonstration": 3})


def test_unusable_notebooks(tmp_path: Path):
    assert "no notebook" in message(validate_for_notebook, tmp_path / "none.ipynb", {})
    assert "0 cells" in message(validate_for_notebook, notebook(tmp_path / "a.ipynb"), {})
    two = notebook(tmp_path / "b.ipynb", "seed = 1", "seed = 2")
    assert "2 cells" in message(validate_for_notebook, two, {})


def test_a_page_with_a_task_takes_the_prompts_format():
    notebooks = paths.repository_root() / "notebooks"
    page, theory = notebooks / "00_quickstart.ipynb", notebooks / "01_one_step.ipynb"
    assert validate_for_notebook(page, {"preset": "smoke", "instruction": "Judge."}).instruction == "Judge."
    assert "unknown parameter" in message(validate_for_notebook, theory, {"instruction": "Judge."})


# ---------------------------------------------------------------------------------------------------------------- arms
def test_arms_may_be_named_and_bring_what_they_need():
    given = {"preset": "smoke", "task": "sst2"}
    assert resolve(given | {"arms": "standard, joint"}).arms == resolve(given | {"arms": ["standard", "joint"]}).arms
    assert resolve(given).arms is None
    for wrong, word in (("norm_matched,joint", "needs standard"), ("untrained_standard", "needs"), ("nothing", "arms")):
        with pytest.raises(InputError, match=word):
            resolve(given | {"arms": wrong})
