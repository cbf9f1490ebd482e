"""What a paper refers to by number: its sections, floats, equations and theorems, counted as LaTeX counts them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_REFERENCE = re.compile("\ue000(.)([^\ue000\ue001]*)\ue001")
NOTHING = "\ue002"
"""Stands for a reference that nothing resolves until `resolve` takes it away with what leads to it."""
_NOTHINGS = rf"{NOTHING}(?:\s*(?:[,;/–-]|and|to|or)?\s*{NOTHING})*"
_BRACKETED_NOTHING = re.compile(
    rf"(?m)^{_NOTHINGS}[ \t]*|\s*(?:\({_NOTHINGS}\)|\[{_NOTHINGS}\])|[ \t]*{_NOTHINGS}(?!\w)|{_NOTHINGS}"
)
MARKS = dict.fromkeys((57344, 57345, 57346))
"""For str.translate: no text may hold them before."""


def reference_mark(key: str, named: bool) -> str:
    """Stands for the number of a label until all labels are known; named with what it numbers, as in `Figure 3`."""
    return f"\ue000{'k' if named else 'n'}{key}\ue001"


@dataclass
class Paper:
    """Everything about a document that its parts share."""

    has_chapters: bool = False
    title: str = ""
    labels: dict[str, tuple[str, str]] = field(default_factory=dict)
    anchor: tuple[str, str] = ("", "")
    """(kind, number) of what a \\label names where it stands."""
    in_appendix: bool = False
    _sections: list[int] = field(default_factory=lambda: [0] * 8)
    _counts: dict[str, int] = field(default_factory=dict)
    _within: dict[str, str] = field(default_factory=dict)

    def step_section(self, level: int) -> None:
        """level: 1 for a chapter, 2 for a section."""
        self._sections[level] += 1
        self._sections[level + 1 :] = [0] * (len(self._sections) - level - 1)
        first = 1 if self.has_chapters else 2
        numbers = [str(number) for number in self._sections[first : level + 1]]
        if self.in_appendix and numbers:
            numbers[0] = _letter(self._sections[first])
        if level == first:
            self._counts |= {counter: 0 for counter, within in self._within.items() if within}
        kind = "Appendix" if self.in_appendix else "Chapter" if level < 2 else "Section"
        self.anchor = (kind, ".".join(numbers))

    def begin_appendix(self) -> None:
        self.in_appendix = True
        self._sections = [0] * len(self._sections)

    def number_within(self, counter: str, section: str) -> None:
        self._within[counter] = section

    def number(self, counter: str, ahead: int = 0) -> str:
        """The number that a counter shows now, or some steps ahead."""
        count = str(self._counts.get(counter, 0) + ahead)
        first = 1 if self.has_chapters else 2
        if self._within.get(counter):
            outer = _letter(self._sections[first]) if self.in_appendix else str(self._sections[first])
            return f"{outer}.{count}"
        return count

    def step(self, counter: str, kind: str) -> str:
        self._counts[counter] = self._counts.get(counter, 0) + 1
        self.anchor = (kind, self.number(counter))
        return self.anchor[1]

    def label(self, key: str) -> None:
        self.labels[key] = self.anchor

    def resolve(self, text: str) -> str:
        """Numbers in the place of reference marks; what has none goes, with the blank or the brackets around it."""

        def number(match: re.Match[str]) -> str:
            kind, number = self.labels.get(match[2], ("", ""))
            if not number:
                return NOTHING
            return f"{kind} {number}".strip() if match[1] == "k" else number

        return _BRACKETED_NOTHING.sub("", _REFERENCE.sub(number, text))


def _letter(number: int) -> str:
    return chr(ord("A") + min(max(number, 1), 26) - 1)
