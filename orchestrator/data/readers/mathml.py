"""MathML as LaTeX (presentation elements of MathML 3, W3C, chapter 3)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate

from orchestrator.data.readers.markup import one_line
from orchestrator.data.readers.xml import Element, text_of

_FUNCTIONS = frozenset(
    "arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf limsup ln log max "
    "min Pr sec sin sinh sup tan tanh".split()
)
_LIMITS = frozenset(
    r"\det \gcd \inf \lim \liminf \limsup \max \min \Pr \sup \sum \prod \coprod \int \oint \bigcup \bigcap "
    r"\bigoplus \bigotimes \operatorname{argmin} \operatorname{argmax}".split()
)
_ACCENTS = {
    "^ˆ\u0302": ("hat", "widehat"),
    "~˜\u0303": ("tilde", "widetilde"),
    "¯‾ˉ\u0304\u0305_": ("bar", "overline"),
    "→⃗⟶": ("vec", "overrightarrow"),
    "˙.\u0307": ("dot", "dot"),
    "¨\u0308": ("ddot", "ddot"),
    "⏞︷": ("overbrace", "overbrace"),
}
_UNDER = {"⏟": "underbrace", "︸": "underbrace", "_": "underline", "̲": "underline", "¯": "underline", "‾": "underline"}
_VARIANTS = {
    "bold": "mathbf",
    "bold-italic": "boldsymbol",
    "script": "mathcal",
    "bold-script": "mathcal",
    "double-struck": "mathbb",
    "fraktur": "mathfrak",
    "normal": "mathrm",
    "sans-serif": "mathsf",
    "monospace": "mathtt",
}
_ALPHABETS = {"SCRIPT": "mathcal", "FRAKTUR": "mathfrak", "DOUBLE-STRUCK": "mathbb", "BOLD": "mathbf"}
_OPERATORS = {
    "×": r"\times",
    "→": r"\to",
    "⟶": r"\to",
    "←": r"\leftarrow",
    "…": r"\ldots",
    "·": r"\cdot",
    "∙": r"\cdot",
    "÷": r"\div",
    "¬": r"\neg",
    "†": r"\dagger",
    "‡": r"\ddagger",
    "°": r"^{\circ}",
    "∣": "|",
    "∥": r"\|",
    "‖": r"\|",
    "〈": r"\langle",
    "〉": r"\rangle",
    "⋃": r"\bigcup",
    "⋂": r"\bigcap",
    "′": "'",
    "″": "''",
    "–": "-",
    "ħ": r"\hbar",
    "≜": r"\triangleq",
    "\\": r"\backslash",
    "~": r"\sim",
    "^": r"\wedge",
    **{character: f"\\{character}" for character in "{}%&#$_"},
    **dict.fromkeys("\u2061\u2062\u2063\u2064\u200b", ""),
}
_RELATIONS = frozenset(
    r"= < > := \leq \geq \neq \approx \in \notin \to \leftarrow \equiv \sim \simeq \cong \propto".split()
)
_COMMAND_END = re.compile(r"\\[A-Za-z]+$")


def latex(math: Element) -> str:
    """One `math` element as LaTeX in one line, without dollar signs; its own TeX annotation where it has one."""
    for annotation in math.iter("annotation"):
        if "tex" in (annotation.get("encoding") or "").lower() and (annotation.text or "").strip():
            return one_line(annotation.text)
    rows = [
        child for child in math if not (child.tag == "mspace" or (child.tag == "mtext" and not text_of(child).strip()))
    ]
    while len(rows) == 1 and rows[0].tag in ("mrow", "mstyle", "semantics") and len(rows[0]):
        rows = list(rows[0])[:1] if rows[0].tag == "semantics" else list(rows[0])
    if len(rows) == 1 and rows[0].tag == "mtable":
        return _tidy(_table(rows[0], "aligned"))
    return _tidy(_row(math))


def _tidy(formula: str) -> str:
    return re.sub(r"(?<=[(\[]) | (?=[)\],;])", "", one_line(formula))


def _write(node: Element) -> str:
    return _ELEMENTS.get(node.tag, _row)(node)


def _row(node: Element) -> str:
    parts = [_escape(one_line(node.text or "")), *(_write(child) for child in node)]
    variant = _VARIANTS.get(node.get("mathvariant") or "") if node.tag == "mstyle" else None
    joined = _join(parts)
    return f"\\{variant}{{{joined}}}" if variant and len(joined) == 1 else joined


def _join(parts: Iterable[str]) -> str:
    """Side by side; a blank keeps a command from the letter behind it."""
    joined = ""
    for part in parts:
        joined += " " + part if part[:1].isalpha() and _COMMAND_END.search(joined) else part
    return joined


@cache
def _character(character: str) -> str:
    from pylatexenc.latexencode import get_builtin_uni2latex_dict

    if character in _OPERATORS:
        return _OPERATORS[character]
    known = get_builtin_uni2latex_dict().get(ord(character), "")
    if not known.startswith(r"\ensuremath{") or character == "√":
        return _letter(character)
    return str(known).removeprefix(r"\ensuremath{").removesuffix("}").replace("mathscr", "mathcal")


def _letter(character: str) -> str:
    """A letter of Unicode's mathematical alphabets in its font; any other character as it is."""
    plain, name = unicodedata.normalize("NFKC", character), unicodedata.name(character, "")
    if not name.startswith("MATHEMATICAL ") or len(plain) != 1:
        return character
    font = next((font for word, font in _ALPHABETS.items() if word in name), None)
    return f"\\{font}{{{plain}}}" if font else plain


def _escape(text: str) -> str:
    return _join(_character(character) for character in text)


def _identifier(node: Element) -> str:
    text = one_line(text_of(node))
    variant = _VARIANTS.get(node.get("mathvariant") or "")
    if len(text) > 1 and text.isascii() and text.isalpha():
        if text in _FUNCTIONS:
            return f"\\{text}"
        return f"\\operatorname{{{text}}}" if text in ("argmin", "argmax") else f"\\{variant or 'mathrm'}{{{text}}}"
    written = _escape(text)
    if variant == "mathbf" and written.startswith("\\"):
        variant = "boldsymbol"  # mathbf leaves Greek as it is
    return f"\\{variant}{{{written}}}" if variant and text else written


def _operator(node: Element) -> str:
    text = one_line(text_of(node))
    written = _identifier(node) if len(text) > 1 and text.isalpha() else _escape(text)
    return f" {written} " if written in _RELATIONS else written


def _text(node: Element) -> str:
    """Words; blanks alone separate, and single symbols that an editor put into mtext are symbols."""
    text = re.sub(r"\s+", " ", text_of(node))
    if not text.strip():
        return " "
    if not any(character.isalpha() and character.isascii() for character in text):
        return _escape(text)
    return "\\text{" + re.sub(r"([{}%&#$_])", r"\\\1", text) + "}"


def _fraction(node: Element) -> str:
    top, bottom = _arguments(node, 2)
    if (node.get("linethickness") or "").rstrip("pxemt%") == "0":
        return f"{{{top} \\atop {bottom}}}"
    return f"\\frac{{{top}}}{{{bottom}}}"


def _superscript(node: Element) -> str:
    base, above = _arguments(node, 2)
    return _base(base) + _script("^", above)


def _subscript(node: Element) -> str:
    base, below = _arguments(node, 2)
    return _base(base) + _script("_", below)


def _both_scripts(node: Element) -> str:
    base, below, above = _arguments(node, 3)
    return _base(base) + _script("_", below) + _script("^", above)


def _root(node: Element) -> str:
    radicand, index = _arguments(node, 2)
    return f"\\sqrt[{index}]{{{radicand}}}"


def _over(node: Element) -> str:
    base, above = _arguments(node, 2)
    mark = one_line(text_of(node[1])) if len(node) > 1 else ""
    for marks, (short, wide) in _ACCENTS.items():
        if mark and mark in marks:
            return f"\\{short if len(base) == 1 or _is_one(base) else wide}{{{base}}}"
    return base + _script("^", above) if base in _LIMITS or "brace{" in base else f"\\overset{{{above}}}{{{base}}}"


def _under(node: Element) -> str:
    base, below = _arguments(node, 2)
    mark = one_line(text_of(node[1])) if len(node) > 1 else ""
    if mark in _UNDER:
        return f"\\{_UNDER[mark]}{{{base}}}"
    return base + _script("_", below) if base in _LIMITS or "brace{" in base else f"\\underset{{{below}}}{{{base}}}"


def _under_over(node: Element) -> str:
    base, below, above = _arguments(node, 3)
    if base in _LIMITS:
        return base + _script("_", below) + _script("^", above)
    return f"\\overset{{{above}}}{{\\underset{{{below}}}{{{base}}}}}"


def _multiscripts(node: Element) -> str:
    """The base, then pairs of scripts; pairs behind `mprescripts` stand before the base."""
    children = list(node)
    split = next((place for place, child in enumerate(children) if child.tag == "mprescripts"), len(children))
    after, before = children[1:split], children[split + 1 :]
    base = _base(_write(children[0])) if children else ""
    return ("{}" + _pairs(before) if before else "") + base + _pairs(after)


def _pairs(scripts: list[Element]) -> str:
    written = [_write(script).strip() for script in scripts]
    return "".join(
        _script("_", below) + _script("^", above)
        for below, above in zip(written[::2], [*written[1::2], ""], strict=False)
    )


def _fenced(node: Element) -> str:
    fences = [_escape((node.get(name) if node.get(name) is not None else default).strip()) for name, default in _FENCES]
    separators = (node.get("separators") if node.get("separators") is not None else ",").replace(" ", "")
    inner = [_write(child) for child in node]
    parts = [fences[0]]
    for place, part in enumerate(inner):
        parts.append(part)
        if separators and place < len(inner) - 1:
            parts.append(_escape(separators[min(place, len(separators) - 1)]))
    return _join([*parts, fences[1]])


def _table(node: Element, environment: str = "matrix") -> str:
    rows = []
    for row in node.iterchildren("mtr", "mlabeledtr"):
        rows.append([_write(cell).strip() for cell in row][row.tag == "mlabeledtr" :])
    if len(rows) == 1 and (len(rows[0]) == 1 or environment == "aligned"):
        return " ".join(rows[0])
    return f"\\begin{{{environment}}} " + r" \\ ".join(" & ".join(row) for row in rows) + f" \\end{{{environment}}}"


def _arguments(node: Element, count: int) -> list[str]:
    written = [_write(child).strip() for child in node][:count]
    return written + [""] * (count - len(written))


def _script(mark: str, script: str) -> str:
    if not script or (mark == "^" and set(script) == {"'"}):
        return script
    return f"{mark}{script}" if len(script) == 1 else f"{mark}{{{script}}}"


def _is_one(text: str) -> bool:
    """One symbol, perhaps in a font: a script needs no braces around it."""
    if len(text) <= 1 or re.fullmatch(r"\\[A-Za-z]+|\\.|\d+", text):
        return True
    argument = re.match(r"\\[A-Za-z]+(?=\{)", text)
    if argument is None:
        return False
    depths = list(accumulate((c == "{") - (c == "}") for c in text[argument.end() :]))
    return depths[-1] == 0 and all(depths[:-1])


def _base(text: str) -> str:
    return text if _is_one(text) or text in _LIMITS or text[-1:] in ")]|" else f"{{{text}}}"


_FENCES = (("open", "("), ("close", ")"))
_ELEMENTS: dict[str, Callable[[Element], str]] = {
    "mi": _identifier,
    "mn": lambda node: _escape(one_line(text_of(node))),
    "mo": _operator,
    "mtext": _text,
    "ms": _text,
    "mspace": lambda node: " ",
    "mphantom": lambda node: "",
    "none": lambda node: "",
    "annotation": lambda node: "",
    "annotation-xml": lambda node: "",
    "mfrac": _fraction,
    "msup": _superscript,
    "msub": _subscript,
    "msubsup": _both_scripts,
    "msqrt": lambda node: f"\\sqrt{{{_row(node).strip()}}}",
    "mroot": _root,
    "mover": _over,
    "munder": _under,
    "munderover": _under_over,
    "mmultiscripts": _multiscripts,
    "mfenced": _fenced,
    "mtable": _table,
    "maction": lambda node: _write(node[0]) if len(node) else "",
}
