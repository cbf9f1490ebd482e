"""The shape of a model, counted tensor by tensor, from a recipe or a config.json. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from orchestrator.config import Recipe
from orchestrator.data.tokenizer import known_tokens
from orchestrator.errors import UserError
from orchestrator.hub import model_directory
from orchestrator.model_config import ModelConfig
from orchestrator.model_files import read_config
from orchestrator.planning.families import config_values, embedding_name, is_tied, kv_heads, parameter_shapes


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    layers: int
    hidden_size: int
    heads: int
    vocab_size: int
    parameters: int
    """Distinct elements: tied tensors count once."""
    block_parameters: int
    """Of one decoder block."""
    kv_heads: int | None = None
    """Heads of keys and values, where they are fewer than heads."""
    ffn_size: int | None = None
    """Inner features of the feed-forward networks; None: 4 x hidden_size."""
    gated: bool = False
    """Whether the feed-forward networks have a gate beside their inner features, as SwiGLU has."""
    query_size: int | None = None
    """Features of all heads together, where they are not hidden_size."""
    outer: OuterParameters | None = None
    """None: known in sum only, taken to be cut evenly and to belong to the embedding."""
    whole_block_parameters: int = 0
    """Of one decoder block, those that every tensor-parallel rank holds."""

    @property
    def outer_parameters(self) -> int:
        """Of what stands around the decoder blocks: embeddings, the last norm, the head."""
        return self.parameters - self.layers * self.block_parameters

    def vocabulary_parameters(self, tensor_parallel: int) -> int:
        """Elements of the embedding that one tensor-parallel rank holds."""
        width = self.outer.embedding_size if self.outer else self.hidden_size
        return vocabulary_rows(self.vocab_size, tensor_parallel) * width

    def rank_parameters(self, blocks: int, *, first: bool, last: bool, tensor_parallel: int) -> int:
        """Elements that one tensor-parallel rank of a pipeline stage holds.

        Args:
            blocks: of the stage.
            first: whether the embedding stands there.
            last: whether the head does. Where it is tied, it is a copy unless the embedding stands there, too.
        """
        cut = blocks * (self.block_parameters - self.whole_block_parameters)
        held = blocks * self.whole_block_parameters
        if self.outer is None:
            cut += self.outer_parameters if first else 0
            cut += min(self.outer_parameters, self.vocab_size * self.hidden_size) if last and not first else 0
            return held + cut // tensor_parallel
        rows = self.vocabulary_parameters(tensor_parallel)
        held += (rows + self.outer.first) * first + self.outer.last * last
        held += rows if last and not (first and self.outer.tied) else 0
        return held + cut // tensor_parallel


@dataclass(frozen=True, kw_only=True)
class OuterParameters:
    """What stands around the decoder blocks."""

    embedding_size: int
    """Features of the embedding and of the head."""
    tied: bool
    """Whether the head is the embedding."""
    first: int
    """Elements beside the embedding in the first stage, whole on every rank: positions, a projection."""
    last: int
    """Elements beside the head in the last stage, whole on every rank: the last norm, a projection."""


VOCABULARY_MULTIPLE = 128
"""Rows of the embedding that a tensor-parallel rank holds are a multiple of it."""


def vocabulary_rows(vocab_size: int, tensor_parallel: int) -> int:
    """Of the embedding or the head that a rank holds, padding included."""
    if tensor_parallel == 1:
        return vocab_size
    return math.ceil(vocab_size / (tensor_parallel * VOCABULARY_MULTIPLE)) * VOCABULARY_MULTIPLE


def model_shape(recipe: Recipe, vocab_size: int) -> ModelShape:
    """
    Args:
        vocab_size: of the tokenizer, added tokens included.

    Raises:
        UserError: `model.path` is no model, or too small for the tokenizer or the sequence length.
    """
    values = model_values(recipe.model, vocab_size, recipe.train.sequence_length)
    _check_vocabulary(recipe, vocab_size)
    return shape_of(values)


def shape_of(values: dict[str, Any]) -> ModelShape:
    """
    Args:
        values: of a config.json.
    """
    shapes = parameter_shapes(values)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    block = {name: size for name, size in sizes.items() if ".layers.0." in name}
    fewer = kv_heads(values) != values["num_attention_heads"]
    query_size = next(shape[0] for name, shape in shapes.items() if name.endswith("layers.0.self_attn.q_proj.weight"))
    return ModelShape(
        layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        heads=values["num_attention_heads"],
        vocab_size=values["vocab_size"],
        parameters=sum(sizes.values()),
        block_parameters=sum(block.values()),
        kv_heads=kv_heads(values) if fewer else None,
        ffn_size=values.get("intermediate_size") or values.get("ffn_dim"),
        gated=any("gate_proj" in name for name in block),
        query_size=query_size if query_size != values["hidden_size"] else None,
        outer=_outer(values, shapes, sizes),
        whole_block_parameters=sum(size for name, size in block.items() if not _is_cut(name)),
    )


def _outer(values: dict[str, Any], shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]) -> OuterParameters:
    first = (".embed_positions.", ".project_in.")
    vocabulary = (embedding_name(values), "lm_head.weight")
    beside = {name: size for name, size in sizes.items() if ".layers." not in name and name not in vocabulary}
    return OuterParameters(
        embedding_size=shapes[embedding_name(values)][1],
        tied=is_tied(values),
        first=sum(size for name, size in beside.items() if any(part in name for part in first)),
        last=sum(size for name, size in beside.items() if not any(part in name for part in first)),
    )


_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
_ROWS = ("o_proj", "out_proj", "down_proj", "fc2")


def _is_cut(name: str) -> bool:
    """Whether tensor-parallel ranks hold a part each of a parameter of a block: row-parallel layers add their bias to
    the sum of their outputs, so that every rank has all of it."""
    layer, kind = name.split(".")[-2:]
    return layer in _COLUMNS or (layer in _ROWS and kind == "weight")


def model_values(model: ModelConfig, vocab_size: int, sequence_length: int) -> dict[str, Any]:
    """The config.json of the model that is trained: with rows for every entry of the tokenizer, unpadded.

    Raises:
        UserError: `model.path` is no model, or the model has fewer positions than sequences have tokens.
    """
    if not model.path:
        return config_values(model, vocab_size, sequence_length)
    values = read_config(model_directory(model, weights=False))
    positions = values.get("max_position_embeddings")
    if positions and sequence_length > positions:
        raise UserError(
            f"train.sequence_length={sequence_length} is more than the {positions} positions of {model.path}",
            f"use {positions} or less",
        )
    return {**values, "vocab_size": max(vocab_size, values["vocab_size"])}


def _check_vocabulary(recipe: Recipe, vocab_size: int) -> None:
    if not recipe.model.path or recipe.tokenizer.add:
        return
    folder = model_directory(recipe.model, weights=False)
    known = known_tokens(folder, read_config(folder)["vocab_size"])
    if vocab_size > known:
        raise UserError(
            f"the tokenizer has {vocab_size} entries, the model {recipe.model.path} knows {known}",
            "use the model's own tokenizer (leave tokenizer.path out), and name new tokens in tokenizer.add",
        )
