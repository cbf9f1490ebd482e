"""Tokens -> blocks of Markdown: the paragraphs, environments and floats of a paper in the order of its text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

from orchestrator.data.readers.code import fence
from orchestrator.data.readers.markup import heading, one_line, table
from orchestrator.data.readers.tex import maths, tables, vocabulary
from orchestrator.data.readers.tex.commands import COMMANDS
from orchestrator.data.readers.tex.lexer import environment, is_paragraph_end, join, name_of, tokenize
from orchestrator.data.readers.tex.paper import Paper
from orchestrator.data.readers.tex.references import Bibliography
from orchestrator.data.readers.tex.tokens import Tokens

_MAX_DEPTH = 12
"""Of a footnote in a caption in a table ...; what lies deeper is left out."""
_MAX_INDENT = 8
_LIGATURES = (("``", "“"), ("''", "”"), ("---", "—"), ("--", "–"), ("?`", "¿"), ("!`", "¡"), ("`", "‘"))
_PUNCTUATION = (".", ",", ";", ":")
PROTECTED = frozenset().union(
    COMMANDS, vocabulary.MATHS, vocabulary.FLOATS, vocabulary.TABLES, vocabulary.LISTS, vocabulary.VERBATIM,
    vocabulary.HEADED, vocabulary.SKIPPED, ("begin", "end", "document"),
)  # fmt: skip
"""Names that mean the same in every document: style files define them for the press alone."""


@dataclass(frozen=True)
class Block:
    kind: str
    """text, item, heading, formula, table, code or caption."""
    text: str


@dataclass
class Float:
    """A figure, table or algorithm that is being read."""

    kind: str
    captions: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    """Captions of its parts, (a), (b) ..."""

    def all_captions(self) -> list[str]:
        """Most have one, behind which those of the parts stand."""
        if not self.parts:
            return self.captions
        return [*self.captions[:-1], " ".join([*self.captions[-1:], *self.parts])]


@dataclass
class _List:
    environment: str
    anchor: tuple[str, str]
    items: int = 0


def markdown(blocks: list[Block]) -> str:
    """An empty line between blocks, none between the items of a list."""
    parts: list[str] = []
    for number, block in enumerate(blocks):
        if number:
            parts.append("\n" if blocks[number - 1].kind == block.kind == "item" else "\n\n")
        parts.append(block.text)
    return "".join(parts)


class Writer:
    """Takes tokens in their order. Groups and plain environments are no nested calls: no depth of them exhausts it."""

    def __init__(self, tokens: Tokens, paper: Paper, bibliography: Bibliography | None, depth: int = 0) -> None:
        self.tokens = tokens
        self.paper = paper
        self.bibliography = bibliography
        self.float: Float | None = None
        self.plain = False
        """No footnotes and no citations: for titles."""
        self.span = 1
        """Columns, where this is the cell of a table."""
        self.blocks: list[Block] = []
        self._depth = depth
        self._words: list[str] = []
        self._floats: list[Block] = []
        self._prefix = ""
        self._lists: list[_List] = []
        self._anchors: list[tuple[str, str]] = []
        self._in_part = False
        self._indent: int | None = None
        """Of lines of pseudocode; None outside."""
        self._indent_step = 0

    def write(self) -> list[Block]:
        while token := self.tokens.next():
            self._take(token)
        self.end_paragraph()
        return self.blocks

    def inline_text(self) -> str:
        return one_line(" ".join(block.text for block in self.write()))

    def child(self, tokens: list[str]) -> Writer:
        """For what is read apart: a caption, a cell, a footnote."""
        inside = Tokens(tokens if self._depth < _MAX_DEPTH else [], self.tokens.macros)
        writer = Writer(inside, self.paper, self.bibliography, self._depth + 1)
        writer.float, writer.plain = self.float, self.plain
        return writer

    def inline(self, tokens: list[str]) -> str:
        return self.child(tokens).inline_text()

    def say(self, text: str) -> None:
        self._words.append(text)

    def space(self) -> None:
        """Keep what comes next apart from the word before."""
        if self._words and self._words[-1][-1:] not in ("", " ", "(", "[", "“", "\n"):
            self._words.append(" ")

    def say_note(self, text: str) -> None:
        """What LaTeX sets at the foot of the page: before the punctuation that the mark follows."""
        last = self._words[-1] if self._words else ""
        if last[-1:] in _PUNCTUATION:
            self._words[-1:] = [last[:-1], text, last[-1]]
        else:
            self._words.append(text)

    def end_paragraph(self) -> None:
        text = one_line("".join(self._words))
        self._words.clear()
        if text:
            kind = "item" if self._prefix or self._indent is not None else "text"
            self.blocks.append(Block(kind, self._prefix + text))
            self._prefix = ""
        self.blocks += self._floats
        self._floats.clear()

    def add(self, kind: str, text: str) -> None:
        """A block of its own in the middle of a paragraph; floats wait for the paragraph's end."""
        floats, self._floats = self._floats, []
        self.end_paragraph()
        if text:
            self.blocks.append(Block(kind, text))
        self._floats = floats

    def _take(self, token: str) -> None:
        if token[0] == "\\":
            self._command(token)
        elif is_paragraph_end(token):
            self.end_paragraph()
        elif token == "$":
            self._dollar()
        elif token in "~&" or token.isspace():
            self.say(" ")
        elif token not in "{}":
            for sign, character in _LIGATURES:
                token = token.replace(sign, character)
            self.say(token)

    def _command(self, token: str) -> None:
        what, inner = environment(token)
        name = name_of(token)
        if what == "begin":
            self._begin(inner)
        elif what == "end":
            self._end(inner)
        elif self._indent is not None and name.lower() in vocabulary.PSEUDOCODE_WORDS:
            self._pseudocode(name.lower())
        elif name in COMMANDS:
            COMMANDS[name](self, name)
        elif name in vocabulary.signs():
            self.say(vocabulary.signs()[name])
        elif name in vocabulary.ACCENTS:
            self._accent(vocabulary.ACCENTS[name])
        else:
            self._drop(name, token[-1:].isspace())

    def _drop(self, name: str, blank: bool) -> None:
        """A command goes, with those of its arguments that are no text."""
        if name in vocabulary.DROPPED:
            self.tokens.star()
        elif blank:
            return
        for _ in range(vocabulary.DROPPED.get(name, 0)):
            self.drop_optional()
            self.tokens.skip_blank()
            if self.tokens.peek()[:1] in ("{", "\\"):
                self.tokens.argument()
        if not blank:
            self.drop_optional()

    def drop_optional(self) -> None:
        while self.tokens.peek() == "[" and self.tokens.optional() is not None:
            pass

    def _accent(self, combining: str) -> None:
        letters = self.inline(self.tokens.argument()).replace("ı", "i").replace("ȷ", "j")
        self.say(unicodedata.normalize("NFC", letters[:1] + combining + letters[1:]) if letters else "")

    def _dollar(self) -> None:
        if self.tokens.peek() != "$":
            self.formula(self.tokens.until("$", in_paragraph=True) or [])
            return
        self.tokens.raw()
        self.display(self.tokens.until("$", in_paragraph=False))
        if self.tokens.peek() == "$":
            self.tokens.raw()

    def formula(self, tokens: list[str]) -> None:
        if tokens[:1] == ["^"] and any(name_of(token) in vocabulary.CITATIONS for token in tokens):
            self.space()
            self.say(self.inline(tokens[1:]))  # citations set as superscripts
        else:
            self.say(maths.inline(tokens, self.paper))

    def display(self, tokens: list[str] | None) -> None:
        self.add("formula", maths.display(tokens or [], self.paper))

    def _begin(self, name: str) -> None:
        if name == "document":
            for part in (self._words, self._floats, self.blocks):
                part.clear()
        elif name in vocabulary.VERBATIM:
            self._verbatim(name)
        elif name in vocabulary.SKIPPED:
            self.tokens.until_end(name, expand=False)
        elif name in vocabulary.MATHS:
            self._numbered_display(name)
        elif name in vocabulary.FLOATS:
            self._read_float(name, vocabulary.FLOATS[name])
        elif name in vocabulary.TABLES:
            self._table(name)
        else:
            self.end_paragraph()
            self._begin_text(name)

    def _begin_text(self, name: str) -> None:
        if name in vocabulary.LISTS:
            self._drop_arguments(name)
            self._lists.append(_List(name, self.paper.anchor))
        elif name in vocabulary.HEADED:
            self.add("heading", heading(2, vocabulary.HEADED[name]))
        elif name in self.tokens.macros.theorems:
            self._begin_theorem(*self.tokens.macros.theorems[name])
        elif name == "proof":
            note = self.tokens.optional()
            self.say((self.inline(note) if note else "Proof").rstrip(".") + ". ")
        elif name in ("appendix", "appendices"):
            self.paper.begin_appendix()
        else:
            self._drop_arguments(name)
            self._in_part = name in vocabulary.PARTS
            if name in vocabulary.PSEUDOCODE:
                self._indent, self._indent_step = 0, 1

    def _drop_arguments(self, name: str) -> None:
        self.drop_optional()
        for _ in range(vocabulary.ENVIRONMENT_ARGUMENTS.get(name, 0)):
            self.tokens.argument()
            self.drop_optional()

    def _end(self, name: str) -> None:
        if name == "document":
            self.tokens.clear()
        self.end_paragraph()
        if name in vocabulary.LISTS and self._lists:
            self.paper.anchor = self._lists.pop().anchor
            self._prefix = ""
        elif name in vocabulary.PSEUDOCODE:
            self._indent, self._prefix = None, ""
        elif name in vocabulary.PARTS:
            self._in_part = False
        elif name in self.tokens.macros.theorems and self._anchors:
            self.paper.anchor = self._anchors.pop()

    def _numbered_display(self, name: str) -> None:
        tokens = self.tokens.until_end(name)
        if tokens is None:
            return
        if name.startswith(vocabulary.MATHS_WITH_ARGUMENT):
            columns = Tokens(tokens, self.tokens.macros)
            columns.optional()
            columns.argument()
            tokens = columns.rest()
        rows, anchor = vocabulary.MATHS[name], self.paper.anchor
        if not name.endswith("*") and name not in ("displaymath", "math"):
            maths.number_rows(tokens, self.paper, by_row=bool(rows) and name != "multline")
        self.add("formula", maths.display(tokens, self.paper, rows))
        self.paper.anchor = anchor

    def _begin_theorem(self, title: str, counter: str, within: str) -> None:
        note = self.tokens.optional()
        self._anchors.append(self.paper.anchor)
        self.paper.number_within(counter, self.tokens.macros.theorems.get(counter, ("", "", within))[2])
        kind = self.inline(tokenize(title))
        name = f"{kind} {self.paper.step(counter, kind)}"
        self.say(f"{name} ({self.inline(note)}). " if note else f"{name}. ")

    def _verbatim(self, name: str) -> None:
        options = join(self.tokens.optional() or [])
        language = join(self.tokens.argument()) if name == "minted" else ""
        named = re.search(r"language\s*=\s*\{?([A-Za-z+#]+)", options)
        text = join(self.tokens.until_end(name, expand=False) or [])
        if text.strip():
            self.add("code", fence(text.strip("\n"), (named[1] if named else language).lower()))

    def item(self) -> None:
        self.end_paragraph()
        label = self.tokens.optional()
        if not self._lists:
            return
        current, mark = self._lists[-1], "-"
        text = self.inline(label) if label else ""
        if current.environment == "description":
            text = text.rstrip(":.") + ":" if text else ""
        if label is None and current.environment.startswith(vocabulary.NUMBERED_LISTS):
            current.items += 1
            self.paper.anchor = ("item", str(current.items))
            mark = f"{current.items}."
        self._prefix = "  " * min(len(self._lists) - 1, _MAX_INDENT) + f"{mark} " + (f"{text} " if text else "")

    def _pseudocode(self, name: str) -> None:
        self.drop_optional()
        if name in vocabulary.PSEUDOCODE_COMMENTS:
            self.tokens.star()
            self.say(" // ")
            return
        self.end_paragraph()
        indent = self._indent or 0
        if name.startswith(vocabulary.PSEUDOCODE_CLOSINGS):
            indent = max(indent - self._indent_step, 0)
        self._prefix = "  " * min(indent, _MAX_INDENT)
        self._indent = indent + self._indent_step * name.startswith(vocabulary.PSEUDOCODE_OPENINGS)
        self.say(vocabulary.PSEUDOCODE_WORDS[name] + " ")

    def _read_float(self, name: str, kind: str) -> None:
        tokens = self.tokens.until_end(name)
        if tokens is None:
            return
        if name in vocabulary.TABLES:
            tokens = ["\\begin{tabular}", *tokens, "\\end{tabular}"]
        anchor, inside = self.paper.anchor, self.child(tokens)
        inside.float = current = Float(kind)
        inside._indent = 0 if kind == "Algorithm" else None
        inside._drop_arguments(name)
        blocks = inside._astronomers_table() if name.startswith("deluxetable") else inside.write()
        if kind == "Figure":
            blocks = [block for block in blocks if block.kind in ("table", "code", "formula")]
        self._floats += [*(Block("caption", caption) for caption in current.all_captions()), *blocks]
        self.paper.anchor = anchor

    def caption(self, kind: str, tokens: list[str], numbered: bool = True) -> None:
        """Of the float that is being read, or of one that stands in the text."""
        alone, self.float = self.float is None, self.float or Float(kind)
        current = self.float
        if self._in_part:
            letter = chr(ord("a") + min(len(current.parts), 25))
            number = self.paper.number(current.kind, ahead=0 if current.captions else 1)
            self.paper.anchor = (current.kind, number + letter)
            current.parts.append(f"({letter}) {self.inline(tokens)}")
        elif numbered:
            name = f"{current.kind} {self.paper.step(current.kind, current.kind)}"
            text = self.inline(tokens)
            current.captions.append(f"{name}: {text}" if text else name)
        else:
            current.captions.append(self.inline(tokens))
        if alone:
            self._floats += [Block("caption", caption) for caption in current.all_captions()]
            self.float = None

    def _table(self, name: str) -> None:
        self.drop_optional()
        for _ in range(vocabulary.TABLES[name]):
            self.tokens.argument()
            self.drop_optional()
        self._add_rows(tables.rows(self.tokens.until_end(name) or []))

    def _astronomers_table(self) -> list[Block]:
        caption, rows, comments = tables.astronomers_rows(self.tokens.rest())
        self.caption("Table", caption)
        self._add_rows(rows)
        self.say(self.inline(comments))
        self.end_paragraph()
        return self.blocks

    def _add_rows(self, rows: list[list[list[str]]]) -> None:
        """One column is a box around text, or a cell with lines; more are a table."""
        cells = [row for row in (self._cells(row) for row in rows) if any(row)]
        cells = [row for number, row in enumerate(cells) if not number or row != cells[0]]  # heads of further pages
        if max((len(row) for row in cells), default=0) > 1:
            self.add("table", table(cells))
        else:
            self.say(" ".join(row[0] for row in cells))

    def _cells(self, row: list[list[str]]) -> list[str]:
        cells: list[str] = []
        for tokens in row:
            cell = self.child(tokens)
            cells += [cell.inline_text(), *[""] * (cell.span - 1)]
        return cells
