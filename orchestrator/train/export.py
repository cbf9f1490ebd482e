"""Checkpoint -> Model: a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.errors import CheckpointDamaged, RunFailed, UserError
from orchestrator.hub import model_directory
from orchestrator.planning.families import Shape, Values, parameter_shapes
from orchestrator.planning.shape import model_values
from orchestrator.runs import RunDir
from orchestrator.train.checkpoints import Commit

log = logging.getLogger(__name__)


def export(
    run: RunDir, recipe: Recipe, manifest: Manifest, commit: Commit, target: str, dtype: str | None = None
) -> None:
    """Write the model of a checkpoint to `target`, its manifest (terrane.json) last.

    Args:
        dtype: fp32, bf16 or fp16; that of the training unless given.

    Raises:
        CheckpointDamaged: found while reading; the target is unfinished then.
    """
    from orchestrator.train.safetensors_files import write_model
    from orchestrator.train.weights import CheckpointWeights

    weights = CheckpointWeights(run.checkpoints, commit)
    dtype = dtype or trained_dtype(run, commit)
    values = model_values(recipe.model, manifest.vocab_size, recipe.train.sequence_length)
    check_shapes(weights.shapes, parameter_shapes(values))
    storage.delete(storage.join(target, "terrane.json"))
    write_model(weights, target, dtype)
    with TemporaryDirectory(prefix="terrane-") as folder, storage.local_directory(run.tokenizer) as directory:
        tokenizer = tokenizers.load(directory)
        tokenizer.save_pretrained(folder)
        write_configuration(Path(folder), recipe, values, tokenizer, dtype)
        Path(folder, "README.md").write_text(model_card(recipe, manifest, commit), encoding="utf-8")
        storage.upload_directory(Path(folder), target)
    facts = {"format": 1, "run": run.name, "step": commit.step, "corpus": manifest.hash, "dtype": dtype}
    storage.write(storage.join(target, "terrane.json"), (json.dumps(facts, indent=2) + "\n").encode())


def trained_dtype(run: RunDir, commit: Commit) -> str:
    """Of the attempt that wrote a checkpoint; fp32, which the checkpoint is in, where that is not known."""
    plan = run.read_json(run.plan(commit.attempt)) or {}
    return str(plan.get("dtype", "fp32"))


def check_shapes(stored: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """
    Raises:
        RunFailed: the checkpoint is of another model than the run's.
    """
    wrong = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        message = (
            f"the checkpoint does not fit the model: it holds {name} as {stored.get(name)}, not {expected.get(name)}"
        )
        raise RunFailed(message, "has the directory of model.path changed since the run began?")


def write_configuration(folder: Path, recipe: Recipe, values: Values, tokenizer: Any, dtype: str) -> None:
    """config.json and generation_config.json: those of `model.path`, or for a model made here with its own tokens."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from orchestrator.train.models import config_object

    architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]]]
    config = config_object({**values, "architectures": architectures, "use_cache": True})
    config.dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    if not recipe.model.path:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    base = model_directory(recipe.model, weights=False) if recipe.model.path else None
    given = base and base / "generation_config.json"
    if given and given.is_file():
        shutil.copyfile(given, folder / given.name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def export_step(run: RunDir, step: int | None, target: str, dtype: str | None = None) -> int:
    """Export the checkpoint of a step, or the newest whole one; returns its step.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    from orchestrator.train import checkpoints

    storage.check_writable(target)
    there = storage.list_files(target)
    if there and "config.json" not in there:
        raise UserError(f"{target} holds other files ({there[0]}, ...)", "give a new directory, or one of a model")
    manifest = load_manifest(run.corpus)
    known = checkpoints.committed_steps(run.checkpoints)
    if manifest is None or not known:
        raise UserError(f"{run.uri} has no checkpoint yet", "terrane run makes one")
    if step is not None and step not in known:
        raise UserError(f"{run.uri} has no checkpoint of step {step}", f"it has {', '.join(map(str, known))}")
    for candidate in [step] if step is not None else reversed(known):
        try:
            export(run, run.recipe(), manifest, checkpoints.read_commit(run.checkpoints, candidate), target, dtype)
            return candidate
        except CheckpointDamaged as error:
            log.warning("checkpoint of step %d passed over: %s", candidate, error.message)
    raise UserError(f"{run.uri}: no checkpoint asked for is whole", "terrane status lists the others")


def model_card(recipe: Recipe, manifest: Manifest, commit: Commit) -> str:
    """What a reader of the directory needs to know of where the weights come from."""
    train = recipe.train
    sources = "\n".join(
        f"- {name}: {counts['kept']:,} documents, {counts['characters']:,} characters"
        for name, counts in manifest.sources.items()
    )
    at = f" (commit {recipe.model.commit})" if recipe.model.commit else ""
    origin = f"`{recipe.model.path}`{at}" if recipe.model.path else "random weights"
    tokens = commit.step * train.global_batch_size * train.sequence_length
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {recipe.name}

Trained with Terrane from {origin}: {commit.step} steps of {train.global_batch_size} sequences of \
{train.sequence_length} tokens ({tokens:,} tokens), AdamW, peak learning rate {train.lr:g}, seed {train.seed}.

Corpus `{manifest.hash}`, {manifest.splits["train"]["tokens"]:,} training tokens:

{sources}
"""
