"""The macros, environments and conditions that a document defines for itself, and the bounds on their use."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.data.readers import Unreadable
from orchestrator.data.readers.tex.lexer import environment, join, name_of

_BUDGET = 500_000
"""Tokens that expansion may produce in a document; a paper that leans on its macros needs some 50,000."""
_WASTE = 2_000_000
"""Tokens that may be looked through for ends that are not there; more and the text is no LaTeX."""


@dataclass(frozen=True)
class Macro:
    arity: int
    default: list[str] | None
    """Of the first argument, where that is optional."""
    body: list[str]
    ends: tuple[str, ...] = ()
    """The command behind each argument that ends it, in `\\def\\be#1\\ee{...}`; "" for none."""


@dataclass
class Macros:
    """What a document defines for itself. Definitions are global: groups end none."""

    protected: frozenset[str] = frozenset()
    """Commands and environments whose meaning no document changes."""
    commands: dict[str, Macro] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    environments: dict[str, tuple[Macro, Macro]] = field(default_factory=dict)
    theorems: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """Environment -> (its title, the environment that it counts with, the counter that it counts within)."""
    conditions: dict[str, bool] = field(default_factory=dict)
    budget: int = _BUDGET
    wasted: int = 0

    def define(self, name: str, macro: Macro) -> None:
        """Macros that call themselves or the internals of LaTeX stay undefined: they end by what only TeX can know."""
        calls = {name_of(token) for token in macro.body}
        internal = any(
            token == "\\@" and after[:1].isalpha() for token, after in zip(macro.body, macro.body[1:], strict=False)
        )
        if name and name not in self.protected and name not in calls and not internal:
            self.commands[name] = macro
            self.aliases.pop(name, None)

    def spend(self, tokens: int) -> None:
        self.budget -= tokens + 1
        if self.budget < 0:
            raise Unreadable("macro bomb")

    def run_away(self, tokens: int) -> None:
        self.wasted += tokens
        if self.wasted > _WASTE:
            raise Unreadable("unbalanced latex")


def substitute(body: list[str], arguments: list[list[str]]) -> list[str]:
    result = []
    for token in body:
        if token[0] == "#" and token[-1].isdigit():
            number = int(token[-1])
            if token[1] == "#":  # a parameter of a macro that the body defines
                result.append(token[1:])
            elif 0 < number <= len(arguments):
                result.extend(arguments[number - 1])
        elif "#" in token and environment(token)[0]:
            for number, argument in enumerate(arguments, start=1):
                token = token.replace(f"#{number}", join(argument))
            result.append(token)
        else:
            result.append(token)
    return result
