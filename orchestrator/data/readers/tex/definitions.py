"""The commands that define: what \\newcommand, \\def, \\let, \\newenvironment, \\newtheorem and \\newif mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from orchestrator.data.readers.tex.lexer import is_paragraph_end, join, name_of
from orchestrator.data.readers.tex.macros import Macro

if TYPE_CHECKING:
    from orchestrator.data.readers.tex.tokens import Tokens


def _new_command(tokens: Tokens, keep: bool = False) -> None:
    """\\newcommand{\\name}[arity][default]{body} and its kin; with keep an older definition stays."""
    tokens.star()
    name = name_of(join(tokens.argument()).strip())
    arity, default = _signature(tokens)
    body = tokens.argument()
    if not (keep and name in tokens.macros.commands):
        tokens.macros.define(name, Macro(arity, default, body))


def _signature(tokens: Tokens) -> tuple[int, list[str] | None]:
    arity = join(tokens.optional() or []).strip()
    return (int(arity) if arity.isdigit() and len(arity) == 1 else 0), tokens.optional() if arity else None


def _new_environment(tokens: Tokens) -> None:
    tokens.star()
    name = join(tokens.argument()).strip()
    arity, default = _signature(tokens)
    begin, end = Macro(arity, default, tokens.argument()), Macro(0, None, tokens.argument())
    if name not in tokens.macros.protected:
        tokens.macros.environments[name] = (begin, end)


def _define(tokens: Tokens) -> None:
    """\\def\\name#1#2\\end{body}; a macro whose parameters are delimited by signs stays undefined."""
    tokens.skip_blank()
    name, ends, known = name_of(tokens.raw()), list[str](), True
    while tokens and tokens.peek() != "{" and not is_paragraph_end(tokens.peek()):
        token = tokens.raw()
        if token == f"#{len(ends) + 1}":
            ends.append("")
        elif ends and not ends[-1] and name_of(token):
            ends[-1] = name_of(token)
        elif not token.isspace():
            known = False
    body = tokens.argument()
    if known and name.isalpha():
        tokens.macros.define(name, Macro(len(ends), None, body, tuple(ends)))


def _let(tokens: Tokens) -> None:
    tokens.skip_blank()
    name = name_of(tokens.raw())
    tokens.skip_blank()
    meaning = tokens.raw()
    if meaning.startswith("="):
        if meaning != "=":
            return
        tokens.skip_blank()
        meaning = tokens.raw()
    old = name_of(meaning)
    if old in tokens.macros.commands:
        tokens.macros.define(name, tokens.macros.commands[old])
    elif old and name and name not in tokens.macros.protected:
        tokens.macros.commands.pop(name, None)
        tokens.macros.aliases[name] = tokens.macros.aliases.get(old, old)


def _new_theorem(tokens: Tokens) -> None:
    """\\newtheorem{name}[counts with]{Title}[counts within]"""
    tokens.star()
    name = join(tokens.argument()).strip()
    shared = join(tokens.optional() or []).strip()
    title = join(tokens.argument())
    within = join(tokens.optional() or []).strip()
    if name not in tokens.macros.protected:
        tokens.macros.theorems[name] = (title, shared or name, within)


def _operator(tokens: Tokens) -> None:
    starred = tokens.star()
    name = name_of(join(tokens.argument()).strip())
    body = ["\\operatorname", *(["*"] if starred else []), "{", *tokens.argument(), "}"]
    tokens.macros.define(name, Macro(0, None, body))


def _new_condition(tokens: Tokens) -> None:
    """\\newif\\ifname makes \\nametrue and \\namefalse; both are kept as macros that set it."""
    name = join(tokens.argument()).strip().removeprefix("\\if")
    if name.isalpha():
        tokens.macros.conditions[name] = False
        for value in ("true", "false"):
            tokens.macros.define(name + value, Macro(0, None, ["\\setcondition", "{", name, "}", value[0]]))


def _set_condition(tokens: Tokens) -> None:
    name = join(tokens.argument())
    tokens.macros.conditions[name] = tokens.argument() == ["t"]


def _documented_command(tokens: Tokens) -> None:
    """xparse: \\NewDocumentCommand{\\name}{m o m}{body}; defined where all its arguments are mandatory."""
    name = name_of(join(tokens.argument()).strip())
    signature = join(tokens.argument()).split()
    body = tokens.argument()
    if all(kind in ("m", "+m") for kind in signature):
        tokens.macros.define(name, Macro(len(signature), None, body))


DEFINITIONS: dict[str, Callable[[Tokens], None]] = {
    **dict.fromkeys(("newcommand", "renewcommand", "DeclareRobustCommand"), _new_command),
    "providecommand": partial(_new_command, keep=True),
    **dict.fromkeys(("newenvironment", "renewenvironment"), _new_environment),
    **dict.fromkeys(("def", "gdef", "edef", "xdef"), _define),
    "let": _let,
    **dict.fromkeys(("newtheorem", "spnewtheorem"), _new_theorem),
    "DeclareMathOperator": _operator,
    "newif": _new_condition,
    "setcondition": _set_condition,
    **dict.fromkeys(("NewDocumentCommand", "RenewDocumentCommand", "DeclareDocumentCommand"), _documented_command),
}
"""Command -> what it defines from the tokens behind it."""
