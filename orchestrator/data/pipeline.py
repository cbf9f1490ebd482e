"""Sources -> Corpus, on Ray Data: read and clean, deduplicate, train a tokenizer, tokenise, pack, write shards.

Work is cut into units of files. What a unit's task gives is marked when it is whole, under a digest of all that it
depends on, so the same command does what is missing: after a failure, after new files, after another setting. The
manifest is written last, and a corpus without it is unfinished.
"""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from orchestrator import storage
from orchestrator.config import Recipe
from orchestrator.data import shards, sources
from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.duplicates import Duplicates, find_duplicates
from orchestrator.data.evaluation_sets import index_evaluation_sets
from orchestrator.data.extraction import UnitFacts, condemn, read_unit
from orchestrator.data.layout import CorpusDir
from orchestrator.data.manifest import Manifest, data_order, save_manifest
from orchestrator.data.packing import SPLITS, PackedUnit, PackSettings, pack_unit, tokenizer_key
from orchestrator.data.passages import Passages, find_passages
from orchestrator.data.sampling import sample_unit, train_tokenizer
from orchestrator.data.sources import SourceFile, Unit
from orchestrator.data.tasks import Progress, run_alone, run_tasks
from orchestrator.errors import RunFailed, UserError

ABANDONED_S = 3600.0

log = logging.getLogger(__name__)


def corpus_inputs(recipe: Recipe) -> str:
    """Digest of everything in a recipe that a corpus depends on."""
    # Of a mixture the shards know only that there is one, which keeps the sources apart: its weights may change.
    apart = bool(recipe.corpus.mixture)
    plain = recipe.model_copy(update={"corpus": recipe.corpus.model_copy(update={"mixture": ()})})
    digest = plain.digest_of("corpus", "tokenizer", "model.path", "model.commit", "train.sequence_length")
    return f"{digest}-by-source" if apart else digest


def listing_digest(files: Sequence[SourceFile]) -> str:
    """Digest of the files of all sources: another one means that files came, went or changed."""
    return xxhash.xxh3_128_hexdigest(repr([(f.uri, f.bytes, f.version) for f in files]).encode())


def build_corpus(recipe: Recipe, uri: str, files: Sequence[SourceFile], progress: Progress) -> Manifest:
    """Make the corpus of a recipe at `uri`, or bring it up to date. Ray must be up.

    Raises:
        UserError: the sources hold no usable document, or too little text for one sequence.
    """
    corpus, config = CorpusDir(uri), recipe.corpus
    units = _settle_units(corpus, files)
    contamination = index_evaluation_sets(config.decontaminate, corpus)
    facts = _read(recipe, corpus, units, contamination, progress)
    found = find_duplicates(corpus, units, facts, config.near_duplicates, progress)
    passages = find_passages(found, progress) if config.duplicate_spans else None
    settings = PackSettings(
        tokenizer=_tokenizer(recipe, corpus, found, facts, progress),
        tokenizer_key=tokenizer_key(corpus.tokenizer),
        sequence_length=recipe.train.sequence_length,
        held_out=config.held_out,
        quality=config.quality,
    )
    packed = run_tasks("tokenise and pack", lambda n: pack_unit(n, found, passages, settings), found.units, progress)
    manifest = _manifest(recipe, corpus, files, units, facts, packed, found)
    save_manifest(manifest, uri)
    _sweep(corpus, found, passages, manifest)
    return manifest


# --- read -------------------------------------------------------------------------------------------------------------


def _settle_units(corpus: CorpusDir, files: Sequence[SourceFile]) -> list[Unit]:
    """The units of before that are still whole, and new ones for the other files."""
    try:
        before = sources.units_from_json(storage.read_json(corpus.units))
    except FileNotFoundError:
        before = []
    units = sources.extend_units(before, list(files))
    if before and units != before:
        same = len({unit.number for unit in units} & {unit.number for unit in before})
        log.info("corpus: the files of %d units of work are as they were, %d units are new", same, len(units) - same)
    storage.write(corpus.units, json.dumps(sources.units_as_json(units)).encode())
    return units


def _read(
    recipe: Recipe, corpus: CorpusDir, units: list[Unit], contamination: str, progress: Progress
) -> list[UnitFacts]:
    config = recipe.corpus

    def read(unit: Unit) -> UnitFacts:
        return read_unit(unit, corpus.uri, config, contamination)

    def read_without_poison(unit: Unit) -> UnitFacts:
        """A unit that ends its worker: find the piece that does, set it aside, and read the others."""
        for _ in range(len(unit.pieces) + 1):
            done = run_alone(lambda: read_unit(unit, corpus.uri, config, contamination, journal=True))
            if done:
                return done
            if not condemn(corpus, unit):
                break
        raise RunFailed(f"reading unit {unit.number} ({unit.source}) ends its worker", "see `ray status` and `dmesg`")

    facts = run_tasks("read and clean", read, units, progress, on_crash=read_without_poison)
    if not any(fact.written for fact in facts):
        dropped = sum((collections.Counter(fact.dropped) for fact in facts), collections.Counter())
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "no document"
        raise UserError(
            f"the corpus is empty: none of {sum(fact.read for fact in facts)} documents was kept ({reasons})",
            "check corpus.sources (JSONL records need a string field `text`) and corpus.quality",
        )
    return facts


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _tokenizer(
    recipe: Recipe, corpus: CorpusDir, found: Duplicates, facts: Sequence[UnitFacts], progress: Progress
) -> str:
    """Directory of the tokenizer in the corpus: a copy of the user's, or one trained on a sample of the corpus."""
    inputs = recipe.digest_of("tokenizer", "model.path", "model.commit").encode()
    if storage.exists(corpus.tokenizer_inputs) and storage.read(corpus.tokenizer_inputs) == inputs:
        return corpus.tokenizer
    given = tokenizers.given_tokenizer(recipe)
    storage.delete(corpus.tokenizer)
    if given:
        with TemporaryDirectory(prefix="terrane-") as folder:
            tokenizer = tokenizers.load(given)
            tokenizers.extend(tokenizer, recipe.tokenizer)
            tokenizer.save_pretrained(folder)
            storage.upload_directory(Path(folder), corpus.tokenizer)
    else:
        _train_tokenizer(recipe, corpus, found, sum(fact.characters for fact in facts), progress)
    storage.write(corpus.tokenizer_inputs, inputs)
    return corpus.tokenizer


def _train_tokenizer(recipe: Recipe, corpus: CorpusDir, found: Duplicates, characters: int, progress: Progress) -> None:
    wanted = recipe.tokenizer.sample_mib * 2**20
    share = min(1.0, wanted / characters)
    while True:
        # The share is of the documents, and one of them may be most of the text.
        sampled = run_tasks(
            "sample for the tokenizer",
            lambda unit, share=share: sample_unit(found, unit, share, recipe.corpus.held_out),  # type: ignore[misc]
            found.units,
            progress,
        )
        if share == 1 or sum(sampled) >= wanted / 2:
            break
        share = min(1.0, 2 * share)
    vocab_size = recipe.tokenizer.vocab_size
    run_tasks("train the tokenizer", lambda _: train_tokenizer(corpus, found.units, vocab_size), [0], progress)


# --- manifest ---------------------------------------------------------------------------------------------------------


def _manifest(
    recipe: Recipe,
    corpus: CorpusDir,
    files: Sequence[SourceFile],
    units: list[Unit],
    facts: Sequence[UnitFacts],
    packed: Sequence[PackedUnit],
    found: Duplicates,
) -> Manifest:
    by_source = {
        source.name: [(f, p) for u, f, p in zip(units, facts, packed, strict=True) if u.source == source.name]
        for source in recipe.corpus.sources
    }
    counts = {name: _counts(parts) for name, parts in by_source.items()}
    totals = sum((collections.Counter(c["dropped"]) for c in counts.values()), collections.Counter())
    documents = {
        "read": sum(c["read"] for c in counts.values()),
        "kept": sum(c["kept"] for c in counts.values()),
        "dropped": dict(sorted(totals.items())),
    }
    reasons = ", ".join(f"{count} {reason}" for reason, count in documents["dropped"].items()) or "none"
    log.info("corpus: %d documents read, %d kept (dropped: %s)", documents["read"], documents["kept"], reasons)
    splits, lost = _splits(recipe, corpus, {name: [p for _, p in parts] for name, parts in by_source.items()})
    manifest = Manifest(
        hash=xxhash.xxh3_128_hexdigest(
            json.dumps([[shard["xxh3"] for shard in splits[split]["shards"]] for split in sorted(splits)]).encode()
        ),
        inputs=corpus_inputs(recipe),
        files=listing_digest(files),
        sequence_length=recipe.train.sequence_length,
        vocab_size=_vocabulary_size(corpus),
        documents=documents,
        sources=counts,
        splits=splits,
        tail_tokens_dropped=lost,
        clusters=found.clusters(),
    )
    data_order(manifest, recipe)  # refuses a mixture of what is not there
    return manifest


def _vocabulary_size(corpus: CorpusDir) -> int:
    with storage.local_directory(corpus.tokenizer) as folder:
        return tokenizers.vocabulary_size(str(folder))


def _counts(parts: Sequence[tuple[UnitFacts, PackedUnit]]) -> dict[str, Any]:
    """Of one source. Every document that was read is kept or counted under its reason."""
    read, kept = sum(fact.read for fact, _ in parts), sum(sum(unit.kept.values()) for _, unit in parts)
    dropped: collections.Counter[str] = collections.Counter()
    lengths: collections.Counter[str] = collections.Counter()
    for fact, unit in parts:
        dropped.update(fact.dropped)
        dropped.update(unit.dropped)
        lengths.update(unit.lengths)
    if read != kept + dropped.total():
        raise RunFailed(f"of {read} documents {kept} were kept and {dropped.total()} dropped", "report this")
    return {
        "units": len(parts),
        "read": read,
        "kept": kept,
        "dropped": dict(sorted(dropped.items())),
        "characters": sum(unit.characters for _, unit in parts),
        "cut_bytes": sum(unit.cut_bytes for _, unit in parts),
        "tokens": sum(unit.tokens for _, unit in parts),
        "lengths": dict(sorted(lengths.items(), key=lambda item: int(item[0]))),
    }


def _splits(
    recipe: Recipe, corpus: CorpusDir, packed: dict[str, list[PackedUnit]]
) -> tuple[dict[str, dict[str, Any]], int]:
    """The shards of each split, and the number of tokens at the very end that fill no sequence."""
    length, vocab_size = recipe.train.sequence_length, _vocabulary_size(corpus)
    splits: dict[str, dict[str, Any]] = {}
    lost = 0
    for split in SPLITS:
        # The sources of a mixture are drawn from by themselves; else the last tokens of all of them fill sequences.
        apart = bool(recipe.corpus.mixture) and split == "train"
        groups = packed if apart else {"": [unit for units in packed.values() for unit in units]}
        written: list[shards.Shard] = []
        for source, units in groups.items():
            found = [shards.Shard(**shard) for unit in units for shard in unit.shards[split]]
            tail = shards.join([unit.tail(split) for unit in units])
            whole, rest = tail.split_at(len(tail.tokens) // length * length)
            lost += len(rest.tokens)
            if len(whole.tokens):
                key = xxhash.xxh3_128_hexdigest(whole.tokens.tobytes())
                name = corpus.shard(split, "-".join(("tails", source)).rstrip("-"), key)
                found.append(shards.write_shard(corpus.uri, name, whole, length, vocab_size))
            written += [replace(shard, source=source) for shard in found]
        sequences = sum(shard.sequences for shard in written)
        if not sequences:
            raise UserError(
                f"the {split} split holds less than one sequence of {length} tokens",
                "add text, shorten train.sequence_length, or change corpus.held_out",
            )
        splits[split] = {"sequences": sequences, "tokens": sequences * length, "shards": [asdict(s) for s in written]}
    return splits, lost


def _sweep(corpus: CorpusDir, found: Duplicates, passages: Passages | None, manifest: Manifest) -> None:
    """Delete what only the work needed, and what another set of units left behind."""
    shards_now = {
        name for split in SPLITS for s in manifest.shards(split) for name in (s.name, s.name + shards.SIDECAR)
    }
    units_now = {f"unit-{unit:06d}" for unit in found.units}
    indexes_now = {"exact", "near", *(passages.indexes if passages else ())}
    for name in storage.list_files(corpus.uri):
        top, _, rest = name.partition("/")
        unit = rest.rpartition("/")[2].partition(".")[0]
        stale = (
            top in ("sample", "journal")
            or (top == "shards" and name not in shards_now)
            or (top == "dedup" and not rest.startswith(found.state))
            or (top == "index" and rest.partition("/")[0] not in indexes_now)
            or (unit.startswith("unit-") and unit not in units_now)
        )
        if stale:
            storage.delete(corpus.path(name))
    storage.delete_abandoned(corpus.uri, ABANDONED_S)
