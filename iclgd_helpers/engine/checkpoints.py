"""
Checkpoints of others: where one lies, what its content is, and whether its files can be what they say.

This is the reading boundary of models. Nothing here imports torch before it must, so that a bad folder is reported at
once. No code of a checkpoint ever runs, and no file of it is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iclgd_helpers import pinned_downloads, storage
from iclgd_helpers.engine.families import HELP, REHEARSAL, TESTED, TINY
from iclgd_helpers.errors import InputError, reason
from iclgd_helpers.paths import cache_folder, resolve_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Models that are fixed by their names: random ones by a seed, the others by a hash.
BUILT_IN = (*TINY, REHEARSAL, *pinned_downloads.MODELS)
# Files of a folder that change what its model computes; every other file may come and go.
PARTS = ("*.safetensors", "pytorch_model*.bin", "*.json", "*.txt", "*.model", "*.jinja")
WITHOUT_EFFECT = ("generation_config.json", "trainer_state.json", "all_results.json")
# The largest value of a size that a model of today could have; beyond it, building one would take all memory or years.
SIZES = dict.fromkeys("num_hidden_layers n_layer num_layers".split(), 1000)
SIZES |= dict.fromkeys("num_attention_heads num_key_value_heads n_head attention_heads head_dim".split(), 2**16)
SIZES |= dict.fromkeys("num_heads num_kv_heads num_local_experts num_experts num_experts_per_tok".split(), 2**16)
SIZES |= dict.fromkeys("hidden_size n_embd d_model word_embed_proj_dim query_pre_attn_scalar".split(), 2**18)
SIZES |= dict.fromkeys("intermediate_size n_inner ffn_dim ffn_hidden_size moe_intermediate_size".split(), 2**24)
SIZES |= dict.fromkeys("vocab_size max_position_embeddings n_positions".split(), 2**24)
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # of safetensors; others hold quantised or whole numbers
HEADER_BYTES = 10**8  # of a safetensors file; the format allows no more
LARGER = 4  # times more entries than are stored: a head may be tied, a table of positions computed


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of somebody else: a folder, or a hub id at one commit, whose files transformers keeps."""

    name: str
    folder: Path | None
    content: str  # SHA-256 of the folder's parts, or the commit: what a record's identity holds
    options: Mapping[str, Any]  # for every `from_pretrained`

    @property
    def source(self) -> str:
        """What `from_pretrained` is asked for."""
        return str(self.folder or self.name)

    @property
    def label(self) -> str:
        """The name that records and tables show: a hub id, or a folder's last part with the start of its checksum."""
        return self.name if self.folder is None else f"{self.folder.name}@{self.content[:8]}"


def find(name: str) -> Checkpoint:
    """
    The checkpoint in a local folder, or of a hub id; its configuration has been looked at.

    Raises
    ------
    InputError
        if it is not there, cannot be reached, or is of a kind that the engine does not take.
    """
    folder = resolve_path(name)
    if folder.is_dir() or name.startswith(("/", ".", "~")):
        if not (folder / "config.json").is_file():
            raise InputError(f"model {name!r} is a folder without config.json: {_ways()}")
        checkpoint = Checkpoint(name, folder, _folder_content(folder), {"local_files_only": True})
        config = folder / "config.json"
    else:
        config, commit = _hub_file(name, "config.json")
        checkpoint = Checkpoint(name, None, commit, {"local_files_only": not _online(), "revision": commit})
    _check_config(name, config)
    return checkpoint


def content(name: str) -> str:
    """What a model is for the identity of a record: a built-in one its name, any other a hash of its content."""
    return name if name in BUILT_IN else find(name).content


def label(name: str) -> str:
    """A model's name in records, tables and names of files; see `Checkpoint.label`."""
    return name if name in BUILT_IN else find(name).label


def file_name(name: str) -> str:
    """A model's label as part of a file's name; a hub id keeps its owner."""
    return label(name).replace("/", "--")


def _ways() -> str:
    known = ", ".join(pinned_downloads.MODELS)
    return f"pass a hub id while online, a folder with config.json, tokenizer and *.safetensors, or one of {known}"


@contextmanager
def reading(name: str) -> Iterator[None]:
    """
    Whatever a library says against a checkpoint, as one line.

    Only calls into other libraries belong inside: they raise errors of every type for files that are not as they should
    be, and a fault of ours must keep its traceback.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be loaded yet
            raise
        words = "it brings code of its own, which is never run" if "trust_remote_code" in str(error) else reason(error)
        raise InputError(f"cannot load model {name!r} ({words}): {_ways()}") from None


# ------------------------------------------------------------------------------------------------------------ content
def _folder_content(folder: Path) -> str:
    """SHA-256 over the parts of a model folder, by name."""
    parts = sorted({path for pattern in PARTS for path in folder.glob(pattern) if path.name not in WITHOUT_EFFECT})
    sums = {path.name: file_sha256(path) for path in parts if path.is_file()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, which is read again only if its size, times or place on the disk have changed."""
    path = path.resolve()
    found = path.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    entry = _known_sums().get(str(path))
    if entry and entry[:-1] == state:
        return str(entry[-1])
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - found.st_mtime_ns > 2 * 10**9:  # a later write within a clock's tick would look the same
        kept = _known_sums() | {str(path): [*state, sha256]}  # read again: another process may have added some
        storage.write_json(cache_folder() / "checksums.json", {"files": kept})
    return sha256


def _known_sums() -> dict[str, list[Any]]:
    """Path -> size, times, place and checksum of files that were read before; a damaged list is begun anew."""
    path = cache_folder() / "checksums.json"
    try:
        files: dict[str, list[Any]] = storage.read_json(path)["files"] if path.is_file() else {}
        return files
    except InputError:
        return {}


@functools.cache
def _online() -> bool:
    return pinned_downloads.hub_is_reachable()


def _hub_file(name: str, file: str) -> tuple[Path, str]:
    """A file of a hub repository in the hub's cache, and the commit that it is of."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    with reading(name):
        path = cached_file(name, file, local_files_only=not _online())
        return Path(path), extract_commit_hash(path, None)


# -------------------------------------------------------------------------------------------------------------- checks
def _check_config(name: str, path: Path) -> None:
    """The kind of a model, and sizes that a model can have, before a library builds anything from them."""
    folder = path.parent
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"model {name!r} holds an adapter, which would be ignored: merge it into its base model first")
    try:
        config = storage.parse_json(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it holds no names")
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: its config.json cannot be read ({reason(error)})") from None
    kind = config.get("model_type")
    _check_kind(name, kind)
    if config.get("quantization_config"):
        raise InputError(
            f"model {name!r} is quantised: models are not loaded in 8 or 4 bits, as K and V are finetuned in full "
            "precision: pass plain weights"
        )
    for size, largest in SIZES.items():
        value = config.get(size)
        if value is not None and (type(value) is not int or not 0 < value <= largest):
            raise InputError(f"model {name!r}: {size}={value!r} in its config.json is no size (1 to {largest})")


def _check_kind(name: str, kind: object) -> None:
    """Whether a type of configuration is that of a causal language model of text, and one that transformers knows."""
    if kind in TESTED:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, ()) if isinstance(kind, str) else ()
    classes = (classes,) if isinstance(classes, str) else classes
    if not classes:
        raise InputError(
            f"model {name!r} is a {kind!r}, which is no causal language model that transformers knows; tested are "
            f"{', '.join(sorted(TESTED))}: {HELP}"
        )
    if any(one.endswith("ForConditionalGeneration") for one in classes):
        raise InputError(f"model {name!r} is a {kind!r}, which reads more than text: pass its language model alone")


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """
    Every token that a text can become must have its row in the embedding, and BOS and EOS, which the token layout puts
    between demonstrations, must be what the weights were trained with.
    """
    rows = config.vocab_size
    with reading(name):
        vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    beyond = [token for token, number in vocabulary.items() if number >= rows and token not in special]
    if beyond:
        raise InputError(
            f"model {name!r}: {len(beyond)} tokens of its tokenizer ({beyond[0]!r}, …) have no row among the {rows} of "
            "its embedding: tokenizer and weights are of different models"
        )
    for kind in ("bos", "eos"):
        own, trained = getattr(tokenizer, f"{kind}_token_id", None), getattr(config, f"{kind}_token_id", None)
        trained = [trained] if isinstance(trained, int) else trained
        if own is not None and (own >= rows or (trained and own not in trained)):
            token = tokenizer.convert_ids_to_tokens(own)
            raise InputError(
                f"model {name!r}: {kind.upper()} is {token!r} (id {own}) for its tokenizer, but its config.json says "
                f"{kind}_token_id={trained} with {rows} rows: the layout would put a wrong token between texts. "
                "Correct either in a local copy and pass its folder"
            )


def check_weights(name: str, folder: Path, described: int) -> None:
    """
    The files of the weights can be what they say, and hold about as many entries as the configuration describes.

    Raises
    ------
    InputError
        naming the file, or the tensor.
    """
    stored = 0
    for path in sorted(folder.glob("*.safetensors")):
        for tensor, (dtype, shape) in _tensors(name, path).items():
            if dtype not in PLAIN_DTYPES and tensor.endswith(".weight"):
                raise InputError(f"model {name!r}: {tensor} in {path.name} is of type {dtype}: pass plain weights")
            stored += prod(shape)
    if described > LARGER * stored + 10**7:
        raise InputError(
            f"model {name!r}: config.json describes {described:.3g} weights, its files hold {stored:.3g}: they are of "
            "different models"
        )


def _tensors(name: str, path: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> type and shape of the tensors in a safetensors file, from its header; their ends are checked."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, HEADER_BYTES):
                raise ValueError("it is cut off, or no safetensors file")
            header = storage.parse_json(file.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if 8 + length + max(ends, default=0) != size:
            raise ValueError("it is cut off, or has more at its end than it says")
        return {tensor: (entry["dtype"], entry["shape"]) for tensor, entry in header.items()}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"model {name!r}: {path.name} cannot be read ({reason(error)})") from None


def check_loaded(name: str, report: Mapping[str, Any]) -> None:
    """
    Every weight of the model came from the checkpoint, and none was left over; `report` is `from_pretrained`'s own.

    Raises
    ------
    InputError
        naming the tensors.
    """
    kinds = {"missing_keys": "are missing", "mismatched_keys": "have another shape", "unexpected_keys": "are left over"}
    for kind, words in kinds.items():
        found = sorted(key if isinstance(key, str) else str(key[0]) for key in report.get(kind, ()))
        if found:
            raise InputError(
                f"model {name!r}: {len(found)} tensors {words} ({', '.join(found[:3])}{', …' if found[3:] else ''}): "
                "weights and config.json are not of one causal language model, and nothing is drawn in their place"
            )


# ---------------------------------------------------------------------------------------------------------- conversion
def weights_folder(checkpoint: Checkpoint) -> Path:
    """
    The folder to load weights from: safetensors of the checkpoint, or a converted copy of its `pytorch_model*.bin`.

    The copy is made once, kept in the cache under the checksum of all that it is made from, and read with
    `weights_only=True`: a pickle in such a file is never executed.
    """
    folder = checkpoint.folder or _fetched(checkpoint)
    if any(folder.glob("*.safetensors")):
        return folder
    weights = sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise InputError(f"model {checkpoint.name!r} has no weights beside its config.json: {_ways()}")
    sums = {path.name: file_sha256(path) for path in [*weights, *sorted(folder.glob("*.json"))]}
    megabytes = sum(path.stat().st_size for path in weights) // 10**6

    def make(temporary: Path, target: Path) -> None:
        print(f"Converting {checkpoint.name} to safetensors once ({megabytes} MB) ...", flush=True)
        convert_bin(checkpoint.name, folder, target)

    name = "converted-" + hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]
    return pinned_downloads.made_once(name, make, megabytes, sums)


def _fetched(checkpoint: Checkpoint) -> Path:
    """The hub's cache of a repository with its weights, fetched if they are not there: safetensors, or else `.bin`."""
    from huggingface_hub import HfApi, snapshot_download

    name, options = checkpoint.name, checkpoint.options
    with reading(name):
        if options["local_files_only"]:
            return Path(snapshot_download(name, **options))
        files = HfApi().list_repo_files(name, revision=options["revision"])
        kind = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "pytorch_model*.bin"
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", kind], **options))


def convert_bin(name: str, folder: Path, target: Path) -> None:
    """Write the weights of `pytorch_model*.bin` as safetensors, in their own precision, with the configuration."""
    from transformers import AutoModelForCausalLM

    options = {"use_safetensors": False, "weights_only": True, "dtype": "auto", "local_files_only": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading(name):
        try:
            model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
        except pickle.UnpicklingError:
            raise InputError(f"{folder} holds more than tensors in its .bin files and is not loaded") from None
    check_loaded(name, report)
    model.save_pretrained(target)
