"""Small models of every family, as configurations of transformers and as directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
GALACTICA = {
    **SIZES,
    "model_type": "opt",
    "ffn_dim": 128,
    "activation_function": "gelu",
    "max_position_embeddings": 64,
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**SIZES, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    "galactica": GALACTICA,
    "llama": ROTARY,
    "qwen2": {**ROTARY, "tie_word_embeddings": True},
    "qwen3": {**ROTARY, "head_dim": 16},
    "mistral": ROTARY,
}


def config_of(family: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    values = {"model_type": family, "pad_token_id": 1, **FAMILIES[family], **changes}
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def large_config() -> Any:
    """A model of 312 MiB in fp32 whose largest tensors take 12 MiB."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 8}
    return LlamaConfig(vocab_size=4096, **sizes)


def model_of(config: Any) -> Any:
    """With every parameter drawn anew, so that none equals another."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
    return model


def directory_of(folder: Path, family: str, **changes: Any) -> Path:
    """The model's directory, without a tokenizer."""
    model_of(config_of(family, **changes)).save_pretrained(folder)
    return folder
