"""The language of a document, identified by py3langid from a bounded sample of its running text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from orchestrator.errors import UserError

UNKNOWN = "und"
"""ISO 639-2's code for undetermined."""
SURE = 0.5
"""Probability from which an identification counts. It is calibrated over lengths: 0.9 and more on a plain paragraph."""
MIN_LETTERS = 60
SAMPLE_CHARACTERS, WINDOW_CHARACTERS = 500, 250
_PLACES = (0.15, 0.45, 0.75, 0.3, 0.6, 0.0, 0.9)
"""Where windows begin, as shares of the text, in the order tried: title pages and lists of references come last."""

# What is of no language or of another one than the text: code, tables, links, formulas, citations, sequences, markup.
_MARKUP = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`"
    r"|^[ \t]*(?:\||>>>)[^\n]*"
    r"|\[START_(REF|DNA|AMINO|SMILES|I_SMILES)\].*?(?:\[END_\1\]|\Z)|\[/?[A-Z_]{3,}\]|</?\w[^>\n]*>"
    r"|\$\$.*?(?:\$\$|\Z)|\$[^$\n]+\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+"
    r"|\]\([^)\s]*\)|(?:https?://|www\.)\S+|(?<!\S)[!-~]*[\d_=<>{}@\\/][!-~]*",
    re.MULTILINE | re.DOTALL,
)
_LETTERS = re.compile(r"[^\W\d_]")


def language_of(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, probability); (UNKNOWN, 0.0) for a text with too little running text to tell."""
    sample = _sample(text)
    if len(_LETTERS.findall(sample)) < MIN_LETTERS:
        return UNKNOWN, 0.0
    code, probability = _identifier().classify(sample)
    return (str(code), float(probability)) if len(code) == 2 else (UNKNOWN, 0.0)


def foreign(text: str, languages: tuple[str, ...], min_probability: float = SURE) -> bool:
    """Whether a text is surely in a language outside of `languages`; of none if that is empty."""
    if not languages:
        return False
    code, probability = language_of(text)
    return code not in languages and probability >= min_probability


def check_languages(languages: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: a code is none that can be identified.
    """
    if not languages:
        return
    known = sorted(code for code in _identifier().labels if len(code) == 2)
    if unknown := sorted(set(languages) - set(known)):
        raise UserError(f"corpus.languages: {', '.join(unknown)} cannot be identified", f"known: {', '.join(known)}")


def _sample(text: str) -> str:
    """At most SAMPLE_CHARACTERS of running text, from windows spread over a long text."""
    if len(text) <= WINDOW_CHARACTERS * len(_PLACES):
        return _running_text(text)[:SAMPLE_CHARACTERS]
    found = ""
    for place in _PLACES:
        start = int(place * len(text))
        found += _running_text(text[start : start + WINDOW_CHARACTERS]) + " "
        if len(found) >= SAMPLE_CHARACTERS:
            break
    return found[:SAMPLE_CHARACTERS]


def _running_text(text: str) -> str:
    return " ".join(_MARKUP.sub(" ", text).split())


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """py3langid's model, restricted to the languages of ISO 639-1 and its class for what is no language."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([code for code in identifier.labels if len(code) == 2 or code == "zxx"])
    return identifier
