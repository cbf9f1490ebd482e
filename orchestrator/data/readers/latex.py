"""LaTeX -> Markdown: title, abstract, sections, paragraphs, formulas, tables, captions and resolved citations.

The reference list itself is left out; its works stand where they are cited.
"""

from __future__ import annotations

from orchestrator.data.readers import Unreadable
from orchestrator.data.readers.markup import heading
from orchestrator.data.readers.tex import source
from orchestrator.data.readers.tex.lexer import tokenize
from orchestrator.data.readers.tex.macros import Macros
from orchestrator.data.readers.tex.paper import MARKS, Paper
from orchestrator.data.readers.tex.references import Bibliography
from orchestrator.data.readers.tex.tokens import Tokens
from orchestrator.data.readers.tex.writer import PROTECTED, Writer, markdown


def read(data: bytes) -> str:
    """One .tex file.

    Raises:
        Unreadable: it is no LaTeX, or holds no text.
    """
    return _markdown(source.single(data))


def read_archive(data: bytes) -> str:
    """An arXiv submission as it is downloaded: gzip of a tar, gzip of one .tex file, or a tar.

    Raises:
        Unreadable: it is broken, too large, or holds no LaTeX with text.
    """
    return _markdown(source.submission(data))


def _markdown(latex: source.Source) -> str:
    macros = Macros(PROTECTED)
    Tokens(tokenize(latex.packages), macros).define()

    def plain(snippet: str) -> str:
        writer = Writer(Tokens(tokenize(snippet.translate(MARKS)), macros), Paper(), None)
        return Paper().resolve(writer.inline_text())

    text = latex.text.translate(MARKS)
    paper = Paper(has_chapters="\\chapter" in text)
    bibliography = Bibliography(latex.bibitems, latex.databases, plain)
    body = paper.resolve(markdown(Writer(Tokens(tokenize(text), macros), paper, bibliography).write()))
    if not body:
        raise Unreadable("no text")
    return f"{heading(1, paper.resolve(paper.title))}\n\n{body}" if paper.title else body
