"""S2ORC's JSON (Lo et al., 2020, and the converter doc2json) -> Galactica's Markdown.

A record is a paper itself or holds one as `latex_parse`, `pdf_parse` or `grobid_parse`. Citations carry title and
author in the text, so the reference list is not printed. Fields of an unexpected type read as empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.readers import Unreadable, citations, markup, tables, xml
from orchestrator.data.readers.citations import Bibliography

_PARSES = ("latex_parse", "pdf_parse", "grobid_parse")


@dataclass(frozen=True)
class _Paper:
    bibliography: Bibliography
    floats: dict[str, dict[str, Any]]
    """Figures and tables by key, in the record's order."""
    roman: bool
    """Sections are numbered I, II, III, so that A, B, C are subsections."""
    printed: set[str] = field(default_factory=set)
    """Floats that stand in the text already."""


def read(data: bytes) -> str:
    """One record as Markdown.

    Raises:
        Unreadable: broken json, not s2orc, no text.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise Unreadable("broken json") from None
    if not isinstance(record, dict):
        raise Unreadable("not s2orc")
    return from_record(record)


def is_record(record: object) -> bool:
    """Whether this is a paper of S2ORC, with or without text."""
    return isinstance(record, dict) and any(
        isinstance(_parse(record).get(key), list) for key in ("body_text", "abstract")
    )


def from_record(record: dict[str, Any]) -> str:
    """One record as Markdown.

    Raises:
        Unreadable: not s2orc, no text.
    """
    if not is_record(record):
        raise Unreadable("not s2orc")
    parse = _parse(record)
    body, back = _paragraphs(parse.get("body_text")), _paragraphs(parse.get("back_matter"))
    paper = _Paper(
        Bibliography({key: [_work(entry)] for key, entry in _entries(parse.get("bib_entries")).items()}),
        _entries(parse.get("ref_entries")),
        markup.has_roman_sections(_section(paragraph)[1] for paragraph in body),
    )
    metadata = _dict(record.get("metadata"))
    title = _text(record, "title") or _text(parse, "title") or _text(metadata, "title")
    plain = next(filter(None, (_text(place, "abstract") for place in (record, parse, metadata))), "")
    abstract = [*_abstract(parse, body, paper)] or [markup.paragraph(plain)]
    blocks = [*_body(body, paper), *_remaining_floats(paper), *_body(back, paper)]
    return markup.paper(title, abstract, blocks).encode("utf-8", "replace").decode()  # JSON may hold half a surrogate


def _parse(record: dict[str, Any]) -> dict[str, Any]:
    """The part with the text: from LaTeX before PDF, and the record itself where nothing is nested."""
    parses = [_dict(record.get(key)) for key in _PARSES]
    return next((parse for parse in parses if parse.get("body_text")), None) or next(filter(None, parses), record)


def _abstract(parse: dict[str, Any], body: list[dict[str, Any]], paper: _Paper) -> Iterator[str]:
    """GROBID now and then takes the first paragraphs of the body for the end of the abstract: those are left out."""
    in_body = {_text(paragraph, "text") for paragraph in body}
    for paragraph in _paragraphs(parse.get("abstract")):
        if _text(paragraph, "text") not in in_body:
            yield markup.paragraph(_woven(paragraph, paper))


def _body(paragraphs: list[dict[str, Any]], paper: _Paper) -> Iterator[str]:
    """Paragraphs, a heading where the section changes, and a figure or table below the first mention of it."""
    above = ""
    for paragraph in paragraphs:
        number, section = _section(paragraph)
        if section != above and section:
            yield markup.heading(markup.section_depth(number or section, roman=paper.roman) + 1, section)
        above = section or above
        yield markup.paragraph(_woven(paragraph, paper))
        for span in _spans(paragraph, "ref_spans"):
            yield from _float(str(span.get("ref_id")), paper)


def _section(paragraph: Mapping[str, Any]) -> tuple[str, str]:
    """Number and name; a name such as `Figure 5` is a caption that the parser took for a heading."""
    section, number = paragraph.get("section"), paragraph.get("sec_num")
    if isinstance(section, list) and section:  # nested sections as (number, name) or names; the last is the innermost
        section = section[-1]
        if isinstance(section, list) and len(section) == 2:
            number, section = section
    name = markup.one_line(section) if isinstance(section, str) else ""
    return number if isinstance(number, str) else "", "" if markup.is_caption_label(name) else name


# Text


def _woven(paragraph: dict[str, Any], paper: _Paper) -> str:
    """A paragraph, without the full stop or comma of the sentence that a formula interrupted."""
    text = re.sub(r"^[\s.,;:)]+(?=\s)", "", paper.bibliography.weave(_marked(paragraph, paper)))
    return f"${text.strip()}$" if re.fullmatch(r"\$[^$]+\$", text.strip()) else text


def _marked(paragraph: dict[str, Any], paper: _Paper) -> str:
    """The text with its citations marked and its formulas in place."""
    text = _text(paragraph, "text")
    spans = [(span, _citation) for span in _spans(paragraph, "cite_spans")]
    spans += [(span, _equation) for span in _spans(paragraph, "eq_spans")]
    spans += [(span, _mention) for span in _spans(paragraph, "ref_spans")]
    parts, end = [], 0
    for span, write in sorted(spans, key=lambda pair: int(pair[0]["start"])):
        if span["start"] < end or span["end"] > len(text):
            continue
        parts += [text[end : span["start"]], write(text[span["start"] : span["end"]], span, paper)]
        end = span["end"]
    return "".join([*parts, text[end:]])


def _citation(printed: str, span: dict[str, Any], paper: _Paper) -> str:
    key = str(span.get("ref_id"))
    return paper.bibliography.cite(_shown(printed, span), [key])


def _shown(printed: str, span: dict[str, Any]) -> str:
    """What readers saw: records from LaTeX print a key (BIBREF3, FIGREF1) and keep the number beside it."""
    key, number = span.get("ref_id"), span.get("text")
    return printed if printed != key else number if isinstance(number, str) and number != key else ""


def _equation(printed: str, span: dict[str, Any], paper: _Paper) -> str:
    formula = markup.one_line(_text(span, "latex") or _text(span, "raw_str")).strip("$ ")
    number = _text(span, "eq_num").strip("()[]. ")
    if not formula:
        return printed
    if printed.startswith("INLINE"):
        return f"${formula}$"
    return f"$${formula} \\tag{{{number}}}$$" if number else f"$${formula}$$"


def _mention(printed: str, span: dict[str, Any], paper: _Paper) -> str:
    """`Figure 2`, or the number alone where the words stand before it; a footnote by its mark."""
    key = str(span.get("ref_id"))
    entry = paper.floats.get(key, {})
    shown = _shown(printed, span) or _number(entry)
    return markup.superscript(shown) if _kind(entry) == "footnote" else shown


def _float(key: str, paper: _Paper) -> Iterator[str]:
    """A figure or table, once: its caption, and its cells where the record has them. A footnote by its text."""
    entry = paper.floats.get(key, {})
    kind, number = _kind(entry), _number(entry)
    if kind not in ("figure", "table", "footnote") or key in paper.printed:
        return
    paper.printed.add(key)
    text = markup.tidy(_text(entry, "text"))
    if kind == "footnote":
        yield f"{markup.superscript(number)} {text}".strip() if text else ""
        return
    yield markup.caption(kind, number, text)
    yield _table(next((html for name in ("html", "content") if "<t" in (html := _text(entry, name))), ""))


def _kind(entry: dict[str, Any]) -> str:
    return _text(entry, "type_str") or _text(entry, "type")


def _number(entry: dict[str, Any]) -> str:
    """Its printed number, where the record knows it."""
    number = entry.get("fig_num") or entry.get("num")
    return str(number) if isinstance(number, str | int) else ""


def _remaining_floats(paper: _Paper) -> Iterator[str]:
    for key in paper.floats:
        yield from _float(key, paper)


def _table(html: str) -> str:
    if not html:
        return ""
    from lxml import etree

    try:
        root = etree.fromstring(html.encode("utf-8", "replace"), etree.HTMLParser(encoding="utf-8", no_network=True))
    except etree.XMLSyntaxError:
        return ""
    found = next(root.iter("table"), None)
    return "" if found is None else tables.read(found, xml.text_of)


# Fields


def _work(entry: dict[str, Any]) -> str:
    authors = entry.get("authors")
    first = authors[0] if isinstance(authors, list) and authors else {}
    author = _text(first, "last") if isinstance(first, dict) else str(first)
    title, venue, volume, pages = (_text(entry, name) for name in ("title", "venue", "volume", "pages"))
    if title or (author and venue):
        return citations.work(title, author, venue, volume, re.split(r"[-–]", pages)[0])
    return citations.work_from_text(_text(entry, "raw_text"))


def _spans(paragraph: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The spans of one kind that name a stretch of text."""
    found = paragraph.get(name)
    return [
        span
        for span in (found if isinstance(found, list) else [])
        if isinstance(span, dict)
        and all(type(span.get(edge)) is int for edge in ("start", "end"))
        and 0 <= span["start"] < span["end"]
    ]


def _paragraphs(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _entries(value: object) -> dict[str, dict[str, Any]]:
    return {str(key): item for key, item in _dict(value).items() if isinstance(item, dict)}


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(record: Mapping[str, Any], name: str) -> str:
    """A text field; characters that citations use as marks become blanks, so that offsets stay."""
    value = record.get(name)
    return value.replace("\x01", " ").replace("\x02", " ") if isinstance(value, str) else ""
