"""Galactica's tokenizer: byte-level BPE with its special tokens at ids 0-22, trained on the corpus or loaded."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.config import Recipe
from orchestrator.errors import UserError
from orchestrator.hub import model_directory
from orchestrator.model_config import TokenizerConfig

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
    settings = Path(path) / "tokenizer_config.json"
    try:
        if settings.is_file() and not isinstance(json.loads(settings.read_text(encoding="utf-8")), dict):
            raise ValueError("it names no settings")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{settings} is damaged: {error}", "download it again") from None


def vocabulary_size(path: str, added: Iterable[str] = ()) -> int:
    """Rows that the embedding of a directory's tokenizer needs, with the tokens to be added: past its highest id."""
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.add_tokens(list(added))
    except Exception as error:  # the library raises the bare class
        raise UserError(f"{file} is no tokenizer: {error}") from None
    return embedding_rows(tokenizer)


def known_tokens(folder: Path, rows: int) -> int:
    """Of the rows of a model's embedding, those that its own tokenizer has given a meaning; all where it has none."""
    return min(rows, vocabulary_size(str(folder))) if (folder / "tokenizer.json").is_file() else rows


def embedding_rows(tokenizer: Any) -> int:
    """One past the highest id of a tokenizer (of tokenizers): some leave ids out."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def load(path: str | Path) -> Any:
    """The transformers tokenizer of a directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def given_tokenizer(recipe: Recipe) -> Path | None:
    """Directory, on this node, of the tokenizer that a recipe gives; None where one is trained."""
    if recipe.tokenizer.path:
        return Path(recipe.tokenizer.path)
    return model_directory(recipe.model, weights=False) if recipe.model.path else None


def planned_vocabulary(recipe: Recipe) -> int:
    """Entries of the tokenizer that a recipe's corpus will have: of one that is trained, at most."""
    given = given_tokenizer(recipe)
    return vocabulary_size(str(given), added_tokens(recipe.tokenizer)) if given else recipe.tokenizer.vocab_size


def added_tokens(config: TokenizerConfig) -> list[str]:
    """What a given tokenizer is to learn; it may know some of them.

    Raises:
        UserError: the file of them is missing or empty, or names one twice.
    """
    if not isinstance(config.add, str):
        return list(config.add)
    if config.add == "galactica":
        return list(SPECIAL_TOKENS[4:])  # its own <s> <pad> </s> <unk> are the model's business
    try:
        lines = Path(config.add).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        hint = "give a file with a token a line"
        raise UserError(f"tokenizer.add: {config.add} cannot be read: {error}", hint) from None
    found = [line.strip() for line in lines if line.strip()]
    if not found or len(set(found)) != len(found):
        what = "names a token twice" if found else "names no token"
        raise UserError(f"tokenizer.add: {config.add} {what}", "give each token a line of its own")
    return found


def extend(tokenizer: Any, config: TokenizerConfig) -> None:
    """Teach a tokenizer (of transformers) the tokens of `tokenizer.add`: each is one id wherever its text stands.

    Galactica's are special: text without special tokens leaves them out, as it does with Galactica's own tokenizer.
    """
    tokenizer.add_tokens(added_tokens(config), special_tokens=config.add == "galactica")


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
