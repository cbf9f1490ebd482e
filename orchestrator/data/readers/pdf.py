"""A PDF with a text layer -> Markdown: its lines in the order of the file, joined to paragraphs under their headings.

Formulas come as the characters that fonts give them. The list of references is cut off, as in every reader.
"""

from __future__ import annotations

import ctypes
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from orchestrator.data.readers import Unreadable
from orchestrator.data.readers.markup import one_line
from orchestrator.data.readers.page_layout import Line, blocks, hyphen

MAX_PAGES = 1_000
MAX_CHARACTERS = 8_000_000
_MIN_LETTERS = 50
"""A scan may carry a stamp of text."""
_DIVIDED = re.compile("(\\w+)[\x02\ufffe](\\w*)")
"""pdfium puts one of these signs where a word is divided at the end of a line."""
_REPAIRS = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st", "\xa0": " ", "\xad": ""}
_ACCENTS = {"´": "\u0301", "`": "\u0300", "¨": "\u0308", "ˆ": "\u0302", "˜": "\u0303", "ˇ": "\u030c", "¸": "\u0327"}
_ACCENTED = re.compile(f"([{''.join(_ACCENTS)}])([A-Za-z])")
_BULLET = re.compile(r"^[•▪◦‣∙●■⁃\x0f]\s+")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd-\uffff]")
_NO_TEXT = re.compile(r"^arXiv:\d{4}\.\d{4,5}|^arXiv:[a-z-]+/\d{7}|(?:\. ?){6}")
"""The stamp of arXiv, and the dots of a table of contents."""
_BOLD = re.compile(rb"bold|black|heavy|medi|demi|cmbx|bx\d", re.IGNORECASE)
_BOLD_WEIGHT = 600
_SAMPLES = 8
"""Characters that tell the type of a line: it may hold formulas and marks in other sizes."""
_EDGE = 3
"""Lines at the head or foot of a page that may repeat over pages."""


def read(data: bytes) -> str:
    """
    Raises:
        Unreadable: broken, encrypted, too large, or without a text layer.
    """
    lines = [line for page in _without_running_lines(_pages(data)) for line in page]
    if sum(character.isalpha() for line in lines for character in line.text) < _MIN_LETTERS:
        raise Unreadable("no text in pdf")
    words = Counter(re.findall(r"\w+(?:-\w+)*", " ".join(line.text for line in lines)))
    clean = [replace(line, text=_clean(line.text, words)) for line in lines]
    return "\n\n".join(blocks([line for line in clean if line.text and not _NO_TEXT.search(line.text)], words))


def _pages(data: bytes) -> list[list[Line]]:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise Unreadable("encrypted pdf" if "password" in str(error).lower() else "broken pdf") from None
    try:
        return _read_pages(document)
    except pypdfium2.PdfiumError:
        raise Unreadable("broken pdf") from None
    finally:
        document.close()


def _read_pages(document: Any) -> list[list[Line]]:
    if not 0 < len(document) <= MAX_PAGES:
        raise Unreadable("too many pages" if len(document) else "broken pdf")
    pages: list[list[Line]] = []
    characters = 0
    for number in range(len(document)):
        page = document[number]
        text = page.get_textpage()
        characters += text.count_chars()
        if characters > MAX_CHARACTERS:
            raise Unreadable("too large")
        pages.append(list(_lines(text, number)))
        text.close()
        page.close()
    return pages


def _lines(text: Any, page: int) -> Iterator[Line]:
    """The lines of a page; one that ends in a divided word holds the next one too, as pdfium has it."""
    import pypdfium2.raw as pdfium

    characters = _characters(text)
    for match in re.finditer(r"[^\r\n]*[^\s\ufffd][^\r\n]*", characters):
        stripped = match[0].strip(" \t\ufffd")
        first = match.start() + match[0].index(stripped)
        last = first + len(stripped) - 1
        left, _, _, top = text.get_charbox(first, loose=True)
        _, bottom, right, _ = text.get_charbox(last, loose=True)
        sample = [first + (last - first) * step // _SAMPLES for step in range(_SAMPLES + 1)]
        sizes = Counter(round(pdfium.FPDFText_GetFontSize(text, index), 1) for index in sample)
        bold = sum(_is_bold(text, index) for index in sample)
        size = sizes.most_common(1)[0][0]
        yield Line(stripped, page, left, right, top, bottom, size, 2 * bold > len(sample))


def _is_bold(text: Any, index: int) -> bool:
    """By the weight of the font, or by its name where the file tells no weight."""
    import pypdfium2.raw as pdfium

    weight = pdfium.FPDFText_GetFontWeight(text, index)
    if weight > 0:
        return bool(weight >= _BOLD_WEIGHT)
    name = ctypes.create_string_buffer(64)
    pdfium.FPDFText_GetFontInfo(text, index, name, len(name), None)
    return _BOLD.search(name.value) is not None


def _characters(text: Any) -> str:
    """One for each index of pdfium, which leaves out of its own text what it cannot name."""
    import pypdfium2.raw as pdfium

    count = text.count_chars()
    whole = str(text.get_text_range())
    if len(whole) == count:
        return whole
    codes = (pdfium.FPDFText_GetUnicode(text, index) for index in range(count))
    return "".join(chr(code) if code and not 0xD800 <= code < 0xE000 else "\ufffd" for code in codes)


def _without_running_lines(pages: list[list[Line]]) -> list[list[Line]]:
    """Pages without their numbers, and without the heads and feet that stand on several of them."""
    edges = [_edges(page) for page in pages]
    counts = Counter(shape for edge in edges for shape in {_shape(line) for line in edge})
    often = max(3, min(len(pages) // 3, 5))

    def runs(line: Line, edge: list[Line]) -> bool:
        is_outermost = line in (edge[0], edge[-1])
        is_number = not line.text.strip(" 0123456789-–.|")
        return counts[_shape(line)] >= (2 if is_outermost else often) or (is_number and is_outermost)

    return [
        [line for line in page if not (line in edge and runs(line, edge))]
        for page, edge in zip(pages, edges, strict=True)
    ]


def _edges(page: list[Line]) -> list[Line]:
    """The lines nearest to the bottom and to the top of a page."""
    by_height = sorted(page, key=lambda line: line.top)
    return by_height[:_EDGE] + by_height[-_EDGE:]


def _shape(line: Line) -> tuple[str, float]:
    """The same for lines that differ in a number."""
    return re.sub(r"\d+", "#", one_line(line.text).lower()), line.size


def _clean(text: str, words: Counter[str]) -> str:
    """Divided words made whole, ligatures and loose accents as letters, bullets as `- `."""
    text = _DIVIDED.sub(lambda match: match[1] + hyphen(match[1], match[2], words) + match[2], text)
    for ligature, letters in _REPAIRS.items():
        text = text.replace(ligature, letters)
    text = _ACCENTED.sub(lambda match: unicodedata.normalize("NFC", match[2] + _ACCENTS[match[1]]), text)
    return one_line(_CONTROL.sub("", _BULLET.sub("- ", text)))
