"""The rows of a LaTeX table, as tokens."""

from __future__ import annotations

from orchestrator.data.readers.tex.lexer import environment, name_of
from orchestrator.data.readers.tex.macros import Macros
from orchestrator.data.readers.tex.tokens import Tokens


def rows(tokens: list[str]) -> list[list[list[str]]]:
    """Rows of cells of tokens: cut at `\\\\` and at `&`, outside groups and inner environments."""
    rest, depth = Tokens(tokens, Macros()), 0
    found: list[list[list[str]]] = [[[]]]
    while token := rest.raw():
        what = environment(token)[0]
        depth += (token == "{" or what == "begin") - (token == "}" or what == "end")
        if depth or (token != "&" and name_of(token) not in ("\\", "tabularnewline", "cr")):
            found[-1][-1].append(token)
        elif token == "&":
            found[-1].append([])
        else:
            rest.star()
            rest.optional()  # the space below the row
            found.append([[]])
    return found


def astronomers_rows(tokens: list[str]) -> tuple[list[str], list[list[list[str]]], list[str]]:
    """AASTeX's deluxetable: its caption, its rows with their head, and its comments."""
    rest = Tokens(tokens, Macros())
    caption, comments, found = list[str](), list[str](), list[list[list[str]]]()
    while token := rest.raw():
        name = name_of(token)
        if name == "tablecaption":
            caption = rest.argument()
        elif name == "tablehead":
            found += rows(rest.argument())
        elif name in ("tablecomments", "tablerefs", "tablenotetext"):
            mark = [*rest.argument(), " "] if name == "tablenotetext" else []
            comments += [*mark, *rest.argument(), " "]
        elif name == "startdata":
            found += rows(_before(rest, "enddata"))
        elif name in ("label", "tabletypesize", "tablewidth", "tablenum", "tablecolumns"):
            argument = rest.argument()
            caption += ["\\label", "{", *argument, "}"] if name == "label" else []
    return caption, found, comments


def _before(tokens: Tokens, name: str) -> list[str]:
    found = []
    while (token := tokens.raw()) and name_of(token) != name:
        found.append(token)
    return found
