from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from orchestrator import storage
from orchestrator.corpus_config import Source
from orchestrator.data import documents
from orchestrator.data.documents import Document, Dropped, read_documents
from orchestrator.data.sources import list_source


def read(folder: Path, **options: object) -> list[Document | Dropped]:
    source = Source.model_validate({"name": "s", "path": str(folder), **options})
    return [document for file in list_source(source) for document in read_documents(file.uri, file.name, source)]


def reasons(found: list[Document | Dropped]) -> list[str]:
    return [document.reason for document in found if isinstance(document, Dropped)]


def texts(found: list[Document | Dropped]) -> list[str]:
    return [document.text for document in found if isinstance(document, Document)]


def test_text_and_markdown_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert read(tmp_path) == [Document("s/a.md", "# A\n"), Document("s/b.txt", "b")]


def test_jsonl_gives_a_document_a_line_and_a_reason_for_each_bad_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\nnonsense\n{"title": "no text"}\n[1]\n{"text": "two"}')
    found = read(tmp_path)
    assert texts(found) == ["one", "two"]
    assert reasons(found) == ["broken json", "no text", "no text"]
    assert [d.id for d in found] == [f"s/a.jsonl#{offset}" for offset in (0, 17, 26, 47, 51)]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard.compress)],
)
def test_compressed_files_are_read_and_broken_ones_named(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.md{suffix}").write_bytes(compress(b"good"))
    (tmp_path / f"b.md{suffix}").write_bytes(compress(os.urandom(5000))[:-20])
    (tmp_path / f"c.md{suffix}").write_bytes(b"no compression at all")
    (tmp_path / f"d.jsonl{suffix}").write_bytes(compress(b'{"text": "one"}\n' + b'{"text": "two"}'))
    found = read(tmp_path)
    assert texts(found) == ["good", "one", "two"]
    assert reasons(found) == ["broken compression"] * 2


def test_what_was_read_before_a_stream_breaks_is_kept(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": f"{n} " * 50}).encode() + b"\n" for n in range(5000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    found = read(tmp_path)
    assert 1000 < len(texts(found)) < 5000
    assert reasons(found)[-1:] == ["broken compression"]


def test_a_file_of_many_formats_each_by_its_name_or_content(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["from parquet"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.html").write_text(f"<html><body><article><p>{'From a page. ' * 30}</p></article></body></html>")
    (tmp_path / "c.tex").write_text(r"\documentclass{article}\begin{document}From \emph{latex}.\end{document}")
    (tmp_path / "d.xml").write_text("<article><body><p>From JATS.</p></body></article>")
    (tmp_path / "e.xml").write_text("<note>of no paper</note>")
    (tmp_path / "f.json").write_text('{"title": "T", "abstract": "From a record."}')
    (tmp_path / "g.f90").write_text("program from_code\nend program\n")
    (tmp_path / "h.gz").write_bytes(gzip.compress((tmp_path / "c.tex").read_bytes()))
    found = {d.id.removeprefix("s/"): d for d in read(tmp_path)}
    for name, part in (
        ("a.parquet#0", "from parquet"),
        ("b.html", "From a page."),
        ("c.tex", "From latex."),
        ("d.xml", "From JATS."),
        ("f.json", "# T\n\n## Abstract\n\nFrom a record."),
        ("g.f90", "program from_code"),
        ("h.gz", "From latex."),
    ):
        document = found.pop(name)
        assert isinstance(document, Document), document
        assert part in document.text
    assert reasons(list(found.values())) == ["unknown xml"]


def test_a_named_format_is_taken_whatever_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text('{"body": "one"}\n')
    assert texts(read(tmp_path, format="jsonl", text_field="body", include=["*.data"])) == ["one"]


def test_an_archive_is_its_files_and_one_with_latex_is_a_submission(tmp_path: Path) -> None:
    def archive(name: str, members: dict[str, bytes]) -> None:
        with tarfile.open(tmp_path / name, "w:gz") as file:
            for inner, data in members.items():
                info = tarfile.TarInfo(inner)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    archive(
        "a.tar.gz",
        {"x/one.md": b"one", "x/two.md.gz": gzip.compress(b"two"), "x/skip.png": b"no", "bad.xml": b"<?xml?>"},
    )
    archive(
        "b.tgz",
        {
            "main.tex": rb"\documentclass{article}\begin{document}Main \input{part}\end{document}",
            "part.tex": b"and part.",
        },
    )
    (tmp_path / "c.tar.gz").write_bytes(b"no archive")
    (tmp_path / "d.tar").write_bytes(b"no archive")
    found = read(tmp_path)
    assert [d.id for d in found] == [
        "s/a.tar.gz#x/one.md",
        "s/a.tar.gz#x/two.md.gz",
        "s/a.tar.gz#bad.xml",
        "s/b.tgz",
        "s/c.tar.gz",
        "s/d.tar",
    ]
    assert texts(found)[:2] == ["one", "two"]
    assert "Main and part." in texts(found)[2]
    assert reasons(found) == ["unknown xml", "broken compression", "broken tar"]


def test_a_selection_is_made_of_every_format(tmp_path: Path) -> None:
    paper = "# T\n\n## Abstract\n\nA.\n\n## Methods\n\nM.\n\n## Conclusion\n\nC.\n"
    (tmp_path / "a.md").write_text(paper)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": paper}) + "\n" + json.dumps({"text": "no sections"}))
    found = read(tmp_path, select="abstract_introduction_conclusion")
    assert texts(found) == ["# T\n\n## Abstract\n\nA.\n\n## Conclusion\n\nC."] * 2
    assert len(reasons(found)) == 1


def test_docstrings_come_under_the_names_they_describe(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '"""Module."""\nclass C:\n    """Class."""\n    def f(self):\n        """Method."""\n'
    )
    (tmp_path / "n.py").write_text("x = 1\n")
    (tmp_path / "o.py").write_text("def (:\n")
    found = read(tmp_path, format="docstrings")
    assert found[0] == Document("s/m.py", "# m\n\nModule.\n\n## C\n\nClass.\n\n## C.f\n\nMethod.")
    assert reasons(found) == ["no docstring", "broken python"]
    assert "class C:" in texts(read(tmp_path))[0], "without the format it is code"


def test_a_package_description_comes_without_its_headers(tmp_path: Path) -> None:
    (tmp_path / "METADATA").write_text("Name: x\nVersion: 1\n\n# Readme\n\ntext\n")
    assert read(tmp_path) == [Document("s/METADATA", "# Readme\n\ntext\n")]


def test_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("é".encode("utf-16"))
    found = read(tmp_path)
    assert reasons(found) == ["not utf-8"]
    assert texts(found) == ["é"]


def test_one_odd_file_costs_itself_only(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("good")
    (tmp_path / "dangling.md").symlink_to("/no/such/file")
    (tmp_path / "loop.md").symlink_to(tmp_path / "loop.md")
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "deflate.md.gz").write_bytes(gzip.compress(b"x" * 1000)[:10] + b"\xff" * 40)
    (tmp_path / "UPPER.MD.GZ").write_bytes(gzip.compress(b"upper"))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.md")).write_text("odd name")
    found = read(tmp_path)
    assert sorted(texts(found)) == ["good", "odd name", "upper"]
    assert reasons(found) == ["broken compression"]
    for document in found:
        document.id.encode()


def test_a_document_without_bounds_is_dropped_before_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"0" * 10_000_000))
    (tmp_path / "b.txt").write_bytes(b"x" * 1001)
    assert reasons(read(tmp_path)) == ["too large", "too large"]


def test_a_reader_that_fails_costs_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes, name: str) -> str:
        raise KeyError("unexpected")

    monkeypatch.setitem(documents._FORMATS, "text", fail)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.md").write_text("good")
    found = read(tmp_path)
    assert reasons(found) == ["reader failed: KeyError"]
    assert texts(found) == ["good"]


def test_a_file_that_went_since_it_was_listed_is_named(bucket: str) -> None:
    storage.write(f"{bucket}/in/a.md", b"a")
    storage.write(f"{bucket}/in/b.md", b"b")
    source = Source(name="s", path=f"{bucket}/in")
    files = list_source(source)
    storage.delete(files[0].uri)
    found = [d for file in files for d in read_documents(file.uri, file.name, source)]
    assert found == [Dropped("s/a.md", "storage failed"), Document("s/b.md", "b")]


def tar_of(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_a_broken_member_costs_itself_not_those_after_it(tmp_path: Path) -> None:
    lines = gzip.compress(b'{"text": "' + os.urandom(5000).hex().encode() + b'"}')[:-100]
    members = {"a.txt": b"a", "b.txt.gz": b"no gzip", "c.jsonl.gz": lines, "d.xml": b"<note/>", "e.txt": b"e"}
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    found = {d.id.removeprefix("s/x.tar#"): d for d in read(tmp_path)}
    assert isinstance(found["a.txt"], Document)
    assert isinstance(found["e.txt"], Document)
    assert {name: d.reason for name, d in found.items() if isinstance(d, Dropped)} == {
        "b.txt.gz": "broken compression",
        "c.jsonl.gz": "broken compression",
        "d.xml": "unknown xml",
    }


def test_a_large_archive_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 4000)
    submission = gzip.compress(tar_of({"main.tex": rb"\documentclass{article}\begin{document}Text.\end{document}"}))
    members = {f"{n}.txt": b"x" * 3000 for n in range(20)} | {"huge.txt": b"x" * 5000, "2001.00001.gz": submission}
    (tmp_path / "bulk.tar.gz").write_bytes(gzip.compress(tar_of(members)))
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 20_000)
    assert len(texts(read(tmp_path))) == 22, "a submission of the size of arXiv's is one among others"
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 4000)
    assert "too large" in reasons(read(tmp_path))


def test_archives_nest_no_deeper_than_those_of_arxiv(tmp_path: Path) -> None:
    inner = tar_of({"deep.txt": b"deep"})
    for _ in range(5):
        inner = tar_of({"in.tar": inner})
    (tmp_path / "x.tar").write_bytes(inner)
    assert reasons(read(tmp_path)) == ["nested archives"]


def test_long_texts_of_parquet_come_one_at_a_time(tmp_path: Path) -> None:
    text = "word " * 200_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([text]))
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    source = Source(name="s", path=str(tmp_path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for document in read_documents(str(tmp_path / "a.parquet"), "a.parquet", source):
        assert document.text == text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "KiB, where all would be 300 MB"


def test_a_tag_without_end_is_refused_in_time(tmp_path: Path) -> None:
    attributes = " ".join(f"a{n}=1" for n in range(300_000))
    (tmp_path / "a.html").write_text(f"<html><body><p {attributes}>text</p></body></html>")
    picture = "A" * 500_000
    body = "<p>" + "A real paragraph of a page. " * 20 + "</p>"
    (tmp_path / "b.html").write_text(f'<html><body><img src="data:image/png;base64,{picture}">{body}</body></html>')
    found = read(tmp_path)
    assert reasons(found) == ["endless tag"]
    assert "A real paragraph" in texts(found)[0]
