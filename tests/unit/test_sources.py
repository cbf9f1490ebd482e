from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import storage
from orchestrator.corpus_config import Source
from orchestrator.data.sources import (
    MIN_UNIT_BYTES,
    SourceFile,
    extend_units,
    list_source,
    make_units,
    units_as_json,
    units_from_json,
)
from orchestrator.errors import UserError


def names(path: object, **options: object) -> list[str]:
    return [file.name for file in list_source(Source.model_validate({"name": "s", "path": str(path), **options}))]


def file(name: str, size: int = 10, source: str = "s", version: str = "1") -> SourceFile:
    return SourceFile(source, f"/data/{source}/{name}", name, size, version)


def test_a_directory_gives_the_files_that_can_be_read(tmp_path: Path) -> None:
    for name in ("a.md", "b.pdf", "c.jsonl.zst", "d.nxml", "e.f90", "f.tgz", "g.exe", "h.png", "sub/i.tex"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["a.md", "b.pdf", "c.jsonl.zst", "d.nxml", "e.f90", "f.tgz", "sub/i.tex"]
    assert names(tmp_path, include=["*.png"]) == ["h.png"]


def test_one_file_and_a_glob_are_sources_too(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.odd").write_text("c")
    assert names(tmp_path / "b.txt") == ["b.txt"]
    assert names(tmp_path / "c.odd") == ["c.odd"]
    assert names(tmp_path / "**" / "*.md") == ["sub/a.md"]
    assert names(tmp_path / "[bc].*") == ["b.txt", "c.odd"]
    assert names(tmp_path, include=["sub/*"]) == ["sub/a.md"]


def test_a_pattern_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(UserError, match="source s:"):
        names(tmp_path / "**.md")


def test_s3_is_a_source(bucket: str) -> None:
    storage.write(f"{bucket}/docs/a.md", b"a")
    storage.write(f"{bucket}/docs/deep/b.txt", b"b")
    storage.write(f"{bucket}/docs-more/c.txt", b"c")
    assert names(f"{bucket}/docs") == ["a.md", "deep/b.txt"]
    assert names(f"{bucket}/docs/a.md") == ["a.md"]
    assert names(f"{bucket}/docs/*.md") == ["a.md"]
    assert names(f"{bucket}/docs/*") == ["a.md", "deep/b.txt"]


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
        names(folder)


def test_units_follow_sources_and_sizes() -> None:
    files = [file(name, 40, source) for source in ("one", "two") for name in "abcd"]
    units = make_units(files, unit_bytes=100)
    assert [[p.file.name for p in unit.pieces] for unit in units] == [["a", "b"], ["c", "d"]] * 2
    assert [unit.number for unit in units] == [0, 1, 2, 3]
    assert [len(unit.pieces) for unit in make_units(files, unit_bytes=1)] == [1] * 8


def test_a_large_file_of_records_is_cut_and_another_is_not() -> None:
    units = make_units([file("a.jsonl", 1000), file("b.jsonl.gz", 1000)], unit_bytes=300)
    assert [[(p.start, p.end) for p in unit.pieces] for unit in units] == [
        [(0, 250)],
        [(250, 500)],
        [(500, 750)],
        [(750, 1000)],
        [(0, None)],
    ]


@given(st.lists(st.integers(0, 5 * MIN_UNIT_BYTES), min_size=1, max_size=30))
def test_every_byte_is_in_one_unit(sizes: list[int]) -> None:
    files = [file(f"{index}.jsonl", size) for index, size in enumerate(sizes)]
    units = make_units(files)
    for each in files:
        pieces = [p for unit in units for p in unit.pieces if p.file == each]
        edges = [(p.start, each.bytes if p.end is None else p.end) for p in pieces]
        assert edges[0][0] == 0
        assert edges[-1][1] == each.bytes
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))


def test_new_files_make_new_units_and_leave_the_others() -> None:
    before = make_units([file("a"), file("c")], unit_bytes=10)
    after = extend_units(before, [file("a"), file("b"), file("c")])
    assert after[:2] == before
    assert [(u.number, [p.file.name for p in u.pieces]) for u in after[2:]] == [(2, ["b"])]


def test_a_changed_file_costs_its_unit() -> None:
    before = make_units([file("a"), file("b"), file("c")], unit_bytes=20)
    after = extend_units(before, [file("a", version="2"), file("b"), file("c")])
    assert [(u.number, [p.file.name for p in u.pieces]) for u in after] == [(1, ["c"]), (2, ["a", "b"])]


def test_a_file_that_went_leaves_with_its_pieces() -> None:
    files = [file("a.jsonl", 100), file("b", 5), file("c", 30)]
    before = make_units(files, unit_bytes=30)
    assert len(before) > 4
    after = extend_units(before, [files[2]])
    assert [[p.file.name for p in unit.pieces] for unit in after] == [["c"]]


def test_units_survive_their_file() -> None:
    units = make_units([file("a.jsonl", 100), file("b", source="t")], unit_bytes=60)
    assert units_from_json(units_as_json(units)) == units


def test_links_to_directories_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.md").write_text("a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert names(tmp_path / "in") == ["link/a.md"]


def test_a_directory_may_have_a_pattern_for_a_name(tmp_path: Path) -> None:
    (tmp_path / "br[1]").mkdir()
    (tmp_path / "br[1]" / "a.md").write_text("a")
    assert names(tmp_path / "br[1]") == ["a.md"]
    with pytest.raises(UserError, match=r"no file matches .*/c\*"):
        names(tmp_path / "c*")
