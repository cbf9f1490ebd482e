"""Galactica's Markdown: what every reader of a scientific format writes (Taylor et al., "Galactica", 2022, sections 3.1-3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BLANKS = re.compile(r"\s+")


def one_line(text: str) -> str:
    """White space as single blanks."""
    return _BLANKS.sub(" ", text).strip()


def heading(level: int, text: str) -> str:
    """`## Text`, level 1 for the title, at most 6."""
    return f"{'#' * min(max(level, 1), 6)} {one_line(text)}"


def reference(title: str, first_author: str) -> str:
    """An in-text citation; the author is the family name alone."""
    known = ", ".join(part for part in (one_line(title).rstrip("."), one_line(first_author)) if part)
    return f"[START_REF] {known}[END_REF]" if known else ""


def superscript(text: str) -> str:
    return f"[START_SUP]{text}[END_SUP]" if text.strip() else text


def subscript(text: str) -> str:
    return f"[START_SUB]{text}[END_SUB]" if text.strip() else text


def span(kind: str, text: str) -> str:
    """A sequence of characters: kind is DNA, AMINO, SMILES or I_SMILES."""
    return f"[START_{kind}]{text}[END_{kind}]"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first row the head; short rows are filled, `|` is escaped. Empty for no cell at all."""
    width = max((len(row) for row in rows), default=0)
    if not width:
        return ""
    cells = [[one_line(cell).replace("|", "\\|") for cell in row] + [""] * (width - len(row)) for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * width, *lines[1:]])
