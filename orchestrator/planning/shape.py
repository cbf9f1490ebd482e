"""The shape of a model, counted tensor by tensor, from a recipe or a Hugging Face directory. No torch."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import ModelConfig
from orchestrator.errors import UserError

_OPT_POSITION_OFFSET = 2
CONFIG_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    layers: int
    hidden_size: int
    heads: int
    vocab_size: int
    parameters: int
    """Distinct elements: tied tensors count once."""


def model_shape(config: ModelConfig, vocab_size: int, sequence_length: int) -> ModelShape:
    """
    Raises:
        UserError: `model.path` is no model directory, or too small for the tokenizer or the sequence length.
    """
    if config.path:
        return _directory_shape(Path(config.path), vocab_size, sequence_length)
    hidden = config.hidden_size
    embeddings = (vocab_size + sequence_length + _OPT_POSITION_OFFSET) * hidden
    blocks = config.layers * (4 * hidden * hidden + 2 * hidden * 4 * hidden)
    return ModelShape(
        layers=config.layers,
        hidden_size=hidden,
        heads=config.heads,
        vocab_size=vocab_size,
        parameters=embeddings + blocks,
    )


def check_model_directory(path: str) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face model directory.

    Raises:
        UserError: says what the directory lacks.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model.path: no directory at {path}", "download the model first; give its directory")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {path} has no config.json", "give a Hugging Face model directory")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model.path: {path} has no *.safetensors", "save the model with safetensors: .bin runs code")
    try:
        values = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"model.path: {folder}/config.json is not JSON: {error}") from None
    missing = [key for key in CONFIG_KEYS if not isinstance(values, dict) or key not in values]
    if missing:
        message = f"model.path: {folder}/config.json has no {', '.join(missing)}"
        raise UserError(message, "decoder-only models in the layout of OPT or Llama are supported")
    return dict(values)


def _directory_shape(folder: Path, vocab_size: int, sequence_length: int) -> ModelShape:
    values = check_model_directory(str(folder))
    positions = values.get("max_position_embeddings")
    if positions and sequence_length > positions:
        raise UserError(
            f"train.sequence_length={sequence_length} is more than the {positions} positions of {folder}",
            f"use {positions} or less",
        )
    if vocab_size > values["vocab_size"]:
        raise UserError(
            f"the tokenizer has {vocab_size} entries, the model {folder} embeds {values['vocab_size']}",
            "use the model's own tokenizer (leave tokenizer.path out)",
        )
    return ModelShape(
        layers=int(values["num_hidden_layers"]),
        hidden_size=int(values["hidden_size"]),
        heads=int(values["num_attention_heads"]),
        vocab_size=int(values["vocab_size"]),
        parameters=sum(_elements(file) for file in sorted(folder.glob("*.safetensors"))),
    )


def _elements(file: Path) -> int:
    """Elements of all tensors of a safetensors file, from its header (8 bytes of length, then JSON)."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
    except (ValueError, struct.error) as error:
        raise UserError(f"model.path: {file} is no safetensors file: {error}", "is it a git-lfs pointer?") from None
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for dimension in tensor["shape"]:
                count *= dimension
            total += count
    return total
