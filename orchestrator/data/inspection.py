"""What a finished corpus holds, and which documents stand behind its sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.data import shards
from orchestrator.data.layout import CorpusDir
from orchestrator.data.manifest import Manifest
from orchestrator.data.numbers import row_of, unit_of
from orchestrator.data.texts import read_texts

SIDECARS_AT_ONCE = 8


@dataclass(frozen=True)
class Passage:
    """A run of a sequence's tokens that comes from one document."""

    sample: int
    first: int
    """Of the tokens of the sequence."""
    last: int
    document: str
    shard: str


def occurrences(
    uri: str, manifest: Manifest, documents: Sequence[str], lost: Set[str] = frozenset()
) -> dict[str, list[tuple[int, int, int]]]:
    """Where documents stand in the training split: (sample, first token, last token) each.

    Reads the sidecars of all shards but the lost ones.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(documents, pa.string())
    found: dict[str, list[tuple[int, int, int]]] = {document: [] for document in documents}
    length, first = manifest.sequence_length, 0
    with ThreadPoolExecutor(SIDECARS_AT_ONCE) as pool:
        listed = manifest.shards("train")
        readable = [shard for shard in listed if shard.name not in lost]
        sidecars = pool.map(lambda shard: shards.read_sidecar(uri, shard.name), readable)
        for shard in listed:
            if shard.name in lost:
                first += shard.sequences
                continue
            sidecar = next(sidecars)
            for run in np.flatnonzero(pc.is_in(sidecar.documents, wanted).to_numpy(zero_copy_only=False)):
                begin, end = int(sidecar.starts[run]), int(sidecar.starts[run] + sidecar.lengths[run])
                for sample in range(begin // length, -(-end // length)):
                    place = (max(begin - sample * length, 0), min(end - sample * length, length) - 1)
                    found[sidecar.documents[run].as_py()].append((first + sample, *place))
            first += shard.sequences
    return found


@dataclass(frozen=True)
class DroppedDocument:
    id: str
    reason: str
    text: str
    of: str = ""
    """The document that it repeats: its number, or its id."""


def trace(uri: str, manifest: Manifest, samples: list[int], split: str = "train") -> list[list[Passage]]:
    """The documents of some sequences, by sample id, of each its passages. Reads the sidecars of their shards only.

    Raises:
        IndexError: there is no such sample.
    """
    found = manifest.shards(split)
    ends = np.cumsum([shard.sequences for shard in found])
    if samples and not 0 <= min(samples) <= max(samples) < ends[-1]:
        raise IndexError(f"samples go from 0 to {ends[-1] - 1}")
    places = [int(np.searchsorted(ends, sample, side="right")) for sample in samples]
    with ThreadPoolExecutor(SIDECARS_AT_ONCE) as pool:
        chosen = sorted(set(places))
        sidecars = dict(zip(chosen, pool.map(lambda p: shards.read_sidecar(uri, found[p].name), chosen), strict=True))
    return [
        [
            Passage(sample, first, last, document, found[place].name)
            for first, last, document in sidecars[place].passages(
                sample - int(ends[place]) + found[place].sequences, manifest.sequence_length
            )
        ]
        for sample, place in zip(samples, places, strict=True)
    ]


def dropped(uri: str, reason: str | None = None) -> Iterator[DroppedDocument]:
    """Every document that was read and is not part of the corpus, or those of one reason."""
    for name in storage.list_files(storage.join(uri, "dropped")):
        columns = ["id", "reason", "text"] + (["of"] if name.endswith(".duplicates.arrow") else [])
        for batch in read_texts(storage.join(uri, "dropped", name), *columns):
            for row in zip(*batch, strict=True):
                if reason is None or row[1] == reason:
                    yield DroppedDocument(*row)


def document_ids(uri: str, numbers: list[int]) -> dict[int, str]:
    """The ids of documents by their numbers."""
    found: dict[int, str] = {}
    for unit in sorted({unit_of(number) for number in numbers}):
        ids = [id_ for (batch,) in read_texts(CorpusDir(uri).documents(unit), "id") for id_ in batch]
        found |= {number: ids[row_of(number)] for number in numbers if unit_of(number) == unit}
    return found


def clusters(uri: str, manifest: Manifest) -> list[dict[str, Any]]:
    """The largest clusters of near-duplicates: their size, the document that stays and some of the others."""
    largest = manifest.clusters.get("largest", [])
    ids = document_ids(uri, [number for _, first, others in largest for number in (first, *others)])
    return [
        {"size": size, "kept": ids[first], "dropped": [ids[other] for other in others]}
        for size, first, others in largest
    ]
