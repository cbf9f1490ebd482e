"""Rolling hashes of runs of words and of bytes: what near-duplicates, shared spans and contamination are found by.

A window hashes to sum(value[byte_j] * x^(j - start)) mod 2^64, read off prefix sums and then mixed. Such polynomials
are weak in their low bits and on Thue-Morse strings, whatever x: over two letters, two of 1024 bytes collide and two of
32 bytes agree in 22 bits before the mixing. The random value of each byte serves every other text; nothing here resists
an adversary.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

from orchestrator.data.splitmix import mix

_X = 0xD1342543DE82EF95  # odd, so that it has an inverse
_INVERSE = pow(_X, -1, 2**64)
_BLOCK_BITS = 14
_BLOCK = 1 << _BLOCK_BITS
"""Bytes hashed at a time: their 64-bit values stay in the second-level cache, and memory does not grow with a text."""
_X_BLOCK, _INVERSE_BLOCK = pow(_X, _BLOCK, 2**64), pow(_INVERSE, _BLOCK, 2**64)
_PIECE = 1 << 16
"""Characters normalised at a time, for the same reasons."""
_BLANK = 0x20
_VALUES = mix(np.arange(256, dtype=np.uint64))


def words(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text's words: lower-cased runs of letters, digits and marks; each ideograph or kana below U+A000 is a word.

    Case is folded character by character and accents stay; compatibility forms (a ligature, a mathematical italic)
    are letters of their own.

    Returns:
        The normalised text in UTF-8, uint8 [bytes], with one blank for every run of anything else, and where each word
        starts and ends in it, int64 [words].
    """
    data = _normalise(text)
    letter = data != _BLANK
    ideograph = (data >= 0xE3) & (data <= 0xE9)  # the lead bytes of U+3000 to U+9FFF, which lead nothing else
    first = letter.copy()
    first[1:] &= ~letter[:-1]
    first |= ideograph
    first[3:] |= ideograph[:-3] & letter[3:]
    last = letter.copy()
    last[:-1] &= ~letter[1:] | first[1:]
    return data, np.flatnonzero(first), np.flatnonzero(last) + 1


def word_ngram_hashes(text: str, n: int) -> np.ndarray:
    """uint64 [words - n + 1]: a hash for each run of n words, in order; empty if the text has fewer."""
    data, starts, ends = words(text.replace("\0", " "))
    return window_hashes(data, starts[: max(len(starts) - n + 1, 0)], ends[n - 1 :])


def ngram_rows(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of `word_ngram_hashes` for many texts at once, which spares short ones most of the cost.

    A text of fewer than n words gives one hash, of all of them; a text without words gives none.

    Returns:
        The texts' hashes one after another, uint64, and where each text's begin, int64 [texts + 1].
    """
    # NUL belongs to no word, so it can stand between the texts, as a word that `words` leaves in place.
    data, starts, ends = words(" \0 ".join(text.replace("\0", " ") for text in texts))
    marks = np.flatnonzero(data[starts] == 0)
    first = np.concatenate([[0], marks + 1])
    count = np.concatenate([marks, [len(starts)]]) - first
    windows = np.maximum(count - n + 1, np.minimum(count, 1))
    offsets = np.concatenate([[0], np.cumsum(windows)])
    begin = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], windows)
    end = begin + np.repeat(np.minimum(count, n), windows) - 1
    return window_hashes(data, starts[begin], ends[end]), offsets


def window_hashes(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 [windows]: a hash of data[start:end] for each window, the same wherever the window stands.

    Args:
        data: uint8 [bytes].
        starts: int64 [windows], ascending, as are the ends.
    """
    blocks = _round_up(len(data) // _BLOCK + 1)
    block_powers, block_inverses = _powers(_X_BLOCK, blocks), _powers(_INVERSE_BLOCK, blocks)
    sums = [np.zeros(len(positions), dtype=np.uint64) for positions in (starts, ends)]
    total = np.zeros(1, dtype=np.uint64)
    for block, first in enumerate(range(0, len(data), _BLOCK)):
        prefix = total + block_powers[block] * _prefix_sums(data[first : first + _BLOCK])
        for positions, out in zip((starts, ends), sums, strict=True):
            # Position 0 has nothing before it and keeps its zero; the end of the data belongs to the last block.
            low, high = np.searchsorted(positions, (first, first + _BLOCK), side="right")
            out[low:high] = prefix[positions[low:high] - first]
        total = prefix[-1:]
    hashes = sums[1] - sums[0]
    hashes *= block_inverses[starts >> _BLOCK_BITS]
    hashes *= _powers(_INVERSE, _BLOCK)[starts & (_BLOCK - 1)]
    return mix(hashes)


def rolling_hashes(data: np.ndarray, k: int) -> np.ndarray:
    """uint64 [bytes - k + 1]: a hash of the k bytes from each position, equal to that of `window_hashes`."""
    hashes = np.empty(max(len(data) - k + 1, 0), dtype=np.uint64)
    for first in range(0, len(hashes), _BLOCK):
        out = hashes[first : first + _BLOCK]
        prefix = _prefix_sums(data[first : first + len(out) + k - 1])
        np.subtract(prefix[k:], prefix[:-k], out=out)
        out *= _powers(_INVERSE, _BLOCK)[: len(out)]
        out[:] = mix(out)
    return hashes


def _prefix_sums(data: np.ndarray) -> np.ndarray:
    """uint64 [bytes + 1]: the sum of value * x^j over the bytes before each position."""
    sums = np.empty(len(data) + 1, dtype=np.uint64)
    sums[0] = 0
    np.take(_VALUES, data, out=sums[1:])
    sums[1:] *= _powers(_X, _round_up(max(len(data), _BLOCK)))[: len(data)]
    return np.cumsum(sums, out=sums)


@functools.cache
def _powers(base: int, count: int) -> np.ndarray:
    """uint64 [count]: base^0, base^1, ... mod 2^64. Counts come as powers of two, so that few are kept."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers)
    powers.flags.writeable = False
    return powers


def _round_up(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _normalise(text: str) -> np.ndarray:
    """Lower-cased UTF-8 with one blank for every run of characters that belong to no word, uint8."""
    pieces = []
    for first in range(0, len(text), _PIECE):
        # A lone surrogate, which JSON can hold, must pass the codecs; it belongs to no word.
        points = np.frombuffer(text[first : first + _PIECE].encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        pieces.append(np.take(_letters(), points).tobytes().decode("utf-32-le").encode())
    data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    keep = data != _BLANK
    keep[1:] |= keep[:-1]
    return data.compress(keep)


@functools.cache
def _letters() -> np.ndarray:
    """uint32 [0x110000]: for each code point its lower case, or a blank if it belongs to no word."""
    table = np.full(0x110000, _BLANK, dtype=np.uint32)
    table[0] = 0
    for point in range(0x32000):  # beyond are no letters
        character = chr(point)
        if character.isalnum() or unicodedata.category(character).startswith("M"):
            lower = character.lower()
            table[point] = ord(lower) if len(lower) == 1 else point
    return table
