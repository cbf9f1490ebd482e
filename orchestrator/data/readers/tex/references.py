"""The works that a paper cites: title and first author by citation key, from .bib databases and \\bibitem lists.

A .bib entry names its fields. A \\bibitem is text in one of a hundred styles, in which the title is found by its marks:
its own command, the second \\newblock, quotation marks, emphasis, a year before it, or the length of its words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.data.readers.markup import one_line
from orchestrator.data.readers.tex.lexer import environment, join, name_of, tokenize
from orchestrator.data.readers.tex.macros import Macros
from orchestrator.data.readers.tex.tokens import Tokens

_ENTRY = re.compile(r"@\s*(\w+)\s*[{(]\s*([^,\s{}()]+)\s*,")
_BIBLATEX_ENTRY = re.compile(r"\\entry\{([^{}]+)\}\{")
_OPENING = re.compile(r"[{}\"]")
_AUTHOR_MARK = re.compile(r"et al|\bet$|[A-Z]\.(?:[ -]?[A-Z]\.)*|^[A-Z][a-z]+ [A-Z]{1,3}$|^and\b|&")
_INITIALS = re.compile(r"(?:[A-Z]\.?[ -]?){1,4}$")
_LEADING_INITIALS = re.compile(r"^(?:[A-Z]\.\s*)+")
_PARTICLES = re.compile(r"(?<!\S)(?:[a-z]\S*\s+)*\S+$")
_JOURNAL = re.compile(
    r"\b(?:Journal|Proc|Proceedings|Trans|Transactions|Phys|Lett|Rev|Letters|Review|Annals|Advances|Conference"
    r"|Workshop|IEEE|ACM|J|Nature|Science|Symposium|Int|Math|arXiv)\b|\w\. \w"
)
_SMALL_JOIN = re.compile(r"\s+(?:and|&|et al\.?|with)(?:\s|$)|;|,")


@dataclass(frozen=True)
class Work:
    title: str
    """Empty where the list gives none, as in some journals of physics."""
    author: str
    """The family name of the first."""


class Bibliography:
    """Works by key, each looked up when it is first cited: databases hold many that never are."""

    def __init__(self, bibitems: str, databases: str, plain: Callable[[str], str]) -> None:
        self._plain = plain
        self._works: dict[str, Work | None] = {}
        self._entries = _entries(databases, _ENTRY, 2)
        self._biblatex = _entries(bibitems, _BIBLATEX_ENTRY, 1)
        self._items = _bibitems(bibitems)

    def work(self, key: str) -> Work | None:
        if key not in self._works:
            self._works[key] = self._look_up(key)
        return self._works[key]

    def _look_up(self, key: str) -> Work | None:
        if key in self._entries:
            entry = self._entries[key]
            work = Work(
                self._title(_field(entry, "title")), self._family(_field(entry, "author") or _field(entry, "editor"))
            )
            if work.title:
                return work
        if key in self._biblatex:
            entry = self._biblatex[key]
            family = re.search(r"family=(?=\{)|\{\{hash=[^{}]*\}(?=\{)", entry)
            title = _after(entry, "\\field{title}")
            return Work(self._title(title), self._plain(_value(entry, family.end()) if family else ""))
        return self._from_item(*self._items[key]) if key in self._items else None

    def _title(self, text: str) -> str:
        return self._plain(text).strip(" .,;:“”\"'‘’")

    def _family(self, names: str) -> str:
        """BibTeX: `Family, Given and ...` or `Given von Family and ...`; a group in braces is one name."""
        first = re.split(r"\s+and\s+", names.strip(), maxsplit=1)[0]
        if first.startswith("{") and first.endswith("}") and first.count("{") == 1:
            return self._plain(first)
        return _family(self._plain(first))

    def _from_item(self, label: str, text: str) -> Work:
        authors = self._item_author(label, text)
        return Work(self._title(self._item_title(text)), authors)

    def _item_title(self, text: str) -> str:
        for mark in ("\\bibinfo{title}", "\\bibinfo {title}", "\\showarticletitle", "\\enquote", "\\BibitemTitle"):
            if found := _after(text, mark):
                return found
        blocks = [block for block in re.split(r"\\newblock\b", text) if block.strip()]
        if len(blocks) > 1 and self._plain(blocks[1]).count(" "):
            return _first_sentence(self._plain(blocks[1]))
        for found in re.findall(r"``(.+?)''|“(.+?)”", text, re.DOTALL):
            if "".join(found).count(" "):
                return "".join(found)
        return self._emphasised(text) or _title_in_prose(self._plain(text))

    def _emphasised(self, text: str) -> str:
        """Books and some styles emphasise titles; most emphasise journals, which look otherwise."""
        for match in re.finditer(r"\\(?:emph|textit|textsl)\s*(?=\{)|(?=\{\\(?:em|it|itshape|sl)\b)", text):
            found = self._plain(_value(text, match.end()))
            if found.count(" ") > 1 and not _JOURNAL.search(found):
                return found
        return ""

    def _item_author(self, label: str, text: str) -> str:
        """From the name that natbib puts into the label, or else the first name of the text."""
        natbib = re.match(r"(.+?)\(\d{4}", self._plain(label))
        if natbib:
            return _SMALL_JOIN.split(natbib[1])[0].strip()
        if found := _after(text, "\\bibnamefont"):
            return self._plain(found)
        names = self._plain(re.split(r"\\newblock\b|``|“", text, maxsplit=1)[0])
        first, _, rest = names.partition(",")
        if _INITIALS.match(rest.split(",")[0].strip()) or " " not in first.strip():
            return first.strip()  # `Family, G., ...`
        return _family(_SMALL_JOIN.split(re.split(r"(?<=[a-z]{2})\.\s|:\s|\(", first)[0])[0])


def _family(name: str) -> str:
    """`Family, Given`, `Given von Family` or `Family GV`."""
    family, comma, _ = name.partition(",")
    words = family.split()
    if comma or len(words) < 2:
        return family.strip()
    if _INITIALS.fullmatch(words[-1]) and not _INITIALS.fullmatch(words[0]):
        return " ".join(words[:-1])
    match = _PARTICLES.search(family)
    return match[0] if match and match[0] != family else words[-1]


def _first_sentence(text: str) -> str:
    """A block may go on with the journal; a title ends at a full stop that no initial or number makes."""
    return re.split(r"(?<=[a-z)\]”]{2}[.])\s+(?=[A-Z])", text.lstrip(), maxsplit=1)[0]


def _title_in_prose(text: str) -> str:
    """`Authors (year). Title. Journal`, `Authors: Title. Journal` or `A. Author, B. Author, Title, Journal`."""
    for pattern in (r"\(\d{4}[a-z]?\)[.,:]?\s+(.{10,}?)[.?]\s", r"(?:[A-Z]\.|et al\.):\s+(.{10,}?)[.?](?:\s|$)"):
        if match := re.search(pattern, text):
            return match[1]
    for piece in re.split(r",\s+|(?<=[a-z]{3})\.\s+", text):
        piece = _LEADING_INITIALS.sub("", piece)
        if piece.count(" ") > 1 and not _AUTHOR_MARK.search(piece) and not _JOURNAL.search(piece):
            return piece
    return ""


def _entries(text: str, pattern: re.Pattern[str], key: int) -> dict[str, str]:
    """The text of every entry, from its key to the next entry."""
    starts = list(pattern.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {match[key]: text[match.end() : end] for match, end in zip(starts, ends, strict=False)}


def _bibitems(text: str) -> dict[str, tuple[str, str]]:
    """Key -> (label, text) of every \\bibitem."""
    items: dict[str, tuple[str, str]] = {}
    tokens = Tokens(tokenize(text), Macros())
    key, label, body = "", "", list[str]()
    while tokens:
        token = tokens.raw()
        if name_of(token) != "bibitem" and environment(token)[1] != "thebibliography":
            body.append(token)
            continue
        if key:
            items[key] = (label, join(body))
        label, key, body = "", "", []
        if name_of(token) == "bibitem":
            label = join(tokens.optional() or [])
            key = one_line(join(tokens.argument()))
    if key:
        items[key] = (label, join(body))
    return items


def _field(entry: str, name: str) -> str:
    """`name = {value}`, `name = "value"` or a bare word."""
    match = re.search(rf"(?<![\w-]){name}\s*=\s*", entry, re.IGNORECASE)
    return _value(entry, match.end()) if match else ""


def _after(text: str, mark: str) -> str:
    start = text.find(mark)
    return _value(text, start + len(mark)) if start >= 0 else ""


def _value(text: str, start: int) -> str:
    """What the group that opens at start holds; a quoted string or bare word likewise."""
    start += len(text) - start - len(text[start:].lstrip())
    opening = text[start : start + 1]
    if opening not in ("{", '"'):
        return re.split(r"[,}\s]", text[start : start + 100], maxsplit=1)[0]
    depth = 0
    for match in _OPENING.finditer(text, start + 1):
        if match[0] == opening == '"' and not depth:
            return text[start + 1 : match.start()]
        if match[0] == "}" and not depth:
            return text[start + 1 : match.start()]
        depth += {"{": 1, "}": -1, '"': 0}[match[0]]
    return ""
