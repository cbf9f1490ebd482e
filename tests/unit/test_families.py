"""Model families: parameters counted without torch, held to those of transformers; directories that are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import Recipe
from orchestrator.errors import UserError
from orchestrator.model_config import ModelConfig
from orchestrator.model_files import check_model, read_config
from orchestrator.planning.families import GALACTICA, Values, config_values, gated_ffn_size, parameter_shapes
from orchestrator.planning.shape import model_shape
from orchestrator.train.fragments import Box
from orchestrator.train.models import build_model, config_object, meta_model, model_config
from orchestrator.train.models import parameter_shapes as theirs
from orchestrator.train.weights import open_weights
from tests.model_directories import FAMILIES, config_of, directory_of, model_of


def recipe(tokenizer: dict[str, Any] | None = None, length: int = 64, **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "corpus": {"sources": [{"name": "a", "path": "/data"}]},
            "model": model,
            "tokenizer": tokenizer or {},
            "train": {"steps": 1, "lr": 1e-3, "sequence_length": length},
        }
    )


# --- parameters -------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "opt": [{}, {"do_layer_norm_before": False}, {"tie_word_embeddings": False}, {"word_embed_proj_dim": 32}],
    "galactica": [{}],
    "llama": [{}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}, {"head_dim": 16}],
    "qwen2": [{}, {"tie_word_embeddings": False}],
    "qwen3": [{}, {"attention_bias": True}, {"head_dim": 128}],
    "mistral": [{}, {"num_key_value_heads": 4}],
}


@pytest.mark.parametrize(("family", "changes"), [(f, v) for f in FAMILIES for v in VARIANTS[f]], ids=str)
def test_parameters_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    config = config_of(family, **changes)
    assert parameter_shapes(config.to_dict()) == theirs(meta_model(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_configuration_counts_the_same(family: str, tmp_path: Path) -> None:
    directory_of(tmp_path, family)
    values = check_model(tmp_path)
    assert parameter_shapes(values) == theirs(meta_model(config_of(family)))
    assert theirs(meta_model(config_object(values))) == theirs(meta_model(config_of(family)))


def aquila(**values: Any) -> Values:
    return {
        "architectures": ["AquilaModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM"},
        "bos_token_id": 100006,
        "eos_token_id": 100007,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "model_type": "aquila",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 100008,
        **values,
    }


AQUILA_7B = aquila(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32)
AQUILA_34B = aquila(
    hidden_size=6144, intermediate_size=24576, num_attention_heads=48, num_hidden_layers=60, num_key_value_heads=8
)
LLAMA_2_7B = {**AQUILA_7B, "model_type": "llama", "vocab_size": 32000}
LLAMA_3_8B = {**LLAMA_2_7B, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
MISTRAL_7B = {**LLAMA_3_8B, "model_type": "mistral", "vocab_size": 32000}
QWEN_25_05B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN3_06B = {
    **QWEN_25_05B,
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


@pytest.mark.parametrize(
    ("values", "published"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_3_8B, 8_030_261_248),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN_25_05B, 494_032_768),
        (QWEN3_06B, 596_049_920),
    ],
)
def test_published_models_have_their_published_parameters(values: Values, published: int) -> None:
    assert sum(math.prod(shape) for shape in parameter_shapes(values).values()) == published


@pytest.mark.parametrize(("values", "billions"), [(AQUILA_7B, 7.3), (AQUILA_34B, 33.9)])
def test_aquila_is_a_llama(values: Values, billions: float, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = read_config(tmp_path)
    config = config_object(read)
    assert type(config).__name__ == "LlamaConfig"
    assert (config.eos_token_id, config.rms_norm_eps) == (100007, 1e-5)
    assert not hasattr(config, "auto_map"), "no code of the directory is ever run"
    shapes = theirs(meta_model(config))
    assert parameter_shapes(read) == shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(billions * 1e9, rel=0.01)


# --- a recipe's own models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("galactica-125m", 124_909_056),
        ("galactica-1.3b", 1_314_557_952),
        ("galactica-6.7b", 6_655_647_744),
        ("galactica-30b", 29_968_103_424),
        ("galactica-120b", 121_328_947_200),
    ],
)
def test_a_preset_has_the_parameters_of_its_name(preset: str, parameters: int) -> None:
    billions = {"m": 1e-3, "b": 1}[preset[-1]] * float(preset.removeprefix("galactica-")[:-1])
    assert model_shape(recipe(preset=preset, length=2048), 50_000).parameters == parameters
    assert parameters == pytest.approx(billions * 1e9, rel=0.015)
    config = model_config(ModelConfig(preset=preset), 50_000, 2048)  # type: ignore[arg-type]
    assert sum(math.prod(shape) for shape in theirs(meta_model(config)).values()) == parameters
    assert set(GALACTICA) >= {preset}


@pytest.mark.parametrize("architecture", ["galactica", "llama", "qwen2", "qwen3", "mistral"])
def test_a_small_model_of_any_architecture_is_what_the_planner_counts(architecture: str) -> None:
    sizes = {"kv_heads": 2, "tied_embeddings": True} if architecture != "galactica" else {}
    made = recipe(architecture=architecture, layers=2, hidden_size=48, heads=4, ffn_size=56, **sizes)
    shape = model_shape(made, 300)
    shapes = theirs(meta_model(model_config(made.model, 300, 64)))
    assert shape.parameters == sum(math.prod(shape) for shape in shapes.values())
    assert shape.kv_heads == sizes.get("kv_heads")


@pytest.mark.parametrize("architecture", ["galactica", "llama", "qwen2", "qwen3", "mistral"])
def test_nothing_drops_out_in_training(architecture: Any) -> None:
    config = model_config(ModelConfig(architecture=architecture), 97, 64)
    rates = [value for key, value in config.to_dict().items() if "drop" in key]
    assert rates and not any(rates)
    assert config.use_cache is False


@pytest.mark.parametrize("architecture", ["galactica", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_built_model_holds_the_weights_it_begins_from(architecture: Any, dtype: torch.dtype) -> None:
    tied = architecture == "qwen3"
    config = ModelConfig(architecture=architecture, layers=2, hidden_size=32, heads=2, tied_embeddings=tied)
    model = build_model(config, vocab_size=97, sequence_length=64, seed=4, dtype=dtype)
    weights = open_weights(config, 97, 64, seed=4)
    assert theirs(model) == weights.shapes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights.read(name, Box.whole(parameter.shape)).to(dtype))
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == (architecture != "llama")
    logits = model(torch.arange(64)[None]).logits
    assert torch.isfinite(logits).all()


def test_dropout_of_a_directory_is_turned_off(tmp_path: Path) -> None:
    directory_of(tmp_path, "opt")
    assert read_config(tmp_path)["dropout"] == 0.1
    assert model_config(ModelConfig(path=str(tmp_path)), 97, 64).dropout == 0


def test_a_gated_network_is_as_large_as_one_without_a_gate() -> None:
    assert [gated_ffn_size(hidden) for hidden in (4096, 768, 64)] == [11008, 2048, 176]


def test_a_preset_keeps_its_positions() -> None:
    assert config_values(ModelConfig(preset="galactica-125m"), 300, 128)["max_position_embeddings"] == 2048
    with pytest.raises(UserError, match="more than the 2048 positions"):
        model_shape(recipe(preset="galactica-125m", length=4096), 300)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"preset": "galactica-7b"}, "galactica-6.7b"),
        ({"architecture": "llama", "heads": 12, "kv_heads": 5}, "kv_heads=5 does not divide heads=12"),
        ({"architecture": "llama", "hidden_size": 36, "heads": 12}, "heads of an even size, not 3"),
        ({"kv_heads": 4}, "not for galactica"),
        ({"tied_embeddings": True}, "not for galactica"),
        ({"path": "/m", "commit": "a" * 40}, "for a model.path of the hub"),
        ({"path": "org/name@main", "commit": "main"}, "pattern"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**model)


# --- directories ------------------------------------------------------------------------------------------------------


def change(**values: Any) -> Callable[[Path], object]:
    """Of the config.json; None takes a key away."""

    def apply(folder: Path) -> None:
        file = folder / "config.json"
        changed = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return apply


def own_head(folder: Path) -> None:
    """An output embedding that differs from the input's, where the configuration says they are one."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, folder / "model.safetensors")
    change(tie_word_embeddings=True)(folder)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "is no configuration"),
        (change(model_type=None), "of the family None"),
        (change(model_type="gpt2"), "of the family gpt2"),
        (change(intermediate_size=None, hidden_size=None), "has no hidden_size, intermediate_size"),
        (change(num_hidden_layers="2"), "has no num_hidden_layers"),
        (change(quantization_config={"bits": 4}), "is quantized"),
        (change(num_hidden_layers=3), r"lacks model\.layers\.2"),
        (change(num_hidden_layers=1), r"does not have: model\.layers\.1"),
        (change(intermediate_size=47), r"down_proj\.weight \[32, 48\], not \[32, 47\] and 3 more"),
        (only_pickles, r"has no \*\.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), r"has no \*\.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "is no safetensors file"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "is no index"),
        (own_head, "an output embedding of its own"),
    ],
)
def test_a_directory_that_holds_no_model_to_begin_from_is_refused(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = directory_of(tmp_path, "llama")
    check_model(folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        check_model(folder)


def test_a_head_that_is_stored_beside_the_embedding_it_is_tied_to_is_fine(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = directory_of(tmp_path, "qwen2")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    check_model(folder)


def test_an_aquilas_directory_gives_its_weights_to_a_llama(tmp_path: Path) -> None:
    folder = directory_of(tmp_path, "llama")
    change(model_type="aquila", architectures=["AquilaForCausalLM"], auto_map={"AutoConfig": "own.AquilaConfig"})(
        folder
    )
    check_model(folder)
    built = build_model(ModelConfig(path=str(folder)), vocab_size=97, sequence_length=64, seed=1, dtype=torch.float32)
    assert type(built).__name__ == "LlamaForCausalLM"
    stored = model_of(config_of("llama"))
    assert all(torch.equal(p, q) for p, q in zip(built.parameters(), stored.parameters(), strict=True))


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory at") as caught:
        check_model(tmp_path / "org" / "name")
    assert "org/name@revision" in caught.value.hint


def test_a_sequence_past_the_positions_is_refused(tmp_path: Path) -> None:
    folder = directory_of(tmp_path, "llama")
    with pytest.raises(UserError, match="more than the 64 positions"):
        model_shape(recipe(path=str(folder), length=65), 97)


def test_a_tokenizer_that_the_model_does_not_embed_is_refused_unless_it_was_extended(tmp_path: Path) -> None:
    folder = str(directory_of(tmp_path, "llama"))
    assert model_shape(recipe(path=folder), 90).vocab_size == 97
    with pytest.raises(UserError, match=r"has 98 entries, the model .* knows 97"):
        model_shape(recipe(path=folder), 98)
    extended = model_shape(recipe({"add": ["<new>"]}, path=folder), 98)
    assert extended.vocab_size == 98
    assert extended.parameters == model_shape(recipe(path=folder), 97).parameters + 2 * 32


def test_dtype_of_a_directory_does_not_matter_to_its_shapes(tmp_path: Path) -> None:
    directory_of(tmp_path, "llama")
    change(dtype="bfloat16", torch_dtype="bfloat16")(tmp_path)
    assert {p.dtype for p in meta_model(model_config(ModelConfig(path=str(tmp_path)), 97, 64)).parameters()} == {
        torch.float32
    }
