"""What a GPU run needs, as far as a CPU can test it: half precision, short memory, other checkpoints."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from iclgd_helpers.data import sources, synthetic
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import checkpoints, finetune, models, observe
from iclgd_helpers.engine.finetune import METHODS, Settings
from iclgd_helpers.engine.observe import Arm
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import parameters

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "gemma3", "xglm")


def material(family: str, dtype: torch.dtype):
    model = models.tiny_model(f"tiny-{family}", dtype=dtype)
    data = sources.load_task("snippets", "generated")
    layout = Layout.make(model.tokenizer, data.task, "eos")
    sequences = [layout.training_sequence(example) for example in data.train[:3]]
    queries = [layout.query(example, "label") for example in data.evaluation[:7]]
    return model, layout, sequences, queries, {"in_context": Arm(layout.prefix(data.train[:4]))}


def changes(model, update) -> torch.Tensor:
    pairs = zip(model.original().values, update.values, strict=True)
    return torch.cat([(new.double() - old.double()).flatten() for old, new in pairs])


# ------------------------------------------------------------------------------------------------ half precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_approaches_float32(family: str, dtype: torch.dtype):
    """Observations and updates, within the precision of the format; weights of the model stay half and unchanged."""
    seen, updates = {}, {}
    for kind in (torch.float32, dtype):
        model, layout, sequences, queries, arms = material(family, kind)
        if kind is torch.float32:  # the same weights, so that only the computation differs
            for parameter in model.model.parameters():
                parameter.data = parameter.data.to(dtype).float()
        ((_, observed),) = list(observe.observe(model, queries, arms))
        seen[kind] = observed["in_context"]
        assert all(getattr(seen[kind], name).dtype == torch.float32 for name in vars(seen[kind]))
        before = [trainable.parameter.data.clone() for trainable in model.trainables]
        for method in METHODS:
            update = finetune.finetune(model, sequences, method, Settings(0.01)).update
            assert all(value.dtype == torch.float32 for value in update.values)
            updates[kind, method] = changes(model, update)
        assert all(t.parameter.dtype == kind for t in model.trainables)
        assert all(map(torch.equal, before, (t.parameter.data for t in model.trainables)))
    scale = 10 * torch.finfo(dtype).eps
    exact, half = (seen[kind].label_log_probabilities for kind in (torch.float32, dtype))
    assert (exact - half).abs().max() < scale * exact.abs().max()
    for method in METHODS:
        exact, half = updates[torch.float32, method], updates[dtype, method]
        assert torch.nn.functional.cosine_similarity(exact, half, 0) > 0.97
        assert 0.9 < half.norm() / exact.norm() < 1.1


def test_sequential_steps_are_seen_by_the_layers_above(monkeypatch):
    """In mixed precision the next layer must see the updated weights, not a cached half-precision copy of the old."""
    model, layout, sequences, *_ = material("gpt2", torch.bfloat16)
    settings = Settings(0.3)
    losses = finetune.finetune(model, sequences[:1], "sequential", settings).losses
    frozen = finetune.finetune(model, sequences[:1], "joint", settings).losses
    assert losses[0, 0] == frozen[0, 0] and not torch.equal(losses[0, 1:], frozen[0, 1:])
    autocast = torch.autocast  # negative control: with the cache the layers above see the old weights
    monkeypatch.setattr(torch, "autocast", lambda *a, cache_enabled: autocast(*a, cache_enabled=True))
    model, layout, sequences, *_ = material("gpt2", torch.bfloat16)
    cached = finetune.finetune(model, sequences[:1], "sequential", settings).losses
    assert not torch.equal(cached, losses)


def test_float16_gradients_are_scaled_and_overflow_is_retried(monkeypatch):
    model, layout, sequences, *_ = material("gpt2", torch.float16)
    run = lambda: changes(model, finetune.finetune(model, sequences, "standard", Settings(0.01)).update)  # noqa: E731
    usual = run()
    monkeypatch.setattr(finetune, "LOSS_SCALE", 2.0**40)  # overflows at first
    assert torch.allclose(run(), usual, rtol=0.05, atol=float(usual.abs().max()) * 0.02)
    monkeypatch.setattr(finetune._Descent, "_unscaled", lambda self, loss, p: torch.autograd.grad(loss * 2.0**40, p))
    assert not run().isfinite().all()  # negative control


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_of_controls_survive_half_precision(family: str):
    model, layout, sequences, *_ = material(family, torch.bfloat16)
    for norm in (1e-6, 1.0):
        assert finetune.update_norm(model, finetune.random_update(model, 3, norm)) == pytest.approx(norm, rel=0.05)
    tiny, large = (finetune.random_update(model, 3, norm) for norm in (1e-6, 100.0))
    assert finetune.kept_by_rounding(model, tiny) < 0.2 and finetune.kept_by_rounding(model, large) > 0.95
    single = models.tiny_model(f"tiny-{family}")
    assert finetune.kept_by_rounding(single, finetune.random_update(single, 3, 1.0)) == pytest.approx(1, abs=1e-4)
    assert finetune.kept_by_rounding(single, single.original()) == 1.0


# -------------------------------------------------------------------------------------------------- short memory
@given(limit=st.integers(70, 400))
def test_smaller_batches_where_memory_is_short(limit: int):
    """A device that holds `limit` query tokens: other batches, the same numbers, and a line that says so."""
    model, layout, _, queries, arms = material("llama", torch.float64)
    whole = dict(_by_query(observe.observe(model, queries, arms)))
    with pytest.MonkeyPatch.context() as patch:
        lines = _limited(patch, limit)
        parts = dict(_by_query(observe.observe(model, queries, arms)))
    assert parts.keys() == whole.keys() == set(range(len(queries)))
    for index, values in whole.items():
        assert torch.allclose(parts[index], values, rtol=1e-9, atol=1e-9)
    too_small = sum(len(query.tokens) for query in queries) > limit
    assert bool(lines) == too_small and all("same numbers" in line for line in lines)


def test_memory_too_small_for_one_query_is_an_error():
    model, layout, sequences, queries, arms = material("llama", torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        _limited(patch, 3)
        with pytest.raises(InputError, match="memory is too small for one query.*pass dtype"):
            list(observe.observe(model, queries, arms))

        def out_of_memory(*_, **__):
            raise torch.OutOfMemoryError("device limit of the test")

        patch.setattr(models.LanguageModel, "hidden", out_of_memory)
        with pytest.raises(InputError, match="memory is too small for a finetuning step"):
            finetune.finetune(model, sequences, "standard", Settings(0.1))
        with pytest.raises(InputError, match="memory is too small for the .* tokens before the queries"):
            list(observe.observe(model, queries, arms))


def _limited(patch: pytest.MonkeyPatch, limit: int) -> list[str]:
    unlimited, lines = observe.observe_batch, []

    def limited(model, batch, prefix):
        if sum(len(query.tokens) for query in batch) > limit:
            raise torch.OutOfMemoryError("device limit of the test")
        return unlimited(model, batch, prefix)

    patch.setattr(observe, "observe_batch", limited)
    patch.setattr(observe, "print", lambda line, file: lines.append(line), raising=False)
    return lines


def _by_query(observations):
    for indices, seen in observations:
        for row, index in enumerate(indices):
            yield index, seen["in_context"].label_log_probabilities[row]


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random XGLM checkpoint laid out as the hub's: config, tokenizer files, safetensors."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small-xglm"
    model = models.tiny_model("tiny-xglm")
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_auto_device_is_the_cpu_without_a_gpu(checkpoint, monkeypatch):
    assert models.load_model(str(checkpoint), "float32", "auto").device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="device 'cuda' cannot be used here .* pass device=cpu"):
        models.load_model(str(checkpoint), "float32", "auto")


def test_a_lone_bin_is_converted_once_and_never_unpickled(checkpoint, tmp_path, cache_folder):
    folder = tmp_path / "bin-only"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(checkpoint / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    loaded = models.load_model(str(folder), "float32", "cpu")
    reference = models.load_model(str(checkpoint), "float32", "cpu")
    for (name, ours), (_, theirs) in zip(
        loaded.model.named_parameters(), reference.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "convert_bin", lambda *_: pytest.fail("converted twice"))
        models.load_model(str(folder), "float32", "cpu")

    class Payload:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    torch.save({"payload": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than tensors"):
        models.load_model(str(folder), "float32", "cpu")


@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_special_tokens_that_contradict_the_weights_are_refused(checkpoint, tmp_path, kind: str):
    folder = tmp_path / "contradiction"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {f"{kind}_token_id": 7}))
    with pytest.raises(InputError, match=f"{kind.upper()} is .*{kind}_token_id=.7. .*Correct either"):
        models.load_model(str(folder), "float32", "cpu")
    (folder / "config.json").write_text(json.dumps(config | {f"{kind}_token_id": None}))
    models.load_model(str(folder), "float32", "cpu")  # a config that says nothing contradicts nothing


def test_the_rehearsal_has_the_paper_models_shape():
    tokenizer = synthetic.tiny_tokenizer()
    config = models._rehearsal_config(tokenizer)
    sizes = (config.num_layers, config.d_model, config.attention_heads, config.ffn_dim, config.vocab_size)
    assert sizes == (24, 2048, 32, 8192, 51_200) and config.scale_embedding
    assert parameters.resolve({"preset": "paper"}).model.endswith("1.3B")
