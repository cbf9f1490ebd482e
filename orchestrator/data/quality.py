"""Quality rules: whether a document is worth training on, decided by cheap counts over its text.

The thresholds are the recipe's (`corpus.quality`). The rules follow Gopher (Rae et al., "Scaling Language Models",
2021, appendix A.1) where they fit science. Counts run over whole texts in numpy; what needs words as strings looks at a
sample.
"""

from __future__ import annotations

import collections
import operator
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from orchestrator.corpus_config import QualityConfig

LONG_WORD = 200
"""Characters; no word of any language is longer, and neither are most links."""
UNSPACED_MEAN = 12
"""Characters between blanks, on average, from which mostly non-ASCII text is taken to write none between words."""
SHORT_LINE_WORDS, SHORT_LINE_CHARACTERS = 3, 48
SAMPLE_PIECES, PIECE_CHARACTERS = 8, 200

# Function words of languages in Latin script, of two letters and more: single letters are variables and specks too.
STOP_WORDS = frozenset(
    (
        "the of and to in is that for with are was by be this from at or an it which not have we as on can "  # English
        "der die das und ist nicht mit den von ein eine für auf dem des werden wird sich auch "  # German
        "le la les des et est une dans que qui pour par sur du au aux avec pas sont ce "  # French
        "el los las del en una por con para se su como más es lo "  # Spanish
        "os do da dos das não uma com em ao ou mais "  # Portuguese
        "il di che della per gli non sono nel alla un "  # Italian
        "het een van zijn niet dat op voor aan er worden ook "  # Dutch
        "och att det som är av på för inte med ett og til ikke et af ja oli että ovat ei tai "  # Nordic, Finnish
        "na nie jest się oraz że przez je se že které jsou pro nebo sú ktoré su koji za "  # Slavic
        "și în care este sunt cu pe nu "  # Romanian
        "ve bir bu için ile olarak de "  # Turkish
        "és hogy egy nem vagy az "  # Hungarian
        "yang dan dari untuk pada dengan ini tidak adalah "  # Indonesian, Malay
        "và của là các có trong được cho những một"  # Vietnamese
    ).split()
)


def drop_reason(text: str, quality: QualityConfig) -> str | None:
    """The rule that a cleaned text breaks, in words, or None. A rule that is off costs nothing."""
    page = _Page(text, quality)
    for rule in RULES:
        # A sample may let a text pass but never drops one.
        if rule.is_broken_by(page) and rule.is_broken_by(_Page(text, quality, whole=True)):
            return rule.reason
    return None


class _Page:
    """A text under the rules, and what several of them need of it, each counted once."""

    def __init__(self, text: str, quality: QualityConfig, whole: bool = False) -> None:
        self.text = text
        self.quality = quality
        self.sampled = not whole and len(text) > SAMPLE_PIECES * PIECE_CHARACTERS

    @cached_property
    def data(self) -> bytes:
        return self.text.encode("utf-8", "replace")

    @cached_property
    def bytes_by_value(self) -> list[int]:
        """How often each of the 256 comes."""
        counts: list[int] = np.bincount(np.frombuffer(self.data, np.uint8), minlength=256).tolist()
        return counts

    @cached_property
    def non_ascii(self) -> int:
        """Bytes."""
        return sum(self.bytes_by_value[0x80:])

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def ellipses(self) -> int:
        """Those that end a word: dots after a blank are Python's prompt and the leaders of a table of contents."""
        dots = self.text.count("...")
        return self.text.count("…") + (dots - self.text.count(" ...") - self.text.count("\n...") if dots else 0)

    @cached_property
    def word_lengths(self) -> np.ndarray:
        """Characters of each word, int64."""
        codes = np.frombuffer(f" {self.text} ".encode("utf-32-le", "surrogatepass"), np.uint32)
        lengths = np.diff(np.flatnonzero(codes <= ord(" "))) - 1
        return lengths[lengths > 0]

    @cached_property
    def longest_word(self) -> int:
        return int(self.word_lengths.max(initial=0))

    @cached_property
    def characters(self) -> int:
        """Those that are not blank."""
        return int(self.word_lengths.sum()) or 1

    @cached_property
    def sample(self) -> list[str]:
        """The words of the text, or of pieces spread evenly over a longer one."""
        if not self.sampled:
            return self.text.split()
        starts = range(0, len(self.text), -(-len(self.text) // SAMPLE_PIECES))
        return [word for start in starts for word in self.text[start : start + PIECE_CHARACTERS].split()]

    @cached_property
    def sample_text(self) -> str:
        """The sample with one blank after each word."""
        return " ".join([*self.sample, ""])

    @cached_property
    def has_words(self) -> bool:
        """Whether blanks stand between words: not in Chinese, Japanese or Thai."""
        return 2 * self.non_ascii <= len(self.data) or self.characters < UNSPACED_MEAN * len(self.word_lengths)

    @property
    def is_latin(self) -> bool:
        letters = sum(self.bytes_by_value[ord("A") : ord("Z") + 1] + self.bytes_by_value[ord("a") : ord("z") + 1])
        return letters > self.non_ascii


# --- measures ---------------------------------------------------------------------------------------------------------

_BULLETS = frozenset(("- ", "* ", "+ ", "• ", "‣ ", "▪ ", "● "))
_ELLIPSES = ("...", "…")
_PUNCTUATION = string.punctuation + "“”‘’„«»‹›…–—·•¡¿。，、"


def _mean_word_length(page: _Page) -> float:
    if page.longest_word <= LONG_WORD:
        return page.characters / (len(page.word_lengths) or 1)
    words = page.word_lengths[page.word_lengths <= LONG_WORD]
    return float(words.mean()) if len(words) else float(LONG_WORD)


def _plain_word_share(page: _Page) -> float:
    """Single letters are variables as well as specks, so they do not count."""
    words = [word.strip(_PUNCTUATION) for word in page.sample]
    return len([word for word in words if len(word) > 1 and word.isalpha()]) / (len(words) or 1)


def _prose_share(page: _Page) -> float:
    if not page.is_latin:
        return 1.0
    stop_words = sum(map(STOP_WORDS.__contains__, page.sample))
    sentences = sum(page.sample_text.count(end) for end in (". ", "? ", "! "))
    return (stop_words + sentences) / (len(page.sample) or 1)


def _digit_share(page: _Page) -> float:
    return sum(page.bytes_by_value[ord("0") : ord("9") + 1]) / page.characters


def _symbol_word_ratio(page: _Page) -> float:
    hashtags = page.text.count(" #") if "#" in page.text else 0
    return (hashtags + page.ellipses) / (len(page.word_lengths) or 1)


def _bullet_line_share(page: _Page) -> float:
    return len([line for line in page.lines if line[:2] in _BULLETS]) / (len(page.lines) or 1)


def _short_line_share(page: _Page) -> float:
    words = [line.count(" ") + 1 for line in page.lines if len(line) < SHORT_LINE_CHARACTERS]
    return sum(count for count in words if count <= SHORT_LINE_WORDS) / (len(page.word_lengths) or 1)


def _ellipsis_line_share(page: _Page) -> float:
    if not page.ellipses:
        return 0.0
    return len([line for line in page.lines if line.endswith(_ELLIPSES)]) / (len(page.lines) or 1)


def _duplicate_line_share(page: _Page) -> float:
    every = sum(map(len, page.lines))
    return 1 - sum(map(len, set(page.lines))) / every if every else 0.0


def _top_ngram_share(page: _Page) -> float:
    """Exact above the limit; some value up to the limit where the share is none above."""
    counts = collections.Counter(page.sample)
    every = sum(map(len, page.sample)) or 1
    # An n-gram holds at most n times what its greatest word holds in all, so most texts need no counting of n-grams.
    bound = 4 * max(map(operator.mul, counts.values(), map(len, counts)), default=0) / every
    if bound <= (page.quality.max_top_ngram_share or 0):
        return bound
    return max(_ngram_characters(page.sample, n) for n in (2, 3, 4)) / every


def _ngram_characters(words: list[str], n: int) -> int:
    """Characters in all occurrences of the commonest n-gram, 0 if none comes twice."""
    counts = collections.Counter(zip(*(words[start:] for start in range(n)), strict=False))
    ngram, count = counts.most_common(1)[0] if counts else ((), 0)
    return count * sum(map(len, ngram)) if count > 1 else 0


def _unbroken_share(page: _Page) -> float:
    if page.longest_word <= LONG_WORD:
        return 0.0
    long = (word for word in page.text.split() if len(word) > LONG_WORD and "[START_" not in word)
    return sum(map(len, long)) / page.characters


def _replacement_share(page: _Page) -> float:
    return page.text.count("\ufffd") / page.characters


def _compression_ratio(page: _Page) -> float:
    return len(page.data) / len(_compressor().compress(page.data))


@lru_cache(maxsize=1)
def _compressor() -> Any:
    import zstandard

    return zstandard.ZstdCompressor(level=1)


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    reason: str
    limit: str
    """Field of QualityConfig, which begins with min_ or max_."""
    measure: Callable[[_Page], float]
    of_words: bool = False
    """Whether it means nothing where no blanks stand between words."""

    def is_broken_by(self, page: _Page) -> bool:
        limit = getattr(page.quality, self.limit)
        if limit is None or (self.of_words and not page.has_words):
            return False
        value = self.measure(page)
        return bool(value < limit if self.limit.startswith("min_") else value > limit)


RULES = (
    Rule("too short", "min_characters", lambda page: len(page.text)),
    Rule("too long", "max_characters", lambda page: len(page.text)),
    Rule("broken characters", "max_replacement_share", _replacement_share),
    Rule("digits", "max_digit_share", _digit_share),
    Rule("mean word length", "min_mean_word_length", _mean_word_length, of_words=True),
    Rule("mean word length", "max_mean_word_length", _mean_word_length, of_words=True),
    Rule("unbroken text", "max_unbroken_share", _unbroken_share, of_words=True),
    Rule("few plain words", "min_plain_word_share", _plain_word_share, of_words=True),
    Rule("no prose", "min_prose_share", _prose_share, of_words=True),
    Rule("hashtags and ellipses", "max_symbol_word_ratio", _symbol_word_ratio, of_words=True),
    Rule("short lines", "max_short_line_share", _short_line_share, of_words=True),
    Rule("bullet lines", "max_bullet_line_share", _bullet_line_share),
    Rule("ellipsis lines", "max_ellipsis_line_share", _ellipsis_line_share),
    Rule("duplicate lines", "max_duplicate_line_share", _duplicate_line_share),
    Rule("repeated words", "max_top_ngram_share", _top_ngram_share, of_words=True),
    Rule("repetition", "max_compression_ratio", _compression_ratio),
)
"""Cheap ones first."""
