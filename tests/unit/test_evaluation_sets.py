from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.data import contamination
from orchestrator.data.evaluation_sets import index_evaluation_sets, read_texts
from orchestrator.data.extraction import _load_index
from orchestrator.data.layout import CorpusDir
from orchestrator.errors import UserError
from tests.conftest import SHARED_DATA

QUESTION = "Which of these four quantities stays the same when a ball bounces without any friction at all?"


def write_all_formats(folder: Path) -> None:
    (folder / "a.csv").write_text(f'question,answer\n"{QUESTION} a",B\n')
    (folder / "b.jsonl").write_text(json.dumps({"items": [{"q": QUESTION + " b"}]}) + "\n")
    (folder / "c.json").write_text(json.dumps({"1": {"q": QUESTION + " c"}}))
    (folder / "d.tsv").write_text(f"{QUESTION} d\tB\n")
    (folder / "e.txt").write_text(QUESTION + " e")
    parquet.write_table(pa.table({"q": [QUESTION + " f"]}), folder / "f.parquet")
    (folder / "g.json.gz").write_bytes(gzip.compress(json.dumps([QUESTION + " g"]).encode()))
    (folder / "ignored.png").write_bytes(b"\0")


def test_every_text_of_every_format_is_found(tmp_path: Path) -> None:
    write_all_formats(tmp_path)
    found = {text for file in tmp_path.iterdir() if file.suffix != ".png" for text in read_texts(str(file))}
    assert {f"{QUESTION} {letter}" for letter in "abcdefg"} <= found


def test_the_index_knows_the_questions_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    write_all_formats(tmp_path / "sets")
    corpus = CorpusDir(str(tmp_path / "corpus"))
    key = index_evaluation_sets(str(tmp_path / "sets"), corpus)
    assert key == index_evaluation_sets(str(tmp_path / "sets"), corpus)
    index = _load_index(corpus.contamination, key)
    assert np.all(np.diff(index.astype(np.float64)) > 0)
    assert contamination.hits(f"The exam asked: {QUESTION.upper()} g -- and more.", index)
    assert not contamination.hits(QUESTION[: len(QUESTION) // 2], index)
    (tmp_path / "sets" / "h.txt").write_text(
        "A text of more than thirteen words that makes another index out of the old one."
    )
    assert index_evaluation_sets(str(tmp_path / "sets"), corpus) != key


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"a.png": b"x"},
        {"a.csv": b"too,short"},
        {"a.jsonl": b"{broken"},
        {"a.json.gz": b"no gzip"},
        {"a.txt": b"\xff"},
    ],
    ids=["missing", "empty", "other", "short", "broken json", "broken gzip", "no utf-8"],
)
def test_sets_that_cannot_be_used_are_refused(tmp_path: Path, content: dict[str, bytes] | None) -> None:
    folder = tmp_path / "sets"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=r"corpus\.decontaminate"):
        index_evaluation_sets(str(folder), CorpusDir(str(tmp_path / "corpus")))


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
def test_a_real_exam_is_found_in_a_text_that_quotes_it(tmp_path: Path) -> None:
    corpus = CorpusDir(str(tmp_path))
    key = index_evaluation_sets(str(SHARED_DATA / "mmlu"), corpus)
    index = _load_index(corpus.contamination, key)
    questions = [
        text for text in read_texts(str(min((SHARED_DATA / "mmlu" / "test").iterdir()))) if len(text.split()) > 15
    ]
    assert all(contamination.hits(f"Before. {question} After.", index) for question in questions[:50])
