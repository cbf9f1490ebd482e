from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from orchestrator.config import Source
from orchestrator.data.documents import Document, Unreadable, list_source, read_documents
from orchestrator.data.pipeline import make_units
from orchestrator.errors import UserError


def read(folder: Path, **source: object) -> list[Document | Unreadable]:
    files = list_source(Source.model_validate({"name": "s", "path": str(folder), **source}))
    return [document for file in files for document in read_documents(file)]


def test_text_and_markdown_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert read(tmp_path) == [Document("s/a.md", "# A\n"), Document("s/b.txt", "b")]


def test_jsonl_gives_a_document_a_line_and_a_reason_for_each_bad_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\nnonsense\n{"title": "no text"}\n[1]\n{"text": "two"}')
    found = read(tmp_path)
    assert [d.text for d in found if isinstance(d, Document)] == ["one", "two"]
    assert [str(d) for d in found if isinstance(d, Unreadable)] == ["broken json", "no text", "no text"]
    assert [d.id for d in found if isinstance(d, Document)] == ["s/a.jsonl#0", "s/a.jsonl#5"]


def test_compressed_files_are_read_and_broken_ones_named(tmp_path: Path) -> None:
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"good"))
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"cut short" * 100)[:-20])
    (tmp_path / "c.md.gz").write_bytes(b"no gzip at all")
    good, *bad = read(tmp_path)
    assert good == Document("s/a.md.gz", "good")
    assert [str(d) for d in bad] == ["broken gzip", "broken gzip"]


def test_docstrings_come_under_the_names_they_describe(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '"""Module."""\nclass C:\n    """Class."""\n    def f(self):\n        """Method."""\n'
    )
    (tmp_path / "n.py").write_text("x = 1\n")
    (tmp_path / "o.py").write_text("def (:\n")
    found = read(tmp_path)
    assert found[0] == Document("s/m.py", "# m\n\nModule.\n\n## C\n\nClass.\n\n## C.f\n\nMethod.")
    assert [str(d) for d in found[1:]] == ["no docstring", "broken python"]


def test_a_package_description_comes_without_its_headers(tmp_path: Path) -> None:
    (tmp_path / "METADATA").write_text("Name: x\nVersion: 1\n\n# Readme\n\ntext\n")
    assert read(tmp_path) == [Document("s/METADATA", "# Readme\n\ntext\n")]


def test_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    assert [str(d) for d in read(tmp_path)] == ["not utf-8"]


def test_one_file_and_a_glob_are_sources_too(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert [d.text for d in read(tmp_path / "b.txt") if isinstance(d, Document)] == ["b"]
    assert [d.text for d in read(tmp_path / "**" / "*.md") if isinstance(d, Document)] == ["a"]
    assert [d.text for d in read(tmp_path, include=["sub/*"]) if isinstance(d, Document)] == ["a"]


def test_s3_is_a_source(bucket: str) -> None:
    from orchestrator import storage

    storage.write(f"{bucket}/docs/a.md", b"a")
    storage.write(f"{bucket}/docs/deep/b.txt", b"b")
    for path, expected in (
        (f"{bucket}/docs", ["a", "b"]),
        (f"{bucket}/docs/a.md", ["a"]),
        (f"{bucket}/docs/*.md", ["a"]),
    ):
        files = list_source(Source(name="s", path=path))
        assert [d.text for f in files for d in read_documents(f) if isinstance(d, Document)] == expected


@pytest.mark.parametrize(
    "content", [None, {}, {"a.bin": b"x"}, {"a.md": b""}], ids=["missing", "empty", "other", "zero"]
)
def test_a_source_without_text_is_refused(tmp_path: Path, content: dict[str, bytes] | None) -> None:
    folder = tmp_path / "source"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(UserError, match="source s:"):
        read(folder)


def test_units_follow_sources_and_sizes(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.md").write_text("x" * 40)
    files = list_source(Source(name="one", path=str(tmp_path))) + list_source(Source(name="two", path=str(tmp_path)))
    units = make_units(files, unit_bytes=100)
    assert [[f.name for f in unit.files] for unit in units] == [["a.md", "b.md"], ["c.md", "d.md"]] * 2
    assert [unit.number for unit in units] == [0, 1, 2, 3]
    assert [len(unit.files) for unit in make_units(files, unit_bytes=1)] == [1] * 8


def test_one_odd_file_costs_itself_only(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("good")
    (tmp_path / "dangling.md").symlink_to("/no/such/file")
    (tmp_path / "loop.md").symlink_to(tmp_path / "loop.md")
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "deflate.md.gz").write_bytes(gzip.compress(b"x" * 1000)[:10] + b"\xff" * 40)
    (tmp_path / "UPPER.MD.GZ").write_bytes(gzip.compress(b"upper"))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.md")).write_text("odd name")
    found = read(tmp_path)
    assert sorted(d.text for d in found if isinstance(d, Document)) == ["good", "odd name", "upper"]
    assert [str(d) for d in found if isinstance(d, Unreadable)] == ["broken gzip"]
    for document in found:
        if isinstance(document, Document):
            document.id.encode()


def test_a_pattern_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(UserError, match="source s:"):
        read(tmp_path / "**.md")
