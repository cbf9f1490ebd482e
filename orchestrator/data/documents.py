"""Readers: a file of a source -> its documents. A file that cannot be read costs itself, never the job."""

from __future__ import annotations

import ast
import fnmatch
import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator import storage
from orchestrator.config import CorpusConfig, Source, expand_path
from orchestrator.errors import UserError


@dataclass(frozen=True)
class Document:
    id: str
    """`source/file` or `source/file#record`, stable while the source's files keep their names."""
    text: str


@dataclass(frozen=True)
class SourceFile:
    source: str
    uri: str
    name: str
    """Relative to the source's path."""
    bytes: int


class Unreadable(Exception):
    """A file or record yields no document; the message is the drop reason, a word or two."""


def list_source(source: Source) -> list[SourceFile]:
    """The files of a source that Terrane reads, sorted by name.

    Raises:
        UserError: the path does not exist or holds no such file.
    """
    path = expand_path(source.path)
    root = path.split("*", 1)[0].rpartition("/")[0] if "*" in path else path
    if storage.is_s3(path):
        names = storage.list_files(root)
        if not names and storage.exists(path):
            root, _, name = path.rpartition("/")
            names = [name]
    elif "*" in path:
        names = _glob(source, root, path[len(root) :].lstrip("/"))
    elif Path(path).is_file():
        root, names = str(Path(path).parent), [Path(path).name]
    elif Path(path).is_dir():
        # Only what can be read as a file: no dangling links, no pipes.
        names = [name for name in storage.list_files(path) if Path(path, name).is_file()]
    else:
        raise UserError(f"source {source.name}: nothing at {path}", "check corpus.sources[].path")
    wanted = sorted(name for name in names if _is_wanted(name, source, path, root))
    if not wanted:
        patterns = ", ".join(source.include) or ", ".join(f"*{suffix}" for suffix in READERS)
        raise UserError(
            f"source {source.name}: no file under {path} matches {patterns}",
            "drop `include`, or give patterns that match",
        )
    files = [SourceFile(source.name, uri := storage.join(root, name), name, storage.size(uri)) for name in wanted]
    if not any(file.bytes for file in files):
        raise UserError(f"source {source.name}: all {len(files)} files under {path} are empty")
    return files


def _glob(source: Source, root: str, pattern: str) -> list[str]:
    try:
        return [str(path.relative_to(root)) for path in Path(root).glob(pattern) if path.is_file()]
    except (ValueError, OSError) as error:
        raise UserError(f"source {source.name}: {source.path}: {error}", "** stands alone between slashes") from None


def list_sources(corpus: CorpusConfig) -> list[SourceFile]:
    return [file for source in corpus.sources for file in list_source(source)]


def read_documents(file: SourceFile) -> Iterator[Document | Unreadable]:
    """Every document of a file; what cannot be read comes as an Unreadable in its place."""
    try:
        data = storage.read(file.uri)
        name = file.name
        if name.lower().endswith(".gz"):
            data, name = gzip.decompress(data), name[: -len(".gz")]
        reader = _reader(name)
        identity = f"{file.source}/{file.name}".encode("utf-8", "replace").decode()
        yield from reader(identity, data)
    except Unreadable as reason:
        yield reason
    except (OSError, EOFError, zlib.error) as error:
        yield Unreadable("broken gzip" if file.name.endswith(".gz") else f"unreadable: {type(error).__name__}")


def _read_text(identity: str, data: bytes) -> Iterator[Document]:
    yield Document(identity, _decode(data))


def _read_metadata(identity: str, data: bytes) -> Iterator[Document]:
    """The long description of an installed Python distribution: its README, after the headers."""
    _, _, description = _decode(data).replace("\r\n", "\n").partition("\n\n")
    yield Document(identity, description)


def _read_jsonl(identity: str, data: bytes) -> Iterator[Document | Unreadable]:
    for number, line in enumerate(data.split(b"\n")):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            yield Unreadable("broken json")
            continue
        text = record.get("text") if isinstance(record, dict) else None
        yield Document(f"{identity}#{number}", text) if isinstance(text, str) else Unreadable("no text")


def _read_docstrings(identity: str, data: bytes) -> Iterator[Document]:
    """The documentation in a Python source: its docstrings, under headings that name what they describe."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(_decode(data))
        sections = list(_docstrings(tree, ""))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Unreadable("broken python") from None
    if not sections:
        raise Unreadable("no docstring")
    title = identity.split("/", 1)[1].removesuffix(".py").replace("/", ".")
    yield Document(identity, f"# {title}\n\n" + "\n\n".join(sections))


def _docstrings(node: ast.AST, qualified: str) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield f"## {qualified}\n\n{text}" if qualified else text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{qualified}.{child.name}" if qualified else child.name)
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _docstrings(child, qualified)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("not utf-8") from None


READERS: dict[str, Callable[[str, bytes], Iterator[Document | Unreadable]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".py": _read_docstrings,
    "METADATA": _read_metadata,
}


def _reader(name: str) -> Callable[[str, bytes], Iterator[Document | Unreadable]]:
    for suffix, reader in READERS.items():
        if name.lower().endswith(suffix.lower()):
            return reader
    return _read_text


def _is_wanted(name: str, source: Source, path: str, root: str) -> bool:
    if storage.is_s3(path) and "*" in path and not fnmatch.fnmatch(storage.join(root, name), path):
        return False
    if source.include:
        return any(fnmatch.fnmatch(name, pattern) for pattern in source.include)
    return any(name.lower().removesuffix(".gz").endswith(suffix.lower()) for suffix in READERS) or "*" in path
