"""Galactica's tokenizer: byte-level BPE with its special tokens at ids 0-22, trained on the corpus or loaded."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

# In this order, ids 0-22 (Taylor et al., "Galactica: A Large Language Model for Science", 2022, and its release).
SPECIAL_TOKENS = (
    "<s> <pad> </s> <unk> [START_REF] [END_REF] [IMAGE] <fragments> </fragments> <work> </work> [START_SUP] [END_SUP] "
    "[START_SUB] [END_SUB] [START_DNA] [END_DNA] [START_AMINO] [END_AMINO] [START_SMILES] [END_SMILES] "
    "[START_I_SMILES] [END_I_SMILES]"
).split()

MARKER = "SPL1T-TH1S-Pl3A5E"
"""The released tokenizer splits where it stands and drops it: its way to a token for every character of a sequence."""

OPERATORS = r"""[\(\)\[\]\{\}]|([!"\#\$%\&'\*\+,\-\./:;<=>\?\\\^_`\|\~])\1*"""
"""As released: a bracket alone, an operator alone or with its own repetitions (section 3.1 of the paper)."""

LONGEST_WORD = 256
"""Characters. A merge walks every word that it occurs in, so one of 200,000 letters costs more than 3 MB of prose."""

_SEQUENCE_START = re.compile(r"\[START_(DNA|AMINO|SMILES|I_SMILES)\]")
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_LONG = re.compile(rf"\S{{{LONGEST_WORD}}}|[^\S\n]{{{LONGEST_WORD}}}")


# --- sequences, a token a character -----------------------------------------------------------------------------------


def sequences(text: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of the sequence inside each DNA, AMINO, SMILES and I_SMILES span, in order.

    A span ends on its line. One that is never closed counts where only its sequence follows, as in a prompt.
    """
    stop = 0
    for opening in _SEQUENCE_START.finditer(text):
        start = opening.end()
        if opening.start() < stop:
            continue
        line = text.find("\n", start)
        close = text.find(f"[END_{opening[1]}]", start, len(text) if line < 0 else line)
        if close >= 0 or (line < 0 and not _SPECIAL.search(text, start)):
            stop = close if close >= 0 else len(text)
            yield start, stop


def characters(sequence: str) -> list[str]:
    """Of a sequence; a combining mark stays with the character before it."""
    if sequence.isascii():
        return list(sequence)
    found: list[str] = []
    for character in sequence:
        if found and unicodedata.combining(character):
            found[-1] += character
        else:
            found.append(character)
    return found


def guard(text: str) -> str:
    """Text as a tokenizer that splits spans must be given it: the marker between the characters of every sequence.

    A text that holds the marker itself keeps it: a second one goes before its first digit, where a token ends anyway,
    and is dropped in its place.
    """
    parts, last = [], 0
    for start, stop in sequences(text):
        parts += [_keep_marker(text[last:start]), MARKER.join(characters(text[start:stop]))]
        last = stop
    return "".join([*parts, _keep_marker(text[last:])])


def _keep_marker(text: str) -> str:
    return text.replace(MARKER, MARKER[:3] + MARKER + MARKER[3:])


def splits_spans(tokenizer: Any) -> bool:
    """Whether a tokenizer, of transformers or of tokenizers, drops the marker: its texts go through `guard`."""
    steps = getattr(tokenizer, "backend_tokenizer", tokenizer).pre_tokenizer
    return steps is not None and MARKER in steps.__getstate__().decode()


# --- training ---------------------------------------------------------------------------------------------------------


def train(texts: Iterable[str], vocab_size: int) -> Any:
    """A transformers PreTrainedTokenizerFast of at most vocab_size entries, special tokens included.

    NFKC; digits, brackets and line ends stand alone, and so do the characters of sequences in a text that was guarded.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _prose(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[4:],
        clean_up_tokenization_spaces=False,
    )


def _splitter() -> Any:
    """The released pre-tokenizer: each step splits what the one before left."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(MARKER, "removed"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(OPERATORS), "isolated"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _prose(text: str) -> Iterator[str]:
    """What merges are learned from: no sequence, no special token, no endless word."""
    last = 0
    for start, stop in [*sequences(text), (len(text), len(text))]:
        for piece in _SPECIAL.split(text[last:start]):
            yield _LONG.sub("\\g<0>\n", piece)
        last = stop


# --- directories ------------------------------------------------------------------------------------------------------


def check_directory(path: str) -> None:
    """
    Raises:
        UserError: no tokenizer that the tokenizers library can run is there.
    """
    if not Path(path).is_dir():
        raise UserError(f"no directory at {path}", "give a Hugging Face directory")
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has no tokenizer (tokenizer.json)",
            "save one there with AutoTokenizer.from_pretrained(...).save_pretrained(...), or set tokenizer.path",
        )


def vocabulary_size(path: str) -> int:
    """Entries of the tokenizer in a directory, added tokens included."""
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    try:
        return int(Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True))
    except Exception as error:  # the library raises the bare class
        raise UserError(f"{file} is no tokenizer: {error}") from None


def load(path: str | Path) -> Any:
    """The transformers tokenizer of a directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def document_end(tokenizer: Any) -> int:
    """Id of the token that closes a document.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos token to end documents with", "set eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)
