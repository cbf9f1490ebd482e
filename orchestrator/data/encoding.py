"""Documents -> token ids, the ids of the tokenizer itself at several times its speed.

A text is cut into units, about a word each, where the tokenizer splits whatever stands on the two sides: the ids of a
text are those of its units in a row. A process remembers the units that it has met and runs the tokenizer on new ones.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.data.tokenizer import (
    MARKER,
    OPERATORS,
    characters,
    check_directory,
    embedding_rows,
    guard,
    sequences,
    splits_spans,
)
from orchestrator.errors import UserError

PIECE = 2**20
"""Characters. Documents are encoded in pieces and batches of about this size: an Encoding takes 100 bytes a token."""

REMEMBERED = 2**18
"""Units, twice: 250 bytes each."""

LONGEST_UNIT = 64
"""Characters of a unit worth remembering."""

MOST_ADDED = 1000
"""Added tokens that a regular expression finds in time."""


# --- superscripts -----------------------------------------------------------------------------------------------------


def superscripts(text: str) -> str:
    """Unicode's raised and lowered characters in Galactica's tokens, before NFKC makes them ordinary: x² is no x2.

    A run is one span, `10⁻³` gives `10[START_SUP]-3[END_SUP]`; ª, º, ™ and ℠ stay.
    """
    return text if text.isascii() else _scripts().sub(_script, text)


@functools.cache
def _scripts() -> re.Pattern[str]:
    """Group 1 is a raised run, group 2 a lowered one."""
    found: dict[str, list[str]] = {"<super>": [], "<sub>": []}
    for character in map(chr, range(0xB0, 0x2C80)):  # past it: kanbun and rare letters
        found.get(unicodedata.decomposition(character).partition(" ")[0], []).append(character)
    raised, lowered = ("".join(sorted(set(characters) - set("ªº™℠"))) for characters in found.values())
    return re.compile(f"([{raised}]+)|([{lowered}]+)")


def _script(match: re.Match[str]) -> str:
    kind = "SUP" if match[1] else "SUB"
    return f"[START_{kind}]{unicodedata.normalize('NFKC', match[0]).replace('−', '-')}[END_{kind}]"


# --- units ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Units:
    """Where the texts of a tokenizer may be cut."""

    pattern: re.Pattern[str]
    """Matches the units of a text one after the other."""
    end: re.Pattern[str]
    """Some of the places between two units: those fit to cut a long text."""


# A word, number or run of signs with the blank before it, where an ASCII character of another kind follows: no known
# pattern goes on across that place, except from a sign to letters (`'s`). Else all up to the next blank (U+0020) after
# a character that is no white space: NFKC composes nothing with a blank, and the one look-ahead, `\s+(?!\S)`, starts
# at white space, which stands whole in the next unit. A unit also ends after a lone \n before a letter or digit that
# NFKC keeps one: that look-ahead fails there.
_SIGN = r"!-/:-@\[-`{-~"
_LINE_START = r"0-9A-Za-z\u0400-\u167f\u3041-\u3096\u30a1-\u9fff\uac00-\ud7a3"
_WORDS = _Units(
    re.compile(
        rf" ?(?:[{_SIGN}]*+[A-Za-z]++(?=[ \n0-9{_SIGN}]|\Z)|[0-9]++(?=[ \nA-Za-z{_SIGN}]|\Z)"
        rf"|[{_SIGN}]++(?=[ 0-9]|\Z))"
        rf"|\s*+\S++(?:(?!\n[{_LINE_START}])[^\S ]\s*+\S*+)*+(?:\n(?=[{_LINE_START}]))?|\s++"
    ),
    re.compile(rf"(?<=\S) |(?<=\S\n)(?=[{_LINE_START}])"),
)

# Galactica also splits around brackets, runs of one operator and line ends: smaller units, met again sooner. Here too
# the neighbours must be ASCII: NFKC makes one of `=` and U+0338, and of `…` after a dot four dots.
_SINGLE = r"0-9()\[\]{}!\"#$%&'*+,\-./:;<=>?\\^_`|~"
_RUNS = "|".join(re.escape(operator) + "++" for operator in "!\"#$%&'*+,-./:;<=>?\\^_`|~")
_GALACTICA_WORDS = _Units(
    re.compile(
        rf" ?(?:[A-Za-z]++|[0-9]{{1,3}}|[()\[\]{{}}]|{_RUNS})(?![^\x00-\x7f])"
        rf"|\n| +(?= [A-Za-z])|[ \t]++(?=\n|[{_SINGLE}](?![^\x00-\x7f]))"
        r"|[^\S\n]*+\S++(?:[^\S\n ][^\S\n]*+\S*+)*+|[^\S\n]++"  # up to the next blank, on this line
    ),
    re.compile(r"\n|(?<=\S) "),
)

_LETTERS = re.compile(" ?[A-Za-z]+")

# Llama 3 and Qwen 2; GPT-2's own is built into the ByteLevel step.
_PATTERNS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)


_GALACTICA_STEPS: list[tuple[str, Any]] = [
    ("Split", (MARKER, "Removed")),
    ("Digits", True),
    ("Split", (OPERATORS, "Isolated")),
    ("Split", ("\n", "Isolated")),
    ("ByteLevel", True),
]
_PATTERN_STEPS: list[list[tuple[str, Any]]] = [
    [("Split", (pattern, "Isolated")), ("ByteLevel", False)] for pattern in _PATTERNS
]


def _units(tokenizer: Any) -> _Units | None:
    """None for a tokenizer that is not known to have units."""
    if type(tokenizer.model).__name__ != "BPE" or tokenizer.model.dropout or not _cuts_at_added(tokenizer):
        return None
    normalizer, splitter = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    if normalizer.get("type") not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        return None
    steps = [_step(step) for step in splitter.get("pretokenizers", [splitter])]
    if steps == _GALACTICA_STEPS:
        return _GALACTICA_WORDS
    plain = steps[-1:] == [("ByteLevel", True)] and all(kind == "Digits" for kind, _ in steps[:-1])
    return _WORDS if plain or steps in _PATTERN_STEPS else None


def _state(part: Any) -> dict[str, Any]:
    return dict(json.loads(part.__getstate__())) if part else {}


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    """Kind and setting of a pre-tokenizer; the setting is None for one that is not known."""
    match step:
        case {"type": "Split", "pattern": dict(pattern), "behavior": behavior, "invert": False}:
            return "Split", (*pattern.values(), behavior)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "ByteLevel", use_regex
        case {"type": "Digits", "individual_digits": individual}:
            return "Digits", individual
    return str(step.get("type")), None


def _cuts_at_added(tokenizer: Any) -> bool:
    """Whether added tokens are found in the text as it is, in one pass, and take nothing of what is around them."""
    added = tokenizer.get_added_tokens_decoder().values()
    normalized = {token.normalized for token in added}
    return (
        len(added) <= MOST_ADDED
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and len(normalized) <= 1
        and (tokenizer.normalizer is None or True not in normalized)
    )


# --- encoder ----------------------------------------------------------------------------------------------------------


class _Memory(dict[str, bytes]):
    """uint32 ids of the units met lately, as bytes; a new unit goes through the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._model = tokenizer, tokenizer.model
        self._guard: Callable[[str], str] = guard if splits_spans(tokenizer) else str
        self._older: dict[str, bytes] = {}

    def __missing__(self, unit: str) -> bytes:
        ids = self._older.get(unit)
        if ids is None:
            ids = array("I", self._tokenise(unit)).tobytes()
        if len(unit) <= LONGEST_UNIT:
            if len(self) >= REMEMBERED:
                self._older = dict(self)
                self.clear()
            self[unit] = ids
        return ids

    def _tokenise(self, unit: str) -> list[int]:
        if _LETTERS.fullmatch(unit):  # one pre-token, which the model alone takes in a fifth of the time
            return [token.id for token in self._model.tokenize(unit.replace(" ", "Ġ"))]
        text = self._guard(unit)
        if len(text) > LONGEST_UNIT:  # without the offsets; for a short one the way through a batch is longer
            return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


class Encoder:
    """Ids of documents, each with the document end.

    They are those of `encode_batch_fast(texts, add_special_tokens=False)`, of guarded texts where the tokenizer splits
    spans.
    """

    def __init__(self, tokenizer: Any, end: int) -> None:
        """
        Args:
            tokenizer: of the tokenizers library, its own from now on.
            end: id of the token that ends a document.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.end = end
        self.vocab_size = embedding_rows(tokenizer)
        self._tokenizer = tokenizer
        self._guards = splits_spans(tokenizer)
        self._units = _units(tokenizer)
        self._memory = _Memory(tokenizer)
        added = sorted((token.content for token in tokenizer.get_added_tokens_decoder().values()), key=len)
        self._added = re.compile(f"({'|'.join(map(re.escape, reversed(added))) or '(?!)'})")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint32 ids [tokens + 1] of each text, read-only.

        Raises:
            TypeError: a text holds a lone surrogate.
        """
        if self._units:
            return [self._by_unit(text, self._units) for text in texts]
        return [ids for batch in _batches(texts) for ids in self._whole(batch)]

    def _whole(self, texts: list[str]) -> list[np.ndarray]:
        guarded = [guard(text) for text in texts] if self._guards else texts
        encodings = self._tokenizer.encode_batch_fast(guarded, add_special_tokens=False)
        return [np.frombuffer(array("I", [*encoding.ids, self.end]), np.uint32) for encoding in encodings]

    def _by_unit(self, text: str, units: _Units) -> np.ndarray:
        found: list[bytes] = []
        last = 0
        for start, stop in [*(sequences(text) if self._guards else ()), (len(text), len(text))]:
            for piece in self._pieces(text[last:start], units):
                found.append(b"".join(map(self._memory.__getitem__, piece)))
            found.append(b"".join(map(self._memory.__getitem__, characters(text[start:stop]))))
            last = stop
        found.append(array("I", [self.end]).tobytes())
        return np.frombuffer(b"".join(found), np.uint32)

    def _pieces(self, text: str, units: _Units) -> Iterator[list[str]]:
        """Units of about PIECE characters at a time; an added token is one."""
        for number, part in enumerate(self._added.split(text)):
            if number % 2:
                yield [part]
                continue
            start = 0
            while len(part) - start > PIECE and (end := units.end.search(part, start + PIECE)):
                yield units.pattern.findall(part, start, end.start())
                start = end.start()
            yield units.pattern.findall(part, start)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Of about PIECE characters; a longer text is a batch of its own."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > PIECE:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


# --- directories ------------------------------------------------------------------------------------------------------


def load_encoder(directory: str | Path) -> Encoder:
    """The encoder of a tokenizer directory. A process keeps the last two by their content: storage hands out copies.

    Raises:
        UserError: no tokenizer is there, or none that says how a document ends.
    """
    check_directory(str(directory))
    file = Path(directory) / "tokenizer.json"
    try:
        return _make(file.read_text(encoding="utf-8"), _end_token(Path(directory)))
    except UserError:
        raise
    except Exception as error:  # the library raises the bare class
        raise UserError(f"{file} is no tokenizer: {error}") from None


@functools.lru_cache(maxsize=2)
def _make(tokenizer_json: str, end: str | int | None) -> Encoder:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    number = tokenizer.token_to_id(end) if isinstance(end, str) else end
    if number is None:
        raise UserError(
            "the tokenizer has no eos token to end documents with", "set eos_token in tokenizer_config.json"
        )
    return Encoder(tokenizer, number)


def end_of_document(uri: str) -> int:
    """Id of the token that a tokenizer directory ends documents with."""
    with storage.local_directory(uri) as folder:
        return load_encoder(folder).end


def _end_token(directory: Path) -> str | int | None:
    """The token, or its id, that the first file to name one ends documents with."""
    for name, key in (
        ("tokenizer_config.json", "eos_token"),
        ("special_tokens_map.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
    ):
        file = directory / name
        token = json.loads(file.read_text(encoding="utf-8")).get(key) if file.is_file() else None
        token = token["content"] if isinstance(token, dict) else token[0] if isinstance(token, list) else token
        if token is not None:
            return token if isinstance(token, str) else int(token)
    return None
