"""One unit of the corpus engine at a time, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.corpus_config import CorpusConfig, QualityConfig, Source
from orchestrator.data import extraction, packing, sources
from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.duplicates import PAIR, Duplicates, partitions
from orchestrator.data.extraction import condemn, read_unit
from orchestrator.data.layout import CorpusDir
from orchestrator.data.packing import PackSettings, pack_unit
from orchestrator.data.shards import ShardReader
from orchestrator.data.sources import Unit, make_units
from orchestrator.data.texts import read_texts

TEXTS = ["alpha beta gamma. " * 20, "ALPHA  beta gamma. " * 20, "short", "delta epsilon zeta. " * 30]


def config(folder: Path, **quality: object) -> CorpusConfig:
    rules: dict[str, object] = dict.fromkeys(type(CorpusConfig.model_fields["quality"].default).model_fields)
    return CorpusConfig.model_validate(
        {
            "sources": [{"name": "s", "path": str(folder)}],
            "held_out": 1e-9,
            "quality": rules | {"min_characters": 100, **quality},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "in" / f"{number}.md").write_text(text)
    (tmp_path / "in" / "9.md").write_bytes(b"\xff\xfe\xff")
    return tmp_path / "in"


@pytest.fixture
def unit(folder: Path) -> Unit:
    return make_units(sources.list_sources(config(folder)))[0]


def test_a_unit_keeps_what_it_read_and_what_it_dropped(unit: Unit, folder: Path, tmp_path: Path) -> None:
    facts = read_unit(unit, str(tmp_path), config(folder), "")
    assert facts.dropped == {"not utf-8": 1, "too short": 1}
    assert facts.read == facts.written + 2 == 5
    corpus = CorpusDir(str(tmp_path))
    kept = [row for batch in read_texts(corpus.documents(0), "id", "text") for row in zip(*batch, strict=True)]
    assert kept == [("s/0.md", TEXTS[0].strip()), ("s/1.md", TEXTS[1].strip()), ("s/3.md", TEXTS[3].strip())]
    lost = [row for batch in read_texts(corpus.dropped(0), "id", "reason", "text") for row in zip(*batch, strict=True)]
    assert lost == [("s/2.md", "too short", "short"), ("s/9.md", "not utf-8", "")]


def test_a_unit_that_was_read_is_not_read_again(
    unit: Unit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_unit(unit, str(tmp_path), config(folder), "")
    with monkeypatch.context() as patched:
        patched.setattr(extraction, "read_documents", lambda *_: pytest.fail("read again"))
        assert read_unit(unit, str(tmp_path), config(folder), "") == first
    other = read_unit(unit, str(tmp_path), config(folder, min_characters=1), "")
    assert other.written == 4, "other rules read anew"


def test_a_piece_that_ends_its_worker_is_set_aside(unit: Unit, folder: Path, tmp_path: Path) -> None:
    corpus = CorpusDir(str(tmp_path))
    assert not condemn(corpus, unit), "nothing is known yet"
    read_unit(unit, str(tmp_path), config(folder), "", journal=True)
    Path(corpus.facts(0)).unlink()
    assert condemn(corpus, unit), "the journal names the last piece that was begun"
    facts = read_unit(unit, str(tmp_path), config(folder), "")
    assert facts.dropped == {"ended its worker": 1, "too short": 1}
    assert facts.read == 5


def pack(corpus: CorpusDir, facts: extraction.UnitFacts, pairs: list[tuple[int, int]] = []) -> packing.PackedUnit:  # noqa: B006
    found = Duplicates(corpus, "state", {0: facts.key})

    def write(found: Duplicates, part: int, first: int, last: int) -> int:
        from orchestrator.data import buckets

        documents = np.array([document for document, _ in pairs], np.uint64)
        buckets.write(found.path("exact", part), np.array(pairs, PAIR), buckets.by_unit(documents), 1)
        return len(pairs)

    write(found, 0, 0, 0)
    found.publish("exact", [len(pairs)])
    found.publish("near", [])
    settings = PackSettings(
        tokenizer=corpus.tokenizer, tokenizer_key="k", sequence_length=16, held_out=1e-9, quality=QualityConfig()
    )
    return pack_unit(0, found, None, settings)


def test_packed_tokens_are_the_documents_each_with_its_end(unit: Unit, folder: Path, tmp_path: Path) -> None:
    corpus = CorpusDir(str(tmp_path))
    facts = read_unit(unit, corpus.uri, config(folder), "")
    tokenizer = tokenizers.train(TEXTS, vocab_size=400)
    tokenizer.save_pretrained(corpus.tokenizer)
    packed = pack(corpus, facts, [(1, 0)])
    (shard,) = packed.shards["train"]
    reader = ShardReader(corpus.uri, [packing.shards.Shard(**shard)], 16, 400)
    ids = reader.take(np.arange(len(reader))).flatten().tolist() + packed.tails["train"]["tokens"]
    assert tokenizer.decode(ids).split("</s>") == [TEXTS[0].strip(), TEXTS[3].strip(), ""]
    assert packed.kept == {"train": 2}
    assert packed.dropped == {"exact duplicate": 1}
    assert packed.tokens == len(ids)
    assert sum(packed.lengths.values()) == 2
    columns = ("id", "reason", "text", "of")
    (lost,) = [r for batch in read_texts(corpus.duplicates(0), *columns) for r in zip(*batch, strict=True)]
    assert lost == ("s/1.md", "exact duplicate", TEXTS[1].strip(), "0")


def test_a_large_unit_is_written_as_several_shards(
    unit: Unit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = CorpusDir(str(tmp_path))
    facts = read_unit(unit, corpus.uri, config(folder), "")
    tokenizers.train(TEXTS, vocab_size=400).save_pretrained(corpus.tokenizer)
    whole = pack(corpus, facts)
    Path(corpus.packed(0)).unlink()
    monkeypatch.setattr(packing, "SHARD_TOKENS", 1)
    cut = pack(corpus, facts)
    assert len(cut.shards["train"]) == len(whole.shards["train"]) == 1, "one batch of documents is one shard"
    assert cut.tails == whole.tails


def test_partitions_are_not_made_twice(tmp_path: Path) -> None:
    found = Duplicates(CorpusDir(str(tmp_path)), "state", {0: "k"})
    found.publish("exact", [7])
    assert partitions(found, "exact", lambda *_: pytest.fail("made again"), 1, lambda *_: None) == [7]


def test_what_cuts_leave_without_sense_is_dropped(tmp_path: Path) -> None:
    settings = PackSettings(
        tokenizer="", tokenizer_key="", sequence_length=16, held_out=0.1, quality=QualityConfig(min_characters=10)
    )
    packer = object.__new__(packing._Packer)
    packer._settings = settings
    prose = "The boiling point of water falls with height, as the air above it weighs less. "
    assert not packer._is_remnant(prose * 3, 100)
    assert packer._is_remnant(prose, 10_000), "a small rest of a long document"
    assert packer._is_remnant("2SO2 + O2 = 2SO3, 4.5, 6.7, 8.9, 1.2, 3.4 " * 10, 100), "nothing that a rule would keep"


def test_a_named_field_that_is_missing_is_no_text(tmp_path: Path) -> None:
    from orchestrator.data.documents import Dropped, read_documents

    (tmp_path / "a.jsonl").write_text('{"title": "T", "abstract": "A"}\n')
    source = Source(name="s", path=str(tmp_path), text_field="abstrct")
    assert list(read_documents(str(tmp_path / "a.jsonl"), "a.jsonl", source)) == [Dropped("s/a.jsonl#0", "no text")]


def test_what_storage_did_not_give_is_asked_for_again(
    unit: Unit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import storage

    with monkeypatch.context() as patched:
        patched.setattr(storage, "reading", lambda uri: (_ for _ in ()).throw(OSError(5, "broke off", uri)))
        failed = read_unit(unit, str(tmp_path), config(folder), "")
    assert failed.dropped == {"storage failed": 5}
    again = read_unit(unit, str(tmp_path), config(folder), "")
    assert again.written == 3
    assert again.key != failed.key, "or what was compared and packed before would stand"
