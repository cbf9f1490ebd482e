"""A YAML file (a recipe, a cluster) as plain values, and the line on which each of them stands: errors say where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import UserError

Place = tuple[str, ...]
_EXAMPLES = {"recipe": "jobs/recipes/ has examples", "cluster file": "jobs/clusters/ has an example"}


class Document:
    """Plain values of a YAML file, and where each of them stands."""

    def __init__(self, file: str, values: Any, lines: dict[Place, int]) -> None:
        self.file = file
        self.values = values
        self.places = {place: f"{file}:{line}" for place, line in lines.items()}

    def apply(self, override: str) -> None:
        key, separator, text = override.partition("=")
        parts = key.split(".")
        if not separator or not all(parts):
            raise UserError(f"cannot read {override!r} as key=value", "write it as in train.lr=1e-4")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            hint = "quote what is special to YAML, as in 'include=[\"*.py\"]'"
            raise UserError(f"cannot read the value of {override!r} as YAML", hint) from None
        node: Any = self.values
        for depth, part in enumerate(parts):
            self.places[tuple(parts[: depth + 1])] = f"command line, {override}:"
            if not isinstance(node, (dict, list)):
                raise UserError(f"{override!r}: {'.'.join(parts[:depth])} is a value and has no fields")
            if isinstance(node, list) and not (part.isdecimal() and int(part) < len(node)):
                raise UserError(f"{override!r}: {'.'.join(parts[:depth])} has {len(node)} entries, from 0")
            index: Any = int(part) if isinstance(node, list) else part
            if depth == len(parts) - 1:
                node[index] = value
            else:
                node = node.setdefault(index, {}) if isinstance(node, dict) else node[index]

    def place_of(self, location: Place) -> str:
        for length in range(len(location), -1, -1):
            if location[:length] in self.places:
                return self.places[location[:length]]
        return self.file


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers (`1e-4` is a float) and booleans (only true and false)."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def read(path: str | Path, what: str = "recipe") -> str:
    """
    Args:
        what: the file should be, for the messages.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}", _EXAMPLES.get(what, "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} {path}: {error}") from None


def parse(file: str, text: str, what: str = "recipe") -> Document:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        if node is not None:
            _collect_lines(file, node, (), lines)
        values = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else file
        raise UserError(f"{place} is not YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} holds a value that YAML cannot mean: {type(error).__name__}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no {what}", _EXAMPLES.get(what, ""))
    return Document(file, values, lines)


def _collect_lines(file: str, node: yaml.Node, place: Place, lines: dict[Place, int]) -> None:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            if inner in lines:
                raise UserError(f"{file}:{key.start_mark.line + 1} {'.'.join(inner)} stands twice")
            lines[inner] = key.start_mark.line + 1
            _collect_lines(file, value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(file, value, (*place, str(index)), lines)
