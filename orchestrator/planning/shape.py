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
from orchestrator.planning.families import config_values, kv_heads, parameter_shapes


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
    """Inner features of the feed-forward networks."""

    @property
    def outer_parameters(self) -> int:
        """Of what stands around the decoder blocks: embeddings, the last norm, the head."""
        return self.parameters - self.layers * self.block_parameters


def model_shape(recipe: Recipe, vocab_size: int) -> ModelShape:
    """
    Args:
        vocab_size: of the tokenizer, added tokens included.

    Raises:
        UserError: `model.path` is no model, or too small for the tokenizer or the sequence length.
    """
    values = model_values(recipe.model, vocab_size, recipe.train.sequence_length)
    _check_vocabulary(recipe, vocab_size)
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(values).items()}
    return ModelShape(
        layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        heads=values["num_attention_heads"],
        vocab_size=values["vocab_size"],
        parameters=sum(sizes.values()),
        block_parameters=sum(size for name, size in sizes.items() if ".layers.0." in name),
        kv_heads=kv_heads(values) if kv_heads(values) != values["num_attention_heads"] else None,
        ffn_size=values.get("intermediate_size") or values.get("ffn_dim"),
    )


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
