from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from orchestrator.corpus_config import Source
from orchestrator.data import buckets, records
from orchestrator.data.readers import Unreadable
from orchestrator.data.texts import TextWriter, read_texts

SOURCE = Source(name="s", path="/x")


@given(lines=st.lists(st.text("ab \r", max_size=12), max_size=20), cuts=st.lists(st.integers(0, 200), max_size=4))
def test_lines_are_read_once_wherever_the_file_is_cut(lines: list[str], cuts: list[int]) -> None:
    data = "\n".join(lines).encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found = [
        line for first, last in itertools.pairwise(edges) for line in records.json_lines(io.BytesIO(data), first, last)
    ]
    assert found == list(records.json_lines(io.BytesIO(data), 0, None))
    assert [line.strip() for _, line in found if line] == [line.strip().encode() for line in lines if line.strip()]


def test_a_line_without_end_is_named_and_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    data = b"short\n" + b"x" * 5_000_000 + b"\nnext\n"
    found = list(records.json_lines(io.BytesIO(data), 0, None))
    assert found == [(0, b"short\n"), (6, None), (5_000_007, b"next\n")]


def test_parquet_row_groups_are_read_once(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(1000)]
    parquet.write_table(pa.table({"text": texts, "other": texts}), tmp_path / "a.parquet", row_group_size=100)
    size = (tmp_path / "a.parquet").stat().st_size
    found: list[tuple[int, str]] = []
    for first, last in ((0, size // 3), (size // 3, size // 2), (size // 2, size)):
        with (tmp_path / "a.parquet").open("rb") as stream:
            found += [(row, record["text"]) for row, record in records.parquet_rows(stream, SOURCE, first, last)]
    assert found == list(enumerate(texts))


def test_a_record_is_its_text_or_its_title_and_abstract() -> None:
    assert records.text_of({"text": "a"}, SOURCE) == "a"
    assert records.text_of({"body": "a"}, SOURCE.model_copy(update={"text_field": "body"})) == "a"
    assert records.text_of({"title": "T", "abstract": "A"}, SOURCE) == "# T\n\n## Abstract\n\nA"
    for record in ({"title": "T"}, {"text": 1}, [], "text", None):
        with pytest.raises(Unreadable, match="no text"):
            records.text_of(record, SOURCE)


def test_corrupt_pages_of_parquet_are_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [f"{n} " * 200 for n in range(500)]}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[100 : len(data) // 2] = b"\xff" * (len(data) // 2 - 100)
    with pytest.raises(Unreadable, match="broken parquet"):
        list(records.parquet_rows(io.BytesIO(bytes(data)), SOURCE, 0, None))


def test_broken_parquet_is_named() -> None:
    with pytest.raises(Unreadable, match="broken parquet"):
        list(records.parquet_rows(io.BytesIO(b"PAR1 nonsense"), SOURCE, 0, None))


def test_records_are_found_in_their_bucket(anywhere: str) -> None:
    import numpy as np

    dtype = np.dtype([("key", "<u8"), ("row", "<u4")])
    rows = np.array([(key * 2**54, number) for number, key in enumerate([5, 1023, 0, 5, 7])], dtype)
    uri = f"{anywhere}/index.bin"
    buckets.write(uri, rows, buckets.by_key(rows["key"]), buckets.KEY_BUCKETS)
    read = [buckets.read(uri, dtype, a, b, buckets.KEY_BUCKETS)["row"].tolist() for a, b in ((0, 1), (5, 8), (8, 1024))]
    assert read == [[2], [0, 3, 4], [1]]
    assert buckets.size(uri, dtype, buckets.KEY_BUCKETS) == 5


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20))
def test_texts_come_back_as_they_went(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    uri = str(tmp_path_factory.mktemp("texts") / "a.arrow")
    with TextWriter(uri, {"id": "string", "text": "string"}) as writer:
        for number, text in enumerate(texts):
            writer.add(str(number), text)
    found = [row for batch in read_texts(uri, "text", "id") for row in zip(*batch, strict=True)]
    assert found == [(text, str(number)) for number, text in enumerate(texts)]


def test_a_file_of_texts_appears_only_whole(anywhere: str) -> None:
    uri = f"{anywhere}/a.arrow"
    with pytest.raises(KeyError), TextWriter(uri, {"text": "string"}) as writer:
        writer.add("x")
        raise KeyError
    with pytest.raises(FileNotFoundError):
        list(read_texts(uri, "text"))
    with TextWriter(uri, {"text": "string"}) as writer:
        writer.add("lone \ud800 surrogate")
    assert [batch for (batch,) in read_texts(uri, "text")] == [["lone ? surrogate"]]


def test_json_is_parsed_or_named() -> None:
    assert records.parse(json.dumps({"a": 1}).encode()) == {"a": 1}
    for line in (b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(Unreadable, match="broken json"):
            records.parse(line)
