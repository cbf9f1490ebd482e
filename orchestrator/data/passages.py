"""Passages that an earlier document holds too: found over units, distributed, and cut from the later one.

Galactica's span deduplication (Taylor et al., 2022): identical spans of 100 bytes or more across documents, in a fixed
order; spans.py has the exact rules. Only documents that stay are compared, so nothing is cut for a copy that is gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from orchestrator import storage
from orchestrator.data import buckets, spans
from orchestrator.data.duplicates import Duplicates, partitions, read_index
from orchestrator.data.layout import CorpusDir
from orchestrator.data.numbers import row_of, unit_of
from orchestrator.data.tasks import Progress, run_tasks
from orchestrator.data.texts import read_texts

FINGERPRINT = np.dtype([("key", "<u8"), ("row", "<u4"), ("offset", "<u4")])
MATCH = np.dtype([("document", "<u8"), ("first", "<u8"), ("offset", "<u4"), ("first_offset", "<u4")])

CANDIDATES = 4
"""Earlier documents that a fingerprint is compared with: more find more of what is rare, see spans.first_matches."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Passages:
    """Where the matches among the documents that stay are written."""

    found: Duplicates
    indexes: tuple[str, ...]
    """Of each unit: the kind of its index."""

    def matches(self, unit: int) -> np.ndarray:
        """Fingerprints of a unit's documents that an earlier document has too, MATCH [n], sorted."""
        found = self.found
        parts = [
            buckets.read(found.path("matches", part), MATCH, unit, unit + 1, found.unit_count)
            for part in range(len(found.parts("matches")))
        ]
        return np.sort(np.concatenate(parts))


def find_passages(found: Duplicates, progress: Progress) -> Passages:
    """Compare the documents that are no duplicates."""

    def fingerprint(unit: int) -> tuple[str, int]:
        return fingerprint_unit(found, unit)

    indexed = run_tasks("fingerprint passages", fingerprint, found.units, progress)

    def compare(found: Duplicates, part: int, first: int, last: int) -> int:
        return _match_part(found, kinds, part, first, last)

    kinds = tuple(kind for kind, _ in indexed)
    # Where every passage is repeated, a record has as many matches as candidates, and numpy holds each a few times.
    size = sum(count for _, count in indexed) * MATCH.itemsize * CANDIDATES * 4
    partitions(found, "matches", compare, size, progress)
    return Passages(found, kinds)


def fingerprint_unit(found: Duplicates, unit: int) -> tuple[str, int]:
    """Index the passages of a unit's documents that stay, unless that was done. Returns the index and its size."""
    gone = found.gone(unit)["document"]
    kind = f"passages-{found.keys[unit][:8]}-{xxhash.xxh3_64_hexdigest(gone.tobytes())}"
    uri = found.corpus.index(kind, unit)
    if storage.exists(uri):
        return kind, buckets.size(uri, FINGERPRINT, buckets.KEY_BUCKETS)
    parts = [np.empty(0, FINGERPRINT)]
    skipped = set(row_of(gone).tolist())
    for row, text in _texts(found.corpus, unit):
        if row not in skipped:
            hashes, offsets = spans.fingerprints(text.encode())
            part = np.empty(len(hashes), FINGERPRINT)
            part["key"], part["row"], part["offset"] = hashes, row, offsets
            parts.append(part)
    records = np.concatenate(parts)
    buckets.write(uri, records, buckets.by_key(records["key"]), buckets.KEY_BUCKETS)
    return kind, len(records)


def _match_part(found: Duplicates, kinds: Sequence[str], part: int, first: int, last: int) -> int:
    records, documents = read_index(found.corpus, kinds, found.units, FINGERPRINT, first, last)
    columns = spans.first_matches(records["key"], documents, records["offset"].astype(np.int64), CANDIDATES)
    matches = np.empty(len(columns[0]), MATCH)
    for name, column in zip(("document", "offset", "first", "first_offset"), columns, strict=True):
        matches[name] = column
    buckets.write(found.path("matches", part), matches, buckets.by_unit(matches["document"]), found.unit_count)
    return len(matches)


def cuts(passages: Passages, unit: int) -> dict[int, list[Span]]:
    """Ranges of bytes to cut, by row of the unit."""
    matches = passages.matches(unit)
    if not len(matches):
        return {}
    corpus = passages.found.corpus
    own = _rows(corpus, unit, matches["document"])
    common: dict[int, list[Span]] = {row: [] for row in own}
    units = unit_of(matches["first"])
    for other in np.unique(units).tolist():
        chosen = matches[units == other]
        theirs = _rows(corpus, other, chosen["first"])
        # Sorted by document, then by the document that it is compared with.
        for (document, first), group in itertools.groupby(
            chosen, key=lambda match: (match["document"], match["first"])
        ):
            pairs = [(int(match["offset"]), int(match["first_offset"])) for match in group]
            row = row_of(int(document))
            common[row] += spans.common_spans(own[row], pairs, theirs[row_of(int(first))])
    return {row: removed for row, found in common.items() if (removed := spans.removed(own[row], found))}


def _rows(corpus: CorpusDir, unit: int, documents: np.ndarray) -> dict[int, bytes]:
    """The texts of some documents of a unit, by row."""
    wanted = set(row_of(documents).tolist())
    return {row: text.encode() for row, text in _texts(corpus, unit) if row in wanted}


def _texts(corpus: CorpusDir, unit: int) -> Iterator[tuple[int, str]]:
    return enumerate(text for (texts,) in read_texts(corpus.documents(unit), "text") for text in texts)
