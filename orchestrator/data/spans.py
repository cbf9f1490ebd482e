"""Identical spans of 100 bytes or more across documents, found by winnowing and cut back to paragraph ends.

Galactica's deduplication (Taylor et al., 2022): sources in a fixed order, the first occurrence of a span stays. Any 100
bytes hold 51 runs of 50 bytes; the one of least hash among them is a fingerprint in every document that has these 100
bytes (Schleimer, Wilkerson and Aiken, "Winnowing", 2003), so documents that share a span share a fingerprint in it.
"""

from __future__ import annotations

import re

import numpy as np

from orchestrator.data.ngrams import rolling_hashes

SPAN = 100
"""Bytes of the shortest span that counts."""
_GRAM = 50
_WINDOW = SPAN - _GRAM + 1
_GAP = 4
_BLOCK = (1 << 14) - SPAN
"""Windows minimised at a time: bounds memory, and keys hold a position in 16 bits."""
_LAST = np.uint64(2**64 - 1)


def fingerprints(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, uint64 [n], and offsets, int64 [n], of the 50 bytes of least hash in each 100 bytes of a text.

    The rightmost of equals, about one in 26 bytes. Runs of one repeated byte (rules, blanks) come last of all and are
    left out: they are the same everywhere and would gather in one partition. So 100 equal bytes alone are not found.
    """
    data = np.frombuffer(text, dtype=np.uint8)
    hashes, offsets = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for first in range(0, len(data) - SPAN + 1, _BLOCK):
        piece = data[first : first + _BLOCK + SPAN - 1]
        grams = rolling_hashes(piece, _GRAM)
        grams[_is_repeated_byte(piece)] = _LAST
        chosen = _rightmost_minima(grams)
        chosen = chosen[grams[chosen] != _LAST]
        hashes.append(grams[chosen])
        offsets.append(chosen + first)
    joined = np.concatenate(offsets)
    new = _differs(joined)  # windows of two blocks may have chosen the same
    return np.concatenate(hashes)[new], joined[new]


def _is_repeated_byte(data: np.ndarray) -> np.ndarray:
    """Whether the bytes from each position are all the same, bool [bytes - 49]."""
    pairs = np.zeros(len(data), dtype=np.int64)
    np.cumsum(data[1:] == data[:-1], out=pairs[1:])
    return np.asarray(pairs[_GRAM - 1 :] - pairs[: 1 - _GRAM] == _GRAM - 1)


def _rightmost_minima(hashes: np.ndarray) -> np.ndarray:
    """The positions that are the rightmost minimum of some window, int64, ascending."""
    # The upper 48 bits of a hash, then 16 that fall with the position, so that of equals the last is least.
    positions = np.uint64(0xFFFF) - np.arange(len(hashes), dtype=np.uint64)
    least = (hashes & np.uint64(0xFFFFFFFFFFFF0000)) | positions
    width = 1
    while width < _WINDOW:  # minima over twice the width, from two that overlap where that would be too wide
        step = min(width, _WINDOW - width)
        least = np.minimum(least[:-step], least[step:])
        width += step
    chosen = 0xFFFF - (least & np.uint64(0xFFFF)).astype(np.int64)
    return np.asarray(chosen[_differs(chosen)])


def _differs(values: np.ndarray) -> np.ndarray:
    """Whether each value differs from the one before; the first does, bool [n]."""
    differs = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=differs[1:])
    return differs


def first_matches(
    hashes: np.ndarray, documents: np.ndarray, offsets: np.ndarray, candidates: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where a partition's fingerprints stand in earlier documents: (document, offset, other document, other offset).

    A record is matched with the first `candidates` records of its hash, in the order of documents and offsets, that
    belong to earlier documents; repetitions within one document match nothing. The search for spans is exact if no
    fingerprint has more earlier records than that. Otherwise a span may stay whose every fingerprint is a phrase that
    also stands, in other surroundings, further ahead: of the duplicate bytes in four textbooks and 122 papers, 0.5 %
    with one candidate, and 0.2 % with four, which compare twice as many pairs of documents.

    Args:
        hashes: uint64 [n]; documents: uint64 [n]; offsets: int64 [n].
    """
    order = np.lexsort((offsets, documents, hashes))
    hashes, documents, offsets = hashes[order], documents[order], offsets[order]
    new_hash = _differs(hashes)
    new_document = new_hash | _differs(documents)
    first = np.flatnonzero(new_hash)[np.cumsum(new_hash) - 1]
    earlier = np.minimum(np.flatnonzero(new_document)[np.cumsum(new_document) - 1] - first, candidates)
    this = np.repeat(np.arange(len(hashes)), earlier)
    nth = np.arange(len(this)) - np.repeat(np.cumsum(earlier) - earlier, earlier)
    other = first[this] + nth
    return documents[this], offsets[this], documents[other], offsets[other]


def common_spans(text: bytes, matches: list[tuple[int, int]], other: bytes) -> list[tuple[int, int]]:
    """Spans (start, end) of at least 100 bytes of a text that stand in another as well, ascending.

    Args:
        matches: (offset, offset in the other) of bytes that are probably equal; each is extended as far as the texts
            agree.
    """
    a, b = np.frombuffer(text, dtype=np.uint8), np.frombuffer(other, dtype=np.uint8)
    found: set[tuple[int, int]] = set()
    reached: dict[int, int] = {}
    for offset, other_offset in sorted(matches):
        shift = offset - other_offset
        if offset < reached.get(shift, 0):
            continue
        start = offset - _agreement(a[:offset][::-1], b[:other_offset][::-1])
        end = reached[shift] = offset + _agreement(a[offset:], b[other_offset:])
        if end - start >= SPAN:
            found.add((start, end))
    return sorted(found)


def _agreement(a: np.ndarray, b: np.ndarray) -> int:
    """The number of equal bytes that both begin with."""
    length = min(len(a), len(b))
    first, step = 0, 256
    while first < length:
        last = min(first + step, length)
        differ = a[first:last] != b[first:last]
        position = int(differ.argmax())
        if differ[position]:
            return first + position
        first, step = last, min(2 * step, 1 << 16)
    return length


def removed(text: bytes, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts (start, end) to take out of a text for its spans that stand in earlier documents.

    Spans with at most 4 bytes between them are one. Each is cut back to whole paragraphs: what a blank line, or else
    the text's start or end, bounds on both sides; in a text without blank lines every line is a paragraph. So a cut
    never leaves half a sentence, or half a character.
    """
    starts, ends = _paragraphs(text)
    parts = []
    for start, end in _joined(spans):
        first = int(np.searchsorted(starts, start, side="left"))
        last = int(np.searchsorted(ends, end, side="right")) - 1
        if first <= last:
            parts.append((int(starts[first]), int(ends[last])))
    return parts


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start - joined[-1][1] <= _GAP:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")


def _paragraphs(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each paragraph starts and ends, int64 [paragraphs]."""
    breaks = [match.span() for match in _BLANK_LINES.finditer(text)]
    if not breaks:
        breaks = [match.span() for match in re.finditer(rb"\n", text)]
    starts = [0, *(end for _, end in breaks)]
    ends = [*(start for start, _ in breaks), len(text)]
    return np.array(starts), np.array(ends)


def cut(text: bytes, removed: list[tuple[int, int]]) -> str:
    """The text without these parts, at most one blank line in a row."""
    kept, position = [], 0
    for start, end in removed:
        kept.append(text[position:start])
        position = end
    kept.append(text[position:])
    # A lone surrogate, which JSON can hold, may be in there.
    rest = b"".join(kept).decode("utf-8", "surrogatepass")
    return re.sub(r"\n(?:[ \t\r]*\n){2,}", "\n\n", rest).strip()
