"""Manifest: what a corpus directory holds, and the data order over it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data.exclusions import Exclusions
from orchestrator.data.layout import CorpusDir
from orchestrator.data.order import BLOCK_TOKENS, Batches, Order, Pool, Stage
from orchestrator.data.schedule import Schedule
from orchestrator.data.shards import Shard, ShardReader
from orchestrator.errors import StorageError, UserError

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus directory holds. Its `hash` names the exact token content, in order."""

    format: int = FORMAT
    hash: str = ""
    inputs: str = ""
    """Digest of the recipe's values that the corpus was made from."""
    files: str = ""
    """Digest of the sources' listing."""
    sequence_length: int
    vocab_size: int
    """Of the tokenizer, added tokens included."""
    documents: dict[str, Any]
    """read = kept + the sum of dropped, which counts by reason."""
    sources: dict[str, dict[str, Any]]
    """The same by source, with characters, tokens and `lengths`: documents by the power of two of their tokens."""
    splits: dict[str, dict[str, Any]]
    tail_tokens_dropped: int
    """At the very end of each group of sequences, too few to fill one."""
    clusters: dict[str, Any] = field(default_factory=dict)
    """Near-duplicates: clusters by size, and the largest."""

    def shards(self, split: str) -> list[Shard]:
        return [Shard(**shard) for shard in self.splits[split]["shards"]]

    def reader(self, corpus: str, split: str) -> ShardReader:
        return ShardReader(corpus, self.shards(split), self.sequence_length, self.vocab_size)

    def sequences(self, split: str) -> int:
        return int(self.splits[split]["sequences"])


def load_manifest(corpus: str) -> Manifest | None:
    """The manifest of a finished corpus, None for an unfinished one.

    Raises:
        StorageError: it cannot be read.
    """
    uri = CorpusDir(corpus).manifest
    try:
        return Manifest(**storage.read_json(uri))
    except FileNotFoundError:
        return None
    except TypeError as error:
        raise StorageError(f"{uri} is of another version of Terrane, or damaged: {error}") from None


def save_manifest(manifest: Manifest, corpus: str) -> None:
    storage.write(CorpusDir(corpus).manifest, (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def data_order(manifest: Manifest, recipe: Recipe) -> Order:
    """Which training sequences every step of a recipe consumes.

    Raises:
        UserError: the mixture draws from a source of less than one sequence.
    """
    pools: tuple[Pool, ...] = (Pool(0, manifest.sequences("train")),)
    stages: tuple[Stage, ...] = (Stage((1.0,)),)
    if recipe.corpus.mixture:
        names = [source.name for source in recipe.corpus.sources]
        pools = tuple(_pool(manifest, name) for name in names)
        stages = tuple(
            Stage(
                tuple(stage.weights.get(name, 0.0) for name in names),
                stage.tokens and -(-stage.tokens // manifest.sequence_length),
            )
            for stage in recipe.corpus.mixture
        )
        for name, pool in zip(names, pools, strict=True):
            if not pool.samples and any(stage.weights.get(name) for stage in recipe.corpus.mixture):
                raise UserError(
                    f"the mixture draws from {name}, which holds less than one sequence of "
                    f"{manifest.sequence_length} tokens",
                    "give it more text, or no weight",
                )
    return Order(
        pools=pools,
        stages=stages,
        batches=(
            *(Batches(stretch.sequences, stretch.steps) for stretch in recipe.train.batch_ramp),
            Batches(recipe.train.global_batch_size),
        ),
        seed=recipe.train.seed,
        block=max(1, BLOCK_TOKENS // manifest.sequence_length),
    )


def schedule(manifest: Manifest, recipe: Recipe, exclusions: Exclusions | None = None) -> Schedule:
    """What every step of a recipe consumes."""
    return Schedule(
        order=data_order(manifest, recipe),
        sequence_length=manifest.sequence_length,
        corpus_hash=manifest.hash,
        skip_steps=recipe.train.skip_steps,
        exclusions=exclusions or Exclusions(),
    )


def _pool(manifest: Manifest, source: str) -> Pool:
    """The sample ids of a source: its shards stand together."""
    found = manifest.shards("train")
    first = next((i for i, shard in enumerate(found) if shard.source == source), len(found))
    samples = sum(shard.sequences for shard in found if shard.source == source)
    return Pool(sum(shard.sequences for shard in found[:first]), samples)
