"""Model families: what a config.json of each means in parameters, and the config.json of a recipe's own model.

Pure, and without torch: `tests/unit/test_families.py` holds every name and shape to those of Transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.errors import UserError
from orchestrator.model_config import ModelConfig

Shape = tuple[int, ...]
Values = dict[str, Any]
"""Of a config.json."""

_OPT_POSITION_OFFSET = 2

# Taylor et al., "Galactica: A Large Language Model for Science", 2022, table 5: layers, hidden size, heads.
GALACTICA = {
    "galactica-125m": (12, 768, 12),
    "galactica-1.3b": (24, 2048, 32),
    "galactica-6.7b": (32, 4096, 32),
    "galactica-30b": (48, 7168, 56),
    "galactica-120b": (96, 10240, 80),
}
GALACTICA_POSITIONS = 2048


# --- a recipe's own model ---------------------------------------------------------------------------------------------


def config_values(model: ModelConfig, vocab_size: int, sequence_length: int) -> Values:
    """The config.json of a model that is made from random weights.

    Raises:
        UserError: a preset has too few positions.
    """
    if model.preset:
        if sequence_length > GALACTICA_POSITIONS:
            raise UserError(
                f"train.sequence_length={sequence_length} is more than the {GALACTICA_POSITIONS} positions of "
                f"model.preset={model.preset}",
                f"use {GALACTICA_POSITIONS} or less, or give model.layers, hidden_size and heads instead",
            )
        layers, hidden, heads = GALACTICA[model.preset]
        return _galactica_values(layers, hidden, heads, 4 * hidden, vocab_size, GALACTICA_POSITIONS)
    layers, hidden, heads = model.layers, model.hidden_size, model.heads
    if model.architecture == "galactica":
        ffn_size = model.ffn_size or 4 * hidden
        return _galactica_values(layers, hidden, heads, ffn_size, vocab_size, sequence_length)
    return {
        "model_type": model.architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": model.ffn_size or gated_ffn_size(hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.kv_heads or heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": sequence_length,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def gated_ffn_size(hidden_size: int) -> int:
    """Of a gated network with as many parameters as one of 4 x hidden_size without a gate, as Llama's: 8/3 of
    hidden_size, rounded up to a multiple of 256 (small models: of 8)."""
    multiple = 256 if hidden_size >= 256 else 8
    return -(-8 * hidden_size // (3 * multiple)) * multiple


def _galactica_values(layers: int, hidden: int, heads: int, ffn_size: int, vocab_size: int, positions: int) -> Values:
    """An OPT with GeLU, no biases, no affine layer norms, pre-norm, learned positions."""
    return {
        "model_type": "opt",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": ffn_size,
        "max_position_embeddings": positions,
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


# --- parameters -------------------------------------------------------------------------------------------------------


def parameter_shapes(values: Values) -> dict[str, Shape]:
    """Every parameter of a model by its name in Transformers, tied ones once."""
    return dict(FAMILIES[values["model_type"]](values))


def is_tied(values: Values) -> bool:
    """Whether the head is the embedding."""
    return bool(values.get("tie_word_embeddings", values["model_type"] == "opt"))


def embedding_name(values: Values) -> str:
    return "model.decoder.embed_tokens.weight" if values["model_type"] == "opt" else "model.embed_tokens.weight"


def kv_heads(values: Values) -> int:
    return int(values.get("num_key_value_heads") or values["num_attention_heads"])


def _opt(values: Values) -> Iterator[tuple[str, Shape]]:
    hidden, ffn, root = values["hidden_size"], values["ffn_dim"], "model.decoder"
    width = values.get("word_embed_proj_dim") or hidden
    bias, affine = values.get("enable_bias", True), values.get("layer_norm_elementwise_affine", True)
    last_norm = values.get("do_layer_norm_before", True) and not values.get("_remove_final_layer_norm", False)
    yield f"{root}.embed_tokens.weight", (values["vocab_size"], width)
    yield f"{root}.embed_positions.weight", (values["max_position_embeddings"] + _OPT_POSITION_OFFSET, hidden)
    if width != hidden:
        yield f"{root}.project_out.weight", (width, hidden)
        yield f"{root}.project_in.weight", (hidden, width)
    if last_norm and affine:
        yield from _affine(f"{root}.final_layer_norm", hidden)
    for number in range(values["num_hidden_layers"]):
        layer = f"{root}.layers.{number}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", hidden, hidden, bias)
        yield from _linear(f"{layer}.fc1", ffn, hidden, bias)
        yield from _linear(f"{layer}.fc2", hidden, ffn, bias)
        if affine:
            yield from _affine(f"{layer}.self_attn_layer_norm", hidden)
            yield from _affine(f"{layer}.final_layer_norm", hidden)
    if not is_tied(values):
        yield "lm_head.weight", (values["vocab_size"], width)


def _rotary(values: Values) -> Iterator[tuple[str, Shape]]:
    """Llama and those that differ from it in biases and norms of queries and keys."""
    family, hidden, ffn = values["model_type"], values["hidden_size"], values["intermediate_size"]
    heads = values["num_attention_heads"]
    head = values.get("head_dim") or (128 if family == "qwen3" else hidden // heads)
    bias = family in ("llama", "qwen3") and values.get("attention_bias", False)
    mlp_bias = family == "llama" and values.get("mlp_bias", False)
    yield "model.embed_tokens.weight", (values["vocab_size"], hidden)
    for number in range(values["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name, rows in (("q_proj", heads), ("k_proj", kv_heads(values)), ("v_proj", kv_heads(values))):
            yield from _linear(f"{layer}.self_attn.{name}", rows * head, hidden, bias or family == "qwen2")
        yield from _linear(f"{layer}.self_attn.o_proj", hidden, heads * head, bias)
        if family == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (head,)
            yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield from _linear(f"{layer}.mlp.gate_proj", ffn, hidden, mlp_bias)
        yield from _linear(f"{layer}.mlp.up_proj", ffn, hidden, mlp_bias)
        yield from _linear(f"{layer}.mlp.down_proj", hidden, ffn, mlp_bias)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not is_tied(values):
        yield "lm_head.weight", (values["vocab_size"], hidden)


def _linear(name: str, out: int, into: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _affine(name: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


FAMILIES: dict[str, Callable[[Values], Iterator[tuple[str, Shape]]]] = {
    "opt": _opt,
    "llama": _rotary,
    "qwen2": _rotary,
    "qwen3": _rotary,
    "mistral": _rotary,
}

COMMON_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
ROTARY_KEYS = (*COMMON_KEYS, "intermediate_size")
NEEDED = {
    "opt": (*COMMON_KEYS, "ffn_dim", "max_position_embeddings"),
    "llama": ROTARY_KEYS,
    "qwen2": (*ROTARY_KEYS, "num_key_value_heads"),
    "qwen3": (*ROTARY_KEYS, "num_key_value_heads"),
    "mistral": (*ROTARY_KEYS, "num_key_value_heads"),
}
"""Keys of a config.json that every published model of a family has; what it leaves out is Transformers' default."""
