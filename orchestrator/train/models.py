"""Models: a recipe's `model` section -> a transformers causal language model with Hugging Face parameter names."""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.config import ModelConfig, Recipe

NOT_A_TARGET = -100


def base_model(recipe: Recipe, vocab_size: int, dtype: torch.dtype) -> Any:
    """The model that a recipe starts from."""
    train = recipe.train
    return build_model(
        recipe.model, vocab_size=vocab_size, sequence_length=train.sequence_length, seed=train.seed, dtype=dtype
    )


def build_model(config: ModelConfig, *, vocab_size: int, sequence_length: int, seed: int, dtype: torch.dtype) -> Any:
    """The model before the first step, equal in every process: read from `model.path`, or made from `seed`.

    Args:
        vocab_size: of the tokenizer; a loaded model must cover it.
    """
    from transformers import AutoModelForCausalLM, OPTForCausalLM

    if config.path:
        return AutoModelForCausalLM.from_pretrained(config.path, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(galactica_config(config, vocab_size, sequence_length)).to(dtype)


def galactica_config(config: ModelConfig, vocab_size: int, sequence_length: int) -> Any:
    """Galactica as an OPT: GeLU, no biases, no affine layer norms, pre-norm, learned positions, no dropout."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        word_embed_proj_dim=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        ffn_dim=4 * config.hidden_size,
        max_position_embeddings=sequence_length,
        activation_function="gelu",
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def meta_model(config: Any) -> Any:
    """The modules of a causal language model without storage, from a config of transformers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def parameter_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """By name, tied parameters once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms and biases) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def token_loss_sum(model: Any, tokens: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over the targets of the cross entropy, in fp32. Every token but the first of a sequence is a target.

    Args:
        tokens: int64 [sequences, sequence_length].
        counted: bool like tokens: False for those that are no targets. None: all are.
    """
    logits = model(input_ids=tokens, use_cache=False).logits
    predictions = logits[:, :-1].flatten(0, 1).float()
    targets = tokens if counted is None else tokens.masked_fill(~counted.to(tokens.device), NOT_A_TARGET)
    return torch.nn.functional.cross_entropy(
        predictions, targets[:, 1:].flatten(), reduction="sum", ignore_index=NOT_A_TARGET
    )
