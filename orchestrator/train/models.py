"""Models: a recipe's `model` section -> a transformers causal language model with Hugging Face parameter names."""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.config import Recipe
from orchestrator.model_config import ModelConfig
from orchestrator.planning.shape import model_values
from orchestrator.train.fragments import Box

FOR_TRAINING = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "use_cache": False}


def base_model(recipe: Recipe, vocab_size: int, dtype: torch.dtype) -> Any:
    """The model that a recipe starts from, whole."""
    train = recipe.train
    return build_model(
        recipe.model, vocab_size=vocab_size, sequence_length=train.sequence_length, seed=train.seed, dtype=dtype
    )


def build_model(config: ModelConfig, *, vocab_size: int, sequence_length: int, seed: int, dtype: torch.dtype) -> Any:
    """The model before the first step, equal in every process.

    Args:
        vocab_size: of the tokenizer; what the model at `model.path` does not embed of it begins as the mean.
    """
    from orchestrator.train.weights import open_weights

    weights = open_weights(config, vocab_size, sequence_length, seed)
    return filled(model_config(config, vocab_size, sequence_length), weights, dtype)


def filled(config: Any, weights: Any, dtype: torch.dtype) -> Any:
    """A whole model, with weights (orchestrator.train.weights)."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name, Box.whole(parameter.shape)))
    return model


def model_config(config: ModelConfig, vocab_size: int, sequence_length: int) -> Any:
    """The configuration of transformers for training: without dropout, and without a cache of keys and values."""
    return config_object({**model_values(config, vocab_size, sequence_length), **FOR_TRAINING})


def config_object(values: dict[str, Any]) -> Any:
    """The configuration of transformers that the values of a config.json mean."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def meta_model(config: Any, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """The modules of a causal language model without storage, from a config of transformers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """By name, tied parameters once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def token_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every token but the first of a sequence, in nats, fp32 [sequences, sequence_length - 1].

    Args:
        tokens: int64 [sequences, sequence_length].
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1)
