"""Weights -> the safetensors files of a Hugging Face model, tensor by tensor, so that no file is ever whole in memory.

A file is 8 bytes of length, a header in JSON (name -> dtype, shape, bytes from and to) and the values in a row. Imports
no Ray.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch

from orchestrator import storage
from orchestrator.model_files import INDEX, SINGLE
from orchestrator.train.fragments import Box
from orchestrator.train.weights import Weights

DTYPES = {"fp32": (torch.float32, "F32"), "bf16": (torch.bfloat16, "BF16"), "fp16": (torch.float16, "F16")}
SHARD_BYTES = 2 * 10**9
"""Of a file, at most; a tensor that is larger has a file of its own."""

Names = list[str]


def write_model(weights: Weights, target: str, dtype: str) -> None:
    """Write the weights and, where they take more than one file, their index, in the place of what is there."""
    size = DTYPES[dtype][0].itemsize
    bytes_of = {name: math.prod(shape) * size for name, shape in weights.shapes.items()}
    shards = list(_shards(bytes_of, SHARD_BYTES))
    files = {file_name(number, len(shards)): names for number, names in enumerate(shards, 1)}
    for old in storage.list_files(target):
        if old.endswith(".safetensors") or old == INDEX:
            storage.delete(storage.join(target, old))
    for file, names in files.items():
        with storage.writing(storage.join(target, file)) as path, path.open("wb") as out:
            _write_file(out, weights, names, dtype)
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": sum(bytes_of.values()) // size, "total_size": sum(bytes_of.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        storage.write(storage.join(target, INDEX), (json.dumps(index, indent=2) + "\n").encode())


def file_name(number: int, count: int) -> str:
    """As Transformers names them."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shards(bytes_of: Mapping[str, int], most: int) -> Iterator[Names]:
    names: Names = []
    filled = 0
    for name, count in bytes_of.items():
        if names and filled + count > most:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += count
    yield names


def _write_file(out: IO[bytes], weights: Weights, names: Names, dtype: str) -> None:
    kind, label = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + math.prod(weights.shapes[name]) * kind.itemsize
        header[name] = {"dtype": label, "shape": list(weights.shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    out.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        out.write(_bytes(weights.read(name, Box.whole(weights.shapes[name])).to(kind)))  # not kept for the next


def _bytes(values: torch.Tensor) -> memoryview:
    return values.view(-1).view(torch.uint8).numpy().data
