"""Read one unit: files -> Markdown -> clean documents worth keeping, with what deduplication needs to know of them."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from orchestrator import storage
from orchestrator.corpus_config import CorpusConfig
from orchestrator.data import buckets, contamination, language, minhash, quality, steps
from orchestrator.data.documents import STORAGE_FAILED, Document, Dropped, read_documents
from orchestrator.data.layout import CorpusDir
from orchestrator.data.sources import Unit
from orchestrator.data.texts import BATCH_CHARACTERS, TextWriter

VERSION = 1
"""Raise it when a reader or a step changes what it gives: units are then read anew."""

MAX_CHARACTERS = 2**24
"""Of one document: what is done to a text takes up to 50 bytes of memory a character, and a worker has 2 GB."""
SHOWN_CHARACTERS = 10_000

_CITATIONS = re.compile(r"\[START_REF\][^\[\n]*\[END_REF\]|\[[\d,;\s\u2013-]{1,40}\]")

EXACT = np.dtype([("key", "<u8"), ("rest", "<u8"), ("row", "<u4")])
NEAR = np.dtype([("key", "<u8"), ("row", "<u4"), ("sketch", "u1", (minhash.SKETCH_BYTES,))])


@dataclass(frozen=True, kw_only=True)
class UnitFacts:
    """What reading a unit gave."""

    key: str
    read: int = 0
    written: int = 0
    """Documents in the unit's file: read = written + the sum of dropped."""
    dropped: dict[str, int] = field(default_factory=dict)
    characters: int = 0
    """Of the documents written."""
    near_records: int = 0


def unit_key(unit: Unit, corpus: CorpusConfig, contamination_key: str) -> str:
    """Digest of all that the result of reading a unit depends on."""
    source = next(source for source in corpus.sources if source.name == unit.source)
    settings = [
        VERSION,
        [[p.file.uri, p.file.version, p.file.bytes, p.start, p.end] for p in unit.pieces],
        source.model_dump(exclude={"include", "path"}),
        corpus.quality.model_dump(),
        corpus.languages,
        corpus.near_duplicates,
        contamination_key,
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(settings).encode())


def load_facts(corpus: CorpusDir, unit: Unit) -> UnitFacts | None:
    """None for a unit that was not read to its end."""
    with contextlib.suppress(FileNotFoundError, TypeError):
        return UnitFacts(**storage.read_json(corpus.facts(unit.number)))
    return None


def read_unit(unit: Unit, uri: str, config: CorpusConfig, contamination_key: str, journal: bool = False) -> UnitFacts:
    """Read a unit, unless that was done before with the same settings and the storage gave every file.

    Args:
        uri: of the corpus.
        journal: note each piece before it is read, for a unit that has ended its worker.
    """
    corpus, key = CorpusDir(uri), unit_key(unit, config, contamination_key)
    done = load_facts(corpus, unit)
    if done and done.key == key:
        return done
    step = _Selection(config, corpus.contamination, contamination_key)
    with _UnitWriter(corpus, unit.number, config.near_duplicates) as writer:
        for document in _documents(unit, corpus, config, journal):
            writer.add(document if isinstance(document, Dropped) else step.decide(document))
    facts = writer.facts(key)
    if STORAGE_FAILED in facts.dropped:  # a key of its own: the next command reads anew, and compares and packs anew
        facts = replace(facts, key=f"{key}-{uuid.uuid4().hex}")
    storage.write(corpus.facts(unit.number), json.dumps(asdict(facts)).encode())
    return facts


def _documents(unit: Unit, corpus: CorpusDir, config: CorpusConfig, journal: bool) -> Iterator[Document | Dropped]:
    source = next(source for source in config.sources if source.name == unit.source)
    poison = _poisonous(corpus, unit.number)
    for index, piece in enumerate(unit.pieces):
        if index in poison:
            yield Dropped(f"{source.name}/{piece.file.name}", "ended its worker")
            continue
        if journal:
            storage.write(corpus.journal(unit.number), json.dumps(index).encode())
        yield from read_documents(piece.file.uri, piece.file.name, source, piece.start, piece.end)


def condemn(corpus: CorpusDir, unit: Unit) -> bool:
    """Mark the piece that the journal names, whose reading ended its worker; False where no piece is named."""
    try:
        index = storage.read_json(corpus.journal(unit.number))
    except FileNotFoundError:
        return False
    storage.delete(corpus.journal(unit.number))
    storage.write(corpus.poison(unit.number), json.dumps(sorted({*_poisonous(corpus, unit.number), index})).encode())
    return True


def _poisonous(corpus: CorpusDir, unit: int) -> set[int]:
    with contextlib.suppress(FileNotFoundError):
        return set(storage.read_json(corpus.poison(unit)))
    return set()


class _Selection:
    """Every step from a document's raw text to its place in the corpus, or to the reason why it has none."""

    def __init__(self, config: CorpusConfig, contamination_uri: str, contamination_key: str) -> None:
        self._config = config
        self._index = _load_index(contamination_uri, contamination_key) if contamination_key else None

    def decide(self, document: Document) -> Document | Dropped:
        if len(document.text) > MAX_CHARACTERS:
            return Dropped(document.id, "too large", document.text[:SHOWN_CHARACTERS])
        text = steps.clean(document.text)
        reason = self._reason(text)
        return Dropped(document.id, reason, text) if reason else Document(document.id, text)

    def _reason(self, text: str) -> str | None:
        if reason := quality.drop_reason(text, self._config.quality):
            return reason
        if self._config.languages and language.foreign(text, self._config.languages):
            return "other language"
        if self._index is not None and contamination.hits(text, self._index):
            return "in an evaluation set"
        return None


@functools.lru_cache(maxsize=1)
def _load_index(uri: str, key: str) -> np.ndarray:
    """Read once a process; the key tells one content from another."""
    return np.frombuffer(storage.read(uri), "<u8")


class _UnitWriter:
    """Writes a unit's documents and its index, a few MiB of text in memory at a time."""

    def __init__(self, corpus: CorpusDir, unit: int, near_duplicates: float | None) -> None:
        self._corpus = corpus
        self._unit = unit
        self._shape = minhash.bands_for(near_duplicates) if near_duplicates is not None else None
        self._kept = TextWriter(corpus.documents(unit), {"id": "string", "text": "string", "hash": "binary"})
        self._lost = TextWriter(corpus.dropped(unit), {"id": "string", "reason": "string", "text": "string"})
        self._texts: list[str] = []
        self._hashes: list[bytes] = []
        self._exact: list[np.ndarray] = []
        self._near: list[np.ndarray] = []
        self._reasons: collections.Counter[str] = collections.Counter()
        self._written = self._characters = self._indexed = 0

    def __enter__(self) -> _UnitWriter:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._kept)
            stack.enter_context(self._lost)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self._index_texts()
            self._write_index("exact", self._exact, EXACT)
            if self._shape:
                self._write_index("near", self._near, NEAR)
        self._stack.__exit__(kind, *rest)

    def add(self, document: Document | Dropped) -> None:
        if isinstance(document, Dropped):
            self._reasons[document.reason] += 1
            self._lost.add(document.id, document.reason, document.text)
            return
        digest = steps.content_hash(document.text)
        self._kept.add(document.id, document.text, digest)
        self._texts.append(document.text)
        self._hashes.append(digest)
        self._written += 1
        self._characters += len(document.text)
        if self._characters - self._indexed >= BATCH_CHARACTERS:
            self._index_texts()

    def facts(self, key: str) -> UnitFacts:
        return UnitFacts(
            key=key,
            read=self._written + self._reasons.total(),
            written=self._written,
            dropped=dict(sorted(self._reasons.items())),
            characters=self._characters,
            near_records=sum(map(len, self._near)),
        )

    def _index_texts(self) -> None:
        rows = np.arange(self._written - len(self._texts), self._written, dtype=np.uint32)
        exact = np.empty(len(rows), EXACT)
        exact["key"], exact["rest"] = np.frombuffer(b"".join(self._hashes), "<u8").reshape(-1, 2).T
        exact["row"] = rows
        self._exact.append(exact)
        if self._shape and self._texts:
            self._near.append(_near_records(self._texts, rows, self._shape))
        self._texts, self._hashes, self._indexed = [], [], self._characters

    def _write_index(self, kind: str, parts: list[np.ndarray], dtype: np.dtype[Any]) -> None:
        records = np.concatenate(parts) if parts else np.empty(0, dtype)
        bucket = buckets.by_key(records["key"])
        buckets.write(self._corpus.index(kind, self._unit), records, bucket, buckets.KEY_BUCKETS)


def _near_records(texts: list[str], rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One record a document and band."""
    # The same paper cites by number in one format and by title in another.
    signatures = minhash.signatures([_CITATIONS.sub(" ", text) for text in texts])
    keys = minhash.band_keys(signatures, *shape)
    records = np.empty(keys.size, NEAR)
    records["key"] = keys.ravel()
    records["row"] = np.repeat(rows, shape[0])
    records["sketch"] = np.repeat(minhash.sketches(signatures), shape[0], axis=0)
    return records
