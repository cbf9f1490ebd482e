"""The files of a Hugging Face model directory, from their headers alone: a driver checks a model without loading it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

BASE_PREFIX = "model."
"""Of parameter names in a causal language model; a bare decoder's files lack it, and both are accepted."""

HEAD = "lm_head.weight"

DTYPES = ("F32", "F16", "BF16")
"""Of safetensors, that weights may be stored in."""

_NOT_PARAMETERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Buffers that older versions of Transformers stored beside the parameters."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    file: Path
    name: str
    """In the file."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


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
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"model.path: {folder} has no *.safetensors", "save the model with safetensors")
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
        if 8 + length + end > file.stat().st_size:
            raise ValueError("it is cut short")
        return [
            StoredTensor(file=file, name=name, shape=tuple(tensor["shape"]), dtype=tensor["dtype"])
            for name, tensor in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"model.path: {file} is no safetensors file: {error}", "is it a git-lfs pointer?") from None
