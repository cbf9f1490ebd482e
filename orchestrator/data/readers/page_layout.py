"""Lines of text with their places on pages -> the title, headings and paragraphs that they make."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from orchestrator.data.readers.markup import heading

_CAPTION = re.compile(r"(?:Figure|Fig\.|Table|Algorithm|Scheme)\s+[A-Z]?\d+\s*[.:|]")
_NUMBERED = re.compile(r"(\d{1,2}|[A-Z])((?:\.\d{1,2}){0,3})\.?\s+([A-Z].{2,90})")
_NAMED = re.compile(
    r"abstract|a b s t r a c t|summary|introduction|background|related works?|methods?|methodology"
    r"|materials and methods|experiments|results|results and discussion|discussions?|conclusions?"
    r"|discussion and conclusions?|conclusions? and future work|acknowledge?ments?|references|bibliography"
    r"|literature cited|appendix|appendices|supplementary materials?|supporting information",
    re.IGNORECASE,
)
_REFERENCES = ("references", "bibliography", "literature cited")
_AFTER_REFERENCES = ("appendi", "supplement", "supporting")
_BARE = ("abstract", *_REFERENCES)
"""Headings by their words alone, whatever their font."""
_SENTENCE_ENDS = (".", "?", "!", ":", ";", "”", '"')
_BESIDE = 30.0
"""Points between parts of one line; columns are further apart from what stands at their left."""
_SMALL, _LARGE = 0.93, 1.05
"""Sizes of footnotes and of headings, by that of the body text."""
_GAP = 0.45
"""Between paragraphs, by the size of the font."""
_MAX_INDENT = 40.0
_SHORT = 0.12
"""Of the column's width, missing from the last line of a paragraph."""
_FRONT_LINES = 80
"""Within which the abstract follows the title, after authors and addresses."""


@dataclass(frozen=True)
class Line:
    text: str
    page: int
    left: float
    right: float
    top: float
    bottom: float
    """In points, from the lower left corner of the page; where a line holds two, from the first to the last."""
    size: float
    """Of the font, in points."""
    is_bold: bool


def blocks(lines: list[Line], words: Counter[str]) -> list[str]:
    """Markdown blocks; words counts those of the text, to tell what a hyphen at a line's end means."""
    sizes = Counter[float]()
    for line in lines:
        sizes[line.size] += len(line.text)
    layout = _Layout(lines, sizes.most_common(1)[0][0] if sizes else 1.0, words)
    title, rest = _title(lines, layout)
    for line in rest:
        layout.take(line)
    layout.end()
    done = _lists(layout.done)
    return [heading(1, title), *done] if title else done


def _lists(parts: list[str]) -> list[str]:
    """Items of a list come together."""
    joined: list[str] = []
    for part in parts:
        if joined and part.startswith("- ") and joined[-1].startswith("- "):
            joined[-1] += "\n" + part
        else:
            joined.append(part)
    return joined


def _title(lines: list[Line], layout: _Layout) -> tuple[str, list[Line]]:
    """The largest type of the first page, and what comes after it; authors and addresses before an abstract go too."""
    front = [line for line in lines if line.page == lines[0].page][:_FRONT_LINES]
    size = max((line.size for line in front if len(line.text) > 3), default=0.0)
    if size <= layout.body * _LARGE:
        return "", lines
    first = next(index for index, line in enumerate(front) if line.size == size and len(line.text) > 3)
    last = first
    while last + 1 < len(front) and front[last + 1].size == size:
        last += 1
    begin = last + 1
    for index in range(begin, min(begin + _FRONT_LINES, len(lines))):
        level, text = layout.heading(lines[index])
        if level:
            begin = index if text.lower() in ("abstract", "introduction", "summary") else begin
            break
    layout.reset()
    return " ".join(line.text for line in front[first : last + 1]), lines[begin:]


class _Layout:
    """Takes lines in their order. Captions and footnotes wait until the paragraph that they cut ends."""

    def __init__(self, lines: list[Line], body: float, words: Counter[str]) -> None:
        self.body = body
        self.done: list[str] = []
        self._words = words
        self._paragraph: list[Line] = []
        self._aside: list[Line] = []
        self._asides: list[str] = []
        self._last: Line | None = None
        self._section = ""
        self._in_references = False
        self._margins, self._ends = _columns(lines)

    def reset(self) -> None:
        self._section = ""

    def take(self, line: Line) -> None:
        self._place(line)
        self._last = line

    def _place(self, line: Line) -> None:
        level, text = self.heading(line)
        if level:
            self.end()
            named = text.lower()
            self._in_references = named in _REFERENCES or (
                self._in_references and not named.startswith(_AFTER_REFERENCES)
            )
            if not self._in_references:
                self.done.append(heading(level, text))
        elif self._in_references:
            return
        elif self._last and (_overlaps(self._last, line) or self._is_script(line)):
            (self._aside or self._paragraph).append(line)
        elif self._is_aside(line):
            self._end_aside(line)
            self._aside.append(line)
        else:
            self._end_aside(line)
            if self._paragraph and self._begins(line):
                self.end()
            self._paragraph.append(line)

    def end(self) -> None:
        """The paragraph is over, and so is what waited for that."""
        if self._aside:
            self._asides.append(self._joined(self._aside))
        if self._paragraph:
            self.done.append(self._joined(self._paragraph))
        self.done += self._asides
        self._paragraph, self._aside, self._asides = [], [], []

    def heading(self, line: Line) -> tuple[int, str]:
        """Level and text, or 0: a usual name, or the next number, in type that is bold, large or all capitals."""
        text = line.text.rstrip(".:")
        letters = text.replace(" ", "").lower()
        if letters in _BARE:
            return 2, "Abstract" if letters == "abstract" else text.capitalize()
        stands_out = line.is_bold or line.size > self.body * _LARGE or text.isupper()
        if not stands_out or line.size < self.body * _SMALL or (len(text) < len(line.text) and not text.isupper()):
            return 0, ""
        if _NAMED.fullmatch(text):
            return 2, text.capitalize() if text.isupper() else text
        numbered = _NUMBERED.fullmatch(text)
        if not numbered or not _follows(self._section, numbered[1]):
            return 0, ""
        self._section = numbered[1]
        name = numbered[3].capitalize() if numbered[3].isupper() else numbered[3]
        return 2 + numbered[2].count("."), name

    def _is_script(self, line: Line) -> bool:
        """An exponent or index that came loose from its formula."""
        return len(line.text) < 4 and line.size < self.body * _SMALL

    def _is_aside(self, line: Line) -> bool:
        if _CAPTION.match(line.text) or line.size < self.body * _SMALL:
            return True
        return bool(self._aside) and _is_below(self._aside[-1], line) and self._aside[-1].size == line.size

    def _end_aside(self, line: Line) -> None:
        if self._aside and not (_is_below(self._aside[-1], line) and self._aside[-1].size == line.size):
            self._asides.append(self._joined(self._aside))
            self._aside = []

    def _begins(self, line: Line) -> bool:
        """Whether a paragraph begins here: by a bullet, a gap, an indent, or a short line before."""
        before = self._paragraph[-1]
        if line.text.startswith("- "):
            return True
        same_column = before.page == line.page and self._margin(before) == self._margin(line)
        margin, end = self._margin(before), self._end(before)
        is_cut = before.right > end - _SHORT * (end - margin) and line.text[0].islower()
        if same_column and before.bottom - line.top > _GAP * line.size:
            return not (self._asides and is_cut)  # the gap may be that of a figure
        if line.text[0].isupper() and same_column and before.right < (margin + end) / 2:
            return True
        if not before.text.endswith(_SENTENCE_ENDS):
            return False
        was_short = before.right < end - _SHORT * (end - margin)
        is_outdented = before.page == line.page and line.left < margin - 4 and line.top < before.top
        return was_short or is_outdented or 4 < line.left - self._margin(line) < _MAX_INDENT

    def _margin(self, line: Line) -> float:
        fitting = [margin for margin in self._margins[line.page] if margin <= line.left + 3]
        return max(fitting, default=line.left)

    def _end(self, line: Line) -> float:
        return self._ends.get((line.page, self._margin(line)), line.right)

    def _joined(self, lines: list[Line]) -> str:
        text = ""
        for line in lines:
            divided = re.search(r"(\w+)-$", text)
            if divided and line.text[:1].isalnum():
                after = re.match(r"\w+", line.text)
                text = text[:-1] + hyphen(divided[1], after[0] if after else "", self._words) + line.text
            else:
                apart = "" if not text or re.search(r"\w[–—/]$", text) else " "
                text = f"{text}{apart}{line.text}"
        return text


def _columns(lines: list[Line]) -> tuple[dict[int, list[float]], dict[tuple[int, float], float]]:
    """Left margins of the columns of each page, and where their lines end."""
    lefts: dict[int, Counter[float]] = defaultdict(Counter)
    for line in lines:
        lefts[line.page][float(round(line.left))] += 1
    margins = {
        page: sorted(left for left, count in counts.items() if count >= max(3, 0.08 * counts.total()))
        for page, counts in lefts.items()
    }
    ends: dict[tuple[int, float], list[float]] = defaultdict(list)
    for line in lines:
        margin = float(round(line.left))
        if margin in margins[line.page]:
            ends[line.page, margin].append(line.right)
    return margins, {key: sorted(rights)[int(0.8 * len(rights))] for key, rights in ends.items()}


def _is_below(above: Line, line: Line) -> bool:
    """Whether a line is the next of the same text."""
    gap = above.bottom - line.top
    return above.page == line.page and -0.8 * line.size < gap < _GAP * line.size and line.left < above.right + 200


def _overlaps(before: Line, line: Line) -> bool:
    """Whether a line stands beside the one before, or is its raised or lowered part."""
    lowest = min(before.top - before.bottom, line.top - line.bottom)
    shared = min(before.top, line.top) - max(before.bottom, line.bottom)
    return before.page == line.page and lowest > 0 and shared > 0.4 * lowest and -1 < line.left - before.right < _BESIDE


def _follows(before: str, number: str) -> bool:
    """Whether a section number may come after another: 1, 1.1, 2 ... A, B."""
    if number.isdecimal():
        return number == before or int(number) == (int(before) + 1 if before.isdecimal() else 1)
    if not before:
        return False
    return number == before or number == ("A" if before.isdecimal() else chr(ord(before) + 1))


def hyphen(before: str, after: str, words: Counter[str]) -> str:
    """What stood between the parts of a divided word: a hyphen where the text has it elsewhere, or none."""
    if not after or words[f"{before}-{after}"] > words[before + after]:
        return "-"
    whole = words[before + after] or (after[0].islower() and before[-1].isalpha())
    return "" if whole else "-"
