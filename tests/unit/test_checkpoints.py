"""Checkpoints of others: named by their content, refused in one line where they are not what they say."""

import ast
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import model_types
import pytest
import torch
import transformers
from conftest import in_one_line
from safetensors.torch import load_file, save_file

from iclgd_helpers import pinned_downloads
from iclgd_helpers.data import tasks
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import checkpoints, families, models
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import experiment, inputs, parameters

HEAD, LAYER = "lm_head.weight", "model.layers.1.mlp.up_proj.weight"
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama as a folder: config, tokenizer, safetensors."""
    folder = tmp_path_factory.mktemp("sound") / "my-model"
    model = models.tiny_model("tiny-llama")
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path, cache_folder: Path) -> Path:
    """A copy of it that may be spoilt, and an empty cache."""
    shutil.copytree(sound, tmp_path / "my-model")
    return tmp_path / "my-model"


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """An edit of the tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def config(file: str = "config.json", **changed: object) -> Edit:
    """An edit of a JSON file; `...` removes a name."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changed
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return edit


def write(file: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def filled(name: str, value: float) -> Edit:
    return weights(lambda tensors: tensors[name].view(-1)[5:6].fill_(value))


def alone(content: bytes | Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """An edit to a `pytorch_model.bin` of its own, of such bytes or of the tensors as changed."""

    def edit(folder: Path) -> None:
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            content(tensors := load_file(folder / "model.safetensors"))
            torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return edit


def a_header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


# ------------------------------------------------------------------------------------------------------- refused
WEIGHTS = {
    "without its head": (weights(lambda t: t.pop(HEAD)), "1 tensors are missing (lm_head.weight)"),
    "without a layer's matrix": (weights(lambda t: t.pop(LAYER)), f"1 tensors are missing ({LAYER})"),
    "without any": (weights(lambda t: [t.pop(k) for k in list(t)[1:]]), "29 tensors are missing"),
    "a matrix too many": (
        weights(lambda t: t.update({"model.layers.7.x": torch.ones(2)})),
        "left over (model.layers.7.x)",
    ),
    "fewer layers described": (config(num_hidden_layers=2), "9 tensors are left over (model.layers.2."),
    "more layers described": (config(num_hidden_layers=4), "9 tensors are missing (model.layers.3."),
    "another shape": (
        weights(lambda t: t.update({HEAD: torch.ones(3, 32)})),
        "1 tensors have another shape (lm_head.weight)",
    ),
    "another width described": (config(intermediate_size=96), "9 tensors have another shape"),
    "NaN": (filled(LAYER, float("nan")), f"no finite numbers in {LAYER}"),
    "infinity": (filled("model.norm.weight", float("inf")), "no finite numbers in model.norm.weight"),
    "whole numbers": (
        weights(lambda t: t.update({HEAD: t[HEAD].to(torch.int8)})),
        "lm_head.weight in model.safetensors is of type I8",
    ),
    "cut off": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors cannot be read"),
    "empty": (write("model.safetensors", ""), "model.safetensors cannot be read"),
    "garbage": (write("model.safetensors", b"\xff" * 4000), "it is cut off, or no safetensors file"),
    "a pointer of Git LFS": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"),
        "cannot be read",
    ),
    "a lying header": (
        write("model.safetensors", a_header(x={"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]})),
        "it is cut off",
    ),
    "a header of another kind": (write("model.safetensors", a_header(x=[1, 2])), "model.safetensors cannot be read"),
    "a header that is a list": (
        write("model.safetensors", struct.pack("<Q", 2) + b"[]"),
        "model.safetensors cannot be read",
    ),
    "a nested header": (write("model.safetensors", struct.pack("<Q", 10**5) + b"[" * 10**5), "nested too deeply"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights beside its config.json"),
    "far larger described": (config(vocab_size=2**24), "config.json describes"),
    "nothing can be computed": (
        config(rope_parameters={"rope_theta": 0.0, "rope_type": "default"}),
        "computes no finite numbers",
    ),
}
CONFIG = {
    "not there": (lambda f: (f / "config.json").unlink(), "is a folder without config.json"),
    "no JSON": (write("config.json", "{"), "its config.json cannot be read"),
    "a list": (write("config.json", "[]"), "it holds no names"),
    "nested": (write("config.json", "[" * 10**5), "nested too deeply"),
    "not UTF-8": (write("config.json", b"\xff\xfe{"), "its config.json cannot be read"),
    "another architecture": (config(model_type="t5"), "is a 't5', which is no causal language model that transformers"),
    "a nested text model": (config(model_type="gemma3", text_config={}), "'gemma3', which reads more than text"),
    "no architecture": (config(model_type=...), "is a None, which is no causal language model"),
    "an architecture that is a list": (config(model_type=["llama"]), "is a ['llama'], which is no causal"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "not loaded in 8 or 4 bits"),
    "an unknown activation": (config(hidden_act="nonsense"), "cannot load model"),
    "an unknown type of numbers": (config(dtype="nonsense"), "cannot load model"),
    "rotary positions without a base": (config(rope_parameters={"rope_type": "yarn"}), "cannot load model"),
    "a text for the heads": (config(num_attention_heads="4"), "num_attention_heads='4' in its config.json is no size"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0 in its config.json is no size (1 to 1000)"),
    "a million million layers": (config(num_hidden_layers=10**12), "is no size (1 to 1000)"),
    "a huge vocabulary": (config(vocab_size=10**12), "vocab_size=1000000000000 in its config.json is no size"),
    "true for a size": (config(hidden_size=True), "hidden_size=True in its config.json is no size"),
    "an adapter": (write("adapter_config.json", "{}"), "holds an adapter, which would be ignored: merge it"),
}
TOKENIZER = {
    "not there": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "cannot load model"),
    "a list": (write("tokenizer.json", "[]"), "cannot load model"),
    "garbage": (write("tokenizer.json", "{"), "cannot load model"),
    "another form": (config("tokenizer.json", version="9.0", model={"type": "Quantum"}), "cannot load model"),
    "its settings are a list": (write("tokenizer_config.json", "[]"), "cannot load model"),
    "larger than the embedding": (config(vocab_size=600), "tokens of its tokenizer"),
    "another end": (config(eos_token_id=7), "EOS is '</s>' (id 2) for its tokenizer"),
}
BIN = {
    "without its head": (alone(lambda t: t.pop(HEAD)), "1 tensors are missing"),
    "a matrix too many": (alone(lambda t: t.update({"x.weight": torch.ones(2)})), "1 tensors are left over"),
    "empty": (alone(b""), "cannot load model"),
    "garbage": (alone(b"garbage"), "holds more than tensors in its .bin files"),
    "a broken archive": (alone(b"PK\x03\x04broken"), "cannot load model"),
}
KINDS = {"weights": WEIGHTS, "config": CONFIG, "tokenizer": TOKENIZER, "bin": BIN}
BAD = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD.keys())
def test_a_checkpoint_that_is_not_what_it_says_is_refused_in_one_line(folder: Path, spoil: Edit, words: str):
    spoil(folder)
    said = in_one_line(models.load_model, str(folder), "float32", "cpu")
    assert words in said and str(folder) in said


def test_the_sound_one_is_taken_and_gives_its_own_numbers(sound: Path):
    """The control of everything above."""
    loaded, made = models.load_model(str(sound), "float32", "cpu"), models.tiny_model("tiny-llama")
    tokens = torch.arange(9)[None]
    assert torch.equal(loaded.hidden(tokens), made.hidden(tokens))


@pytest.mark.parametrize("size", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [-1, 1.5, "x", [], {}, 10**30])
def test_sizes_are_looked_at_before_anything_is_built(folder: Path, size: str, value: object, monkeypatch):
    config(**{size: value})(folder)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_a, **_k: pytest.fail("was built"))
    with pytest.raises(InputError, match="is no size"):
        checkpoints.find(str(folder))


# ------------------------------------------------------------------------------------------------------- code, pickles
PAYLOAD = "import pathlib\npathlib.Path({file!r}).touch()\nclass Own: pass\n"
OWN = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False], ids=["known class", "own class"])
def test_code_in_a_folder_never_runs_and_is_never_asked_about(folder: Path, where: str, known: bool, monkeypatch):
    ran = folder.parent / "ran"
    (folder / "own.py").write_text(PAYLOAD.format(file=str(ran)))
    config(where, auto_map=OWN)(folder)
    if not known:
        config("config.json", model_type="own")(folder)
        config("tokenizer_config.json", tokenizer_class="Own")(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    if known:
        models.load_model(str(folder), "float32", "cpu")
    else:
        with pytest.raises(InputError, match="is a 'own'|never run"):
            models.load_model(str(folder), "float32", "cpu")
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------------- content
def run_of(folder: Path) -> parameters.ExperimentParameters:
    given = {"preset": "smoke", "model": str(folder), "n_demonstrations": 2, "max_examples": 2, "controls": False}
    return parameters.resolve(given | {"conditioning": False})


def identity_of(folder: Path) -> str:
    return inputs.check([run_of(folder)])[0]


CHANGES = {
    "trained again": filled(LAYER, 0.25),
    "config.json corrected": config(rms_norm_eps=1e-5),
    "another tokenizer": config("tokenizer_config.json", clean_up_tokenization_spaces=True),
    "a file of the tokenizer more": write("added_tokens.json", "{}"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_folder_is_another_model(folder: Path, change: Edit):
    before, label = identity_of(folder), checkpoints.label(str(folder))
    change(folder)
    assert identity_of(folder) != before and checkpoints.label(str(folder)) != label


def test_a_trained_folder_gets_a_second_record(folder: Path, tmp_path: Path, records_folder: Path):
    given = run_of(folder)
    first = experiment.run(given, progress=False)
    assert experiment.run(given, progress=False).json["created"] == first.json["created"]
    weights(lambda tensors: tensors[HEAD].mul_(-1))(folder)
    second = experiment.run(given, progress=False)
    assert len(list(records_folder.iterdir())) == 2
    assert first.json["arms"]["zero_shot"] != second.json["arms"]["zero_shot"]
    assert first.json["model_content"] != second.json["model_content"]
    text = json.dumps(first.json)
    assert first.json["parameters"]["model"].startswith("my-model@") and str(tmp_path) not in text


def test_where_a_folder_lies_and_what_has_no_effect_do_not_matter(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "other" / "my-model")
    for extra in ("README.md", "generation_config.json", "trainer_state.json"):
        (folder / extra).write_text("{}")
    assert identity_of(folder) == identity_of(tmp_path / "other" / "my-model")
    assert checkpoints.label(str(folder)) == checkpoints.label(str(tmp_path / "other" / "my-model"))


def test_files_are_read_again_only_when_they_have_changed(folder: Path, monkeypatch):
    file = folder / "model.safetensors"
    os.utime(file, (1, 1))
    first, opened, original = checkpoints.file_sha256(file), [], Path.open

    def watched(path: Path, *arguments, **options):
        opened.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", watched)
    assert checkpoints.file_sha256(file) == first and file not in opened
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    opened.clear()
    with original(file, "wb") as spoilt:
        spoilt.write(content)
    os.utime(file, (1, 1))  # size and time of writing are the old ones
    assert checkpoints.file_sha256(file) != first and file in opened
    (checkpoints.cache_folder() / "checksums.json").write_text("{")
    assert checkpoints.file_sha256(file) != first


def test_a_folder_that_is_trained_while_it_is_read_is_noticed(folder: Path, monkeypatch):
    original = checkpoints.check_loaded

    def meanwhile(name: str, report: dict) -> None:
        filled(LAYER, 0.5)(folder)
        original(name, report)

    monkeypatch.setattr(checkpoints, "check_loaded", meanwhile)
    with pytest.raises(InputError, match="was changed while it was read"):
        models.load_model(str(folder), "float32", "cpu")


def test_built_in_models_are_their_names(monkeypatch):
    monkeypatch.setattr(checkpoints, "find", lambda name: pytest.fail("looked for a folder"))
    for name in checkpoints.BUILT_IN:
        assert checkpoints.content(name) == checkpoints.label(name) == name
    assert set(families.TINY) == set(models._tiny_configs(8)) and set(pinned_downloads.MODELS) < set(
        checkpoints.BUILT_IN
    )


def test_a_hub_model_is_its_commit(folder: Path, tmp_path: Path, monkeypatch):
    """A hub cache as the hub's library lays it out, offline."""
    commits = ("a" * 40, "b" * 40)
    cache = tmp_path / "hub" / "models--owner--name"
    for commit in commits:
        shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    monkeypatch.setattr(checkpoints, "_online", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    for commit in commits:
        (cache / "refs" / "main").write_text(commit)
        found = checkpoints.find("owner/name")
        assert found.content == commit and found.label == "owner/name" and found.options["revision"] == commit
        assert models.load_model("owner/name", "float32", "cpu").name == "owner/name"
    with pytest.raises(InputError, match="cannot load model 'owner/other'.*pass a hub id while online"):
        checkpoints.find("owner/other")


# ------------------------------------------------------------------------------------------------------- conversion
def test_a_corrected_config_is_a_new_conversion(folder: Path):
    alone(lambda tensors: None)(folder)
    config(rms_norm_eps=1e-2)(folder)
    wrong = models.load_model(str(folder), "float32", "cpu")
    config(rms_norm_eps=1e-6)(folder)
    right = models.load_model(str(folder), "float32", "cpu")
    assert (wrong.model.config.rms_norm_eps, right.model.config.rms_norm_eps) == (1e-2, 1e-6)
    assert len(list(checkpoints.cache_folder().glob("converted-*[0-9a-f]"))) == 2


# ---------------------------------------------------------------------------------------------- what others have saved
ROOT = Path(checkpoints.__file__).parents[2]


def saved(folder: Path, name: str, **options: object) -> torch.nn.Module:
    """A folder with a random model of a tested type and the tiny tokenizer; returns the model."""
    model = model_types.random_model(model_types.CASES[name].config, torch.float32)
    model.save_pretrained(folder, **options)
    model_types.TOKENIZER.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", [case.kind for case in model_types.CASES.values() if case.kind in model_types.CASES])
def test_families_load_from_several_files(name: str, tmp_path: Path, cache_folder: Path):
    made = saved(tmp_path / "model", name, max_shard_size="25KB")
    assert len(list((tmp_path / "model").glob("model-0*.safetensors"))) > 1
    loaded = models.load_model(str(tmp_path / "model"), "float32", "cpu")
    own = models.LanguageModel(made, model_types.TOKENIZER, name)
    tokens = torch.arange(9)[None] + 3
    with torch.no_grad():
        expected = own.logits(own.hidden(tokens))
        torch.testing.assert_close(loaded.logits(loaded.hidden(tokens)), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.01


def test_one_of_several_files_is_missing(tmp_path: Path, cache_folder: Path):
    saved(tmp_path / "model", "qwen2", max_shard_size="25KB")
    sorted((tmp_path / "model").glob("model-0*.safetensors"))[1].unlink()
    said = in_one_line(models.load_model, str(tmp_path / "model"), "float32", "cpu")
    assert "cannot load model" in said or "are missing" in said


def test_a_checkpoint_without_bos_begins_with_eos(folder: Path):
    """As Qwen's: neither its tokenizer nor its configuration knows a token for the beginning."""
    config("tokenizer_config.json", bos_token=None)(folder)
    config("tokenizer_config.json", bos_token=...)(folder)
    config(bos_token_id=...)(folder)
    loaded = models.load_model(str(folder), "float32", "cpu")
    assert loaded.tokenizer.bos_token_id is None
    layout = Layout.make(loaded.tokenizer, tasks.TASKS["cb"], "eos")
    assert layout.prefix() == (loaded.tokenizer.eos_token_id,)


def test_a_padded_vocabulary_is_taken_as_it_is(tmp_path: Path, cache_folder: Path):
    """Rows of the embedding behind the tokenizer's last token take part in the softmax, as they do in transformers."""
    wide = len(model_types.TOKENIZER) + 37
    given = model_types.CASES["qwen2"].config.to_dict() | {"vocab_size": wide}
    made = model_types.random_model(transformers.Qwen2Config(**given), torch.float32)
    made.save_pretrained(tmp_path / "model")
    model_types.TOKENIZER.save_pretrained(tmp_path / "model")
    tokens = torch.arange(9)[None] + 3
    with torch.no_grad():
        expected = made(tokens).logits
        loaded = models.load_model(str(tmp_path / "model"), "float32", "cpu")
        logits = loaded.logits(loaded.hidden(tokens))
    assert logits.shape[-1] == wide
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-4)


def test_what_a_generation_config_says_changes_nothing(sound: Path, folder: Path):
    wrong = {"bos_token_id": 5, "eos_token_id": [7, 9], "temperature": 0.1, "do_sample": True, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(wrong))
    tokens = torch.arange(9)[None]
    plain, other = (models.load_model(str(where), "float32", "cpu") for where in (sound, folder))
    assert torch.equal(plain.hidden(tokens), other.hidden(tokens))
    assert other.tokenizer.eos_token_id == plain.tokenizer.eos_token_id
    layouts = [Layout.make(model.tokenizer, tasks.TASKS["cb"], "eos") for model in (plain, other)]
    assert layouts[0].prefix() == layouts[1].prefix()


def calls_without_refusal(source: str) -> list[str]:
    """Calls that load or build a model, a tokenizer or a configuration and do not refuse code of others."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            refusals = [k for k in node.keywords if k.arg == "trust_remote_code"]
            refused = len(refusals) == 1 and ast.unparse(refusals[0].value) == "False"
            if node.func.attr in ("from_pretrained", "from_config") and not refused:
                found.append(ast.unparse(node))
    return found


def test_every_loading_call_refuses_code_of_others():
    sources = list((ROOT / "iclgd_helpers").rglob("*.py"))
    assert [call for path in sources for call in calls_without_refusal(path.read_text(encoding="utf-8"))] == []
    assert sum(path.read_text(encoding="utf-8").count(".from_pretrained(") for path in sources) >= 6
    assert calls_without_refusal("AutoModel.from_pretrained(x, trust_remote_code=True)")  # the control
    assert calls_without_refusal("AutoModel.from_config(x)") and not calls_without_refusal("f(x)")


@pytest.mark.parametrize("bits", [{"load_in_8bit": True, "quant_method": "bitsandbytes"}, {"quant_method": "mxfp4"}])
def test_quantised_checkpoints_of_any_kind_are_refused(folder: Path, bits: dict):
    config(quantization_config=bits)(folder)
    assert "models are not loaded in 8 or 4 bits" in in_one_line(models.load_model, str(folder), "float32", "cpu")
