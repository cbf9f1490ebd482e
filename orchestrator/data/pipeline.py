"""Sources -> Corpus, on Ray Data: read and clean, deduplicate, train a tokenizer, tokenise, pack, write shards.

Work is cut into units of files. What the reading of a unit gave is a file written whole, so the same command reads
unfinished units only; the manifest is written last, and a corpus without it is unfinished.
"""

from __future__ import annotations

import collections
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.config import CorpusConfig, Recipe
from orchestrator.data import documents, language, quality, shards, steps
from orchestrator.data import tokenizer as tokenizers
from orchestrator.errors import StorageError, UserError

log = logging.getLogger(__name__)

UNIT_BYTES = 8 * 2**20
TASK_CPUS = 1.0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus directory holds. Its `hash` names the exact token content, in order."""

    format: int = 1
    hash: str = ""
    inputs: str = ""
    """Digest of the recipe's values that the corpus was made from."""
    sequence_length: int
    vocab_size: int
    """Of the tokenizer, added tokens included."""
    documents: dict[str, Any]
    """read = kept + the sum of dropped, which counts by reason."""
    sources: dict[str, dict[str, int]]
    splits: dict[str, dict[str, Any]]
    tail_tokens_dropped: int
    """At the very end of each split, too few to fill a sequence."""

    def shards(self, split: str) -> list[shards.Shard]:
        return [shards.Shard(**shard) for shard in self.splits[split]["shards"]]

    def sequences(self, split: str) -> int:
        return int(self.splits[split]["sequences"])


def load_manifest(corpus: str) -> Manifest | None:
    """The manifest of a finished corpus, None for an unfinished one.

    Raises:
        StorageError: it cannot be read.
    """
    uri = storage.join(corpus, "manifest.json")
    try:
        return Manifest(**storage.read_json(uri))
    except FileNotFoundError:
        return None
    except TypeError as error:
        raise StorageError(f"{uri} is of another version of Terrane, or damaged: {error}") from None


def corpus_inputs(recipe: Recipe) -> str:
    """Digest of everything in a recipe that a corpus depends on."""
    return recipe.digest_of("corpus", "tokenizer", "model.path", "train.sequence_length")


def build_corpus(recipe: Recipe, corpus: str, progress: Callable[[str, int, int], None]) -> Manifest:
    """Make the corpus of a recipe at `corpus`. Ray must be up.

    Args:
        progress: called with (what, done, of).

    Raises:
        UserError: the sources hold no usable document, or too little text for one sequence; a language is unknown.
    """
    language.check_languages(recipe.corpus.languages)
    units = make_units(documents.list_sources(recipe.corpus))
    extracted = _extract(recipe, corpus, units, progress)
    kept = _first_of_each(extracted)
    if not any(mask.any() for mask in kept):
        raise UserError(
            f"the corpus is empty: none of {sum(e.read for e in extracted)} documents was kept "
            f"({_reasons(extracted, kept)})",
            "check corpus.sources (JSONL records need a string field `text`) and corpus.quality",
        )
    tokenizer_uri = _tokenizer(recipe, corpus, extracted, kept, progress)
    packed = _pack(recipe, corpus, tokenizer_uri, extracted, kept, progress)
    manifest = _manifest(recipe, corpus, tokenizer_uri, extracted, kept, packed)
    storage.write(storage.join(corpus, "manifest.json"), (json.dumps(asdict(manifest), indent=2) + "\n").encode())
    storage.delete(storage.join(corpus, "work"))
    return manifest


# --- units ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    number: int
    files: tuple[documents.SourceFile, ...]

    def uri(self, corpus: str) -> str:
        return storage.join(corpus, "work", f"unit-{self.number:06d}.arrow")


def make_units(files: list[documents.SourceFile], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Consecutive files of one source, up to unit_bytes each: a function of the listing alone."""
    units: list[Unit] = []
    group: list[documents.SourceFile] = []
    for file in files:
        full = sum(f.bytes for f in group) + file.bytes > unit_bytes
        if group and (full or group[0].source != file.source):
            units.append(Unit(len(units), tuple(group)))
            group = []
        group.append(file)
    if group:
        units.append(Unit(len(units), tuple(group)))
    return units


# --- read, clean, deduplicate -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What reading a unit gave: the texts are in its file, this is what the driver needs to know of them."""

    unit: Unit
    source: str
    read: int
    dropped: dict[str, int]
    hashes: np.ndarray
    """Content hashes of the documents in the unit's file, 16 bytes each (dtype S16 would strip zeros: V16)."""
    characters: np.ndarray
    """Of each document in the unit's file, int64."""


def extract_unit(unit: Unit, corpus: str, config: CorpusConfig) -> Extracted:
    """Read and clean the documents of a unit and write those worth keeping to its file, unless that was done before."""
    import pyarrow as pa

    key = repr((unit, config.quality, config.languages))
    done = _extracted_before(unit, corpus, key)
    if done:
        return done
    ids, texts, hashes = [], [], []
    dropped: collections.Counter[str] = collections.Counter()
    read = 0
    for document in (d for file in unit.files for d in documents.read_documents(file)):
        read += 1
        if isinstance(document, documents.Unreadable):
            dropped[str(document)] += 1
            continue
        text = steps.clean(document.text)
        reason = _drop_reason(text, config)
        if reason:
            dropped[reason] += 1
            continue
        ids.append(document.id)
        texts.append(text.encode("utf-8", "replace").decode())
        hashes.append(steps.content_hash(text))
    facts = {"key": key, "read": str(read), "dropped": json.dumps(dropped)}
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "text": pa.array(texts, pa.large_string()),
            "hash": pa.array(hashes, pa.binary(16)),
            "characters": pa.array([len(text) for text in texts], pa.int64()),
        }
    ).replace_schema_metadata(facts)
    with io.BytesIO() as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
        writer.close()
        storage.write(unit.uri(corpus), sink.getvalue())
    return _extracted(unit, table)


def _drop_reason(text: str, config: CorpusConfig) -> str | None:
    reason = quality.drop_reason(text, config.quality)
    return reason or ("other language" if language.foreign(text, config.languages) else None)


def _extracted_before(unit: Unit, corpus: str, key: str) -> Extracted | None:
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.BufferReader(storage.read(unit.uri(corpus)))).read_all()
    except FileNotFoundError:
        return None
    return _extracted(unit, table) if table.schema.metadata.get(b"key") == key.encode() else None


def _extracted(unit: Unit, table: Any) -> Extracted:
    facts = table.schema.metadata
    return Extracted(
        unit=unit,
        source=unit.files[0].source,
        read=int(facts[b"read"]),
        dropped=json.loads(facts[b"dropped"]),
        hashes=np.frombuffer(b"".join(table["hash"].to_pylist()), dtype="V16"),
        characters=table["characters"].to_numpy(),
    )


def _extract(
    recipe: Recipe, corpus: str, units: list[Unit], progress: Callable[[str, int, int], None]
) -> list[Extracted]:
    config = recipe.corpus
    done = _run_units("read and clean", lambda unit: extract_unit(unit, corpus, config), units, progress)
    return sorted(done, key=lambda extracted: extracted.unit.number)


def _first_of_each(extracted: list[Extracted]) -> list[np.ndarray]:
    """Exact deduplication: for each unit, a mask of the documents that no earlier document equals."""
    every = np.concatenate([e.hashes for e in extracted]) if extracted else np.empty(0, "V16")
    keep = np.zeros(len(every), dtype=bool)
    keep[np.unique(every, return_index=True)[1]] = True
    return list(np.split(keep, np.cumsum([len(e.hashes) for e in extracted])[:-1]))


def _reasons(extracted: list[Extracted], kept: list[np.ndarray]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in _dropped(extracted, kept).items()) or "no document"


def _dropped(extracted: list[Extracted], kept: list[np.ndarray]) -> dict[str, int]:
    dropped: collections.Counter[str] = collections.Counter()
    for unit, mask in zip(extracted, kept, strict=True):
        dropped.update(unit.dropped)
        if duplicates := int((~mask).sum()):
            dropped["exact duplicate"] += duplicates
    return dict(sorted(dropped.items()))


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _tokenizer(
    recipe: Recipe,
    corpus: str,
    extracted: list[Extracted],
    kept: list[np.ndarray],
    progress: Callable[[str, int, int], None],
) -> str:
    """Directory of the tokenizer in the corpus: a copy of the user's, or one trained on the corpus."""
    import ray

    uri = storage.join(corpus, "tokenizer")
    given = recipe.tokenizer.path or recipe.model.path
    if storage.exists(storage.join(uri, "tokenizer.json")):
        return uri
    if given:
        with TemporaryDirectory(prefix="terrane-") as folder:
            tokenizers.load(given).save_pretrained(folder)
            _publish_tokenizer(Path(folder), uri)
        return uri
    sample = _sample(recipe, extracted, kept)
    progress("train the tokenizer", 0, 1)
    ray.get(ray.remote(num_cpus=TASK_CPUS)(_train_tokenizer).remote(corpus, uri, sample, recipe.tokenizer.vocab_size))
    progress("train the tokenizer", 1, 1)
    return uri


def _sample(recipe: Recipe, extracted: list[Extracted], kept: list[np.ndarray]) -> list[tuple[Unit, np.ndarray]]:
    """(unit, mask) of a random sample of the training documents: those with the least content hash, up to a size."""
    masks = [mask & ~held_out(e.hashes, recipe.corpus.held_out) for e, mask in zip(extracted, kept, strict=True)]
    hashes = np.concatenate([e.hashes for e in extracted])
    characters = np.concatenate([e.characters for e in extracted]) * np.concatenate(masks)
    # The first 8 bytes decide the split, so the last 8 order the sample.
    ranking = np.argsort(_words(hashes)[:, 1], kind="stable")
    limit = recipe.tokenizer.sample_mib * 2**20
    smallest = characters[characters > 0].min() if characters.any() else 0
    ranking = ranking[characters[ranking] <= max(limit, smallest)]
    chosen = np.zeros(len(hashes), dtype=bool)
    chosen[ranking[np.cumsum(characters[ranking]) - characters[ranking] < limit]] = True
    split = np.split(chosen, np.cumsum([len(m) for m in masks])[:-1])
    return [(e.unit, mask & chosen) for e, mask, chosen in zip(extracted, masks, split, strict=True)]


def _train_tokenizer(corpus: str, uri: str, sample: list[tuple[Unit, np.ndarray]], vocab_size: int) -> None:
    texts = (text for unit, mask in sample for _, text in _read_unit(unit, corpus, mask))
    with TemporaryDirectory(prefix="terrane-") as folder:
        tokenizers.train(texts, vocab_size).save_pretrained(folder)
        _publish_tokenizer(Path(folder), uri)


def _publish_tokenizer(folder: Path, uri: str) -> None:
    """tokenizer.json goes last: its presence says that the directory is whole."""
    for name in sorted(storage.list_files(str(folder)), key=lambda name: name == "tokenizer.json"):
        storage.upload(folder / name, storage.join(uri, name))


# --- tokenise and pack ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PackedUnit:
    number: int
    written: dict[str, list[shards.Shard]] = field(default_factory=dict)
    """Shards by split."""
    tails: dict[str, shards.Packed] = field(default_factory=dict)
    """By split: the tokens after the last whole sequence."""


def pack_unit(
    unit: Unit, kept: np.ndarray, held: np.ndarray, corpus: str, tokenizer_uri: str, sequence_length: int
) -> PackedUnit:
    """Tokenise the kept documents of a unit and write its whole sequences, one shard a split."""
    tokenizer = _load_tokenizer(tokenizer_uri)
    end = tokenizers.document_end(tokenizer)
    result = PackedUnit(number=unit.number)
    for split, mask in (("train", kept & ~held), ("held_out", kept & held)):
        stream = _tokenise(tokenizer, end, _read_unit(unit, corpus, mask))
        whole, tail = stream.split_at(len(stream.tokens) // sequence_length * sequence_length)
        result.tails[split] = tail
        if len(whole.tokens):
            name = f"shards/{split}-{unit.number:06d}.arrow"
            shard = shards.write_shard(corpus, name, whole, sequence_length, len(tokenizer))
            result.written[split] = [shard]
    return result


def _pack(
    recipe: Recipe,
    corpus: str,
    tokenizer_uri: str,
    extracted: list[Extracted],
    kept: list[np.ndarray],
    progress: Callable[[str, int, int], None],
) -> list[PackedUnit]:
    length = recipe.train.sequence_length
    masks = {
        e.unit.number: (mask, held_out(e.hashes, recipe.corpus.held_out))
        for e, mask in zip(extracted, kept, strict=True)
    }

    def pack(unit: Unit) -> PackedUnit:
        return pack_unit(unit, *masks[unit.number], corpus, tokenizer_uri, length)

    done = _run_units("tokenise and pack", pack, [e.unit for e in extracted], progress)
    return sorted(done, key=lambda packed: packed.number)


def _tokenise(tokenizer: Any, end: int, texts: Iterator[tuple[str, str]]) -> shards.Packed:
    """Every document followed by the end token."""
    pairs = list(texts)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast([text for _, text in pairs], add_special_tokens=False)
    parts = [
        shards.Packed(np.array([*encoding.ids, end], dtype=np.uint32), [(len(encoding.ids) + 1, document)])
        for (document, _), encoding in zip(pairs, encodings, strict=True)
    ]
    return shards.join(parts)


def _manifest(
    recipe: Recipe,
    corpus: str,
    tokenizer_uri: str,
    extracted: list[Extracted],
    kept: list[np.ndarray],
    packed: list[PackedUnit],
) -> Manifest:
    length, vocab_size = recipe.train.sequence_length, len(_load_tokenizer(tokenizer_uri))
    splits: dict[str, dict[str, Any]] = {}
    lost = 0
    for split in ("train", "held_out"):
        found = [shard for unit in packed for shard in unit.written.get(split, [])]
        tail = shards.join([unit.tails[split] for unit in packed])
        whole, rest = tail.split_at(len(tail.tokens) // length * length)
        lost += len(rest.tokens)
        if len(whole.tokens):
            found.append(shards.write_shard(corpus, f"shards/{split}-tails.arrow", whole, length, vocab_size))
        sequences = sum(shard.sequences for shard in found)
        if not sequences:
            raise UserError(
                f"the {split} split holds less than one sequence of {length} tokens",
                "add text, shorten train.sequence_length, or change corpus.held_out",
            )
        splits[split] = {"sequences": sequences, "tokens": sequences * length, "shards": [asdict(s) for s in found]}
    return Manifest(
        hash=_content_hash(splits),
        inputs=corpus_inputs(recipe),
        sequence_length=length,
        vocab_size=vocab_size,
        documents={
            "read": sum(e.read for e in extracted),
            "kept": int(sum(mask.sum() for mask in kept)),
            "dropped": _dropped(extracted, kept),
        },
        sources=_by_source(extracted, kept),
        splits=splits,
        tail_tokens_dropped=lost,
    )


def _by_source(extracted: list[Extracted], kept: list[np.ndarray]) -> dict[str, dict[str, int]]:
    sources: dict[str, collections.Counter[str]] = {}
    for unit, mask in zip(extracted, kept, strict=True):
        counter = sources.setdefault(unit.source, collections.Counter())
        counter.update(documents=int(mask.sum()), characters=int(unit.characters[mask].sum()))
    return {name: dict(counter) for name, counter in sources.items()}


def _content_hash(splits: dict[str, dict[str, Any]]) -> str:
    import xxhash

    text = json.dumps([[shard["xxh3"] for shard in splits[split]["shards"]] for split in sorted(splits)])
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


# --- common -----------------------------------------------------------------------------------------------------------


def held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """Mask of the documents in the held-out split."""
    return np.array([steps.is_held_out(bytes(digest), share) for digest in hashes], dtype=bool)


def _words(hashes: np.ndarray) -> np.ndarray:
    """[n, 2] uint64, big-endian halves of the hashes."""
    return hashes.view(">u8").reshape(-1, 2)


def _read_unit(unit: Unit, corpus: str, mask: np.ndarray) -> Iterator[tuple[str, str]]:
    """(id, text) of the chosen documents of a unit."""
    import pyarrow as pa

    table = pa.ipc.open_file(pa.BufferReader(storage.read(unit.uri(corpus)))).read_all()
    for index in np.flatnonzero(mask):
        yield table["id"][index].as_py(), table["text"][index].as_py()


def _load_tokenizer(uri: str) -> Any:
    with storage.local_directory(uri) as folder:
        return tokenizers.load(folder)


def quiet_ray_data() -> None:
    """Importing Ray Data sets its loggers up, so they are quietened after that; progress is ours to tell."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _run_units(
    what: str, work: Callable[[Unit], Any], units: list[Unit], progress: Callable[[str, int, int], None]
) -> list[Any]:
    """Do work on every unit as Ray Data tasks, results in any order."""
    import pickle

    import ray

    quiet_ray_data()

    def on_row(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": pickle.dumps(work(pickle.loads(row["unit"])))}

    results = []
    rows = [{"unit": pickle.dumps(unit)} for unit in units]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(on_row, num_cpus=TASK_CPUS)
    progress(what, 0, len(units))
    for row in dataset.iter_rows():
        results.append(pickle.loads(row["result"]))
        progress(what, len(results), len(units))
    return results
