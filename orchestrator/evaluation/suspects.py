"""The documents behind a loss spike, judged with the checkpoint from before it: a state that knows nothing of them.

A sample that stood out may hold several documents. Each is judged by the loss of its own tokens, among those of all
documents that were trained on around the spike.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.data import inspection
from orchestrator.data.manifest import Manifest
from orchestrator.errors import UserError
from orchestrator.runs import RunDir
from orchestrator.train import checkpoints
from orchestrator.train.spikes import SAMPLE_FLOOR, robust_scores

OTHERS = 64
"""Samples that the suspects are compared with, at most."""
LEAST_TARGETS = 4
"""A passage with fewer targets says nothing."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A document in a sample."""

    document: str
    sample: int
    tokens: int
    loss: float
    """Mean over its targets, in nats, before the spike."""
    z: float
    """How far the loss lies above those of the other documents, in robust deviations."""


def judge(run: RunDir, manifest: Manifest, step: int, device: str) -> tuple[int, list[Judged]]:
    """The step of the checkpoint, and the documents of the suspected samples, the worst first.

    Raises:
        UserError: no spike was found at the step, or no checkpoint from before it is left.
    """
    spike = next((found for found in reversed(run.spikes()) if found["step"] == step), None)
    if spike is None:
        known = ", ".join(str(found["step"]) for found in run.spikes()) or "none"
        raise UserError(f"{run.uri} has no loss spike at step {step}", f"steps with one: {known}")
    before = [known for known in checkpoints.committed_steps(run.checkpoints) if known < step]
    if not before:
        raise UserError(f"no checkpoint from before step {step} is left", "raise train.keep_checkpoints")
    suspected = [suspect["sample"] for suspect in spike["suspects"]]
    with np.load(io.BytesIO(storage.read(run.sample_losses(spike["attempt"], step)))) as kept:
        others = np.setdiff1d(kept["ids"], suspected)
    chosen = np.random.default_rng(step).permutation(others)[:OTHERS].tolist()
    judged = _judged(run, manifest, before[-1], [*suspected, *chosen], device)
    found = [found for found in judged if found.sample in suspected]
    return before[-1], sorted(found, key=lambda found: -found.z)


def _judged(run: RunDir, manifest: Manifest, step: int, samples: list[int], device: str) -> list[Judged]:
    losses = _token_losses(run, manifest, step, samples, device)
    passages = [passage for found in inspection.trace(run.corpus, manifest, samples) for passage in found]
    row = {sample: number for number, sample in enumerate(samples)}
    of_passage = [losses[row[p.sample], max(p.first, 1) : p.last + 1] for p in passages]
    telling = [(p, part) for p, part in zip(passages, of_passage, strict=True) if len(part) >= LEAST_TARGETS]
    means = np.array([part.mean() for _, part in telling])
    scores = robust_scores(means, SAMPLE_FLOOR)
    return [
        Judged(document=p.document, sample=p.sample, tokens=p.last - p.first + 1, loss=float(mean), z=float(z))
        for (p, _), mean, z in zip(telling, means, scores, strict=True)
    ]


def _token_losses(run: RunDir, manifest: Manifest, step: int, samples: list[int], device: str) -> np.ndarray:
    """Of every token but the first of each sample, [samples, sequence_length]; the first's is 0."""
    import torch

    from orchestrator.train.models import token_losses

    model = _model(run, manifest, step).to(device).eval()
    tokens = manifest.reader(run.corpus, "train").take(np.array(samples)).astype(np.int64)
    losses = np.zeros(tokens.shape)
    with torch.inference_mode():
        for number, sequence in enumerate(torch.from_numpy(tokens).to(device)):
            losses[number, 1:] = token_losses(model, sequence[None])[0].cpu().numpy()
    return losses


def _model(run: RunDir, manifest: Manifest, step: int) -> Any:
    import torch

    from orchestrator.train.models import filled, model_config
    from orchestrator.train.weights import CheckpointWeights

    recipe = run.recipe()
    config = model_config(recipe.model, manifest.vocab_size, recipe.train.sequence_length)
    weights = CheckpointWeights(run.checkpoints, checkpoints.read_commit(run.checkpoints, step))
    return filled(config, weights, torch.float32)
