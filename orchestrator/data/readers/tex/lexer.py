"""LaTeX cut into tokens, and what a token is by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SPACE = r"[ \t]*(?:\n(?![ \t]*\n)[ \t]*)?"
_TOKEN = re.compile(
    rf"\\(?:begin|end)\s*\{{[^{{}}\\]*\}}"  # with the name of the environment: one token
    rf"|\\[A-Za-z]+(?:@[A-Za-z@]*)?{_SPACE}"  # the blank after a command is the command's
    r"|\\.?|[ \t]*\n[ \t]*\n\s*|\s+|\#{1,8}\d|[{}$&\#~^_\[\]]|[^\\{}$&\#~^_\[\]\s]+",
    re.DOTALL,
)
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{\s*([^{}]*?)\s*\}")


def tokenize(text: str) -> list[str]:
    return _TOKEN.findall(text)


def name_of(token: str) -> str:
    """A command without its backslash; "" for what is none."""
    return (token[1:].rstrip() or " ") if token[:1] == "\\" else ""


def environment(token: str) -> tuple[str, str]:
    """("begin" or "end", name), or two empty strings."""
    match = _ENVIRONMENT.match(token)
    return (match[1], match[2]) if match else ("", "")


def is_paragraph_end(token: str) -> bool:
    return token.isspace() and token.count("\n") > 1


def join(tokens: Iterable[str]) -> str:
    """The source of tokens; a command keeps apart from a letter that expansion put behind it."""
    text = ""
    parts = []
    for token in tokens:
        if text[:1] == "\\" and text[-1:].isalpha() and token[:1].isalpha():
            parts.append(" ")
        parts.append(token)
        text = token
    return "".join(parts)
