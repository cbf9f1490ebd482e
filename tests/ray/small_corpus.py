"""A small corpus for the tests of the transport, in which no two sequences are alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from orchestrator.data import shards
from orchestrator.data.exclusions import Exclusions, LostShard
from orchestrator.data.manifest import Manifest, save_manifest
from orchestrator.data.order import Batches, Order, Pool, Stage
from orchestrator.data.schedule import Schedule

LENGTH, BATCH = 64, 12
SHARDS = (37, 50, 5, 61, 40)
"""Sequences of each."""
SAMPLES = sum(SHARDS)
EPOCH = SAMPLES // BATCH
"""Whole steps in one."""
FEW = 3 * BATCH * LENGTH
"""Tokens of a unit: three steps of a lone rank, or more of many ranks."""
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Corpus:
    uri: str
    rows: np.ndarray
    """All sequences, by sample id; no two are alike."""
    shards: list[shards.Shard]

    def schedule(
        self, *batches: Batches, skip: tuple[tuple[int, int], ...] = (), exclusions: Exclusions | None = None
    ) -> Schedule:
        order = Order(
            pools=(Pool(0, len(self.rows)),),
            stages=(Stage((1.0,)),),
            batches=batches or (Batches(BATCH),),
            seed=3,
            block=8,
            window=3,
        )
        return Schedule(
            order=order,
            sequence_length=LENGTH,
            corpus_hash=self.uri,
            skip_steps=skip,
            exclusions=exclusions or Exclusions(),
        )

    def lost(self, index: int) -> LostShard:
        shard = self.shards[index]
        return LostShard(name=shard.name, first=sum(SHARDS[:index]), samples=shard.sequences, reason="test")


def write_corpus(uri: str, seed: int = 0, vocab_size: int = 50_000) -> Corpus:
    rows = np.random.default_rng(seed).integers(0, vocab_size, (SAMPLES, LENGTH), dtype=np.uint32)
    written = []
    for number, part in enumerate(np.split(rows, np.cumsum(SHARDS)[:-1])):
        packed = shards.Packed(part.reshape(-1), [(part.size, "d")])
        written.append(shards.write_shard(uri, f"{number}.arrow", packed, LENGTH, vocab_size))
    splits = {"train": {"sequences": SAMPLES, "tokens": rows.size, "shards": list(map(asdict, written))}}
    manifest = Manifest(
        hash=uri,
        sequence_length=LENGTH,
        vocab_size=vocab_size,
        documents={},
        sources={},
        splits=splits,
        tail_tokens_dropped=0,
    )
    save_manifest(manifest, uri)
    return Corpus(uri, rows.astype(shards.token_type(vocab_size)), written)


def wait_for(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.02)
