"""A checkpoint of any layout as a Hugging Face directory, streamed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.manifest import Manifest, save_manifest
from orchestrator.errors import CheckpointDamaged, RunFailed, UserError
from orchestrator.model_files import check_model
from orchestrator.runs import RunDir, open_run
from orchestrator.train.checkpoints import Commit
from orchestrator.train.export import export, export_step
from orchestrator.train.fragments import Box
from orchestrator.train.models import build_model
from orchestrator.train.weights import CheckpointWeights
from tests import made_checkpoints, made_runs
from tests.memory import peak_growth_mib
from tests.model_directories import FAMILIES, directory_of, large_config, model_of

VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train(["the quick brown fox"], vocab_size=VOCABULARY).save_pretrained(folder)
    return folder


def begin(root: str, tokenizer: Path, **model: Any) -> tuple[RunDir, Recipe, Manifest]:
    """A run with a corpus."""
    values = made_runs.recipe(root).model_dump() | {"model": model}
    recipe = Recipe.model_validate(values)
    run = open_run(recipe)
    storage.upload_directory(tokenizer, run.tokenizer)
    manifest = replace(made_runs.corpus(run.corpus), vocab_size=VOCABULARY)
    save_manifest(manifest, run.corpus)
    return run, recipe, manifest


def reload(folder: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_checkpoint_is_read_box_by_box(anywhere: str) -> None:
    parameters = {"a": torch.randn(7, 5), "b": torch.randn(11), "c": torch.randn(3, 4)}
    commit = made_checkpoints.save(anywhere, 5, parameters)
    weights = CheckpointWeights(anywhere, commit)
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    for name, tensor in parameters.items():
        for box in (Box.whole(tensor.shape), Box((1,) * tensor.dim(), tuple(n - 2 for n in tensor.shape))):
            assert torch.equal(weights.read(name, box), tensor[box.slices])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_the_trained_one(family: str, tokenizer: Path, tmp_path: Path) -> None:
    base = directory_of(tmp_path / "base", family, vocab_size=VOCABULARY)
    run, recipe, manifest = begin(str(tmp_path), tokenizer, path=str(base))
    trained = reload(base).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    commit = made_checkpoints.save(run.checkpoints, 5, dict(trained.named_parameters()))
    export(run, recipe, manifest, commit, run.model)
    model = reload(run.model)
    assert type(model) is type(trained)
    state = trained.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, trained(ids).logits)
    config = json.loads(storage.read(storage.join(run.model, "config.json")))
    assert (config["use_cache"], config["architectures"]) == (True, [type(trained).__name__])
    check_model(Path(run.model))
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 10)


@pytest.mark.parametrize("architecture", ["galactica", "llama", "qwen2", "qwen3", "mistral"])
def test_a_model_made_here_has_the_tokens_of_its_tokenizer(architecture: str, tokenizer: Path, tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden_size": 32, "heads": 4}
    run, recipe, manifest = begin(str(tmp_path), tokenizer, architecture=architecture, **sizes)
    made = build_model(recipe.model, vocab_size=VOCABULARY, sequence_length=8, seed=1, dtype=torch.float32)
    export(run, recipe, manifest, made_checkpoints.save(run.checkpoints, 5, dict(made.named_parameters())), run.model)
    model = reload(run.model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), made.parameters(), strict=True))
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == (2, 0, 1)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("trained", "asked", "found"),
    [
        ("bf16", None, torch.bfloat16),
        ("bf16", "fp32", torch.float32),
        (None, None, torch.float32),
        ("fp32", "fp16", torch.float16),
    ],
)
def test_the_dtype_is_that_of_the_training_unless_another_is_asked_for(
    trained: str | None, asked: str | None, found: torch.dtype, tokenizer: Path, tmp_path: Path
) -> None:
    base = directory_of(tmp_path / "base", "llama", vocab_size=VOCABULARY)
    run, recipe, manifest = begin(str(tmp_path), tokenizer, path=str(base))
    if trained:
        run.claim_attempt({"dtype": trained})
    weights = reload(base)
    commit = made_checkpoints.save(run.checkpoints, 5, dict(weights.named_parameters()))
    export(run, recipe, manifest, commit, run.model, asked)
    model = reload(run.model, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {found}
    assert all(torch.equal(p, q.to(found)) for p, q in zip(model.parameters(), weights.parameters(), strict=True))


def made_run(anywhere: str, tokenizer: Path, base: Path) -> tuple[RunDir, Recipe, Manifest, Commit]:
    run, recipe, manifest = begin(anywhere, tokenizer, path=str(directory_of(base, "llama", vocab_size=VOCABULARY)))
    commit = made_checkpoints.save(run.checkpoints, 5, dict(reload(base).named_parameters()))
    return run, recipe, manifest, commit


def test_shards_and_their_index_are_as_transformers_reads_them(
    anywhere: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe, manifest, commit = made_run(anywhere, tokenizer, tmp_path / "base")
    export(run, recipe, manifest, commit, run.model)
    assert [n for n in storage.list_files(run.model) if "safetensors" in n] == ["model.safetensors"]
    monkeypatch.setattr("orchestrator.train.safetensors_files.SHARD_BYTES", 20_000)
    export(run, recipe, manifest, commit, run.model)
    with storage.local_directory(run.model) as folder:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
        assert len(files) > 3
        assert max((folder / name).stat().st_size for name in files) < VOCABULARY * 32 * 4 + 2000, "the embedding's"
        base = reload(tmp_path / "base")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in base.parameters())
        assert set(index["weight_map"].values()) == set(files)
        model = reload(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))
    monkeypatch.undo()
    export(run, recipe, manifest, commit, run.model)
    assert [n for n in storage.list_files(run.model) if "safetensors" in n] == ["model.safetensors"], "the old ones go"


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(tokenizer: Path, tmp_path: Path) -> None:
    run, recipe, manifest, _ = made_run(str(tmp_path), tokenizer, tmp_path / "base")
    other = dict(reload(tmp_path / "base").named_parameters())
    del other["model.norm.weight"]
    commit = made_checkpoints.save(run.checkpoints, 6, other)
    with pytest.raises(RunFailed, match=r"model\.norm\.weight as None, not \(32,\)"):
        export(run, recipe, manifest, commit, run.model)
    assert not storage.list_files(run.model)


def test_a_damaged_checkpoint_makes_no_model(tokenizer: Path, tmp_path: Path) -> None:
    run, recipe, manifest, commit = made_run(str(tmp_path), tokenizer, tmp_path / "base")
    name = next(name for name in commit.files if name.endswith(".distcp"))
    file = Path(run.checkpoint(5), name)
    data = bytearray(file.read_bytes())
    for place in range(0, len(data), 1000):
        data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointDamaged):
        export(run, recipe, manifest, commit, run.model)
    assert not storage.exists(run.model_manifest)


def test_the_newest_whole_checkpoint_is_exported(tokenizer: Path, tmp_path: Path) -> None:
    run, _, _, _ = made_run(str(tmp_path), tokenizer, tmp_path / "base")
    newer = made_checkpoints.save(run.checkpoints, 7, dict(reload(tmp_path / "base").named_parameters()))
    Path(run.checkpoint(7), newer.folder, ".metadata").write_bytes(b"")
    assert export_step(run, None, run.model, "bf16") == 5
    facts = run.read_json(run.model_manifest)
    assert (facts["step"], facts["dtype"]) == (5, "bf16")
    with pytest.raises(UserError, match="no checkpoint asked for is whole"):
        export_step(run, 7, run.model)


# --- memory -----------------------------------------------------------------------------------------------------------

EXPORT = """
from orchestrator.train import checkpoints
from orchestrator.train.fragments import Box
from orchestrator.train.safetensors_files import write_model
from orchestrator.train.weights import CheckpointWeights

weights = CheckpointWeights(sys.argv[1], checkpoints.newest(sys.argv[1]))

weights.read("model.norm.weight", Box((0,), (8,)))  # what the libraries take for themselves comes first

def work():
    write_model(weights, sys.argv[2], "fp32")
"""


def test_an_export_takes_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    model = model_of(large_config())
    made_checkpoints.save(str(tmp_path / "checkpoints"), 5, dict(model.named_parameters()), parts=1)
    total = sum(p.numel() for p in model.parameters()) * 4 // 2**20
    growth = peak_growth_mib(EXPORT, str(tmp_path / "checkpoints"), str(tmp_path / "model"))
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) > total * 2**20
    assert growth < total / 4, f"{growth} MiB for a model of {total} MiB"
