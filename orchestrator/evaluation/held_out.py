"""The held-out split: its tokens, and the loss on it while a model is trained. Imports no Ray."""

from __future__ import annotations

from typing import Any

import numpy as np

from orchestrator.config import Recipe
from orchestrator.data.manifest import Manifest
from orchestrator.data.order import slice_of
from orchestrator.data.schedule import Role
from orchestrator.errors import RunFailed, ShardLost, UserError


def sequences_of(recipe: Recipe, manifest: Manifest) -> int:
    """How many held-out sequences a recipe evaluates on.

    Raises:
        UserError: there are none.
    """
    found = min(recipe.evaluation.held_out_sequences, manifest.sequences("held_out"))
    if not found:
        raise UserError(
            f"the held-out split has not one sequence of {manifest.sequence_length} tokens",
            "raise corpus.held_out",
        )
    return found


def held_out_tokens(corpus: str, manifest: Manifest, first: int, end: int) -> np.ndarray:
    """The held-out sequences first..end - 1, [sequences, sequence_length].

    Raises:
        RunFailed: a shard of them is missing or damaged.
    """
    try:
        return manifest.reader(corpus, "held_out").take(np.arange(first, end))
    except ShardLost as error:
        raise RunFailed(error.message, "evaluation needs it: restore it and run the same command") from None


class HeldOut:
    """One worker's part of the held-out sequences; every worker of an attempt has one."""

    def __init__(self, corpus: str, recipe: Recipe, manifest: Manifest, role: Role) -> None:
        total, replicas = sequences_of(recipe, manifest), len(role.shares)
        self._tokens = held_out_tokens(corpus, manifest, *slice_of(total, role.rank, (1,) * replicas))
        self._largest = -(-total // replicas)

    def loss(self, engine: Any) -> float:
        """Mean over all targets, in nats, the same on every worker. All call it."""
        loss_sum, targets = engine.evaluate(self._tokens, None, self._largest)
        return float(loss_sum / targets)
