"""The files of a Hugging Face model directory: its configuration, and its tensors by their headers.

A driver checks a model with them and neither loads it nor imports torch.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.model_config import MOST_LAYERS
from orchestrator.planning.families import FAMILIES, NEEDED, embedding_name, is_tied, parameter_shapes

BASE_PREFIX = "model."
"""Of parameter names in a causal language model; a bare decoder's files lack it, and both are accepted."""

HEAD = "lm_head.weight"

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
"""Of safetensors, that weights may be stored in, with the bytes of an element."""

BLOCK = 2**22
"""Bytes that are compared at a time."""

_SIZES = tuple(
    dict.fromkeys((*chain.from_iterable(NEEDED.values()), "max_position_embeddings", "head_dim", "word_embed_proj_dim"))
)
"""Keys of a config.json."""

_NOT_PARAMETERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Buffers that older versions of Transformers stored beside the parameters."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    file: Path
    name: str
    """In the file."""
    shape: tuple[int, ...]
    dtype: str
    start: int
    """Of its values, in the file."""
    stop: int


def check_model(folder: Path) -> dict[str, Any]:
    """The config.json of a model that training can begin from.

    Raises:
        UserError: says what is missing, damaged or of a kind that Terrane does not know.
    """
    values = read_config(folder)
    embedding = embedding_name(values) if is_tied(values) else None
    found = locate(folder, parameter_shapes(values), embedding)
    head = stored_tensors(folder).get(HEAD)
    if embedding and head and not _same(head, found[embedding]):
        message = f"model.path: {folder} has an output embedding of its own, which its config.json ties to the input's"
        raise UserError(message, "set tie_word_embeddings to false in config.json, or delete lm_head.weight")
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a config.json, those of an Aquila as the Llama that it is.

    Raises:
        UserError: it is missing, no JSON, or of another family than those that Terrane trains.
    """
    if not folder.is_dir():
        hint = "give a directory, or a model of the Hugging Face hub as org/name@revision"
        raise UserError(f"model.path: no directory at {folder}", hint)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model.path: {folder} has no config.json", "give a Hugging Face model directory")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"model.path: {file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"model.path: {file} is no configuration")
    values = _without_aquila(values)
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = f"{', '.join(FAMILIES)} and aquila"
        raise UserError(f"model.path: {file} is of the family {family}", f"Terrane trains {known}")
    if missing := [key for key in NEEDED[family] if not isinstance(values.get(key), int)]:
        raise UserError(f"model.path: {file} has no {', '.join(missing)}", "is it the configuration of a whole model?")
    _check_sizes(file, values)
    if values.get("quantization_config"):
        raise UserError(f"model.path: {folder} is quantized", "train the model that it was made from")
    return values


def _check_sizes(file: Path, values: dict[str, Any]) -> None:
    """See that the sizes of a config.json are such that its parameters can be counted."""
    given = {key: values[key] for key in _SIZES if values.get(key) is not None}
    for key, value in given.items():
        most = MOST_LAYERS if key == "num_hidden_layers" else sys.maxsize
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise UserError(f"model.path: {file} has {key}={value!r}, which is no size of a model")


def _without_aquila(values: dict[str, Any]) -> dict[str, Any]:
    """Aquila and Aquila2 (BAAI, 2023) are Llama in layout and tensor names, with code of their own beside them."""
    if values.get("model_type") != "aquila":
        return values
    kept = {key: value for key, value in values.items() if key not in ("auto_map", "architectures")}
    return {**kept, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by its stored name, from the headers of its safetensors files.

    Raises:
        UserError: there are none, one is damaged or a git-lfs pointer, or the index names a file that is missing.
    """
    return {tensor.name: tensor for file in _weight_files(folder) for tensor in _header(file)}


def locate(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], embedding: str | None = None
) -> dict[str, StoredTensor]:
    """Where each parameter of a model is stored.

    Args:
        shapes: of the model's parameters, tied ones once.
        embedding: name of the embedding that the head is tied to; the head may then be stored, or stand for it.

    Raises:
        UserError: names the tensors that are missing, unexpected, or of another shape or dtype.
    """
    stored = {_full_name(name, shapes): tensor for name, tensor in stored_tensors(folder).items()}
    if embedding:
        head = stored.pop(HEAD, None)
        if head:
            stored.setdefault(embedding, head)
    _refuse(folder, "lacks", sorted(set(shapes) - set(stored)))
    unexpected = sorted(name for name in set(stored) - set(shapes) if not name.endswith(_NOT_PARAMETERS))
    _refuse(folder, "holds what the model of its config.json does not have:", unexpected)
    found = {name: stored[name] for name in shapes}
    wrong = [f"{n} {list(t.shape)}, not {list(shapes[n])}" for n, t in found.items() if t.shape != shapes[n]]
    _refuse(folder, "does not fit its config.json:", wrong)
    odd = [f"{name} ({tensor.dtype})" for name, tensor in found.items() if tensor.dtype not in DTYPES]
    _refuse(folder, "holds weights that are no floating-point numbers of 16 or 32 bits:", odd)
    return found


def _full_name(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return BASE_PREFIX + name if name not in shapes and BASE_PREFIX + name in shapes else name


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(f"model.path: {folder} {what} {shown}", "the directory is incomplete, or of another model")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            hint = "save the model with safetensors: pickles such as *.bin and *.pt may run code"
            raise UserError(f"model.path: {folder} has no *.safetensors", hint)
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"model.path: {index} is no index of safetensors files: {error!r}") from None
    files = [folder / Path(str(name)).name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"model.path: {folder} lacks {file.name}, which its index names", "download it again")
    return files


def _header(file: Path) -> list[StoredTensor]:
    """Of a safetensors file: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header names no tensors")
        header.pop("__metadata__", None)
        found = [_tensor(file, name, tensor, 8 + length) for name, tensor in header.items()]
        _check_places(found, 8 + length, file.stat().st_size)
        return found
    except OSError as error:
        raise UserError(f"model.path: {file} cannot be read: {error.strerror}", "download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"model.path: {file} is no safetensors file: {error}", "is it a git-lfs pointer?") from None


def _check_places(tensors: list[StoredTensor], first: int, last: int) -> None:
    """See that tensors fill a file from one byte to another, as the safetensors library asks for in the workers."""
    ordered = sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop))
    if max((tensor.stop for tensor in tensors), default=first) > last:
        raise ValueError("it is cut short")
    starts, stops = [tensor.start for tensor in ordered], [first, *(tensor.stop for tensor in ordered)]
    if [*starts, last] != stops:
        raise ValueError("its tensors do not follow each other")


def _tensor(file: Path, name: str, header: dict[str, Any], base: int) -> StoredTensor:
    first, last = header["data_offsets"]
    shape = tuple(header["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f"{name} has no place or shape")
    if header["dtype"] in DTYPES and last - first != math.prod(shape) * DTYPES[header["dtype"]]:
        raise ValueError(f"{name} has another number of bytes than its shape and dtype need")
    return StoredTensor(file=file, name=name, shape=shape, dtype=header["dtype"], start=base + first, stop=base + last)


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if (one.file, one.start) == (other.file, other.start):
        return True
    if one.stop - one.start != other.stop - other.start:
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        for done in range(0, one.stop - one.start, BLOCK):
            count = min(BLOCK, one.stop - one.start - done)
            if left.read(count) != right.read(count):
                return False
    return True
