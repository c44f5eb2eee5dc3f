"""Pages at the edges of what the schema admits: every cell holds, or one line says what the page cannot show."""

import contextlib
import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import transformers
from notebook_cells import sources, whole_page

from iclgd_helpers.engine import models
from iclgd_helpers.experiments import records
from iclgd_helpers.pages import selection

pytestmark = pytest.mark.filterwarnings("ignore")
PAGES = (
    "00_quickstart", "10_inside_a_pretrained_model", "40_tasks_and_prompts", "50_prediction_alignment",
    "60_attention_similarity", "62_controls", "70_layer_causal_finetuning", "72_gradient_norms_and_clipping",
    "74_fixed_prompt_finetuning", "76_demonstration_attention", "90_your_own_model",
)  # fmt: skip
SMALL = {"preset": "smoke", "max_examples": 4, "n_clip_values": 1, "n_sweep_examples": 4, "n_questions": 2}
WORDS = "A,Bu,Fal,La,Ne,Positive,Que,S,T,Wor,a,at"  # each one token of the tiny tokenizer


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a Llama of one layer and one head."""
    folder = tmp_path_factory.mktemp("one-layer")
    tokenizer, config = models.tokenizer_and_config("tiny-llama")
    changed = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "attention_bias": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict() | changed | {"head_dim": 32}))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def table(folder: Path, labels: list[int], words: str) -> dict[str, str]:
    """Parameters of a table in `folder` with these labels, a row each."""
    rows = "".join(f"the film was number {number},{label}\n" for number, label in enumerate(labels))
    (folder / "own.csv").write_text("text,label\n" + rows)
    return {"data_file": str(folder / "own.csv"), "template": "{text} It is", "verbalizers": words}


def shown(slug: str, **given: Any) -> str:
    """What the page prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        whole_page(slug, **SMALL | given)
    return printed.getvalue()


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Records in a folder of this module's; nothing stored of the grid, which takes long to draw."""
    monkeypatch.setenv("ICLGD_RECORDS", str(tmp_path_factory.getbasetemp() / "edges"))
    monkeypatch.setattr(selection, "grid", lambda: [])
    monkeypatch.setattr(selection, "sweeps", lambda _kind: {})
    stored = records.load_all
    monkeypatch.setattr(records, "load_all", lambda folder: [] if folder == "results/records" else stored(folder))
    with torch.set_grad_enabled(True):  # page 10 turns gradients off
        yield
    plt.close("all")


@pytest.mark.parametrize("slug", PAGES)
def test_least_of_everything(slug: str, one_layer: str):
    shown(slug, model=one_layer, learning_rate=0.0, max_examples=1, n_demonstrations=1)


@pytest.mark.parametrize("slug", PAGES)
def test_many_classes_and_one_demonstration(slug: str, tmp_path: Path):
    shown(slug, n_demonstrations=1, **table(tmp_path, [number % 12 for number in range(48)], WORDS))


@pytest.mark.parametrize("slug", PAGES)
def test_what_has_diverged_is_shown_as_such(slug: str):
    printed = shown(slug, learning_rate=1e30)
    if any("run_cell(p)" in source for source in sources(slug).values()):
        line, *_of_another_model = [row for row in printed.splitlines() if row.startswith("Diverged, so without")]
        assert {"standard", "joint", "sequential"} <= set(line.split(": ")[1].split(", ")) and "zero_shot" not in line


@pytest.mark.parametrize("n_rare", [0, 1, 3])
@pytest.mark.parametrize("slug", ["40_tasks_and_prompts", "74_fixed_prompt_finetuning"])
def test_a_rare_class(slug: str, n_rare: int, tmp_path: Path):
    rare = range(1, 2 * n_rare + 1, 2)
    shown(slug, **table(tmp_path, [int(number in rare) for number in range(60)], "a,at"))
