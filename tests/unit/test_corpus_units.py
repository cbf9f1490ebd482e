"""One unit of the corpus pipeline at a time, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.config import CorpusConfig, QualityConfig, Recipe, Source
from orchestrator.data import documents, pipeline, shards, steps
from orchestrator.data import tokenizer as tokenizers
from tests.languages import PARAGRAPHS

TEXTS = ["alpha beta gamma. " * 20, "ALPHA  beta gamma. " * 20, "short", "delta epsilon zeta. " * 30]


def config(**limits: int) -> CorpusConfig:
    """Length is the one rule that is on."""
    off = dict.fromkeys(QualityConfig.model_fields)
    return CorpusConfig(sources=(Source(name="s", path="/x"),), quality=QualityConfig.model_validate({**off, **limits}))


@pytest.fixture
def unit(tmp_path: Path) -> pipeline.Unit:
    for number, text in enumerate(TEXTS):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.md").write_text(text)
    (tmp_path / "in" / "9.md").write_bytes(b"\xff\xfe\xff")
    return pipeline.make_units(documents.list_source(Source(name="s", path=str(tmp_path / "in"))))[0]


def test_documents_in_are_kept_and_dropped(unit: pipeline.Unit, tmp_path: Path) -> None:
    found = pipeline.extract_unit(unit, str(tmp_path), config(min_characters=100))
    masks = pipeline._first_of_each([found])
    dropped = pipeline._dropped([found], masks)
    assert dropped == {"exact duplicate": 1, "not utf-8": 1, "too short": 1}
    assert found.read == masks[0].sum() + sum(dropped.values()) == 5


def test_documents_in_other_languages_are_dropped_with_that_reason(tmp_path: Path) -> None:
    for code in ("de", "en", "fr"):
        (tmp_path / f"{code}.md").write_text(PARAGRAPHS[code])
    source = Source(name="s", path=str(tmp_path))
    (unit,) = pipeline.make_units(documents.list_source(source))
    wanted = CorpusConfig(sources=(source,), languages=("en", "fr"))
    found = pipeline.extract_unit(unit, str(tmp_path / "out"), wanted)
    assert found.dropped == {"other language": 1}
    assert [id for id, _ in pipeline._read_unit(unit, str(tmp_path / "out"), np.ones(2, bool))] == [
        "s/en.md",
        "s/fr.md",
    ]


def test_a_unit_that_was_read_is_not_read_again(
    unit: pipeline.Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pipeline.extract_unit(unit, str(tmp_path), config(min_characters=100))
    with monkeypatch.context() as patched:
        patched.setattr(documents, "read_documents", lambda _: pytest.fail("read again"))
        again = pipeline.extract_unit(unit, str(tmp_path), config(min_characters=100))
    assert np.array_equal(again.hashes, first.hashes)
    assert np.array_equal(again.characters, first.characters)
    assert (again.read, again.dropped) == (first.read, first.dropped)
    other = pipeline.extract_unit(unit, str(tmp_path), config(min_characters=1))
    assert len(other.hashes) == 4, "another recipe reads anew"


def test_packed_tokens_are_the_documents_each_with_its_end(unit: pipeline.Unit, tmp_path: Path) -> None:
    tokenizer = tokenizers.train(TEXTS, vocab_size=400)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = pipeline.extract_unit(unit, str(tmp_path), config(min_characters=100))
    everything = np.ones(len(found.hashes), dtype=bool)
    packed = pipeline.pack_unit(unit, everything, ~everything, str(tmp_path), str(tmp_path / "tokenizer"), 16)
    (shard,) = packed.written["train"]
    ids = shards.ShardReader(str(tmp_path), [shard]).take(np.arange(shard.sequences)).flatten().tolist()
    ids += packed.tails["train"].tokens.tolist()
    expected = [TEXTS[0].strip(), TEXTS[1].strip(), TEXTS[3].strip()]
    assert tokenizer.decode(ids).split("</s>") == [*expected, ""]
    assert "held_out" not in packed.written


def sample(characters: list[int], sample_mib: int = 1) -> int:
    """How many of documents of these sizes the tokenizer is trained on."""
    values = {"name": "r", "corpus": {"sources": [{"name": "s", "path": "/x"}], "held_out": 1e-9}}
    recipe = Recipe.model_validate(
        {**values, "tokenizer": {"sample_mib": sample_mib}, "train": {"steps": 1, "lr": 1.0}}
    )
    hashes = np.frombuffer(b"".join(steps.content_hash(str(n)) for n in range(len(characters))), dtype="V16")
    unit = pipeline.Unit(0, ())
    sizes = np.array(characters, dtype=np.int64)
    found = pipeline.Extracted(unit=unit, source="s", read=len(sizes), dropped={}, hashes=hashes, characters=sizes)
    ((_, mask),) = pipeline._sample(recipe, [found], [np.ones(len(sizes), dtype=bool)])
    return int(mask.sum())


def test_a_huge_document_does_not_cut_the_tokenizer_sample() -> None:
    assert sample([1000] * 50) == 50
    assert sample([1000] * 50 + [10 * 2**20]) == 50
    assert sample([10 * 2**20]) == 1, "better one that is too large than none"
    assert 900 <= sample([1000] * 5000) <= 1100
