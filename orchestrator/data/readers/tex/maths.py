"""Formulas: the LaTeX between $ and $ as the author wrote it, without what only typesets or numbers it."""

from __future__ import annotations

import re

from orchestrator.data.readers.tex.lexer import environment, join, name_of
from orchestrator.data.readers.tex.macros import Macros
from orchestrator.data.readers.tex.paper import Paper, reference_mark
from orchestrator.data.readers.tex.tokens import Tokens
from orchestrator.data.readers.tex.vocabulary import CITATIONS, NAMED_REFERENCES, REFERENCES

_LEFT_OUT = {"nonumber", "notag", "ensuremath", "displaybreak", "noindent", "allowbreak"}
_BLANKS = re.compile(r"[ \t]+")
_LINE_ENDS = re.compile(r" ?\n\s*")


def inline(tokens: list[str], paper: Paper) -> str:
    """`$...$`, or nothing where nothing is left."""
    source = " ".join(_clean(tokens, paper).split())
    return f"${source}$" if source else ""


def display(tokens: list[str], paper: Paper, rows: str = "") -> str:
    """`$$ ... $$`; rows is the environment that can hold its rows there."""
    source = _LINE_ENDS.sub("\n", _BLANKS.sub(" ", _clean(tokens, paper))).strip()
    if not source:
        return ""
    if rows and re.search(r"\\\\|&", source):
        source = f"\\begin{{{rows}}}\n{source}\n\\end{{{rows}}}"
    return f"$$ {source} $$"


def number_rows(tokens: list[str], paper: Paper, by_row: bool) -> None:
    """Give an equation, or each row of an aligned one, its number, and the number to its labels."""
    rest, depth = Tokens(tokens, Macros()), 0
    numbered, labels = True, list[str]()
    while token := rest.raw():
        name, what = name_of(token), environment(token)[0]
        depth += (token == "{" or what == "begin") - (token == "}" or what == "end")
        if name in ("nonumber", "notag"):
            numbered = False
        elif name == "label":
            labels.append(join(rest.argument()).strip())
        elif by_row and name == "\\" and not depth:
            _number(numbered, labels, paper)
            numbered, labels = True, []
    _number(numbered, labels, paper)


def _number(numbered: bool, labels: list[str], paper: Paper) -> None:
    if numbered:
        paper.step("equation", "Equation")
    for label in labels:
        paper.label(label)


def _clean(tokens: list[str], paper: Paper) -> str:
    rest, kept = Tokens(tokens, Macros()), list[str]()
    while token := rest.raw():
        name = name_of(token)
        if name == "label":
            key = join(rest.argument()).strip()
            paper.labels.setdefault(key, paper.anchor)
        elif name in REFERENCES:
            mark = reference_mark(join(rest.argument()).strip(), name in NAMED_REFERENCES)
            kept.append(f"({mark})" if name == "eqref" else mark)
        elif name in CITATIONS:
            rest.optional()
            rest.argument()
        elif name not in _LEFT_OUT:
            kept.append(token)
    return join(kept)
