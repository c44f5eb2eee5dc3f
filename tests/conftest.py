"""What several modules share: tiny models of the six families in two precisions, folders, the refusal, a tab."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import float64
import hypothesis
import naive
import pytest
import torch

from iclgd_helpers.data import sources, tasks
from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.token_layout import Layout, Query, TrainingSequence
from iclgd_helpers.engine import models
from iclgd_helpers.errors import InputError
from iclgd_helpers.measures import intervals
from tools import browser

# Reproducible, no time limit on a busy machine, and no examples kept from one run to the next.
hypothesis.settings.register_profile("book", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("book")

FEW_RESAMPLES = 10
FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "gemma3", "xglm")


def _defined(value: object) -> object:
    """`value` with NaN in place of None, which stands for it in a record."""
    if isinstance(value, list):
        return [_defined(item) for item in value]
    return float("nan") if value is None else value


@dataclass(frozen=True)
class Material:
    """A tiny model with three-class examples whose demonstrations reach beyond Gemma's sliding window."""

    model: models.LanguageModel
    layout: Layout
    demonstrations: list[tasks.Example]
    examples: list[tasks.Example]
    tolerance: float  # of a comparison with the naive implementation, relative to the largest entry

    @property
    def labels(self) -> list[tuple[int, ...]]:
        return list(self.layout.labels)

    @property
    def sequences(self) -> list[TrainingSequence]:
        return [self.layout.training_sequence(example) for example in self.demonstrations]

    def queries(self, token_read: str = "label") -> list[Query]:
        return [self.layout.query(example, token_read) for example in self.examples]

    def close(self, ours: object, naive_value: object) -> None:
        """Assert that both are equal to within the tolerance, NaN where NaN."""
        ours, naive_value = (torch.as_tensor(_defined(value)).double() for value in (ours, naive_value))
        scale = max(1.0, float(naive_value.nan_to_num().abs().max()))
        torch.testing.assert_close(ours, naive_value, rtol=0, atol=self.tolerance * scale, equal_nan=True)


@cache
def _tiny(family: str, dtype: torch.dtype) -> models.LanguageModel:
    return models.tiny_model(f"tiny-{family}", dtype=dtype)


def _material(family: str, dtype: torch.dtype, tolerance: float) -> Iterator[Material]:
    model = _tiny(family, dtype)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    data = sources.load_task("cb", "generated")
    yield Material(
        model,
        Layout.make(model.tokenizer, data.task, "eos"),
        select_demonstrations(data.train, 4, seed=0, balanced=False),
        data.evaluation[:5],
        tolerance,
    )
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was not restored"


def in_one_line(call: Callable, *arguments: object, **named: object) -> str:
    """What bad input is answered with: one line, not too long."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **named)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, not made yet."""
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def records_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records of the test's own, not made yet."""
    monkeypatch.setenv("ICLGD_RECORDS", str(tmp_path / "records"))
    return tmp_path / "records"


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    """A tab of a real browser; tests that ask for one are skipped where none is installed."""
    if browser.path() is None:
        pytest.skip("no chromium found: install it, or set ICLGD_BROWSER to its path")
    with browser.Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere and take most of the time."""
    monkeypatch.setattr(intervals, "RESAMPLES", FEW_RESAMPLES)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the six families."""
    return request.param


@pytest.fixture
def double(family: str) -> Iterator[Material]:
    """Float64, without the casts of transformers; 1e-9."""
    with float64.uncast():
        yield from _material(family, torch.float64, 1e-9)


@pytest.fixture(params=["float64", "float32"])
def material(request: pytest.FixtureRequest, family: str) -> Iterator[Material]:
    """Both precisions: float64 without the casts of transformers (1e-9), float32 as it is (1e-4)."""
    double = request.param == "float64"
    with float64.uncast() if double else nullcontext():
        yield from _material(family, getattr(torch, request.param), 1e-9 if double else 1e-4)


@pytest.fixture
def stock(double: Material) -> torch.nn.Module:
    """transformers' own model with the weights of `double`."""
    return naive.stock(double.model)
