"""TEI as GROBID writes it from a PDF -> Galactica's Markdown, the step that sciparser does.

Citations carry title and author in the text, so the reference list is not printed. Section numbers give the depth of a
heading and are left out of it; authors, affiliations and keywords are not text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from orchestrator.data.readers import Unreadable, citations, markup, tables, xml
from orchestrator.data.readers.citations import Bibliography
from orchestrator.data.readers.xml import Element


@dataclass(frozen=True)
class _Paper:
    bibliography: Bibliography
    footnotes: dict[str, Element]
    roman: bool
    """Sections are numbered I, II, III, so that A, B, C are subsections."""
    printed: set[Element] = field(default_factory=set)
    """Footnotes that stand in the text already."""


def read(data: bytes) -> str:
    """One paper as Markdown.

    Raises:
        Unreadable: broken xml, entity in xml, xml too deep, not tei, no text.
    """
    root = xml.parse(data)
    if root.tag not in ("TEI", "teiCorpus"):
        raise Unreadable("not tei")
    try:
        return _read(root)
    except RecursionError:
        raise Unreadable("xml too deep") from None


def _read(root: Element) -> str:
    numbers = [head.get("n") or xml.text_of(head) for head in root.iterfind(".//body//head")]
    paper = _Paper(
        Bibliography({entry.get(xml.XML_ID) or "": [_work(entry)] for entry in root.iter("biblStruct")}),
        {note.get(xml.XML_ID): note for note in root.iter("note") if note.get(xml.XML_ID)},
        markup.has_roman_sections(numbers),
    )
    title = root.find("teiHeader/fileDesc/titleStmt/title")
    abstract = root.find("teiHeader/profileDesc/abstract")
    body = [block for place in root.iterfind("text/*") for block in _blocks(place, paper, 1)]
    return markup.paper(
        "" if title is None else _line(title, paper), [] if abstract is None else _blocks(abstract, paper, 2), body
    )


# Blocks


def _blocks(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    """What stands in an element: runs of text as paragraphs, and the blocks between them."""
    run = node.text or ""
    for child in node:
        if child.tag not in _BLOCKS:
            run += _inline_of(child, paper) + (child.tail or "")
            continue
        yield from _paragraph(run, paper)
        yield from _BLOCKS[child.tag](child, paper, depth)
        run = child.tail or ""
    yield from _paragraph(run, paper)
    if node.tag == "p":
        for mark in node.iter("ref"):
            note = paper.footnotes.get((mark.get("target") or "").lstrip("#"))
            yield from _note(note, paper, depth) if note is not None else ()


def _paragraph(run: str, paper: _Paper) -> Iterator[str]:
    text = markup.paragraph(paper.bibliography.weave(run))
    if text.strip(" .,;:"):
        yield text


def _division(div: Element, paper: _Paper, depth: int) -> Iterator[str]:
    if div.get("type") in ("references", "toc", "figures"):
        return
    head = div.find("head")
    title = _line(head, paper) if head is not None else _HEADINGS.get(div.get("type") or "", "")
    below = [child for child in div.iterchildren("div") if child.find("head") is not None]
    if title and not markup.is_caption_label(title) and not (head is None and below):
        number = head.get("n") if head is not None else None
        depth = max(depth, markup.section_depth(number or title, roman=paper.roman))
        yield markup.heading(depth + 1, title)
        depth += 1
    yield from _blocks(div, paper, depth)


_HEADINGS = {
    "acknowledgement": "Acknowledgements",
    "acknowledgment": "Acknowledgments",
    "availability": "Availability",
    "funding": "Funding",
    "annex": "Appendix",
}


def _figure(figure: Element, paper: _Paper, depth: int) -> Iterator[str]:
    """A figure by its caption; a table by its caption, its cells and its notes."""
    written = [tables.read(table, lambda cell: _line(cell, paper)) for table in tables.outermost(figure)]
    notes = [_line(note, paper) for note in figure.iterchildren("note")]
    text = _line(figure.find("figDesc"), paper).lstrip(".: ") or next(filter(None, notes), "")
    yield _caption(figure, text, paper)
    yield from written
    yield from (note for note in notes if note != text)


def _caption(figure: Element, text: str, paper: _Paper) -> str:
    """GROBID repeats the label in the head, and both in the description: each is printed once."""
    head = _line(figure.find("head"), paper).rstrip(".: ")
    number = _line(figure.find("label"), paper).rstrip(".: ")
    if not head or re.sub(r"\W+", "", text).startswith(re.sub(r"\W+", "", head)):
        return markup.caption("table" if figure.get("type") == "table" else "figure", number, text)
    return markup.paragraph(f"{head}. {text}" if text else "" if markup.is_caption_label(head) else head)


def _note(note: Element, paper: _Paper, depth: int) -> Iterator[str]:
    """A footnote under its number, once: below the paragraph that refers to it, or else where it stands."""
    text = _line(note, paper)
    if note in paper.printed or note.get("place") == "headnote" or not text:
        return
    paper.printed.add(note)
    number = note.get("n") or ""
    yield f"{markup.superscript(number)} {text}".strip() if not text.startswith(f"{number} ") else text


def _formula(formula: Element, paper: _Paper, depth: int) -> Iterator[str]:
    label = _line(formula.find("label"), paper).strip("()[]. ")
    text = markup.one_line("".join([formula.text or "", *(_formula_part(part, paper) for part in formula)]))
    if text:
        yield f"$${text}" + (f" \\tag{{{label}}}$$" if label else "$$")


def _formula_part(part: Element, paper: _Paper) -> str:
    return ("" if part.tag == "label" else _inline_of(part, paper)) + (part.tail or "")


def _list(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    ordered = node.get("type") in ("ordered", "numbered") or node.get("rend") in ("ordered", "numbered")
    items = (_line(item, paper) for item in node.iterchildren("item"))
    yield "\n".join(
        f"{number}. {item}" if ordered else f"- {item}" for number, item in enumerate(filter(None, items), 1)
    )


def _skip(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    return iter(())


_BLOCKS: dict[str, Callable[[Element, _Paper, int], Iterator[str]]] = {
    **dict.fromkeys(("head", "listBibl", "listOrg", "biblStruct", "pb", "graphic"), _skip),
    **dict.fromkeys(("p", "ab", "quote", "body", "group", "text"), _blocks),
    "div": _division,
    "figure": _figure,
    "note": _note,
    "formula": _formula,
    "list": _list,
}


# Text


def _line(node: Element | None, paper: _Paper) -> str:
    return "" if node is None else markup.tidy(paper.bibliography.weave(_inline(node, paper)))


def _inline(node: Element, paper: _Paper) -> str:
    return xml.mixed(node, lambda child: _inline_of(child, paper))


def _inline_of(node: Element, paper: _Paper) -> str:
    if node.tag == "ref":
        return _reference(node, paper)
    if node.tag == "hi":
        return _raised(node, paper)
    if node.tag in ("graphic", "figure", "listBibl"):
        return ""
    # Sentences, paragraphs and line breaks follow each other without a blank.
    return f" {_inline(node, paper)} " if node.tag in ("s", "p", "lb", "item", "head", "div") else _inline(node, paper)


def _reference(ref: Element, paper: _Paper) -> str:
    keys = [target.lstrip("#") for target in (ref.get("target") or "").split()]
    printed = _inline(ref, paper)
    before = ref.getprevious()
    if before is not None and before.tag == "ref" and not before.tail:  # GROBID drops the blank between two of them
        printed = " " + printed
    if ref.get("type") == "foot" and any(key in paper.footnotes for key in keys):
        return markup.superscript(printed.strip())
    return paper.bibliography.cite(printed, keys)


def _raised(node: Element, paper: _Paper) -> str:
    rend = node.get("rend") or ""
    if rend.startswith("sup"):
        return markup.superscript(_inline(node, paper))
    return markup.subscript(_inline(node, paper)) if rend.startswith("sub") else _inline(node, paper)


# The reference list


def _work(entry: Element) -> str:
    title = _first(entry, "analytic/title[@type='main']", "analytic/title", "monogr/title[@level='m']")
    author = _first(
        entry,
        "analytic/author/persName/surname",
        "monogr/author/persName/surname",
        "analytic/author/orgName",
        "monogr/author/orgName",
        "analytic/author/persName",
        "monogr/editor/persName/surname",
    )
    journal = _first(entry, "monogr/title[@level='j']", "monogr/title")
    if title or (journal and author):
        volume = _first(entry, "monogr/imprint/biblScope[@unit='volume']")
        page = entry.find("monogr/imprint/biblScope[@unit='page']")
        first = "" if page is None else page.get("from") or markup.one_line(xml.text_of(page))
        return citations.work(title, author, journal, volume, first)
    return citations.work_from_text(_first(entry, "note[@type='raw_reference']"), author)


def _first(entry: Element, *paths: str) -> str:
    """The text of the first of these that has any."""
    found = (markup.one_line(xml.text_of(entry.find(path))) for path in paths)
    return next(filter(None, found), "")
