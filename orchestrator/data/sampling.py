"""The tokenizer's text: a random sample of the training documents, set aside unit by unit and read by one task."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator import storage
from orchestrator.data import steps, tokenizer
from orchestrator.data.duplicates import Duplicates
from orchestrator.data.layout import CorpusDir
from orchestrator.data.numbers import row_of
from orchestrator.data.texts import TextWriter, read_texts

MAX_CHARACTERS = 2**20
"""Of one document; the rest of a longer one is not sampled."""


def sample_unit(found: Duplicates, unit: int, share: float, held_out: float) -> int:
    """Set a share of a unit's training documents aside, by their content. Returns the number of characters."""
    gone = set(row_of(found.gone(unit)["document"]).tolist())
    characters = row = 0
    with TextWriter(found.corpus.sample(unit), {"text": "string"}) as writer:
        for texts, hashes in read_texts(found.corpus.documents(unit), "text", "hash"):
            for text, digest in zip(texts, hashes, strict=True):
                # The first 8 bytes of the hash decide the split, so the last 8 order the sample.
                drawn = int.from_bytes(digest[8:], "big") < share * 2**64
                if drawn and row not in gone and not steps.is_held_out(digest, held_out):
                    writer.add(text[:MAX_CHARACTERS])
                    characters += min(len(text), MAX_CHARACTERS)
                row += 1
    return characters


def train_tokenizer(corpus: CorpusDir, units: list[int], vocab_size: int) -> None:
    """Train on what the units set aside, and write the tokenizer's directory."""
    texts = (text for unit in units for (batch,) in read_texts(corpus.sample(unit), "text") for text in batch)
    with TemporaryDirectory(prefix="terrane-") as folder:
        tokenizer.train(texts, vocab_size).save_pretrained(folder)
        storage.upload_directory(Path(folder), corpus.tokenizer)
