"""Source code -> the same in a Markdown fence; notebooks as the text and the code that their authors wrote."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

from orchestrator.data.readers import Unreadable

SUFFIXES: dict[str, str] = {
    suffix: language
    for language, suffixes in {
        "ada": ".adb .ads",
        "bash": ".sh .bash",
        "c": ".c .h",
        "clojure": ".clj",
        "cmake": ".cmake",
        "cpp": ".cpp .cc .cxx .hpp .hh .hxx .ipp .tpp",
        "csharp": ".cs",
        "cuda": ".cu .cuh",
        "elixir": ".ex .exs",
        "erlang": ".erl",
        "fortran": ".f .for .ftn .f77 .f90 .f95 .f03 .f08",
        "fsharp": ".fs",
        "glsl": ".glsl",
        "go": ".go",
        "groovy": ".groovy",
        "haskell": ".hs",
        "hip": ".hip",
        "idl": ".pro",
        "java": ".java",
        "javascript": ".js .mjs .jsx",
        "julia": ".jl",
        "kotlin": ".kt",
        "lean": ".lean",
        "lisp": ".lisp .lsp",
        "lua": ".lua",
        "maple": ".mpl",
        "mathematica": ".wl .wls",
        "matlab": ".m",
        "modelica": ".mo",
        "nextflow": ".nf",
        "ocaml": ".ml .mli",
        "opencl": ".cl .opencl",
        "pascal": ".pas",
        "perl": ".pl .pm",
        "php": ".php",
        "prolog": ".plg",
        "python": ".py .pyx .pyi .pxd",
        "r": ".r",
        "ruby": ".rb",
        "rust": ".rs",
        "sas": ".sas",
        "scala": ".scala",
        "scheme": ".scm .ss",
        "smt": ".smt2",
        "snakemake": ".smk",
        "sql": ".sql",
        "stan": ".stan",
        "stata": ".do .ado",
        "swift": ".swift",
        "tcl": ".tcl",
        "typescript": ".ts .tsx",
        "verilog": ".sv .vh",
        "vhdl": ".vhd .vhdl",
        "wdl": ".wdl",
        "zig": ".zig",
        "notebook": ".ipynb",
    }.items()
    for suffix in suffixes.split()
}
"""Suffix in lower case -> the language that its fence names."""

MAX_BYTES = 8 << 20
_MAX_MEAN_LINE = 200
_MAX_LINE = 5_000
_HEADER_LINES = 15
_FENCES = re.compile(r"^[ \t]*(`{3,})", re.MULTILINE)
_GENERATED = re.compile(
    r"\bdo not (?:edit|modify)\b(?! this line)|@generated\b"
    r"|(?:^\W*|\b(?:is|was|been|code|file)\s+(?:an? )?)(?:auto-?|automatically |machine[ -])generated\b"
    r"|^\W*generated (?:by|from|with|using)\b",
    re.IGNORECASE | re.MULTILINE,
)
_EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]*")


def read(data: bytes, name: str) -> str:
    """
    name: of the file, whose suffix tells the language.

    Raises:
        Unreadable: binary, generated, minified, too large or empty.
    """
    if len(data) > MAX_BYTES:
        raise Unreadable("too large")
    text = _decode(data)
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".ipynb":
        return _notebook(text)
    if not text.strip():
        raise Unreadable("no text")
    _refuse_generated(text)
    return fence(text.strip("\n"), SUFFIXES.get(suffix, ""))


def fence(code: str, language: str = "") -> str:
    """Code between fences longer than any that it holds."""
    marks = "`" * max((len(found) + 1 for found in _FENCES.findall(code)), default=3)
    return f"{marks}{language}\n{code}\n{marks}"


def _decode(data: bytes) -> str:
    if b"\0" in data:
        raise Unreadable("binary")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise Unreadable("not utf-8") from None


def _refuse_generated(text: str) -> None:
    lines = text.split("\n")
    lengths = [len(line) for line in lines if line.strip()]
    if max(lengths) > _MAX_LINE or sum(lengths) > _MAX_MEAN_LINE * len(lengths):
        raise Unreadable("minified code")
    if _GENERATED.search("\n".join(lines[:_HEADER_LINES])):
        raise Unreadable("generated code")


def _notebook(text: str) -> str:
    """Jupyter: text cells as they are, code cells in fences, outputs left out."""
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError):
        raise Unreadable("broken notebook") from None
    if not isinstance(notebook, dict):
        raise Unreadable("broken notebook")
    language = _notebook_language(notebook)
    blocks = [block for cell in _cells(notebook) if (block := _cell(cell, language))]
    if not blocks:
        raise Unreadable("no text")
    return "\n\n".join(blocks)


def _cells(notebook: dict[str, Any]) -> list[Any]:
    """Before version 4 of the format cells stood in worksheets."""
    cells = notebook.get("cells")
    if isinstance(cells, list):
        return cells
    sheets = notebook.get("worksheets")
    sheets = sheets if isinstance(sheets, list) else []
    return [cell for sheet in sheets if isinstance(sheet, dict) for cell in sheet.get("cells") or []]


def _notebook_language(notebook: dict[str, Any]) -> str:
    metadata = notebook.get("metadata")
    for key, field in (("language_info", "name"), ("kernelspec", "language")):
        found = metadata.get(key) if isinstance(metadata, dict) else None
        if isinstance(found, dict) and isinstance(found.get(field), str):
            return re.sub(r"[^\w+#-]", "", found[field].lower())
    return "python"


def _cell(cell: Any, language: str) -> str:
    if not isinstance(cell, dict):
        return ""
    source = cell.get("source", cell.get("input", ""))
    if isinstance(source, list):
        source = "".join(part for part in source if isinstance(part, str))
    if not isinstance(source, str):
        return ""
    source = _EMBEDDED.sub("", source).strip("\n")
    if not source.strip() or max(map(len, source.split("\n"))) > _MAX_LINE:
        return ""
    if cell.get("cell_type") == "heading":
        level = cell.get("level")
        return "#" * (level if isinstance(level, int) and 1 <= level <= 6 else 1) + " " + source
    return fence(source, language) if cell.get("cell_type") == "code" else source
