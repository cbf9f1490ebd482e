"""What the commands of LaTeX say: sections, citations, references, notes, signs that need more than a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.data.readers.markup import heading, reference, subscript, superscript
from orchestrator.data.readers.tex import vocabulary
from orchestrator.data.readers.tex.lexer import join, name_of, tokenize
from orchestrator.data.readers.tex.paper import NOTHING, reference_mark

if TYPE_CHECKING:
    from orchestrator.data.readers.tex.writer import Writer

_ESCAPED = re.compile(r"\\([%#_&~{}$])")
_LENGTH = re.compile(r"\s*-?[\d.]+\s*[a-z]{2}\s*|\s*-?[\d.]*\\[A-Za-z]+\s*")
_TEX_LENGTH = re.compile(r"\s*=?\s*-?[\d.]+\s*[a-z]{2}\b(?:\s*(?:plus|minus)\s*-?[\d.]+\s*[a-z]{2,4}\b)*")
_MAX_COLUMNS = 100
_BIBLIOGRAPHY = {"references", "bibliography", "literature cited"}


def _title(writer: Writer, name: str) -> None:
    writer.drop_optional()
    title = _plain(writer, writer.tokens.argument())
    writer.paper.title = writer.paper.title or title


def _plain(writer: Writer, tokens: list[str]) -> str:
    child = writer.child(tokens)
    child.plain = True
    return child.inline_text()


def _section(writer: Writer, name: str) -> None:
    starred = writer.tokens.star()
    writer.drop_optional()
    level = vocabulary.SECTIONS[name]
    if not starred and level < vocabulary.SECTIONS["paragraph"]:
        writer.paper.step_section(level)
    text = _plain(writer, writer.tokens.argument())
    writer.end_paragraph()
    if text and text.lower() not in _BIBLIOGRAPHY:
        text = text.rstrip(".:") if level >= vocabulary.SECTIONS["paragraph"] else text
        writer.add("heading", heading(max(level + writer.paper.has_chapters, 2), text))


def _headed(writer: Writer, name: str) -> None:
    """\\abstract{...} and \\acknowledgments: a heading; what follows is read as any text."""
    if name == "abstract" and writer.tokens.peek() != "{":
        return
    writer.end_paragraph()
    writer.add("heading", heading(2, vocabulary.HEADED[name]))
    if name == "abstract":
        writer.tokens.push([*writer.tokens.argument(), "\n\n"])


def _cite(writer: Writer, name: str) -> None:
    writer.tokens.star()
    keys = []
    while True:
        while writer.tokens.optional() is not None:
            pass
        keys += [key.strip() for key in join(writer.tokens.argument()).split(",")]
        if not (name.endswith("cites") and writer.tokens.peek() in ("[", "{")):
            break
    if writer.plain or writer.bibliography is None:
        return
    works = [work for key in keys if (work := writer.bibliography.work(key))]
    text = "".join(reference(work.title, work.author) for work in works if work.title)
    if name.lower() == "citeauthor" or (name in vocabulary.TEXTUAL_CITATIONS and not text):
        text = ", ".join(work.author for work in works)
    if text and name not in ("citeyear", "citeyearpar", "citedate"):
        writer.space()
        writer.say(text)
    else:
        writer.say(NOTHING)


def _refer(writer: Writer, name: str) -> None:
    writer.tokens.star()
    keys = join(writer.tokens.argument()).split(",")
    if name in ("pageref", "nameref"):
        writer.say(NOTHING)
        return
    marks = ", ".join(reference_mark(key.strip(), name in vocabulary.NAMED_REFERENCES) for key in keys)
    writer.say(f"({marks})" if name == "eqref" else marks)


def _label(writer: Writer, name: str) -> None:
    writer.paper.label(join(writer.tokens.argument()).strip())


def _footnote(writer: Writer, name: str) -> None:
    writer.drop_optional()
    tokens = writer.tokens.argument()
    text = "" if writer.plain else writer.inline(tokens).rstrip(".")
    if text:
        writer.say_note(f" ({text})")


def _url(writer: Writer, name: str) -> None:
    writer.say(_ESCAPED.sub(r"\1", join(writer.tokens.argument())))


def _verb(writer: Writer, name: str) -> None:
    writer.tokens.star()
    writer.drop_optional()
    if name == "mintinline":
        writer.tokens.argument()
    text = join(writer.tokens.argument()) if writer.tokens.peek() == "{" else writer.tokens.delimited()
    writer.say(f"`{text}`" if text else "")


def _script(mark: Callable[[str], str]) -> Callable[[Writer, str], None]:
    def say(writer: Writer, name: str) -> None:
        text = writer.inline(writer.tokens.argument())
        writer.say(text if "[START_REF]" in text else mark(text))

    return say


def _quoted(writer: Writer, name: str) -> None:
    writer.tokens.star()
    writer.say(f"“{writer.inline(writer.tokens.argument())}”")


def _space_if_word(writer: Writer, name: str) -> None:
    """\\xspace: a blank unless punctuation or a note follows."""
    follower = writer.tokens.peek()
    if name_of(follower) not in ("footnote", "xspace", "/", " ") and follower[:1] not in ".,;:!?/)]'’-–}~ \n":
        writer.say(" ")


def _chemistry(writer: Writer, name: str) -> None:
    """mhchem: H2O, SO4^2-."""
    text = join(writer.tokens.argument()).replace("->", " → ").replace("<=>", " ⇌ ")
    text = re.sub(r"\^\{?([\d+\-.]+)\}?|(?<=[A-Za-z)\]])_?\{?(\d+)\}?", _charge_or_count, text)
    writer.say(text.replace("{", "").replace("}", "").replace("$", ""))


def _charge_or_count(match: re.Match[str]) -> str:
    return superscript(match[1]) if match[1] else subscript(match[2])


def _quantity(writer: Writer, name: str) -> None:
    """siunitx: \\SI{3}{\\milli\\metre}, \\num{3}, \\si{\\metre}."""
    writer.drop_optional()
    parts = [] if name in ("si", "unit") else [join(writer.tokens.argument()).strip()]
    if name not in ("num", "ang"):
        writer.drop_optional()
        units = writer.tokens.argument()
        parts.append("".join(vocabulary.UNITS.get(name_of(token), token.strip("{}")) for token in units).strip())
    writer.say(" ".join(parts) + ("°" if name == "ang" else ""))


def _caption(writer: Writer, name: str) -> None:
    starred = writer.tokens.star()
    kind = join(writer.tokens.argument()).capitalize() if name == "captionof" else "Figure"
    writer.drop_optional()
    writer.caption(kind if name != "tablecaption" else "Table", writer.tokens.argument(), not starred)


def _part_caption(writer: Writer, name: str) -> None:
    """\\subfloat[caption]{...}: the caption of a part; what it holds is read as any text."""
    found = writer.tokens.optional()
    if found and writer.float is not None:
        writer.float.parts.append(f"({chr(ord('a') + min(len(writer.float.parts), 25))}) {writer.inline(found)}")


def _columns(writer: Writer, name: str) -> None:
    count = join(writer.tokens.argument()).strip()
    writer.span = min(int(count), _MAX_COLUMNS) if count.isdecimal() and len(count) < 4 else 1
    writer.span = max(writer.span, 1)
    writer.tokens.argument()


def _rule(writer: Writer, name: str) -> None:
    """\\cmidrule(lr){2-3}"""
    writer.drop_optional()
    if writer.tokens.peek().startswith("("):
        writer.tokens.raw()
    writer.tokens.argument()


def _line_break(writer: Writer, name: str) -> None:
    """\\\\[2mm]"""
    writer.tokens.star()
    found = writer.tokens.optional()
    if found is not None and not _LENGTH.fullmatch(join(found)):
        writer.tokens.push(["[", *found, "]"])
    writer.say(" ")


def _length(writer: Writer, name: str) -> None:
    """\\vskip 2mm plus 1pt"""
    text = ""
    while len(text) < 80 and writer.tokens and writer.tokens.peek()[0] not in "\\{}$":
        text += writer.tokens.raw()
    writer.tokens.push(tokenize(_TEX_LENGTH.sub("", text, count=1)))


def _either(writer: Writer, name: str) -> None:
    """\\texorpdfstring{for the press}{for the outline}"""
    text = writer.tokens.argument()
    writer.tokens.argument()
    writer.tokens.push(text)


def _unwrap_optional(writer: Writer, name: str) -> None:
    """\\twocolumn[title and authors]"""
    writer.tokens.push(writer.tokens.optional() or [])


def _within(writer: Writer, name: str) -> None:
    counter = join(writer.tokens.argument()).strip()
    writer.paper.number_within(counter, join(writer.tokens.argument()).strip())


def _paragraph(writer: Writer, name: str) -> None:
    writer.end_paragraph()


def _item(writer: Writer, name: str) -> None:
    writer.item()


def _appendix(writer: Writer, name: str) -> None:
    writer.paper.begin_appendix()


def _formula(writer: Writer, name: str) -> None:
    """\\ensuremath{...} or \\(...\\)"""
    tokens = writer.tokens.until("\\)", in_paragraph=True) if name == "(" else writer.tokens.argument()
    writer.formula(tokens or [])


def _display(writer: Writer, name: str) -> None:
    writer.display(writer.tokens.until("\\]", in_paragraph=False))


def _nothing(writer: Writer, name: str) -> None:
    pass


COMMANDS: dict[str, Callable[[Writer, str], None]] = {
    **dict.fromkeys(("title", "icmltitle", "Title", "mytitle"), _title),
    **dict.fromkeys(vocabulary.SECTIONS, _section),
    **dict.fromkeys(vocabulary.HEADED, _headed),
    **dict.fromkeys(vocabulary.CITATIONS, _cite),
    **dict.fromkeys(vocabulary.REFERENCES, _refer),
    "label": _label,
    **dict.fromkeys(("footnote", "footnotetext", "endnote", "sidenote"), _footnote),
    **dict.fromkeys(("url", "path", "nolinkurl"), _url),
    **dict.fromkeys(("verb", "lstinline", "mintinline"), _verb),
    "textsuperscript": _script(superscript),
    "textsubscript": _script(subscript),
    **dict.fromkeys(("enquote", "textquote"), _quoted),
    "xspace": _space_if_word,
    **dict.fromkeys(("ce", "cee"), _chemistry),
    **dict.fromkeys(("SI", "qty", "num", "si", "unit", "ang"), _quantity),
    **dict.fromkeys(("caption", "captionof", "tablecaption", "figcaption"), _caption),
    **dict.fromkeys(("subfloat", "subcaptionbox"), _part_caption),
    "multicolumn": _columns,
    **dict.fromkeys(("cmidrule", "cmidrule*"), _rule),
    **dict.fromkeys(("\\", "tabularnewline"), _line_break),
    **dict.fromkeys(vocabulary.LENGTHS, _length),
    "texorpdfstring": _either,
    "twocolumn": _unwrap_optional,
    "numberwithin": _within,
    "par": _paragraph,
    "item": _item,
    "appendix": _appendix,
    **dict.fromkeys(("ensuremath", "("), _formula),
    "[": _display,
    "nobreakdash": _nothing,
}
"""Command -> what it does to a writer; it is given its own name."""
