"""LaTeX as TeX reads it: a stack of tokens on which the author's own macros are expanded as they are met."""

from __future__ import annotations

from orchestrator.data.readers.tex.definitions import DEFINITIONS
from orchestrator.data.readers.tex.lexer import environment, is_paragraph_end, name_of, tokenize
from orchestrator.data.readers.tex.macros import Macro, Macros, substitute

_COLLECTING = 5
"""Times that it costs to take a token, of the cost to look at it."""
_MAX_OPTIONAL = 2_000
"""Tokens between [ and ]."""
_MAX_DELIMITED = 20_000
"""Tokens between the commands that begin and end a formula."""
_NO_CONDITION = {"iff", "ifthenelse"}


class Tokens:
    """What is left of a text. `next` executes definitions and conditionals and expands macros; `raw` does not."""

    def __init__(self, tokens: list[str], macros: Macros) -> None:
        self._stack = tokens[::-1]
        self.macros = macros

    def __bool__(self) -> bool:
        return bool(self._stack)

    def peek(self) -> str:
        return self._stack[-1] if self._stack else ""

    def raw(self) -> str:
        return self._stack.pop() if self._stack else ""

    def push(self, tokens: list[str]) -> None:
        self._stack.extend(reversed(tokens))

    def clear(self) -> None:
        self._stack.clear()

    def rest(self) -> list[str]:
        """All that is left, which is taken."""
        left = self._stack[::-1]
        self._stack.clear()
        return left

    def define(self) -> None:
        """Executes the definitions and nothing else: what the text of a style file does is for the press."""
        while token := self.raw():
            if name_of(token) in DEFINITIONS:
                DEFINITIONS[name_of(token)](self)

    def next(self) -> str:
        """The next token that no macro stands for; "" at the end."""
        while self._stack:
            token = self._stack.pop()
            if token[0] != "\\":
                return token
            name = name_of(token)
            if name in self.macros.commands:
                self._expand(self.macros.commands[name])
            elif name in self.macros.aliases:
                return "\\" + self.macros.aliases[name] + (" " if token[-1:].isspace() else "")
            elif name in DEFINITIONS:
                DEFINITIONS[name](self)
            elif not self._is_environment_opened(token) and not self._is_condition(name):
                return token
        return ""

    def _expand(self, macro: Macro) -> None:
        arguments = []
        if macro.default is not None:
            given = self.optional()
            arguments.append(macro.default if given is None else given)
        while len(arguments) < macro.arity:
            end = macro.ends[len(arguments)] if macro.ends else ""
            arguments.append(self._delimited(end) if end else self.argument())
        result = substitute(macro.body, arguments)
        self.macros.spend(len(result))
        self.push(result)

    def _delimited(self, end: str) -> list[str]:
        stack = self._stack
        for index in range(len(stack) - 1, max(len(stack) - 1 - _MAX_DELIMITED, -1), -1):
            if name_of(stack[index]) == end:
                found = stack[index + 1 :][::-1]
                del stack[index:]
                return found
        self.macros.run_away(min(len(stack), _MAX_DELIMITED))
        return []

    def _is_environment_opened(self, token: str) -> bool:
        if not self.macros.environments or not token.startswith(("\\begin", "\\end")):
            return False
        what, name = environment(token)
        if name not in self.macros.environments:
            return False
        begin, end = self.macros.environments[name]
        self._expand(begin if what == "begin" else end)
        return True

    def skip_blank(self) -> None:
        while self._stack and self._stack[-1].isspace() and not is_paragraph_end(self._stack[-1]):
            self._stack.pop()

    def star(self) -> bool:
        """Whether a `*` came next, which is taken away."""
        if not self.peek().startswith("*"):
            return False
        rest = self._stack.pop()[1:]
        if rest:
            self._stack.append(rest)
        return True

    def argument(self) -> list[str]:
        """The tokens of a group without its braces, or the one token or character that stands for it."""
        self.skip_blank()
        token = self.peek()
        if token in ("", "}") or is_paragraph_end(token):
            return []
        self._stack.pop()
        if token == "{":
            return self._until("}", len(self._stack)) or []
        if token[0] not in "\\#" and len(token) > 1:
            self._stack.append(token[1:])
            token = token[0]
        return [token]

    def optional(self) -> list[str] | None:
        """The tokens between [ and ], or None."""
        blank = self.raw() if self.peek().isspace() and not is_paragraph_end(self.peek()) else ""
        if self.peek() == "[":
            self._stack.pop()
            inside = self._until("]", _MAX_OPTIONAL)
            if inside is not None:
                return inside
            self._stack.append("[")
        if blank:
            self._stack.append(blank)
        return None

    def _until(self, close: str, most: int) -> list[str] | None:
        """The rest of a group, which is taken; None where it has no end, and then nothing is taken."""
        depth, stack = 0, self._stack
        for index in range(len(stack) - 1, max(len(stack) - 1 - most, -1), -1):
            token = stack[index]
            if token == close and not depth:
                inside = stack[index + 1 :][::-1]
                del stack[index:]
                return inside
            depth += (token == "{") - (token == "}")
            if depth < 0:
                break
        self.macros.run_away(min(most, len(stack)))
        return None

    def until(self, close: str, in_paragraph: bool) -> list[str] | None:
        """The tokens of a formula before close, which is taken too; None where it has no end, and then nothing is."""
        found, depth = list[str](), 0
        while token := self.next():
            if not depth and token.rstrip() == close:
                return found
            found.append(token)
            if in_paragraph and is_paragraph_end(token):
                break
            depth = max(depth + (token == "{") - (token == "}"), 0)
        self.push(found)
        self.macros.run_away(_COLLECTING * len(found))
        return None

    def delimited(self) -> str:
        """What stands between two equal characters, as in \\verb|...|; empty where the line ends before."""
        text = self.raw()
        delimiter = text[:1]
        while self._stack and delimiter not in text[1:] and "\n" not in text:
            text += self.raw()
        inside, found, rest = text[1:].partition(delimiter) if delimiter else ("", "", "")
        self.push(tokenize(rest if found else text))
        return inside if found else ""

    def until_end(self, name: str, expand: bool = True) -> list[str] | None:
        """The tokens before `\\end{name}`, which is taken too; None where there is none, and then nothing is taken."""
        found, depth = list[str](), 0
        while token := self.next() if expand else self.raw():
            what, inner = environment(token)
            if inner == name:
                if what == "end" and not depth:
                    return found
                depth += 1 if what == "begin" else -1
            found.append(token)
        self.push(found)
        self.macros.run_away(_COLLECTING * len(found))
        return None

    def _is_condition(self, name: str) -> bool:
        """Executes \\if..., \\else and \\fi; a condition that the document has not set is taken for false."""
        if name == "fi":
            return True
        if name == "else":
            self._skip_branch(("fi",))
            return True
        if not name.startswith("if") or name in _NO_CONDITION or self.peek() == "{":
            return False
        if name != "iftrue" and not self.macros.conditions.get(name[2:], False):
            self._skip_branch(("fi", "else"))
        return True

    def _skip_branch(self, ends: tuple[str, ...]) -> None:
        depth, stack = 0, self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index][0] != "\\":
                continue
            name = name_of(stack[index])
            if not depth and name in ends:
                del stack[index:]
                return
            opens = name.startswith("if") and name not in _NO_CONDITION and not (index and stack[index - 1] == "{")
            depth += opens - (name == "fi")
        self.macros.run_away(_COLLECTING * len(stack))
