"""The held-out split while a model is trained: who evaluates what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.config import Recipe
from orchestrator.data.manifest import Manifest
from orchestrator.data.schedule import Role
from orchestrator.errors import RunFailed, UserError
from orchestrator.evaluation.held_out import HeldOut, held_out_tokens, sequences_of
from tests.made_runs import LENGTH, SEQUENCES, SHARDS, corpus, recipe


class Reader:
    """In an engine's place: tells what it is given to evaluate."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []
        self.sequences: set[int] = set()

    def evaluate(self, tokens: np.ndarray, counted: None, sequences: int) -> tuple[float, int]:
        self.seen.append(tokens)
        self.sequences.add(sequences)
        return 10.0, 4


def manifest_at(uri: str) -> Manifest:
    """Of a corpus whose held-out split is its training split."""
    made = corpus(uri)
    return replace(made, splits={**made.splits, "held_out": made.splits["train"]})


def settings(root: Path, held_out_sequences: int) -> Recipe:
    values = recipe(str(root)).model_dump(mode="json")
    return Recipe.model_validate({**values, "evaluation": {"held_out_sequences": held_out_sequences}})


@pytest.mark.parametrize("replicas", [1, 3, 5])
@pytest.mark.parametrize("wanted", [2, 14, 10**6])
def test_the_replicas_evaluate_every_sequence_once_in_shares_alike(tmp_path: Path, replicas: int, wanted: int) -> None:
    manifest, total = manifest_at(str(tmp_path)), min(wanted, SHARDS * SEQUENCES)
    reader = Reader()
    for rank in range(replicas):
        held_out = HeldOut(str(tmp_path), settings(tmp_path, wanted), manifest, Role(rank, (1,) * replicas))
        assert held_out.loss(reader) == 2.5
    assert reader.sequences == {-(-total // replicas)}
    assert max(map(len, reader.seen)) <= -(-total // replicas)
    assert np.array_equal(np.concatenate(reader.seen), held_out_tokens(str(tmp_path), manifest, 0, total))
    assert sum(map(len, reader.seen)) == total
    assert reader.seen[0].shape[1] == LENGTH


def test_without_a_held_out_sequence_nothing_is_evaluated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held-out split has not one sequence of 8 tokens") as refused:
        sequences_of(settings(tmp_path, 4), corpus(str(tmp_path)))
    assert "corpus.held_out" in refused.value.hint


def test_a_held_out_shard_that_is_missing_is_not_taken_for_one_of_training(tmp_path: Path) -> None:
    manifest = manifest_at(str(tmp_path))
    (tmp_path / manifest.shards("held_out")[0].name).unlink()
    with pytest.raises(RunFailed, match="is missing") as failed:
        held_out_tokens(str(tmp_path), manifest, 0, 1)
    assert (type(failed.value), "evaluation needs it" in failed.value.hint) == (RunFailed, True)
