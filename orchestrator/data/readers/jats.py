"""JATS, the XML of PubMed Central and most publishers (ANSI/NISO Z39.96) -> Galactica's Markdown.

Citations carry title and author in the text, so the reference list is not printed. Authors, affiliations, permissions
and keywords are not text. Sequences are wrapped only where the source marks them and they spell one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from orchestrator.data.readers import Unreadable, jats_references, markup, mathml, tables, xml
from orchestrator.data.readers.citations import Bibliography
from orchestrator.data.readers.xml import Element


@dataclass(frozen=True)
class _Paper:
    bibliography: Bibliography
    footnotes: dict[str, Element]
    printed: set[Element] = field(default_factory=set)
    """Footnotes that stand in the text already."""


def read(data: bytes) -> str:
    """One article as Markdown; sub-articles (reviews, responses) are left out.

    Raises:
        Unreadable: broken xml, entity in xml, xml too deep, not jats, no text.
    """
    root = xml.parse(data)
    article = root if root.tag == "article" else next(root.iter("article"), None)
    if article is None:
        raise Unreadable("not jats")
    try:
        return _read(article)
    except RecursionError:
        raise Unreadable("xml too deep") from None


def _read(article: Element) -> str:
    places = [article.find(tag) for tag in ("body", "back", "floats-group")]
    paper = _Paper(
        jats_references.read(article),
        {fn.get("id"): fn for place in places if place is not None for fn in place.iter("fn") if fn.get("id")},
    )
    title = article.find("front/article-meta/title-group")
    body = [block for place in places if place is not None for block in _blocks(place, paper, 1)]
    return markup.paper(_title(title, paper), _abstracts(article, paper), body)


def _title(group: Element | None, paper: _Paper) -> str:
    """Title and subtitle, without the marks of footnotes."""
    if group is None:
        return ""
    for mark in list(group.iter("xref", "fn")):
        xml.drop(mark)
    parts = (_line(part, paper) for part in group.iterchildren("article-title", "subtitle"))
    return ": ".join(part for part in parts if part)


def _abstracts(article: Element, paper: _Paper) -> Iterator[str]:
    """The abstract, then the author's and the editor's summaries; a teaser only where there is nothing else."""
    found = article.findall("front/article-meta/abstract")
    plain = [abstract for abstract in found if abstract.get("abstract-type") is None]
    others = [abstract for abstract in found if abstract not in plain and abstract.get("abstract-type") not in _TEASERS]
    for abstract in plain + others or found:
        name = _line(abstract.find("title"), paper) or (abstract not in plain and (plain or others) and "Summary")
        yield markup.heading(2, name or "Abstract")
        yield from _blocks(abstract, paper, 2)


_TEASERS = frozenset(("toc", "teaser", "graphical", "web-summary", "video", "object-outline"))


# Blocks


def _blocks(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    """What stands in an element: runs of text as paragraphs, and the blocks between them."""
    run = node.text or ""
    after_formula = False
    for child in node:
        if child.tag not in _BLOCKS:
            run += _inline_of(child, paper) + (child.tail or "")
            continue
        yield from _paragraph(run, paper, after_formula)
        yield from _BLOCKS[child.tag](child, paper, depth)
        run, after_formula = child.tail or "", child.tag.startswith("disp-formula")
    yield from _paragraph(run, paper, after_formula)
    if node.tag == "p":
        yield from _footnotes(node, paper)


def _paragraph(run: str, paper: _Paper, after_formula: bool) -> Iterator[str]:
    text = markup.paragraph(paper.bibliography.weave(run))
    if after_formula:  # the full stop or comma that ends the formula's sentence
        text = text.lstrip(" ,.;")
    if text:
        yield text


def _footnotes(paragraph: Element, paper: _Paper) -> Iterator[str]:
    """The footnotes of a paragraph, below it, each under the mark that it has in the text."""
    cited = [mark.get("rid") for mark in paragraph.iter("xref") if mark.get("ref-type") == "fn"]
    notes = [paper.footnotes[key] for key in cited if key in paper.footnotes] + list(paragraph.iter("fn"))
    for note in notes:
        if note in paper.printed or next(note.iterancestors("table-wrap-foot"), None) is not None:
            continue
        paper.printed.add(note)
        yield f"{_mark(note, paper)} {_children_line(note, paper, 'p')}".strip()


def _section(sec: Element, paper: _Paper, depth: int) -> Iterator[str]:
    title = _line(sec.find("title"), paper) or _HEADINGS.get(sec.tag, "")
    if title:
        yield markup.heading(depth + 1, title)
    yield from _blocks(sec, paper, depth + 1 if title else depth)


def _boxed_text(box: Element, paper: _Paper, depth: int) -> Iterator[str]:
    caption = _caption(box, paper)
    if caption:
        yield markup.heading(depth + 1, caption)
    yield from _blocks(box, paper, depth + 1 if caption else depth)


def _captioned(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    """A figure, or a file that comes with the paper, by its caption alone."""
    if node.find("caption") is not None:
        yield _caption(node, paper)
    for child in node.iterchildren("fig", "p"):
        yield from _BLOCKS[child.tag](child, paper, depth)


def _table_wrap(wrap: Element, paper: _Paper, depth: int) -> Iterator[str]:
    found = [tables.read(table, lambda cell: _line(cell, paper)) for table in tables.outermost(wrap)]
    yield _caption(wrap, paper) if any(found) or wrap.find("caption") is not None else ""
    yield from found
    for foot in wrap.iter("table-wrap-foot"):
        for note in foot.iterchildren("fn", "p", "attrib"):
            mark = _mark(note, paper) if note.tag == "fn" else ""
            yield f"{mark} {_children_line(note, paper, 'p') or _line(note, paper)}".strip()


def _caption(node: Element, paper: _Paper) -> str:
    """`Table 1. Title. Explanation.`"""
    label = _line(node.find("label"), paper).rstrip(".: ")
    title = _line(node.find("caption/title"), paper)
    rest = [_line(part, paper) for part in node.iterfind("caption/p")]
    parts = [part for part in (title, *rest) if part and not _FILE_TYPE.fullmatch(part)]
    if label and not (parts and parts[0].startswith(label)):
        parts.insert(0, label)
    return (
        markup.paragraph(" ".join(part if part[-1] in ".:?!;" else f"{part}." for part in parts[:-1]) + " " + parts[-1])
        if parts
        else ""
    )


_FILE_TYPE = re.compile(r"\((?:[\d.]+ [KMG]?B )?[A-Z0-9]{2,5}\)")


def _list(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    ordered = node.get("list-type") in _ORDERED
    items = []
    for number, item in enumerate(node.iterchildren("list-item"), 1):
        label = _line(item.find("label"), paper)
        text = "\n".join(block for block in _blocks(item, paper, depth) if block)
        lead = f"{number}. " if ordered and not label else f"- {label} " if label and label not in _BULLETS else "- "
        if text:
            items.append(lead + text.replace("\n", "\n" + " " * (3 if ordered else 2)))
    yield _line(node.find("title"), paper)
    yield "\n".join(items)


_ORDERED = frozenset(("order", "alpha-lower", "alpha-upper", "roman-lower", "roman-upper"))
_BULLETS = frozenset("•–—-*·○●▪■◦‣")


def _definitions(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    """`- term: definition`."""
    items = []
    for item in node.iterchildren("def-item"):
        term, meaning = _line(item.find("term"), paper), _children_line(item, paper, "def")
        items.append("- " + ": ".join(part for part in (term.rstrip(":"), meaning) if part))
    yield _line(node.find("title"), paper)
    yield "\n".join(item for item in items if item != "- ")
    for inner in node.iterchildren("def-list"):
        yield from _definitions(inner, paper, depth)


def _display(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    """A formula of its own: `$$...\\tag{1}$$` where it is LaTeX."""
    label = _line(node.find("label"), paper).strip("()[]. ")
    text = markup.one_line(paper.bibliography.weave(_formula(node, paper)))
    tex = re.fullmatch(r"\$([^$]+)\$", text)
    if tex:
        yield f"$${tex[1]}" + (f" \\tag{{{label}}}$$" if label else "$$")
    elif text:
        yield f"{text} ({label})" if label else text


def _quote(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    for block in _blocks(node, paper, depth):
        yield "\n".join(f"> {line}" for line in block.split("\n"))


def _code(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    text = xml.text_of(node).strip("\n")
    fence = "```" if "```" not in text else "~~~~"
    if text.strip():
        yield f"{fence}\n{text}\n{fence}"


def _verse(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    yield "\n".join(filter(None, (_line(line, paper) for line in node.iter("verse-line"))))


def _statement(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    """A theorem or the like: its label and title lead its first paragraph."""
    lead = " ".join(filter(None, (_line(node.find(tag), paper).rstrip(".") for tag in ("label", "title"))))
    blocks = [block for block in _blocks(node, paper, depth) if block]
    yield ". ".join([lead] * bool(lead) + blocks[:1])
    yield from blocks[1:]


def _skip_block(node: Element, paper: _Paper, depth: int) -> Iterator[str]:
    return iter(())


_HEADINGS = {"ack": "Acknowledgments", "glossary": "Glossary"}
_BLOCKS: dict[str, Callable[[Element, _Paper, int], Iterator[str]]] = {
    **dict.fromkeys(("p", "app-group", "fig-group", "table-wrap-group", "disp-formula-group", "speech"), _blocks),
    **dict.fromkeys(("sec", "app", "ack", "glossary", "notes"), _section),
    **dict.fromkeys(("fig", "supplementary-material", "media", "chem-struct-wrap"), _captioned),
    **dict.fromkeys(("disp-quote", "boxed-quote"), _quote),
    **dict.fromkeys(("code", "preformat"), _code),
    **dict.fromkeys(
        "title label subtitle caption object-id graphic alt-text long-desc permissions attrib sec-meta kwd-group bio "
        "ref-list fn-group floats-group index toc".split(),
        _skip_block,
    ),
    "boxed-text": _boxed_text,
    "table-wrap": _table_wrap,
    "list": _list,
    "def-list": _definitions,
    "disp-formula": _display,
    "verse-group": _verse,
    "statement": _statement,
}


# Text


def _line(node: Element | None, paper: _Paper) -> str:
    """All of an element in one line."""
    return "" if node is None else markup.tidy(paper.bibliography.weave(_inline(node, paper)))


def _children_line(node: Element, paper: _Paper, tag: str) -> str:
    return " ".join(filter(None, (_line(child, paper) for child in node.iterchildren(tag))))


def _inline(node: Element, paper: _Paper) -> str:
    return xml.mixed(node, lambda child: _inline_of(child, paper))


def _inline_of(node: Element, paper: _Paper) -> str:
    return _INLINE.get(node.tag, _inline)(node, paper)


def _spaced(node: Element, paper: _Paper) -> str:
    return f" {_inline(node, paper)} "


def _citation(xref: Element, paper: _Paper) -> str:
    """A citation where it names entries of the reference list; other cross-references as printed."""
    return paper.bibliography.cite(_inline(xref, paper), (xref.get("rid") or "").split())


def _formula(node: Element, paper: _Paper) -> str:
    """LaTeX where the source has it, else MathML, else text; a picture alone is `[IMAGE]`, so that no gap is silent."""
    if node.find(".//tex-math") is not None or node.find(".//math") is not None:
        for picture in list(node.iter("graphic", "inline-graphic")):
            xml.drop(picture)
    text = "".join([node.text or "", *(_formula_part(child, paper) + (child.tail or "") for child in node)])
    return text if text.strip() or next(node.iter("graphic", "inline-graphic"), None) is None else "[IMAGE]"


def _formula_part(node: Element, paper: _Paper) -> str:
    return "" if node.tag in ("label", "graphic", "inline-graphic") else _inline_of(node, paper)


def _alternatives(node: Element, paper: _Paper) -> str:
    for tag in ("tex-math", "math", "textual-form", "chem-struct", "inline-graphic"):
        found = node.find(f".//{tag}")
        if found is not None:
            return _inline_of(found, paper)
    return "" if len(node) == 0 or node.find("graphic") is not None else _inline_of(node[0], paper)


def _tex(node: Element, paper: _Paper) -> str:
    """The formula of a tex-math, which often is a whole LaTeX document."""
    text = xml.text_of(node)
    text = text.split(r"\begin{document}")[-1].split(r"\end{document}")[0].strip()
    formula = markup.one_line(text.strip("$").removeprefix(r"\[").removesuffix(r"\]"))
    return f"${formula}$" if formula else ""


def _math(node: Element, paper: _Paper) -> str:
    formula = mathml.latex(node)
    return f"${formula}$" if formula else ""


def _footnote_mark(node: Element, paper: _Paper) -> str:
    return _mark(node, paper) if node.find("label") is not None else ""


def _mark(note: Element, paper: _Paper) -> str:
    """A footnote's label as a superscript."""
    label = _line(note.find("label"), paper)
    return label if not label or label.startswith("[START_SUP]") else markup.superscript(label)


def _marked_sequence(node: Element, paper: _Paper) -> str:
    """DNA, protein and SMILES as the source marks them (content-type), if the text spells one and nothing else."""
    text = _inline(node, paper)
    kind = node.get("content-type") or ""
    for pattern, name, spelling in _SEQUENCES:
        if pattern.search(kind.lower()) and (found := spelling.fullmatch(markup.one_line(text))):
            sequence = found[2].replace(" ", "")
            return f"{found[1]}{markup.span(name, sequence)}{found[3]}"
    return text


_SEQUENCES = (
    # Publishers mark primers as genes; ten bases in a row are a sequence, not the name of one.
    (
        re.compile(r"\bdna\b|nucleotide|primer|gene$"),
        "DNA",
        re.compile(r"((?:5[’'′] ?[-–]? ?)?)((?:[ACGTUNacgtun] ?){10,}?)((?:[-–]? ?3[’'′])?)"),
    ),
    (re.compile(r"protein|amino|peptide"), "AMINO", re.compile(r"()((?:[ACDEFGHIKLMNPQRSTVWXY] ?){10,}?)()")),
    (re.compile(r"smiles"), "SMILES", re.compile(r"()([^ ]+)()")),
)


def _nothing(node: Element, paper: _Paper) -> str:
    return ""


_INLINE: dict[str, Callable[[Element, _Paper], str]] = {
    "sup": lambda node, paper: markup.superscript(_inline(node, paper)),
    "sub": lambda node, paper: markup.subscript(_inline(node, paper)),
    "xref": _citation,
    "inline-formula": _formula,
    "disp-formula": _formula,
    "chem-struct": _marked_sequence,
    "named-content": _marked_sequence,
    "alternatives": _alternatives,
    "tex-math": _tex,
    "math": _math,
    "fn": _footnote_mark,
    "inline-graphic": lambda node, paper: "[IMAGE]",
    **dict.fromkeys(("p", "break", "list", "list-item", "def-list", "def-item", "title", "sec", "disp-quote"), _spaced),
    **dict.fromkeys(
        "graphic media object-id index-term private-char alt-text long-desc def permissions".split(), _nothing
    ),
}
