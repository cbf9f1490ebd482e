"""Tables of XML and HTML as Markdown: cells that span rows and columns become rows of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.data.readers import markup
from orchestrator.data.readers.xml import Element

_WIDEST = 200
_ROW = ("tr", "row")
_CELL = ("th", "td", "entry", "cell")


@dataclass(frozen=True)
class Cell:
    text: str
    columns: int = 1
    rows: int = 1


Rows = Sequence[Sequence[Cell]]


def outermost(element: Element) -> list[Element]:
    """The tables inside, without those that stand in a cell of another."""
    return [table for table in element.iter("table") if next(table.iterancestors("table"), None) is None]


def read(table: Element, write: Callable[[Element], str]) -> str:
    """A table element of HTML, JATS, CALS or TEI as Markdown; `write` gives the text of a cell.

    The head is the thead, or else the first rows that hold th alone.
    """
    names = [column.get("colname") for column in table.iter("colspec")]
    head: list[list[Cell]] = []
    body: list[list[Cell]] = []
    for row in table.iter(*_ROW):
        if next(row.iterancestors("table"), None) is not table:
            continue
        cells = list(row.iterchildren(*_CELL))
        above = any(parent.tag == "thead" for parent in row.iterancestors("thead", "table"))
        is_head = above or (not body and bool(cells) and all(cell.tag == "th" for cell in cells))
        (head if is_head else body).append([_cell(cell, names, write) for cell in cells])
    return write_table(head, body)


def _cell(cell: Element, names: Sequence[str | None], write: Callable[[Element], str]) -> Cell:
    columns = _number(cell.get("colspan") or cell.get("cols"))
    first, last = cell.get("namest"), cell.get("nameend")
    if first in names and last in names and first is not None:
        columns = names.index(last) - names.index(first) + 1
    rows = _number(cell.get("rowspan") or cell.get("rows"))
    return Cell(write(cell), columns, rows if cell.get("morerows") is None else _number(cell.get("morerows")) + 1)


def _number(attribute: str | None) -> int:
    return min(int(attribute), _WIDEST) if attribute and attribute.isascii() and attribute.strip().isdigit() else 1


def write_table(head: Rows, body: Rows) -> str:
    """A Markdown table; several head rows become one, empty rows and columns go. Empty where no cell has text.

    A cell over several rows stands in each of them. Over several columns, a head stands in each of them, so that a
    column reads by itself; a cell of the body stands in its first, as the line that names a group of rows does.
    """
    top, rows = grid(head, repeat=True), grid(body, repeat=False)
    top, rows = [row for row in top if any(row)], [row for row in rows if any(row)]
    if not rows:
        top, rows = top[:1], grid(head, repeat=False)[1:]
    return markup.table(_without_empty_columns([_one_head(top), *rows] if top else rows))


def grid(rows: Rows, *, repeat: bool) -> list[list[str]]:
    """Rows of equal length; `repeat` writes a cell into every column that it spans."""
    filled: list[list[str]] = []
    hanging: dict[int, tuple[int, str]] = {}  # column -> rows still covered from above, and their text
    for cells in rows:
        row: list[str] = []
        below: dict[int, tuple[int, str]] = {}
        waiting = list(cells)[::-1]
        while (waiting or any(column >= len(row) for column in hanging)) and len(row) < _WIDEST:
            column = len(row)
            if column in hanging:
                left, text = hanging[column]
                row.append(text)
                if left > 1:
                    below[column] = (left - 1, text)
            elif waiting:
                _place(waiting.pop(), row, below, hanging, repeat)
            else:
                row.append("")
        filled.append(row)
        hanging = below
    width = max((len(row) for row in filled), default=0)
    return [row + [""] * (width - len(row)) for row in filled]


def _place(
    cell: Cell, row: list[str], below: dict[int, tuple[int, str]], hanging: dict[int, tuple[int, str]], repeat: bool
) -> None:
    text = markup.one_line(cell.text)
    for number in range(min(max(cell.columns, 1), _WIDEST - len(row))):
        if len(row) in hanging:  # two cells claim one place: the one from above has it
            break
        written = text if repeat or number == 0 else ""
        if cell.rows > 1:
            below[len(row)] = (cell.rows - 1, written)
        row.append(written)


def _one_head(rows: list[list[str]]) -> list[str]:
    """Head rows as one, `Group A` over `mean` as `Group A mean`."""
    return [" ".join(dict.fromkeys(text for text in column if text)) for column in zip(*rows, strict=True)]


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    width = max((len(row) for row in rows), default=0)
    padded = [row + [""] * (width - len(row)) for row in rows]
    kept = [column for column in range(width) if any(row[column] for row in padded)]
    return [[row[column] for column in kept] for row in padded]
