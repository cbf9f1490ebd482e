"""Checkpoint -> Model: a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` loads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.manifest import Manifest, load_manifest
from orchestrator.errors import CheckpointDamaged, UserError
from orchestrator.runs import RunDir
from orchestrator.train.checkpoints import Commit

log = logging.getLogger(__name__)


def export(run: RunDir, recipe: Recipe, manifest: Manifest, commit: Commit, target: str) -> None:
    """Write the model of a checkpoint to `target`, its manifest (terrane.json) last."""
    import torch

    from orchestrator.train import checkpoints
    from orchestrator.train.fragments import Box, Fragment
    from orchestrator.train.models import base_model

    model = base_model(recipe, manifest.vocab_size, torch.float32)
    with torch.no_grad():
        fragments = [
            Fragment(name, tuple(parameter.shape), Box.whole(parameter.shape), {"param": parameter.data})
            for name, parameter in model.named_parameters()
        ]
        checkpoints.load(run.checkpoints, commit, fragments)
    with TemporaryDirectory(prefix="terrane-") as folder, storage.local_directory(run.tokenizer) as tokenizer:
        model.save_pretrained(folder)
        tokenizers.load(tokenizer).save_pretrained(folder)
        Path(folder, "README.md").write_text(model_card(recipe, manifest, commit), encoding="utf-8")
        storage.delete(storage.join(target, "terrane.json"))
        storage.upload_directory(Path(folder), target)
    facts = {"format": 1, "run": run.name, "step": commit.step, "corpus": manifest.hash}
    storage.write(storage.join(target, "terrane.json"), (json.dumps(facts, indent=2) + "\n").encode())


def export_step(run: RunDir, step: int | None, target: str) -> int:
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
            export(run, run.recipe(), manifest, checkpoints.read_commit(run.checkpoints, candidate), target)
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
    origin = f"`{recipe.model.path}`" if recipe.model.path else "random weights"
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
