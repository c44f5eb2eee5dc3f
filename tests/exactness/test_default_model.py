"""The default model in float32, on the default text: the engine equals the naive implementation there, too."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import naive
import pytest
import torch

from iclgd_helpers import pinned_downloads
from iclgd_helpers.data import sources, tasks
from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import finetune, models
from iclgd_helpers.engine.finetune import Settings
from iclgd_helpers.engine.observe import Arm, observe

NAME, TOLERANCE = "SmolLM2-135M-Instruct", 1e-4
N_QUERIES, N_DEMONSTRATIONS = 3, 16


@dataclass(frozen=True)
class Real:
    model: models.LanguageModel
    stock: torch.nn.Module
    trained: torch.nn.Module  # a second one, for the naive finetuning
    layout: Layout
    demonstrations: list[tasks.Example]
    examples: list[tasks.Example]

    @property
    def prompts(self) -> list[list[int]]:
        return [naive.encode(self.model.tokenizer, example.prompt) for example in self.examples]


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    at_hand = pinned_downloads.is_intact(pinned_downloads.cache_folder() / NAME, pinned_downloads.sources(NAME))
    text = (pinned_downloads.cache_folder() / "movieReviewSnippets.tsv").is_file()
    if not (at_hand and text) and os.environ.get("ICLGD_REQUIRE_DATA") != "1":
        pytest.skip(f"{NAME} and the snippets have not been fetched (`make book` does)")
    model = models.load_model(NAME, "float32", "cpu")
    data = sources.load_task("snippets", "pypi")
    layout = Layout.make(model.tokenizer, data.task, "eos")
    demonstrations = select_demonstrations(data.train, N_DEMONSTRATIONS, 0, balanced=False)
    yield Real(model, naive.stock(model), naive.stock(model), layout, demonstrations, data.evaluation[:N_QUERIES])


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the largest entry."""
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("n_demonstrations", [0, N_DEMONSTRATIONS])
def test_observation_equals_naive(real: Real, n_demonstrations: int):
    demonstrations = real.demonstrations[:n_demonstrations]
    before = naive.context(real.model.tokenizer, real.layout.task, demonstrations, "eos")
    assert tuple(before) == real.layout.prefix(demonstrations)
    assert before[0] == real.model.tokenizer.bos_token_id
    queries = [real.layout.query(example, "label") for example in real.examples]
    arms = {"arm": Arm(real.layout.prefix(demonstrations))}
    checked = 0
    for indices, seen in observe(real.model, queries, arms):
        for place, index in enumerate(indices):
            prompt = real.prompts[index]
            expected = naive.observe(real.stock, before, prompt, list(real.layout.labels))
            ours, n_read = seen["arm"], len(prompt) + 1
            difference = ours.label_log_probabilities[place] - expected["label_log_probabilities"]
            assert difference.abs().max() < TOLERANCE
            assert (ours.lens_log_odds[place] - expected["lens"]).abs().max() < 10 * TOLERANCE
            for layer in range(real.model.n_layers):
                outputs = ours.attention_output[place, layer], expected["attention_output"][layer]
                scores = ours.attention_scores[place, layer, :, :n_read], expected["attention_scores"][layer]
                assert relative(*outputs) < TOLERANCE, layer
                assert relative(*scores) < TOLERANCE, layer
            checked += 1
    assert checked == N_QUERIES


@pytest.mark.parametrize(
    ("method", "loss"), [("standard", "all"), ("standard", "label_space"), ("joint", "all"), ("sequential", "all")]
)
def test_first_step_equals_naive(real: Real, method: str, loss: str):
    """Losses and gradient norms of one step: what follows it is well conditioned at small rates only."""
    settings = Settings(1e-4, loss)
    sequences = [real.layout.training_sequence(example) for example in real.demonstrations]
    sequence = min(sequences, key=lambda sequence: len(sequence.tokens))
    if method == "sequential":  # one forward pass of the naive model for each of 30 layers: few tokens
        sequence = replace(sequence, trunk=sequence.trunk[:7])
    before = [value.clone() for value in real.model.original().values]
    ours = finetune.finetune(real.model, [sequence], method, settings)
    assert all(torch.equal(a, b) for a, b in zip(before, real.model.original().values, strict=True))
    real.trained.load_state_dict(real.stock.state_dict())
    losses, norms = naive.finetune(real.trained, [sequence], method, 1e-4, loss)
    assert relative(ours.losses.double(), torch.tensor(losses, dtype=torch.float64)) < TOLERANCE
    norms = torch.tensor(norms, dtype=torch.float64)
    assert ((ours.gradient_norms - norms).abs() / norms).max() < 10 * TOLERANCE
    change = finetune.drift(real.model, ours.update)
    assert relative(change, torch.tensor(naive.drift(real.stock, real.trained), dtype=torch.float64)) < 10 * TOLERANCE
