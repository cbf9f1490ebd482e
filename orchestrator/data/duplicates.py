"""Deduplication over units, distributed: no task holds more than its partition of the records, and none the corpus.

Records that must meet have the same key, so each partition of the keys is compared by itself (buckets.py is the
shuffle). What is found is written by unit, for the tasks that pack. The order of documents is that of their numbers:
the first of several stays.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from orchestrator import storage
from orchestrator.data import buckets, components, minhash
from orchestrator.data.extraction import EXACT, NEAR, UnitFacts
from orchestrator.data.layout import CorpusDir
from orchestrator.data.numbers import number_of
from orchestrator.data.sources import Unit
from orchestrator.data.splitmix import mix
from orchestrator.data.tasks import Progress, run_tasks
from orchestrator.errors import RunFailed

PARTITION_BYTES = 128 * 2**20
"""Of the records that one task compares."""

LOCAL_EDGES = 2**22
"""Up to this many pairs of near-duplicates are joined to clusters by one task, 64 MiB of them."""

MAX_ROUNDS = 64

PAIR = np.dtype([("document", "<u8"), ("first", "<u8")])
"""A duplicate and the document that stays; or, on the way there, two nodes of an edge."""

GONE = np.dtype([("document", "<u8"), ("first", "<u8"), ("near", "?")])

JOIN = "join duplicates"
LARGEST = 10
EXAMPLES = 3


@dataclass(frozen=True)
class Duplicates:
    """Where the duplicates among a set of units are written."""

    corpus: CorpusDir
    state: str
    """Digest of the units: another set of units has files of its own."""
    keys: dict[int, str]
    """Of each unit's facts, by its number."""

    @property
    def units(self) -> list[int]:
        return list(self.keys)

    @property
    def unit_count(self) -> int:
        return max(self.keys) + 1

    def path(self, kind: str, part: int) -> str:
        return self.corpus.dedup(self.state, kind, part)

    def parts(self, kind: str) -> list[int]:
        """What the task of each part returned.

        Raises:
            FileNotFoundError: the kind is not done.
        """
        return list(storage.read_json(self.corpus.dedup_parts(self.state, kind)))

    def publish(self, kind: str, results: list[int]) -> None:
        """Say that every part of a kind is written."""
        storage.write(self.corpus.dedup_parts(self.state, kind), json.dumps(results).encode())

    def of_unit(self, kind: str, unit: int) -> np.ndarray:
        """The pairs of a unit's documents, in order; kind is exact or near."""
        found = [
            buckets.read(self.path(kind, part), PAIR, unit, unit + 1, self.unit_count)
            for part in range(len(self.parts(kind)))
        ]
        return np.sort(np.concatenate([np.empty(0, PAIR), *found]))

    def gone(self, unit: int) -> np.ndarray:
        """The duplicates of a unit, sorted, GONE [n]; one that is both counts as exact."""
        parts = []
        for kind in ("exact", "near"):
            pairs = self.of_unit(kind, unit)
            part = np.empty(len(pairs), GONE)
            part["document"], part["first"], part["near"] = pairs["document"], pairs["first"], kind == "near"
            parts.append(part)
        every = np.concatenate(parts)
        return np.asarray(every[np.unique(every["document"], return_index=True)[1]])

    def clusters(self) -> dict[str, Any]:
        """Sizes of the clusters of near-duplicates, counted, and the largest of them."""
        sizes: dict[str, int] = {}
        largest: list[tuple[int, int, list[int]]] = []
        for part in range(len(self.parts("near"))):
            found = storage.read_json(self.path("clusters", part))
            for size, count in found["sizes"].items():
                sizes[size] = sizes.get(size, 0) + count
            largest += found["largest"]
        return {
            "sizes": dict(sorted(sizes.items(), key=lambda item: int(item[0]))),
            "largest": sorted(largest, key=lambda cluster: -cluster[0])[:LARGEST],
        }


def find_duplicates(
    corpus: CorpusDir, units: Sequence[Unit], facts: Sequence[UnitFacts], near: float | None, progress: Progress
) -> Duplicates:
    """Exact duplicates by content hash; near-duplicates as connected components over MinHash-LSH.

    Args:
        near: the Jaccard threshold; None finds exact ones only.
    """
    keys = {unit.number: fact.key for unit, fact in zip(units, facts, strict=True)}
    found = Duplicates(corpus, xxhash.xxh3_64_hexdigest(json.dumps(keys).encode()), keys)
    written = sum(fact.written for fact in facts)
    partitions(found, "exact", _exact_part, written * EXACT.itemsize, progress)
    if near is None:
        found.publish("near", [])
        return found
    size = sum(fact.near_records for fact in facts) * NEAR.itemsize

    def compare(found: Duplicates, part: int, first: int, last: int) -> int:
        return _near_part(found, part, first, last, near)

    edges = partitions(found, "edges", compare, size, progress)
    _join(found, sum(edges), progress)
    return found


# --- partitions -------------------------------------------------------------------------------------------------------


def partitions(
    found: Duplicates,
    kind: str,
    work: Callable[[Duplicates, int, int, int], int],
    size: int,
    progress: Progress,
) -> list[int]:
    """Run work(found, part, first bucket, last bucket) for every partition; the numbers that it returns."""
    with contextlib.suppress(FileNotFoundError):
        return found.parts(kind)
    count = min(max(1, -(-size // PARTITION_BYTES)), buckets.KEY_BUCKETS)
    ranges = _ranges(count)

    def run(part: int) -> int:
        return work(found, part, *ranges[part])

    results = run_tasks(f"compare ({kind})", run, range(count), progress)
    found.publish(kind, results)
    return results


def read_index(
    corpus: CorpusDir, kinds: Sequence[str], units: Sequence[int], dtype: np.dtype[Any], first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """The records of a partition from every unit's index of its kind, and the document number of each."""
    parts = [
        buckets.read(corpus.index(kind, unit), dtype, first, last, buckets.KEY_BUCKETS)
        for kind, unit in zip(kinds, units, strict=True)
    ]
    documents = [number_of(unit, part["row"]) for unit, part in zip(units, parts, strict=True)]
    return np.concatenate(parts), np.concatenate(documents)


def _exact_part(found: Duplicates, part: int, first: int, last: int) -> int:
    records, documents = read_index(found.corpus, ["exact"] * len(found.units), found.units, EXACT, first, last)
    order = np.lexsort((documents, records["rest"], records["key"]))
    keys, rest, documents = records["key"][order], records["rest"][order], documents[order]
    repeats = np.zeros(len(order), dtype=bool)
    repeats[1:] = (keys[1:] == keys[:-1]) & (rest[1:] == rest[:-1])
    leader = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
    _write_pairs(found, "exact", part, documents[repeats], documents[leader[repeats]])
    return int(repeats.sum())


def _near_part(found: Duplicates, part: int, first: int, last: int, threshold: float) -> int:
    records, documents = read_index(found.corpus, ["near"] * len(found.units), found.units, NEAR, first, last)
    edges = minhash.duplicate_edges(records["key"], documents, records["sketch"], threshold)
    edges = components.forest(edges)
    _write_edges(found, "edges", part, components.symmetric(edges))
    return len(edges)


def _write_pairs(found: Duplicates, kind: str, part: int, documents: np.ndarray, firsts: np.ndarray) -> None:
    pairs = np.empty(len(documents), PAIR)
    pairs["document"], pairs["first"] = documents, firsts
    buckets.write(found.path(kind, part), pairs, buckets.by_unit(documents), found.unit_count)


# --- clusters ---------------------------------------------------------------------------------------------------------


def _join(found: Duplicates, edges: int, progress: Progress) -> None:
    """Edges to stars: every document of a cluster linked to the cluster's first."""
    with contextlib.suppress(FileNotFoundError):
        found.parts("near")
        return
    if edges <= LOCAL_EDGES:
        found.publish("near", run_tasks(JOIN, lambda _: _join_here(found), [0], progress))
    else:
        found.publish("near", _join_by_rounds(found, progress))


def _join_here(found: Duplicates) -> int:
    edges = _read_edges(found, "edges", 0, buckets.KEY_BUCKETS)
    return _finish(found, 0, *components.components(edges))


def _join_by_rounds(found: Duplicates, progress: Progress) -> list[int]:
    """Large-star and small-star in turn until nothing changes (Kiveris et al., 2014)."""
    count = len(found.parts("edges"))
    ranges = _ranges(count)

    def large(part: int) -> int:
        return _write_edges(found, "large", part, components.large_star(_read_edges(found, kind, *ranges[part])))

    def small(part: int) -> int:
        edges = components.small_star(_read_edges(found, "large", *ranges[part]))
        return _write_edges(found, "small", part, components.symmetric(edges))

    def finish(part: int) -> int:
        edges = _read_edges(found, "small", *ranges[part])
        return _finish(found, part, edges[:, 1], edges[:, 0])

    kind, before = "edges", [0]
    for _ in range(MAX_ROUNDS):
        found.publish("large", run_tasks(JOIN, large, range(count), progress))
        after = run_tasks(JOIN, small, range(count), progress)
        found.publish("small", after)
        if after == before:
            return run_tasks(JOIN, finish, range(count), progress)
        kind, before = "small", after
    raise RunFailed(f"near-duplicates did not settle into clusters in {MAX_ROUNDS} rounds", "report this")


def _finish(found: Duplicates, part: int, documents: np.ndarray, firsts: np.ndarray) -> int:
    """Write the pairs of whole clusters by unit, and what there is to tell of them. Returns the number of pairs."""
    duplicates = firsts < documents
    documents, firsts = documents[duplicates], firsts[duplicates]
    _write_pairs(found, "near", part, documents, firsts)
    leaders, counts = np.unique(firsts, return_counts=True)
    sizes, how_many = np.unique(counts + 1, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:LARGEST]
    facts = {
        "sizes": {str(size): int(many) for size, many in zip(sizes, how_many, strict=True)},
        "largest": [
            (int(counts[i]) + 1, int(leaders[i]), [int(d) for d in documents[firsts == leaders[i]][:EXAMPLES]])
            for i in largest
        ],
    }
    storage.write(found.path("clusters", part), json.dumps(facts).encode())
    return len(documents)


def _ranges(count: int) -> list[tuple[int, int]]:
    """The buckets of each of `count` partitions."""
    edges = [buckets.KEY_BUCKETS * part // count for part in range(count + 1)]
    return list(itertools.pairwise(edges))


def _write_edges(found: Duplicates, kind: str, part: int, edges: np.ndarray) -> int:
    """Write records [n, 2] cut by their first node. Returns a checksum of their set."""
    pairs = np.empty(len(edges), PAIR)
    pairs["document"], pairs["first"] = edges[:, 0], edges[:, 1]
    buckets.write(found.path(kind, part), pairs, buckets.by_key(mix(edges[:, 0])), buckets.KEY_BUCKETS)
    return components.checksum(edges)


def _read_edges(found: Duplicates, kind: str, first: int, last: int) -> np.ndarray:
    """uint64 [n, 2]: the edges of every part whose first node is in a range of buckets."""
    count = len(found.parts(kind))
    parts = [buckets.read(found.path(kind, part), PAIR, first, last, buckets.KEY_BUCKETS) for part in range(count)]
    pairs = np.concatenate(parts)
    return np.stack([pairs["document"], pairs["first"]], axis=1)
