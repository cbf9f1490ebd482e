"""Text that is text already: plain, Markdown, package descriptions, the docstrings of Python sources."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

from orchestrator.data.readers import Unreadable


def text(data: bytes, name: str) -> str:
    """UTF-8, or UTF-16 with its mark."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise Unreadable("not utf-8") from None


def metadata(data: bytes, name: str) -> str:
    """The long description of an installed Python distribution: its README, after the headers."""
    return text(data, name).replace("\r\n", "\n").partition("\n\n")[2]


def docstrings(data: bytes, name: str) -> str:
    """The documentation in a Python source: its docstrings, under headings that name what they describe."""
    try:
        with warnings.catch_warnings(action="ignore"):
            sections = list(_docstrings(ast.parse(text(data, name)), ""))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Unreadable("broken python") from None
    if not sections:
        raise Unreadable("no docstring")
    return f"# {name.removesuffix('.py').replace('/', '.')}\n\n" + "\n\n".join(sections)


def _docstrings(node: ast.AST, qualified: str) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        found = ast.get_docstring(node)
        if found:
            yield f"## {qualified}\n\n{found}" if qualified else found
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{qualified}.{child.name}" if qualified else child.name)
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _docstrings(child, qualified)
