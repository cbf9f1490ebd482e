"""A web page -> Markdown: its main text by trafilatura, without navigation, with formulas as LaTeX.

A list of references at the end is left out, as in every reader.
"""

from __future__ import annotations

import codecs
import itertools
import logging
import re
from collections.abc import Iterator
from typing import Any

from orchestrator.data.readers import Unreadable
from orchestrator.data.readers.code import fence
from orchestrator.data.readers.markup import heading, one_line, subscript, superscript, table

MAX_BYTES = 8 << 20
MAX_ELEMENTS = 100_000
_DECLARED = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", re.IGNORECASE)
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_TAG = re.compile(
    r"<\s*(?:!doctype|html|head|body|div|p|article|section|table|ul|ol|h[1-6]|span|pre|br)\b", re.IGNORECASE
)
_HEADING_TAG = re.compile(r"<h[1-6]\b", re.IGNORECASE)
_DRAWN = {
    "mw-editsection", "headerlink", "anchorjs-link", "katex-html", "MathJax_Preview", "MathJax", "MathJax_Display",
    "MathJax_SVG", "mwe-math-fallback-image-inline", "mwe-math-fallback-image-display", "ltx_tag_equation",
}  # fmt: skip
"""Classes of what only a browser needs: edit links, permalinks, formulas drawn beside their source."""
_NO_TEXT = ("script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form", "button", "svg")
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]"
    "|&#(?:0*(?:[0-8]|1[124-9]|2[0-9]|3[01]|6553[45])|x0*(?:[0-8bcef]|1[0-9a-f]|d[89a-f]..|fff[ef]))(?![0-9a-f]);?",
    re.IGNORECASE,
)
"""What lxml takes from a page, but not from trafilatura."""
_CALL_TO_NOTE = re.compile(r"\[\w{1,4}\]|[*†‡]")
_STYLED = re.compile(r"\{\\(?:display|text)style\s?(.*)\}", re.DOTALL)
_MATHJAX = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_DISPLAY = re.compile(r"(\$\$ .+? \$\$)", re.DOTALL)
_REFERENCES = {"references", "bibliography", "works cited", "literature cited"}
_BLOCKS = {"head", "p", "quote", "list", "table", "code", "div"}


def read(data: bytes) -> str:
    """
    Raises:
        Unreadable: not HTML, not in the encoding that it declares, too large, or without text.
    """
    text = _decode(data)
    _refuse_endless_tags(text)
    tree = _parse(text)
    title = one_line(tree.findtext(".//title") or "")
    blocks = _main_text(tree)
    if len(_HEADING_TAG.findall(text)) > 2 and not any(block.startswith("#") for block in blocks):
        # Without an <article> or the like trafilatura guesses, and where it guesses it loses the headings.
        blocks = max(blocks, _main_text(_as_article(_parse(text))), key=_size)
    blocks = blocks or _plain_text(_parse(text))
    if not blocks:
        raise Unreadable("no text")
    if title and not any(block.startswith("# ") for block in blocks):
        blocks.insert(0, heading(1, title))
    return "\n\n".join(blocks)


_LONG_TAG = re.compile(r"<[a-zA-Z][^<>]{50000}[^<>]*")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_MOST_ATTRIBUTES = 2000


def _refuse_endless_tags(text: str) -> None:
    """The parser compares every attribute of a tag with every other."""
    for tag in _LONG_TAG.finditer(text):
        if len(_QUOTED.sub("", tag[0]).split()) > _MOST_ATTRIBUTES:
            raise Unreadable("endless tag")


def _parse(text: str) -> Any:
    """The tree with formulas, superscripts and subscripts written as text, which no extraction takes away."""
    import lxml.etree
    import lxml.html

    try:
        tree = lxml.html.document_fromstring(text)
    except lxml.etree.ParserError:
        raise Unreadable("not html") from None
    if sum(1 for _ in itertools.islice(tree.iter(), MAX_ELEMENTS + 1)) > MAX_ELEMENTS:
        raise Unreadable("too large")
    _write_formulas(tree)
    _write_scripts(tree)
    _unbox(tree)
    return tree


def _main_text(tree: Any) -> list[str]:
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it has a line for every oddity of every page
    try:
        page = trafilatura.bare_extraction(
            tree, include_comments=False, include_tables=True, include_formatting=True, with_metadata=False
        )
    except (ValueError, RecursionError):
        raise Unreadable("broken html") from None
    return _without_references(list(_blocks(page.body))) if page is not None and page.body is not None else []


def _as_article(tree: Any) -> Any:
    body = tree.find("body")
    if body is not None:
        article = body.makeelement("article")
        article.text, body.text = body.text, None
        article.extend(list(body))
        body.append(article)
    return tree


def _size(blocks: list[str]) -> int:
    return sum(len(block) for block in blocks)


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise Unreadable("too large")
    declared = _DECLARED.search(data[:4096])
    charset = declared[1].decode("ascii").lower() if declared else "utf-8"
    charset = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), charset)
    if charset in ("iso-8859-1", "latin1", "latin-1", "us-ascii"):
        charset = "cp1252"  # what browsers take these names for
    try:
        text = data.decode(charset)
    except LookupError:
        raise Unreadable("unknown charset") from None
    except UnicodeDecodeError:
        raise Unreadable("not utf-8" if charset.startswith("utf-8") else "not in its charset") from None
    if "\0" in text or not _TAG.search(text):
        raise Unreadable("not html")
    # lxml refuses an XML declaration in what is decoded already.
    return re.sub(r"^\s*<\?xml[^>]*\?>", "", _CONTROL.sub("", text))


def _write_formulas(tree: Any) -> None:
    for element in list(tree.iter("script")):
        if (element.get("type") or "").startswith("math/tex"):
            _replace(element, _formula(element.text or "", "display" in element.get("type")))
    for element in list(tree.iter("math")):
        _replace(element, _formula(_tex(element), element.get("display") == "block"))
    for element in list(tree.iter("table")):
        if "ltx_eqn_table" in (element.get("class") or ""):  # how LaTeXML numbers a formula
            paragraph = element.makeelement("p")
            paragraph.text, paragraph.tail = one_line(element.text_content()), element.tail
            element.getparent().replace(element, paragraph)


def _write_scripts(tree: Any) -> None:
    for name, mark in (("sup", superscript), ("sub", subscript)):
        for element in list(tree.iter(name)):
            text = one_line(element.text_content())
            is_note = _CALL_TO_NOTE.fullmatch(text) and element.find(".//a") is not None
            _replace(element, "" if is_note else mark(text))


def _unbox(tree: Any) -> None:
    """Takes away what only a browser needs, and the boxes around DocBook's headings."""
    for element in [e for e in tree.iter() if isinstance(e.tag, str) and e.get("class")]:
        classes = set(element.get("class").split())
        if classes & _DRAWN:
            _replace(element, "")
        elif "titlepage" in classes:
            for box in [element, *element.findall(".//div")]:
                box.drop_tag()


def _tex(math: Any) -> str:
    """The LaTeX that MathML carries along, or else its characters."""
    for annotation in math.iter("annotation"):
        if annotation.get("encoding") == "application/x-tex" and annotation.text:
            return str(annotation.text)
    return math.get("alttext") or " ".join(text.strip() for text in math.itertext() if text.strip())


def _formula(source: str, display: bool) -> str:
    source = one_line(source)
    styled = _STYLED.fullmatch(source)
    source = styled[1].strip() if styled else source
    if not source:
        return ""
    return f" \\[{source}\\] " if display else f"\\({source}\\)"


def _replace(element: Any, text: str) -> None:
    if element.getparent() is not None:
        element.tail = text + (element.tail or "")
        element.drop_tree()


def _plain_text(tree: Any) -> list[str]:
    """The body's text as it comes, for pages in which trafilatura finds no main text."""
    body = tree.find("body")
    if body is None:
        return []
    parts: list[str] = []
    for element in body.iter():
        hidden = next(element.iterancestors(*_NO_TEXT), None) is not None
        shown = isinstance(element.tag, str) and element.tag not in _NO_TEXT and not hidden
        parts += [element.text or "" if shown else "", "" if hidden else element.tail or ""]
    return [line for part in parts if (line := _text(part))]


def _text(raw: str) -> str:
    def dollars(match: re.Match[str]) -> str:
        return f"${match[1].strip()}$" if match[1] else f"$$ {match[2].strip()} $$"

    return _MATHJAX.sub(dollars, one_line(raw))


def _blocks(parent: Any) -> Iterator[str]:
    """Markdown of what trafilatura found: head, p, quote, list, table, code, and text between them."""
    loose = [parent.text or ""]
    for element in parent:
        if element.tag in _BLOCKS and not (element.tag == "code" and _is_inline(element)):
            yield from _paragraph(loose)
            yield from _block(element)
            loose = [element.tail or ""]
        else:
            loose += [_inline(element), element.tail or ""]
    yield from _paragraph(loose)


def _paragraph(parts: list[str]) -> Iterator[str]:
    """A paragraph, cut where a displayed formula stands in it."""
    for part in _DISPLAY.split(_text("".join(parts))):
        if part.strip():
            yield part.strip()


def _block(element: Any) -> Iterator[str]:
    if element.tag == "head":
        text = _text(_inline(element)).strip("¶§# ")
        level = (element.get("rend") or "h2")[1:]
        if text:
            yield heading(int(level) if level.isdecimal() else 2, text)
    elif element.tag == "list":
        yield "\n".join(_items(element, 0))
    elif element.tag == "table":
        yield from _table(element)
    elif element.tag == "code":
        if code := _code(element).strip("\n"):
            yield fence(code, _language(element))
    else:
        yield from _blocks(element)


def _is_inline(code: Any) -> bool:
    return not len(code) and "\n" not in (code.text or "")


def _inline(element: Any) -> str:
    """Text with what it holds; code between backticks."""
    if element.tag == "lb":
        return " "
    if element.tag == "code":
        text = one_line(_code(element))
        return f"`{text}`" if text else ""
    return (element.text or "") + "".join(_inline(child) + (child.tail or "") for child in element)


def _code(element: Any) -> str:
    if element.tag == "lb":
        return "\n"
    return (element.text or "") + "".join(_code(child) + (child.tail or "") for child in element)


def _language(code: Any) -> str:
    for element in code.iter():
        if match := re.search(r"(?:language|lang|highlight)-(\w+)", element.get("class") or ""):
            return match[1]
    return ""


def _items(parent: Any, depth: int) -> Iterator[str]:
    """Lines of a list; a term stands before its definition."""
    term, number = "", 0
    for item in parent.iter("item"):
        if _enclosing(item, "list") is not parent:
            continue
        own = (item.text or "") + "".join(
            ("" if child.tag == "list" else _inline(child)) + (child.tail or "") for child in item
        )
        text = _text(own)
        if (item.get("rend") or "").startswith("dt"):
            term = text.rstrip(":") + ": "
            continue
        number += 1
        mark = f"{number}." if parent.get("rend") == "ol" else "-"
        if text or term:
            yield f"{'  ' * depth}{mark} {term}{text}"
        term = ""
        for inner in item.iter("list"):
            if _enclosing(inner, "item") is item:
                yield from _items(inner, depth + 1)


def _enclosing(element: Any, tag: str) -> Any:
    return next(element.iterancestors(tag), None)


def _table(element: Any) -> Iterator[str]:
    rows = [[_text(_inline(cell)) for cell in row.iter("cell")] for row in element.iter("row")]
    rows = [row for row in rows if any(row)]
    columns = max((len(row) for row in rows), default=0)
    while len(rows) > 1 and columns > 1 and not any(rows[0][1:]):
        yield rows.pop(0)[0]  # its caption
    if columns > 1:
        yield table(rows)
    else:
        yield from (row[0] for row in rows)


def _without_references(blocks: list[str]) -> list[str]:
    kept, skipping = [], 0
    for block in blocks:
        level = len(block) - len(block.lstrip("#")) if re.match(r"#{1,6} ", block) else 0
        if level and (not skipping or level <= skipping):
            skipping = level if block.strip("# ").lower() in _REFERENCES else 0
        if not skipping:
            kept.append(block)
    return kept
