"""A LaTeX source as it is downloaded -> one text: the archive in memory, its main file, and what that file inputs."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
import zlib
from dataclasses import dataclass

from orchestrator.data.readers import Unreadable

MAX_BYTES = 64 << 20
"""Of an archive, decompressed."""
MAX_TEXT = 4 << 20
"""Characters of the main file with all that it inputs; a long thesis has one million."""
_MAX_FILES = 10_000
_MAX_INPUTS = 1_000
_MAX_DEPTH = 16
_KEPT = (".tex", ".ltx", ".bbl", ".bib", ".sty")

_VERBATIM = r"verbatim|Verbatim|BVerbatim|lstlisting|minted|alltt|comment|filecontents"
_NO_COMMENT = re.compile(
    rf"\\begin\s*\{{((?:{_VERBATIM})\*?)\}}|\\verb\*?([^A-Za-z\s*])|\\(?:url|path|nolinkurl|href)\s*\{{[^{{}}\n]*\}}"
    r"|\\.|%[^\n]*(?:\n[ \t]*(?=\S)|(?=\n)|\Z)",
    re.DOTALL,
)
_INPUT = re.compile(
    r"\\(?:(?P<import>(?:sub)?import)\*?\s*\{(?P<folder>[^{}]*)\}\s*\{(?P<imported>[^{}]+)\}"
    r"|(?:input|(?P<page>include)|subfile)(?:\s*\{(?P<braced>[^{}]+)\}|[ \t]+(?P<bare>[^\s\\{}]+)))"
)
_PACKAGE = re.compile(r"\\(?:usepackage|RequirePackage)\s*(?:\[[^\]]*\])?\s*\{([^{}]*)\}")
_MARKERS = re.compile(r"\\(?:documentclass|documentstyle|begin|section|chapter|title|input|cite|bye)\b")
_MAIN_NAMES = ("main", "ms", "paper", "article", "manuscript")


@dataclass(frozen=True, kw_only=True)
class Source:
    text: str
    """Main file with its inputs, comments removed."""
    packages: str = ""
    """The author's own .sty files, for the macros in them."""
    bibitems: str = ""
    """What BibTeX or biber made: .bbl files, and thebibliography where it stands in the text."""
    databases: str = ""
    """.bib files."""


def single(data: bytes) -> Source:
    """One .tex file.

    Raises:
        Unreadable: it is no LaTeX.
    """
    return _assemble({"main.tex": data}, "main.tex")


def submission(data: bytes) -> Source:
    """gzip of a tar, gzip of one .tex file, or either without gzip. Nothing is written to disk.

    Raises:
        Unreadable: broken, too large, without LaTeX, or with paths that lead out of the archive.
    """
    raw = _gunzip(data) if data[:2] == b"\x1f\x8b" else data
    files = _untar(raw)
    if files is None:
        return single(raw)
    return _assemble(files, _main_file(files))


def _gunzip(data: bytes) -> bytes:
    decoder = zlib.decompressobj(wbits=31)
    try:
        raw = decoder.decompress(data, MAX_BYTES + 1)
    except zlib.error:
        raise Unreadable("broken gzip") from None
    if len(raw) > MAX_BYTES:
        raise Unreadable("too large")
    if not decoder.eof:
        raise Unreadable("broken gzip")
    return raw


def _untar(raw: bytes) -> dict[str, bytes] | None:
    """The text files by path; None where raw is no tar."""
    try:
        archive = tarfile.open(fileobj=io.BytesIO(raw), mode="r:")  # noqa: SIM115
    except (tarfile.TarError, EOFError, ValueError):
        return None
    files: dict[str, bytes] = {}
    try:
        for number, member in enumerate(archive):
            if number > _MAX_FILES:
                raise Unreadable("too large")
            path = posixpath.normpath(member.name)
            if path.startswith(("/", "..")):
                raise Unreadable("path out of the archive")
            # A sparse file may claim any size, whatever the archive holds.
            if member.isreg() and not member.issparse() and path.lower().endswith(_KEPT):
                content = archive.extractfile(member)
                files[path] = content.read() if content else b""
    except (tarfile.TarError, EOFError, ValueError, OSError):
        raise Unreadable("broken tar") from None
    return files


def _main_file(files: dict[str, bytes]) -> str:
    """The document that the others belong to: compiled with a bibliography, of a usual name, or the longest."""
    sources = {path: data for path, data in files.items() if path.lower().endswith((".tex", ".ltx"))}
    whole = [
        path
        for path, data in sources.items()
        if b"\\begin{document}" in data and re.search(rb"\\document(class|style)", data)
    ]

    def rank(path: str) -> tuple[bool, bool, int, str]:
        stem = path.rpartition(".")[0]
        return (stem + ".bbl" in files, posixpath.basename(stem).lower() in _MAIN_NAMES, len(sources[path]), path)

    if not sources:
        raise Unreadable("no latex")
    return max(whole or sources, key=rank)


def _assemble(files: dict[str, bytes], main: str) -> Source:
    text = _Inputs(files).read(main, "", 0)
    if not _MARKERS.search(text):
        raise Unreadable("no latex")
    named = [name.strip() + ".sty" for found in _PACKAGE.findall(text) for name in found.split(",")]
    stem = main.rpartition(".")[0]
    lists = sorted((path for path in files if path.lower().endswith(".bbl")), key=lambda path: path != stem + ".bbl")
    return Source(
        text=text,
        packages="\n".join(without_comments(_decode(files[name])) for name in dict.fromkeys(named) if name in files),
        bibitems="\n".join([without_comments(_decode(files[path])) for path in lists] + [_bibliography_in(text)]),
        databases="\n".join(_decode(data) for path, data in files.items() if path.lower().endswith(".bib")),
    )


class _Inputs:
    """Files put in the place of the \\input that names them. What is not in the archive is left out."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self._left = _MAX_INPUTS
        self._characters = 0

    def read(self, path: str, folder: str, depth: int) -> str:
        """The text of a file with its inputs; folder is where \\import said that they are.

        Raises:
            Unreadable: more files or characters than a paper has.
        """
        if b"\0" in self._files[path]:
            raise Unreadable("binary")
        self._left -= 1
        text = without_comments(_decode(self._files[path]))
        self._characters += len(text)
        if self._left < 0 or self._characters > MAX_TEXT:
            raise Unreadable("too large")
        if depth > _MAX_DEPTH:
            return ""
        if depth and "\\begin{document}" in text:  # a subfile that compiles alone
            text = text.partition("\\begin{document}")[2].partition("\\end{document}")[0]
        return _INPUT.sub(lambda match: self._input(match, folder, depth), text)

    def _input(self, match: re.Match[str], folder: str, depth: int) -> str:
        name = (match["imported"] or match["braced"] or match["bare"]).strip().strip('"')
        inner = posixpath.join(folder, match["folder"].strip()) if match["import"] else folder
        for candidate in (posixpath.join(inner, name), name):
            for path in (posixpath.normpath(candidate + ".tex"), posixpath.normpath(candidate)):
                if path in self._files and not path.lower().endswith((".bbl", ".bib", ".sty")):
                    text = self.read(path, inner, depth + 1)
                    return f"\n\n{text}\n\n" if match["page"] else text
        return ""


def _bibliography_in(text: str) -> str:
    _, begin, rest = text.partition("\\begin{thebibliography}")
    return begin + rest.partition("\\end{thebibliography}")[0]


def _decode(data: bytes) -> str:
    """Older sources are in Latin 1, declared or not."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def without_comments(text: str) -> str:
    """LaTeX without `%` comments; verbatim text and URLs keep their signs."""
    kept, position, endless = [], 0, set()
    while match := _NO_COMMENT.search(text, position):
        kept.append(text[position : match.start()])
        position = match.end()
        close = f"\\end{{{match[1]}}}" if match[1] else match[2]
        if close and close not in endless:
            end = text.find(close, position) if match[1] else text.find(close, position, text.find("\n", position))
            if match[1] and end < 0:
                endless.add(close)
            position = end + len(close) if end >= 0 else position
        if not (match[0].startswith("%") or match[1] == "comment"):
            kept.append(text[match.start() : position])
    return "".join(kept) + text[position:]
