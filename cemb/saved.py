"""Models in folders that stand alone: values, what tables they are, and the words they are of.

A folder holds ``model.safetensors`` (all values, shared ones once), ``words.json`` (an array, for names may
hold line breaks), ``manifest.json`` (classes of the tables and arguments to make them anew, hash version,
SHA-256 of ``words.json``, and details that whoever saves it adds) and ``SHA256SUMS`` of these. Nothing in it
is code or a pickle: only the classes of `cemb.tables` are made, by name.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cemb import files, vectors
from cemb.checks import check_integers
from cemb.hashing import HASH_VERSION
from cemb.model import COMPRESSED_TABLES, TABLES, PairModel
from cemb.tables import (
    HashedEmbedding,
    ProductQuantizedEmbedding,
    RowQuantizedEmbedding,
    TransformCodedEmbedding,
    all_rows,
)
from cemb.vectors import Vectors

VERSION = 1
_FIELDS = {
    "kind": str,
    "hash_version": int,
    "num_words": int,
    "words_sha256": str,
    "model": dict,
    "details": dict,
}
# What making a model raises for what it cannot be made from.
_NO_MODEL = (
    *(ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError),
    *(AssertionError, FileNotFoundError, SafetensorError),  # the first of torch's constructors
)
_REMEDY = "train or make it again, or take a whole copy of it"
_QUANTIZED = (RowQuantizedEmbedding, ProductQuantizedEmbedding, TransformCodedEmbedding)
_CLASSES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (*TABLES.values(), *COMPRESSED_TABLES.values(), *_QUANTIZED)
}
# Of a table, whatever a manifest claims: some things grow with them that are no values.
_LARGEST = {"num_embeddings": 2**40, "embedding_dim": 2**20}


class SavedModel(NamedTuple):
    """A model of words, as `load` reads it."""

    model: Any  # a PairModel, or a table without contexts
    words: list[str]
    manifest: dict[str, Any]

    def vectors(self, balanced: bool = False, *, contexts: bool = False) -> Vectors:
        """The words' vectors, float32 ``[words, dim]``, or those of the contexts, which are words, too.

        Args:
            balanced: those of `cemb.vectors.balanced`, which do not depend on how words and contexts share
                their product.
            contexts: the contexts' vectors in place of the words'.

        Raises ValueError for a table without contexts where these are needed.
        """
        model = self.model
        if not isinstance(model, PairModel):
            if balanced or contexts:
                raise ValueError(
                    f"a {type(model).__name__} alone has no contexts, which balanced vectors and those of "
                    "contexts need"
                )
            return Vectors(self.words, all_rows(model).cpu().numpy())
        own = _side(model, contexts)
        if len(own) != len(self.words):
            raise ValueError(f"there are {len(own):,} contexts, which are not the {len(self.words):,} words")
        return Vectors(self.words, vectors.balanced(own, _side(model, not contexts)) if balanced else own)


def _side(model: PairModel, contexts: bool) -> npt.NDArray[np.float32]:
    """The words' vectors, or the contexts'."""
    rows = all_rows(model.context_table if contexts else model.word_table)
    rows = rows[model.first_context :] if contexts else rows[: model.num_words]
    return rows.contiguous().cpu().numpy()


def _num_words(description: Mapping[str, Any]) -> int:
    """Of a model as `_describe` tells of it; ValueError if that is no number."""
    table = description["word_table"] if description["class"] == "PairModel" else description
    num_words: int = description.get("first_context") or table["arguments"]["num_embeddings"]
    check_integers(1, num_words=num_words)
    return num_words


def _check_words(words: Sequence[Any], num_words: int) -> None:
    """Raise ValueError unless there are so many words, which are distinct texts."""
    for word in words:
        if type(word) is not str:
            raise ValueError(f"words must be texts, and one is {word!r}")
    if not len(words) == len({*words}) == num_words:
        raise ValueError(
            f"a model of {num_words:,} words needs a name for each, got {len(words):,}, of which "
            f"{len({*words}):,} are distinct"
        )


def write_values(values: dict[str, Tensor], path: Path) -> None:
    """Write contiguous tensors by safetensors' `save_file`, with the permissions of the umask.

    Raises the system's OSError where that has another.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(values, path)
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(number := int(found[1]), os.strerror(number)) from None
    path.chmod(mode)


def _check_sizes(arguments: Mapping[str, Any]) -> None:
    for name, largest in _LARGEST.items():
        check_integers(1, largest, **{name: arguments[name]})


def _describe_table(table: Any) -> dict[str, Any]:
    name = type(table).__name__
    if _CLASSES.get(name) is not type(table):
        raise ValueError(
            f"models are PairModel itself, tables are of {', '.join(_CLASSES)}, and this one is a {name}"
        )
    _check_sizes(table.arguments)
    return {"class": name, "arguments": table.arguments}


def _describe(model: nn.Module) -> dict[str, Any]:
    """What `_build` makes a model like this one from."""
    if type(model) is not PairModel:
        return _describe_table(model)
    words, contexts = model.word_table, model.context_table
    is_hashed = isinstance(words, HashedEmbedding) and isinstance(contexts, HashedEmbedding)
    bias = "shared" if model.context_bias is model.word_bias else "separate"
    return {
        "class": "PairModel",
        "word_table": _describe_table(words),
        "context_table": None if contexts is words else _describe_table(contexts),
        "shares_pool": is_hashed and contexts is not words and contexts.weight is words.weight,
        "bias": "none" if model.word_bias is None else bias,
        "dropout": model.dropout,
        "first_context": model.first_context,
    }


def _build_table(description: Mapping[str, Any], **others: Any) -> nn.Module:
    if (name := description["class"]) not in _CLASSES:
        raise ValueError(f"there is no table {name!r}; there are {', '.join(_CLASSES)}")
    arguments = description["arguments"]
    _check_sizes(arguments)
    # A device of its own would be in place of that without memory; no table has it as one of its `arguments`.
    table: Any = _CLASSES[name](**{key: arguments[key] for key in arguments if key != "device"}, **others)
    if {*arguments} != {*table.arguments}:
        raise ValueError(f"{name} has the arguments {sorted(table.arguments)}, got {sorted(arguments)}")
    return cast(nn.Module, table)


def _build(description: Mapping[str, Any]) -> nn.Module:
    """A model as `_describe` tells of it, whose values take no memory."""
    with torch.device("meta"):
        if description["class"] != "PairModel":
            return _build_table(description)
        word_table = _build_table(description["word_table"])
        shared = {"weight": word_table.weight} if description["shares_pool"] else {}
        context_table = description["context_table"] and _build_table(description["context_table"], **shared)
        options = {name: description[name] for name in ("bias", "dropout", "first_context")}
        return PairModel(word_table, context_table or None, **options)


def _values(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a model by name, those under several names once, and that name for each."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    names = {name: found.setdefault(id(value), name) for name, value in state.items()}
    return {name: state[name] for name in found.values()}, names


def save(folder: Path | str, model: nn.Module, words: Sequence[str], *, details: Mapping[str, Any]) -> None:
    """Write a model into a new folder, whole or not at all. Values on other devices come by the CPU.

    Whether values are frozen (`requires_grad`) is not kept.

    Args:
        model: a `PairModel` of tables of `cemb.tables`, or such a table alone; of no class derived from them.
        words: a name for each of its words.
        details: what the manifest shall say besides, as JSON has it.

    Raises ValueError for other models, for words that are not distinct texts, one for each of the model's,
    and for details that are not JSON; FileExistsError if `folder` exists.
    """
    folder = Path(folder)
    description = _describe(model)
    num_words = _num_words(description)
    _check_words(words, num_words)
    listed = json.dumps(list(words), ensure_ascii=False).encode()
    manifest = {
        "kind": "model",
        "version": VERSION,
        "hash_version": HASH_VERSION,
        "num_words": num_words,
        "words_sha256": hashlib.sha256(listed).hexdigest(),
        "model": description,
        "details": details,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    values, names = _values(model)
    if names != _values(_build(description))[1]:
        raise ValueError("the tables share values in another way than by one pool, which is not kept")
    values = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    with files.disk_errors(folder), files.atomic_directory(folder) as work:
        write_values(values, work / "model.safetensors")
        (work / "words.json").write_bytes(listed)
        (work / "manifest.json").write_text(text, encoding="utf-8")


def load(folder: Path | str, *, device: torch.device | str = "cpu") -> SavedModel:
    """The model in a folder that `save` or ``cemb train --out`` wrote, bit for bit.

    It is in training mode, as new modules are. Takes memory for what the files hold, whatever the manifest
    claims.

    Raises:
        FileNotFoundError: there is no manifest.
        DamagedError: a file is not what was written, or they do not belong together.
        ValueError: the folder is of another kind or version, or of another version of the hash.
    """
    folder = Path(folder)
    manifest = files.read_manifest(folder, VERSION, _FIELDS, _REMEDY)
    if manifest["kind"] != "model" or manifest["hash_version"] != HASH_VERSION:
        raise ValueError(
            f"{str(folder)!r} is a {manifest['kind']} of hash version {manifest['hash_version']}, and this "
            f"reads a model of hash version {HASH_VERSION}"
        )
    try:
        words = _read_words(folder, manifest)
        _check_words(words, _num_words(manifest["model"]))
        model = _build(manifest["model"])
        _read_values(folder, model)
    except _NO_MODEL as error:
        what = f"manifest.json has no {error}" if isinstance(error, KeyError) else str(error)
        raise files.damaged(folder, " ".join(what.split()), _REMEDY) from None
    return SavedModel(model.to(device), words, manifest)


def _read_words(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    words = files.read_json(folder / "words.json")
    if not isinstance(words, list):
        raise ValueError("words.json is no array")
    _check_words(words, manifest["num_words"])
    if files.file_hash(folder / "words.json") != f"sha256:{manifest['words_sha256']}":
        raise ValueError("words_sha256 of manifest.json is not that of words.json")
    return words


def _read_values(folder: Path, model: nn.Module) -> None:
    """Put the values of a folder into a model without any, if they have its names, shapes and types."""
    wanted, names = _values(model)
    with safe_open(folder / "model.safetensors", framework="pt", backend="pread") as stored:
        if {*stored.keys()} != {*wanted}:
            raise ValueError(
                f"model.safetensors has {sorted(stored.keys())}, and should have {sorted(wanted)}"
            )
        for name, value in wanted.items():
            shape = stored.get_slice(name).get_shape()
            if shape != [*value.shape]:
                raise ValueError(
                    f"{name} of model.safetensors has shape {shape}, and should have {[*value.shape]}"
                )
        found = {}
        for name, value in wanted.items():
            tensor = stored.get_tensor(name)
            is_parameter = isinstance(value, nn.Parameter)
            if tensor.dtype != value.dtype and not (is_parameter and tensor.is_floating_point()):
                raise ValueError(
                    f"{name} of model.safetensors is {tensor.dtype}, and should be {value.dtype}"
                )
            if not value.is_meta and not torch.equal(tensor, value):  # what a table hashes by
                raise ValueError(f"{name} of model.safetensors is not what manifest.json tells of the hash")
            found[name] = nn.Parameter(tensor) if is_parameter else tensor
    model.load_state_dict({name: found[once] for name, once in names.items()}, assign=True)
