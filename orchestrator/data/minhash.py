"""Near-duplicates by MinHash: signatures, the band keys that bring candidates together, and the check of each pair.

A record that travels is (band key, document, sketch), so a pair is checked where its bucket is, without the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from orchestrator.data.components import unique
from orchestrator.data.ngrams import ngram_rows
from orchestrator.data.splitmix import mix

SKETCH_BYTES = 64
_SEED = 0x7E11
_BATCH = 1 << 19
"""Characters hashed at a time."""
_MISS_WEIGHT = 0.99
"""Against 0.01 for a false candidate: candidates are checked, a missed pair is gone."""
_REPRESENTATIVES = 8
_STANDARD_ERRORS = 2.0
_ROWS = 1 << 18
"""Pairs compared at a time, to bound memory."""
_EQUAL_NIBBLES = np.array([(x & 0x0F == 0) + (x & 0xF0 == 0) for x in range(256)], dtype=np.uint8)


def signatures(texts: Sequence[str], ngram: int = 5, permutations: int = 128) -> np.ndarray:
    """MinHash signatures of the texts' sets of word n-grams, uint32 [texts, permutations].

    Two texts agree at a position with the probability of their Jaccard similarity. A text of fewer words than `ngram`
    counts as one n-gram; all texts without words share a signature of their own.
    """
    import rensa

    rows = []
    for batch in _batches(texts):
        hashes, offsets = ngram_rows(batch, ngram)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, offsets.astype(np.uint64), permutations, _SEED
        )
        rows.append(np.array(matrix.to_rows(), dtype=np.uint32))
    return np.concatenate(rows) if rows else np.empty((0, permutations), dtype=np.uint32)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    first, size = 0, 0
    for index, text in enumerate(texts):
        if size and size + len(text) > _BATCH:
            yield texts[first:index]
            first, size = index, 0
        size += len(text)
    if first < len(texts):
        yield texts[first:]


def bands_for(threshold: float, permutations: int = 128) -> tuple[int, int]:
    """The number of bands and the rows in each that suit a Jaccard threshold.

    A pair of similarity s meets in some bucket with probability 1 - (1 - s^rows)^bands. The choice has the least
    weighted area of that curve below the threshold (false candidates) and above the curve past it (misses), as in
    Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4, and datasketch.
    """
    grid = (np.arange(1000) + 0.5) / 1000
    past = grid >= threshold
    best = (np.inf, 1, 1)
    for rows in range(1, permutations + 1):
        for bands in range(1, permutations // rows + 1):
            met = 1 - (1 - grid**rows) ** bands
            cost = (1 - _MISS_WEIGHT) * met[~past].sum() + _MISS_WEIGHT * (1 - met[past]).sum()
            best = min(best, (float(cost), bands, rows))
    return best[1], best[2]


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64 [documents, bands]: a hash of each band of a signature, the band's number mixed in."""
    cut = signatures[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    multipliers = mix(np.arange(1, rows + 1, dtype=np.uint64)) | np.uint64(1)
    return mix((cut * multipliers).sum(axis=2) + mix(np.arange(bands, dtype=np.uint64)))


def sketches(signatures: np.ndarray) -> np.ndarray:
    """Four bits of each position of a signature, uint8 [documents, permutations / 2]: enough to estimate similarity.

    b-bit MinHash (Li and König, "b-Bit Minwise Hashing", 2010). With 64 bytes to spend, four bits of 128 positions have
    three quarters of the standard error of eight bits of 64.
    """
    # The top bits of a product depend on all bits below, however rensa lays out its values.
    bits = ((signatures * np.uint32(0x9E3779B1)) >> np.uint32(28)).astype(np.uint8)
    return bits[:, 0::2] | (bits[:, 1::2] << np.uint8(4))


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of rows of sketches [..., bytes], float64; unrelated texts vary around zero."""
    equal = _EQUAL_NIBBLES[a ^ b].sum(axis=-1, dtype=np.int64) / (2 * a.shape[-1])
    return np.asarray((equal - 1 / 16) / (1 - 1 / 16))


def tolerance(threshold: float, permutations: int = 128) -> float:
    """How far below the threshold an estimate may lie: two standard errors, so that one true pair in 44 is refused."""
    equal = threshold + (1 - threshold) / 16
    return float(_STANDARD_ERRORS * np.sqrt(equal * (1 - equal) / permutations) / (1 - 1 / 16))


def duplicate_edges(keys: np.ndarray, documents: np.ndarray, sketches: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs of near-duplicates among the records of one partition, uint64 [pairs, 2], (smaller, larger), unique.

    A bucket's first document represents it: the documents similar to it are linked to it. The first of the others is
    the next representative, and so on, up to eight; what resembles none of them stays unlinked here. So a bucket of a
    million documents costs at most eight million comparisons, and copies of one text meet in the first pass. Documents
    that resemble each other but belong to different representatives may still meet in another band.

    Args:
        keys: uint64 [records], the band keys; equal keys make a bucket.
        documents: uint64 [records].
        sketches: uint8 [records, bytes].
        threshold: the Jaccard similarity from which documents count as duplicates; an estimate may fall short of it by
            `tolerance`.
    """
    least = threshold - tolerance(threshold, 2 * sketches.shape[1])
    left = np.lexsort((documents, keys))
    edges = []
    for _ in range(_REPRESENTATIVES):
        starts = np.ones(len(left), dtype=bool)
        starts[1:] = keys[left[1:]] != keys[left[:-1]]
        representative = left[starts][np.cumsum(starts) - 1]
        left, representative = left[~starts], representative[~starts]
        if not len(left):
            break
        linked = _similar(sketches, representative, left, least)
        edges.append(np.stack([documents[representative[linked]], documents[left[linked]]], axis=1))
        left = left[~linked]
    return unique(np.concatenate(edges)) if edges else np.empty((0, 2), dtype=np.uint64)


def _similar(sketches: np.ndarray, a: np.ndarray, b: np.ndarray, least: float) -> np.ndarray:
    """Whether the estimated similarity of rows a and b is at least this, bool [pairs]."""
    parts = [
        similarity(sketches[a[first : first + _ROWS]], sketches[b[first : first + _ROWS]]) >= least
        for first in range(0, len(a), _ROWS)
    ]
    return np.concatenate(parts)
