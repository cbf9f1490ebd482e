"""Perplexity on the held-out split, of the model before training and of the one after it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data.manifest import Manifest
from orchestrator.evaluation.held_out import held_out_tokens, sequences_of
from orchestrator.runs import RunDir

BATCH = 8


def evaluate(run: RunDir, recipe: Recipe, manifest: Manifest, step: int, device: str) -> dict[str, Any]:
    """Loss (nats a token) and perplexity of the base and of the exported model on the same held-out sequences."""
    import torch
    from transformers import AutoModelForCausalLM

    from orchestrator.train.models import base_model

    sequences = sequences_of(recipe, manifest)
    tokens = held_out_tokens(run.corpus, manifest, 0, sequences)
    base = base_model(recipe, manifest.vocab_size, torch.float32)
    with storage.local_directory(run.model) as folder:
        model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        "step": step,
        "sequences": sequences,
        "tokens": sequences * (manifest.sequence_length - 1),
        "base": _score(base, tokens, device),
        "model": _score(model, tokens, device),
    }


def _score(model: Any, tokens: np.ndarray, device: str) -> dict[str, float]:
    import torch

    from orchestrator.train.models import token_losses

    model = model.to(device).eval()
    total = 0.0
    with torch.inference_mode():
        for batch in np.array_split(tokens.astype(np.int64), math.ceil(len(tokens) / BATCH)):
            total += float(token_losses(model, torch.from_numpy(batch).to(device)).sum())
    loss = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    return {"loss": loss, "perplexity": math.exp(loss)}
