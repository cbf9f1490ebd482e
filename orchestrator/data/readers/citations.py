"""In-text citations: `[3-5]` or `(Smith et al., 2001)` -> `[START_REF] Title, Smith[END_REF]` from the reference list.

A reader writes `Bibliography.cite(...)` where the source marks a citation and passes the finished paragraph to `weave`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.data.readers import markup

# A citation between these two is a place in the reference list. No XML document can hold such characters.
_MARK = "\x01[0-9,]+\x02"
_RANGE = r"\s*[-\u2010-\u2015\u2212]\s*"
_RUN = rf"{_MARK}(?:(?:{_RANGE}|\s*[,;]?\s*){_MARK})*"
_LISTED = rf"{_MARK}(?:(?:{_RANGE}|\s*[,;]?\s*(?:and|&)?\s*){_MARK})*\s*[,;]?"
_BRACKETED = re.compile(
    rf"\[START_SUP\]\s*(?:\[({_LISTED})\s*\]|({_LISTED}))\s*\[END_SUP\]|\[\s*({_LISTED})\s*\]|\(\s*({_LISTED})\s*\)"
)
_RUNS = re.compile(rf"{_RUN}(?:\s+(?=[.,;:)\]]))?")
_MARKS = re.compile(rf"({_RANGE})?\x01([0-9,]+)\x02")
_LONGEST_RANGE = 50

_LEAD_WORDS = re.compile(r"(?:(?:see|also|e\.g\.|cf\.|i\.e\.)[,\s]\s*)+", re.IGNORECASE)
_PAIRS = {"(": ")", "[": "]"}

_TITLE = r"(?P<title>[^.?]{8,}\??)"
_FULL_NAMES = re.compile(  # Jane Smith and John R. Doe. 2012. Title.
    rf"(?P<author>(?:[^\d(.]|(?<=\b[A-Z])\.){{4,}}?)\. (?:19|20)\d\d[a-z]?\.\s+{_TITLE}"
)
_ENTRY_STYLES = (
    re.compile(rf"(?P<author>[^\d(]{{2,}}?)\(\d{{4}}[a-z]?\)[.,:]?\s*{_TITLE}"),  # Smith J, Doe JR (2012) Title.
    _FULL_NAMES,
    re.compile(  # Smith J, Doe JR. Title. Possessive: a list of authors is never tried twice.
        rf"(?P<author>[^\W\d][\w'’-]+ [A-Z]{{1,3}})(?:(?:,| and) [^.,]+ [A-Z]{{1,3}}|, et al)*+\.+\s{_TITLE}"
    ),
)
_INITIALS = re.compile(r"(?:[\s,.]+(?:[A-Z]\.?-?){1,4}(?=[\s,.;&(]|$)).*|,.*| et al.*| and .*|\s*[&(].*", re.DOTALL)
_LONGEST_TITLE = 300
_LONGEST_ENTRY = 2000


class Bibliography:
    """A reference list: the key of an entry -> the works that it names, each already an in-text reference."""

    def __init__(self, entries: Mapping[str, Sequence[str]]) -> None:
        """`entries` in the order of the list; an entry without a work resolves nothing."""
        known = {key: [work for work in works if work] for key, works in entries.items()}
        self._works = [works for works in known.values() if works]
        self._places = {key: place for place, key in enumerate(key for key, works in known.items() if works)}

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def cite(self, printed: str, keys: Iterable[str]) -> str:
        """A citation of these entries; what is printed, where none of them is known.

        Of the printed text its unpaired brackets stay, as in `Wu et al., 2014)`, and so do words such as `see`.
        """
        places = [str(self._places[key]) for key in keys if key in self._places]
        if not places:
            return printed
        before, after = _around(printed)
        return f"{before}\x01{','.join(places)}\x02{after}"

    def weave(self, text: str) -> str:
        """The text with its citations written out: ranges filled, and no brackets around nothing but citations."""
        if "\x01" not in text:
            return text
        text = _BRACKETED.sub(_without_brackets, markup.one_line(text))
        return _RUNS.sub(self._write_run, text)

    def _write_run(self, match: re.Match[str]) -> str:
        places: list[int] = []
        for dash, cited in _MARKS.findall(match[0]):
            numbers = [int(number) for number in cited.split(",")]
            if dash and places and 1 < numbers[0] - places[-1] <= _LONGEST_RANGE:
                places += range(places[-1] + 1, numbers[0])
            places += numbers
        written = " ".join(work for place in dict.fromkeys(places) for work in self._works[place])
        before, after = _neighbours(match)
        return (
            (" " if before and not before.isspace() and before not in "([{“‘\"'/" else "")
            + written
            + (" " if after.isalnum() or after in ("(", "[") else "")
        )


def work(title: str, first_author: str, venue: str = "", volume: str = "", page: str = "") -> str:
    """An entry as an in-text reference; a work without a title (common in physics) is named by where it appeared."""
    where = " ".join(part.strip() for part in (venue, volume) if part.strip())
    return markup.reference(
        title if title.strip() else ", ".join(part for part in (where, page.strip()) if part), first_author
    )


def work_from_text(entry: str, first_author: str = "") -> str:
    """An entry of which the source holds only the printed line, `Hansen J (2012) Title. Journal ...`."""
    entry = markup.one_line(entry[:_LONGEST_ENTRY])
    found = next(filter(None, (style.match(entry) for style in _ENTRY_STYLES)), None)
    if found is None:
        return markup.reference(entry[:_LONGEST_TITLE], first_author)
    author = _INITIALS.sub("", found["author"].strip())
    if found.re is _FULL_NAMES:
        author = author.split(" ")[-1]
    return markup.reference(found["title"], first_author or author)


def _without_brackets(match: re.Match[str]) -> str:
    inner = next(group for group in match.groups() if group)
    listed = re.sub(r"\s*[,;]?\s*\b(?:and|&)\s*(?=\x01)|\s*&\s*(?=\x01)", ", ", inner).rstrip(" ,;")
    before, after = _neighbours(match)
    return ("" if before.isspace() else " " if before else "") + listed + (" " if after.isalnum() else "")


def _neighbours(match: re.Match[str]) -> tuple[str, str]:
    """The characters before and after a match; empty at the ends."""
    return match.string[max(match.start() - 1, 0) : match.start()], match.string[match.end() : match.end() + 1]


def _around(printed: str) -> tuple[str, str]:
    """What to keep before and after a citation that replaces the printed text."""
    before, core, after = "", printed.strip(), ""
    while core and core[-1] in ",;)]":
        if core[-1] in ")]" and core.count("(["[core[-1] == "]"]) >= core.count(core[-1]):
            break
        core, after = core[:-1].rstrip(), core[-1] + after
    opening = core[:1]
    if opening in _PAIRS and core.count(opening) > core.count(_PAIRS[opening]):
        before, core = opening, core[1:]
    words = _LEAD_WORDS.match(core.lstrip("(["))
    if words:
        if opening in _PAIRS and not before:
            before, after = opening, _PAIRS[opening] + after
        before += words[0]
    lead = printed[: len(printed) - len(printed.lstrip())]
    trail = printed[len(printed.rstrip()) :] if printed.strip() else ""
    return lead + before, after + trail
