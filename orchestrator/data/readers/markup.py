"""Galactica's Markdown, which every reader of a scientific format writes (Taylor et al., "Galactica", 2022)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.data.readers import Unreadable

_BEFORE_POINT = re.compile(r" (?=[.,;:?!)\]]*[.,;](?:\s|$))(?<=[^\\.] )")
_IN_BRACKETS = re.compile(r" (?=[\w\[])(?<=[(\[] )| (?=[)\]])(?<=[\w$\]] )")
_HEADING = re.compile(r"(#{1,6})[ \t]+(.*\S)")
_BACK_MATTER = re.compile(
    r"ackn?ow|thanks|abbrev|gloss|append|annex|support|supplement|fund|author|data avail|availab|notes?$|compet",
    re.IGNORECASE,
)


def one_line(text: str) -> str:
    """White space as single blanks."""
    return " ".join(text.split())


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


def tidy(text: str) -> str:
    """One line without blanks before commas and full stops or inside brackets, as markup taken out leaves them."""
    line = _BEFORE_POINT.sub("", one_line(text))
    return _IN_BRACKETS.sub("", line)


def paragraph(text: str) -> str:
    """Tidy text; a leading `#` is escaped, so that no paragraph reads as a heading."""
    line = tidy(text)
    return "\\" + line if _HEADING.match(line) else line


def paper(title: str, abstract: Iterable[str], body: Iterable[str]) -> str:
    """A paper from its blocks (each a heading, a paragraph, a list, a table or a formula).

    An abstract and a body that begin without a heading get one, so that sections can be told apart; a heading over
    nothing is left out.

    Raises:
        Unreadable: no text.
    """
    summary = [block for block in abstract if block.strip()]
    if summary and not _HEADING.match(summary[0]):
        summary.insert(0, heading(2, "Abstract"))
    text = [block for block in body if block.strip()]
    if summary and text and not _HEADING.match(text[0]):
        heads = [found[2] for found in map(_HEADING.match, text) if found]
        has_sections = any(not _BACK_MATTER.match(head) for head in heads)
        text.insert(0, heading(2, "Introduction" if has_sections else "Main text"))
    blocks = _without_empty_headings([*summary, *text])
    if not blocks:
        raise Unreadable("no text")
    return "\n\n".join([heading(1, title)] * bool(title.strip()) + blocks)


def _without_empty_headings(blocks: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for block in reversed(blocks):
        found = _HEADING.match(block)
        below = _HEADING.match(kept[-1]) if kept else None
        if found and (not kept or (below and len(below[1]) <= len(found[1]))):
            continue
        kept.append(block)
    return kept[::-1]


_DECIMAL = re.compile(r"(?:[A-Z]\.)?\d{1,2}(?:\.\d{1,2})*(?=[.)\s]|$)")
_LETTER = re.compile(r"[A-Z](?=[.)]\s|[.)]?$)")
_CAPTION_LABEL = re.compile(r"(?:supplementary )?(?:fig(?:ure|\.)?|table|scheme|box)\s*[\dIVXS]+[.:]?", re.IGNORECASE)


def caption(kind: str, number: str, text: str) -> str:
    """`Figure 2. Text`; text that names itself is left as it is, and text that begins in mid-sentence is no caption."""
    if not re.match(r"[\w(\[“‘\"'$]", text):
        return ""
    if re.match(r"(?:supplementary )?(?:fig|tab|scheme|box|chart|plate|algorithm)", text, re.IGNORECASE):
        return paragraph(text)
    return f"{kind.capitalize()} {number}. {text}" if number else f"{kind.capitalize()}: {text}"


def section_depth(number: str, *, roman: bool) -> int:
    """How deep a section is by its number, or by the head that begins with it: 1 for `2`, 2 for `2.1`.

    In papers with sections I, II, III (roman), A is 2 and 1) is 3 deep, as the IEEE sets them.
    """
    number = number.strip()
    if decimal := _DECIMAL.match(number):
        return 3 if roman else decimal[0].count(".") + 1
    return 2 if roman and _LETTER.match(number) and number[0] not in "IVX" else 1


def has_roman_sections(numbers: Iterable[str]) -> bool:
    return any(re.match(r"II[.)]?(\s|$)", number.strip()) for number in numbers)


def is_caption_label(text: str) -> bool:
    """Whether text is `Figure 5` and no more, which readers of PDF take for a heading."""
    return _CAPTION_LABEL.fullmatch(text.strip()) is not None


_NUMBER = re.compile(
    r"(?:(?i:section)\s+)?(?:\d+(?:\.\d+)*(?:[.):]|\b|(?=[A-Z]))|[IVXLC]+(?:[.):]|\b)|[A-Z](?:[.):]|(?=\s)))\s*"
)
_SPACED = re.compile(r"((?:\d+[.)]?|[IVX]+[.)])\s+)?((?:\w ){4,}\w)")
_ABSTRACT = re.compile(r"abstract|summary")
_INTRODUCTION = re.compile(r"(?:(?:general|background|motivation|overview)(?: and| &)? )?introduction\b.*")
_BACKGROUND = re.compile(r"background\b.*")
_CONCLUSION = re.compile(
    r"(?:(?:general|final|main|overall|summary|discussions?|results)(?:,? (?:and|&)|,)? )*(?:the )?"
    r"conclusions?\b(?! of the proof).*"
    r"|(?:concluding|closing|final) (?:remarks?|comments?|thoughts|discussion)\b.*"
    r"|summary(?:,? (?:and|&)|,) (?:outlook|discussion|perspectives?|future|open|implications)\b.*"
)


@dataclass(frozen=True)
class _Section:
    level: int
    name: str
    """In lower case, without numbering and markup."""
    start: int
    end: int
    """Lines, the heading among them; the end is the next heading of the same or a higher level."""


def abstract_introduction_conclusion(markdown: str) -> str:
    """The title and the sections Abstract, Introduction and Conclusion with all that stands below them.

    This is what AstroLLaMA-Chat is trained on (Perkowski et al., 2024). Where no section is an introduction, the first
    that is called Background is taken.

    Raises:
        Unreadable: no abstract, introduction or conclusion.
    """
    lines = markdown.split("\n")
    sections = _sections(lines)
    kept = _outermost(s for s in sections if any(p.fullmatch(s.name) for p in (_ABSTRACT, _INTRODUCTION, _CONCLUSION)))
    if not any(_INTRODUCTION.fullmatch(section.name) for section in kept):
        background = (section for section in sections if _BACKGROUND.fullmatch(section.name))
        kept = _outermost(sorted([*kept, *_first_outside(background, kept)], key=lambda section: section.start))
    if not kept:
        raise Unreadable("no abstract, introduction or conclusion")
    title = [lines[s.start] for s in sections[:1] if s.level == 1 and s not in kept]
    return "\n\n".join([*title, *("\n".join(lines[s.start : s.end]).strip() for s in kept)])


def _sections(lines: Sequence[str]) -> list[_Section]:
    sections: list[_Section] = []
    following = [len(lines)] * 7  # level -> where the next heading of this or a higher level stands
    for line, level, name in reversed(list(_headings(lines))):
        sections.append(_Section(level, _plain_name(name), line, following[level]))
        following[level:] = [line] * (7 - level)
    return sections[::-1]


def _headings(lines: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Line, level and text of each heading outside fenced code."""
    fence = ""
    for number, line in enumerate(lines):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if mark and (not fence or (mark[1].startswith(fence) and not line.strip().strip(fence[0]))):
            fence = "" if fence else mark[1]
        elif not fence and (found := _HEADING.match(line)):
            yield number, len(found[1]), found[2]


def _plain_name(name: str) -> str:
    """`II. I N T R O D U C T I O N {#intro}` -> `introduction`."""
    name = one_line(re.sub(r"\{[^{}]*\}$|[*_`#]+", "", name.strip()))
    if spaced := _SPACED.fullmatch(name):
        return spaced[2].replace(" ", "").casefold()
    number = _NUMBER.match(name)
    return name[number.end() if number else 0 :].casefold().strip(" .:;–—-")


def _outermost(sections: Iterable[_Section]) -> list[_Section]:
    kept: list[_Section] = []
    for section in sections:
        if not kept or section.start >= kept[-1].end:
            kept.append(section)
    return kept


def _first_outside(candidates: Iterable[_Section], kept: Sequence[_Section]) -> list[_Section]:
    outside = (s for s in candidates if not any(k.start <= s.start < k.end for k in kept))
    return list(outside)[:1]
