"""Where a model's first values come from."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import UserError
from orchestrator.model_files import read_config
from orchestrator.train.fragments import Box
from orchestrator.train.weights import DirectoryWeights, RandomWeights, Weights
from tests.memory import peak_growth_mib
from tests.model_directories import FAMILIES, config_of, large_config, model_of


def boxes(shape: tuple[int, ...]) -> list[Box]:
    """Some rectangles of a tensor: all of it, an end of every dimension, an inner part."""
    ends = [(0, n) for n in shape], [(n // 3, n - n // 3) for n in shape], [(n // 3, max(1, n // 4)) for n in shape]
    return [Box(tuple(o for o, _ in end), tuple(n for _, n in end)) for end in ends]


def check_equal(weights: Weights, parameters: dict[str, torch.Tensor]) -> None:
    assert dict(weights.shapes) == {name: tuple(p.shape) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for box in boxes(tuple(parameter.shape)):
            part = weights.read(name, box)
            assert part.dtype == torch.float32 and part.is_contiguous()
            assert torch.equal(part, parameter[box.slices].float()), (name, box)


# --- random -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_spread_as_transformers_own(family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(family, hidden_size=128, vocab_size=300)
    weights = RandomWeights(config, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    theirs = dict(model.named_parameters())
    assert weights.shapes == {name: tuple(p.shape) for name, p in theirs.items()}
    for name, expected in theirs.items():
        ours = weights.read(name, Box.whole(expected.shape))
        spread = float(expected.std(correction=0))
        assert float(ours.mean()) == pytest.approx(float(expected.mean()), abs=6 * spread / expected.numel() ** 0.5)
        assert float(ours.std(correction=0)) == pytest.approx(spread, rel=6 / expected.numel() ** 0.5, abs=1e-9), name
        if expected.dim() > 1:  # rows of zeros, such as the padding's
            assert torch.equal(ours.any(1), expected.any(1)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_box_is_a_part_of_the_random_parameter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.train.weights.BLOCK", 256)  # many blocks in a small model
    config = config_of(family)
    whole = {n: RandomWeights(config, 5).read(n, Box.whole(s)) for n, s in RandomWeights(config, 5).shapes.items()}
    check_equal(RandomWeights(config, 5), whole)
    matrices = [tensor for tensor in whole.values() if tensor.dim() == 2]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(matrices, 2))
    assert not torch.equal(matrices[0], RandomWeights(config, 6).read(next(iter(whole)), Box.whole(matrices[0].shape)))


def test_drawing_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    weights = RandomWeights(config_of("llama"), 5)
    weights.read("lm_head.weight", Box.whole(weights.shapes["lm_head.weight"]))
    assert torch.equal(before, torch.random.get_rng_state())


# --- a directory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_read_box_by_box(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = config_of(family)
    model = model_of(config).to(dtype)
    model.save_pretrained(tmp_path)
    check_equal(DirectoryWeights(tmp_path, config), dict(model.named_parameters()))


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    config = config_of("llama")
    model = model_of(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_equal(DirectoryWeights(tmp_path, config), dict(model.named_parameters()))
    next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(UserError, match=r"lacks model-00001-of-\d+\.safetensors, which its index names"):
        DirectoryWeights(tmp_path, config)


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["galactica", "qwen2"])
@pytest.mark.parametrize("names", ["bare", "with the head", "head instead"])
def test_names_may_lack_the_base_models_prefix_and_tied_heads_may_be_stored(
    family: str, names: str, tmp_path: Path
) -> None:
    config = config_of(family)
    parameters = dict(model_of(config).named_parameters())
    embedding = next(iter(parameters))
    stored = {n.removeprefix("model.") if names == "bare" else n: t for n, t in parameters.items()}
    if names != "bare":
        stored["lm_head.weight"] = parameters[embedding]
    if names == "head instead":
        del stored[embedding]
    save(tmp_path, stored)
    check_equal(DirectoryWeights(tmp_path, config), parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "does not have: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight \[31\], not \[32\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), r"model.norm.weight \(I8\)"),
    ],
)
def test_a_directory_of_another_model_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    config = config_of("llama")
    tensors: dict[str, torch.Tensor] = dict(model_of(config).named_parameters())
    change(tensors)
    save(tmp_path, tensors)
    with pytest.raises(UserError, match=message):
        DirectoryWeights(tmp_path, config)


def test_buffers_that_older_versions_stored_are_passed_over(tmp_path: Path) -> None:
    config = config_of("llama")
    parameters: dict[str, torch.Tensor] = dict(model_of(config).named_parameters())
    save(tmp_path, {**parameters, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    check_equal(DirectoryWeights(tmp_path, config), parameters)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"", b"\0" * 8])
def test_a_file_that_is_no_safetensors_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is no safetensors file"):
        DirectoryWeights(tmp_path, config_of("llama"))


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    config = config_of("llama")
    save(tmp_path, dict(model_of(config).named_parameters()))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="it is cut short"):
        DirectoryWeights(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [-128, 0]}, "model.norm.weight has no place or shape"),
        ({"data_offsets": [0.0, 128.0]}, "model.norm.weight has no place or shape"),
        ({"shape": "32"}, "model.norm.weight has no place or shape"),
        ({"data_offsets": [0, 8]}, "model.norm.weight has another number of bytes"),
        ({"dtype": "F16"}, "model.norm.weight has another number of bytes"),
        ({"data_offsets": [0, 128]}, "its tensors do not follow each other"),
    ],
)
def test_a_header_that_lies_about_its_tensors_is_found_out(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = config_of("llama")
    save(tmp_path, dict(model_of(config).named_parameters()))
    rewrite_header(tmp_path / "model.safetensors", lambda header: header["model.norm.weight"].update(change))
    with pytest.raises(UserError, match=message):
        DirectoryWeights(tmp_path, config)


@pytest.mark.parametrize("header", [b"null", b"[1]", b"[" * 100_000, b'{"a": 1}'])
def test_a_header_that_is_no_header_is_told(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="is no safetensors file"):
        DirectoryWeights(tmp_path, config_of("llama"))


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_weights_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read: No such file or directory"):
        DirectoryWeights(tmp_path, config_of("llama"))
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no index of safetensors files"):
        DirectoryWeights(tmp_path, config_of("llama"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"num_key_value_heads": "2"},
        {"hidden_size": True},
        {"max_position_embeddings": "128"},
        {"head_dim": [8]},
    ],
)
def test_a_config_whose_sizes_are_none_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **FAMILIES["llama"], **change}))
    with pytest.raises(UserError, match=f"{next(iter(change))}=.* is no size of a model"):
        read_config(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("[" * 100_000, "is not JSON"), ('{"model_type": []}', "of the family")])
def test_a_config_that_is_none_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


# --- memory -----------------------------------------------------------------------------------------------------------

READ_HALVES = """
from orchestrator.train.fragments import Box
from orchestrator.train.weights import DirectoryWeights, RandomWeights
from tests.model_directories import large_config

config = large_config()
weights = DirectoryWeights(sys.argv[1], config) if len(sys.argv) > 1 else RandomWeights(config, 1)
weights.read("lm_head.weight", Box((0, 0), (8, 8)))  # what the libraries take for themselves comes first

def work():
    for name, (rows, *columns) in weights.shapes.items():
        for half in range(2):
            weights.read(name, Box((half * rows // 2, *(0 for _ in columns)), (rows // 2, *columns)))
            if columns:
                weights.read(name, Box((0, half * columns[0] // 2), (rows, columns[0] // 2)))
"""


@pytest.mark.parametrize("kind", ["directory", "random"])
def test_reading_box_by_box_takes_the_memory_of_a_tensor_or_two(kind: str, tmp_path: Path) -> None:
    config = large_config()
    total = sum(math.prod(shape) for shape in RandomWeights(config, 1).shapes.values()) * 4 / 2**20
    if kind == "directory":
        model_of(config).save_pretrained(tmp_path)
    growth = peak_growth_mib(READ_HALVES, *([str(tmp_path)] if kind == "directory" else []))
    assert growth < total / 6, f"{growth} MiB for a model of {total:.0f} MiB"
