"""Pack one unit: the documents that stay -> tokens -> sequences in shards, with what there is to tell of them."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash

from orchestrator import storage
from orchestrator.corpus_config import QualityConfig
from orchestrator.data import shards, spans, steps
from orchestrator.data.duplicates import Duplicates
from orchestrator.data.encoding import Encoder, load_encoder
from orchestrator.data.layout import CorpusDir
from orchestrator.data.numbers import row_of
from orchestrator.data.passages import Passages, cuts
from orchestrator.data.quality import drop_reason
from orchestrator.data.shards import Packed
from orchestrator.data.texts import TextWriter, read_texts

LEAST_REST = 1 / 3
"""Of a document's bytes: with less than that after cuts, it is dropped as duplicate passages."""

SPLITS = ("train", "held_out")
SHARD_TOKENS = 2**24
"""A unit of more than this many tokens is written as several shards."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What the packing of every unit has in common."""

    tokenizer: str
    """Directory."""
    tokenizer_key: str
    """Digest of its content."""
    sequence_length: int
    held_out: float
    quality: QualityConfig
    """What is left of a document after cuts must pass too."""


@dataclass(frozen=True, kw_only=True)
class PackedUnit:
    """What packing a unit gave."""

    key: str
    kept: dict[str, int] = field(default_factory=dict)
    """Documents by split."""
    dropped: dict[str, int] = field(default_factory=dict)
    characters: int = 0
    cut_bytes: int = 0
    tokens: int = 0
    """Of whole sequences and tails, document ends included."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Documents by tokens: "12" counts those of 2^12 to 2^13 - 1."""
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By split."""
    tails: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By split: the tokens after the last whole sequence, and their documents."""

    def tail(self, split: str) -> Packed:
        found = self.tails[split]
        return Packed(np.array(found["tokens"], np.uint32), [(n, d) for n, d in found["documents"]])


def load_packed(corpus: CorpusDir, unit: int) -> PackedUnit | None:
    """None for a unit that was not packed to its end."""
    with contextlib.suppress(FileNotFoundError, TypeError):
        return PackedUnit(**storage.read_json(corpus.packed(unit)))
    return None


def pack_unit(unit: int, found: Duplicates, passages: Passages | None, settings: PackSettings) -> PackedUnit:
    """Pack a unit, unless that was done before with the same result."""
    corpus = found.corpus
    gone = found.gone(unit)
    matches = passages.matches(unit).tobytes() if passages else b""
    digest = xxhash.xxh3_128(repr((settings, found.keys[unit])).encode())
    digest.update(gone.tobytes())
    digest.update(matches)
    done = load_packed(corpus, unit)
    if done and done.key == digest.hexdigest():
        return done
    removed = cuts(passages, unit) if passages else {}
    columns = {"id": "string", "reason": "string", "text": "string", "of": "string"}
    with TextWriter(corpus.duplicates(unit), columns) as dropped:
        packer = _Packer(corpus, unit, digest.hexdigest(), settings, dropped)
        reasons = {row_of(int(pair["document"])): pair for pair in gone}
        row = 0
        for ids, texts, hashes in read_texts(corpus.documents(unit), "id", "text", "hash"):
            documents = []
            for id_, text, hash_ in zip(ids, texts, hashes, strict=True):
                if duplicate := reasons.get(row):
                    reason = "near duplicate" if duplicate["near"] else "exact duplicate"
                    packer.drop(id_, reason, text, str(duplicate["first"]))
                else:
                    documents.append((id_, *_after_cuts(text, removed.get(row, [])), hash_))
                row += 1
            packer.add(documents)
        result = packer.finish()
    storage.write(corpus.packed(unit), json.dumps(asdict(result)).encode())
    return result


def _after_cuts(text: str, removed: list[tuple[int, int]]) -> tuple[str, int]:
    """The text without its cuts, and the number of bytes cut."""
    return (spans.cut(text.encode(), removed), sum(b - a for a, b in removed)) if removed else (text, 0)


class _Packer:
    """Collects tokens by split and writes a shard whenever there are enough."""

    def __init__(self, corpus: CorpusDir, unit: int, key: str, settings: PackSettings, dropped: TextWriter) -> None:
        self._reasons: collections.Counter[str] = collections.Counter()
        self._dropped = dropped
        self._corpus = corpus
        self._unit = unit
        self._key = key
        self._settings = settings
        self._encoder = _encoder(settings.tokenizer, settings.tokenizer_key)
        self._parts: dict[str, list[shards.Packed]] = {split: [] for split in SPLITS}
        self._waiting = dict.fromkeys(SPLITS, 0)
        self._shards: dict[str, list[shards.Shard]] = {split: [] for split in SPLITS}
        self._kept: collections.Counter[str] = collections.Counter()
        self._lengths: collections.Counter[str] = collections.Counter()
        self._characters = self._cut_bytes = self._tokens = 0

    def drop(self, id_: str, reason: str, text: str, of: str = "") -> None:
        """Count a document out, and keep it with its reason and the number of what it repeats."""
        self._reasons[reason] += 1
        self._dropped.add(id_, reason, text, of)

    def add(self, documents: list[tuple[str, str, int, bytes]]) -> None:
        """(id, text, bytes cut from it, content hash) each."""
        by_split: dict[str, list[tuple[str, str, int, bytes]]] = {split: [] for split in SPLITS}
        for document in documents:
            _, text, cut_bytes, digest = document
            if cut_bytes and self._is_remnant(text, cut_bytes):
                self.drop(document[0], "duplicate passages", text)
            else:
                by_split[_split(digest, self._settings.held_out)].append(document)
        for split, chosen in by_split.items():
            self._add(split, chosen)

    def _is_remnant(self, text: str, cut_bytes: int) -> bool:
        """Whether too little is left of a text to make sense: formulas without their prose, the end of a list."""
        rest = len(text.encode())
        return rest < LEAST_REST * (rest + cut_bytes) or drop_reason(text, self._settings.quality) is not None

    def _add(self, split: str, documents: list[tuple[str, str, int, bytes]]) -> None:
        encoded = self._encoder.encode([text for _, text, _, _ in documents])
        for (id_, text, cut_bytes, _), tokens in zip(documents, encoded, strict=True):
            self._parts[split].append(shards.Packed(tokens, [(len(tokens), id_)]))
            self._waiting[split] += len(tokens)
            self._kept[split] += 1
            self._lengths[str(len(tokens).bit_length() - 1)] += 1
            self._characters += len(text)
            self._cut_bytes += cut_bytes
            self._tokens += len(tokens)
        if self._waiting[split] >= SHARD_TOKENS:
            self._write(split)

    def finish(self) -> PackedUnit:
        for split in SPLITS:
            self._write(split)
        tails = {split: shards.join(self._parts[split]) for split in SPLITS}
        return PackedUnit(
            key=self._key,
            kept=dict(self._kept),
            dropped=dict(self._reasons),
            characters=self._characters,
            cut_bytes=self._cut_bytes,
            tokens=self._tokens,
            lengths=dict(self._lengths),
            shards={split: [asdict(shard) for shard in self._shards[split]] for split in SPLITS},
            tails={s: {"tokens": tail.tokens.tolist(), "documents": tail.documents} for s, tail in tails.items()},
        )

    def _write(self, split: str) -> None:
        """Write the whole sequences there are; the rest stays."""
        length = self._settings.sequence_length
        packed = shards.join(self._parts[split])
        whole, rest = packed.split_at(len(packed.tokens) // length * length)
        self._parts[split], self._waiting[split] = [rest], len(rest.tokens)
        if len(whole.tokens):
            part = f"{self._unit:06d}-{len(self._shards[split]):02d}"
            name = self._corpus.shard(split, part, self._key)
            self._shards[split].append(
                shards.write_shard(self._corpus.uri, name, whole, length, self._encoder.vocab_size)
            )


def _split(digest: bytes, held_out: float) -> str:
    return "held_out" if steps.is_held_out(digest, held_out) else "train"


@functools.lru_cache(maxsize=2)
def _encoder(uri: str, key: str) -> Encoder:
    """Loaded once a process; the key tells one content of the directory from another."""
    with storage.local_directory(uri) as folder:
        return load_encoder(folder)


def tokenizer_key(uri: str) -> str:
    """Digest of a tokenizer directory."""
    digest = xxhash.xxh3_128()
    for name in storage.list_files(uri):
        digest.update(name.encode())
        digest.update(storage.read(storage.join(uri, name)))
    return digest.hexdigest()
