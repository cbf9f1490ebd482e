"""Weights: the values that training begins from, read box by box, so that no rank ever holds the whole model.

Imports no Ray.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from orchestrator import storage
from orchestrator.data.tokenizer import known_tokens
from orchestrator.hub import model_directory
from orchestrator.model_config import ModelConfig
from orchestrator.model_files import HEAD, locate, read_config
from orchestrator.planning.families import embedding_name, is_tied
from orchestrator.train.checkpoints import Commit, step_directory
from orchestrator.train.fragment_files import FragmentReader
from orchestrator.train.fragments import PARAM, Box, Fragment
from orchestrator.train.models import config_object, meta_model, model_config, parameter_shapes
from orchestrator.train.planners import FragmentLoadPlanner, stored_shapes

BLOCK = 2**20
"""Elements that are drawn from one generator: a rank draws what it holds, and little more."""


class Weights(Protocol):
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every parameter, by its name in the Hugging Face model, tied ones once."""

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A part of a parameter: fp32, of the shape of the box, the caller's own."""


def open_weights(config: ModelConfig, vocab_size: int, sequence_length: int, seed: int) -> Weights:
    """What a recipe's model begins from.

    Args:
        vocab_size: of the tokenizer, added tokens included.

    Raises:
        UserError: `model.path` does not hold what its config.json says.
    """
    if not config.path:
        return RandomWeights(model_config(config, vocab_size, sequence_length), seed)
    folder = model_directory(config)
    values = read_config(folder)
    weights = DirectoryWeights(folder, config_object(values))
    known = known_tokens(folder, values["vocab_size"])
    if vocab_size <= known:
        return weights
    names = {embedding_name(values)} | ({HEAD} if not is_tied(values) else set())
    return ResizedWeights(weights, names, known=known, rows=max(vocab_size, values["vocab_size"]))


class RandomWeights:
    """As the model's own `_init_weights` draws them; each block of rows is a function of the seed and its place."""

    def __init__(self, config: Any, seed: int) -> None:
        """
        Args:
            config: of transformers.
        """
        self._model = meta_model(config)
        self._seed = seed
        self.shapes = parameter_shapes(self._model)

    def read(self, name: str, box: Box) -> torch.Tensor:
        shape = self.shapes[name]
        rows = max(1, BLOCK // math.prod(shape[1:]))
        first, end = box.offsets[0], box.offsets[0] + box.lengths[0]
        values = torch.empty(box.lengths)
        for start in range(first - first % rows, end, rows):
            stop = min(start + rows, shape[0])
            block = self._draw(name, start, (stop - start, *shape[1:]))
            low, high = max(first, start), min(end, stop)
            values[low - first : high - first] = block[low - start : high - start][(slice(None), *box.slices[1:])]
        return values

    def _draw(self, name: str, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Rows of a parameter from `first` on: its module with these rows alone, initialised by the model."""
        path, _, attribute = name.rpartition(".")
        module = copy.copy(self._model.get_submodule(path))
        rows = torch.nn.Parameter(torch.empty(shape), requires_grad=False)
        module._parameters = {**module._parameters, attribute: rows}
        padding: Any = getattr(module, "padding_idx", None)
        if padding is not None:
            module.padding_idx = padding - first if first <= padding < first + shape[0] else None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(xxhash.xxh3_64_intdigest(f"{self._seed} {name} {first}".encode()))
            self._model._init_weights(module)
        return rows.detach()


class DirectoryWeights:
    """Of a Hugging Face directory: safetensors, in one file or several, of which only the boxes are read."""

    def __init__(self, path: str | Path, config: Any) -> None:
        """
        Args:
            config: of transformers, as the directory's config.json says.

        Raises:
            UserError: the directory does not hold the parameters of the config.
        """
        model = meta_model(config)
        self.shapes = parameter_shapes(model)
        embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        self._places = locate(Path(path), self.shapes, embedding if config.tie_word_embeddings else None)

    def read(self, name: str, box: Box) -> torch.Tensor:
        from safetensors import safe_open

        place = self._places[name]
        with safe_open(str(place.file), framework="pt") as tensors:  # for each box anew: nothing stays mapped
            return torch.empty(box.lengths).copy_(tensors.get_slice(place.name)[box.slices])


class CheckpointWeights:
    """The parameters of a checkpoint, whatever layout wrote it; on S3 only what is asked for is fetched."""

    def __init__(self, checkpoints: str, commit: Commit) -> None:
        """
        Raises:
            CheckpointDamaged: the checkpoint's list of fragments is not what was committed. `read` raises it too.
        """
        uri = storage.join(step_directory(checkpoints, commit.step), commit.folder)
        self._reader = FragmentReader(uri, commit.metadata_xxh3)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.shapes = stored_shapes(self._metadata)

    def read(self, name: str, box: Box) -> torch.Tensor:
        values = torch.empty(box.lengths)
        planner = FragmentLoadPlanner([Fragment(name, self.shapes[name], box, {PARAM: values})])
        planner.set_up_planner({}, self._metadata, is_coordinator=True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return values


class ResizedWeights:
    """Of a model whose tokenizer has learned new tokens: their rows are the mean of the rows of the old ones.

    So the new tokens change the probabilities of the old ones by little, where random rows may take nearly all of it
    (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021).
    """

    def __init__(self, base: Weights, names: set[str], *, known: int, rows: int) -> None:
        """
        Args:
            names: of the matrices with a row a token.
            known: tokens before, whose rows stay. Rows past them that a model has for padding are new ones too.
            rows: of the new matrices.
        """
        self._base = base
        self._known = known
        self.shapes = {n: (rows, *shape[1:]) if n in names else shape for n, shape in base.shapes.items()}
        self._means: dict[str, torch.Tensor | None] = dict.fromkeys(names)

    def read(self, name: str, box: Box) -> torch.Tensor:
        if name not in self._means:
            return self._base.read(name, box)
        first, columns = box.offsets[0], box.lengths[1:]
        old = max(0, min(box.lengths[0], self._known - first))
        values = torch.empty(box.lengths)
        if old:
            values[:old] = self._base.read(name, Box(box.offsets, (old, *columns)))
        if old < len(values):
            values[old:] = self._mean(name)[box.slices[1]]
        return values

    def _mean(self, name: str) -> torch.Tensor:
        """Of the rows of the old tokens, in pieces, each rank for itself."""
        mean = self._means[name]
        if mean is None:
            width = self.shapes[name][1]
            total = torch.zeros(width, dtype=torch.float64)
            rows = max(1, BLOCK // width)
            for first in range(0, self._known, rows):
                piece = Box((first, 0), (min(rows, self._known - first), width))
                total += self._base.read(name, piece).sum(0, dtype=torch.float64)
            mean = self._means[name] = (total / self._known).float()
        return mean
