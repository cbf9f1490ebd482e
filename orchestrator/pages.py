"""Pages of a report: sections of paragraphs, facts, tables and plots as one HTML file, or as Markdown.

The HTML needs no script and no network. All text is untrusted and escaped.
"""

from __future__ import annotations

import html
import re
from string import Template
from typing import NamedTuple

Cell = str | int | float | None
Row = tuple[Cell, ...]
Facts = dict[str, Cell]


class Table(NamedTuple):
    align: str
    """`l` or `r` for each column."""
    headers: tuple[str, ...]
    rows: list[Row]


class Plot(NamedTuple):
    svg: str
    caption: str


Block = str | Facts | Table | Plot
Section = tuple[str, list[Block]]


def as_text(value: Cell) -> str:
    """A value as a reader wants it: an en dash for nothing, thousands apart, four digits of a fraction."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}"


def markdown(name: str, outcome: str, sections: list[Section]) -> str:
    """Without the plots."""
    parts = [f"# Terrane run {_plain(name)}", _plain(outcome)]
    for title, blocks in sections:
        texts = [_markdown_block(block) for block in blocks if not isinstance(block, Plot)]
        parts += [f"## {title}", *texts] if texts else []
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: str | Facts | Table) -> str:
    if isinstance(block, str):
        return _plain(block)
    table = Table("lr", ("", ""), list(block.items())) if isinstance(block, dict) else block
    rule = ["---:" if side == "r" else "---" for side in table.align]
    lines = [
        [_plain(header) for header in table.headers],
        rule,
        *([_plain(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Cell) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = html.escape(re.sub(r"([\\`*_\[\]|~#])", r"\\\1", as_text(value)), quote=False)
    return "<br>".join(text.splitlines())


def to_html(name: str, outcome: str, sections: list[Section]) -> str:
    """One file, plots inside."""
    body = "\n".join(
        f"<section><h2>{title}</h2>{''.join(map(_html_block, blocks))}</section>" for title, blocks in sections
    )
    return _PAGE.substitute(name=html.escape(name), outcome=html.escape(outcome), body=body)


def _html_block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, dict):
        pairs = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(as_text(v))}</dd></div>" for k, v in block.items())
        return f"<dl>{''.join(pairs)}</dl>"
    if isinstance(block, Plot):
        return f"<figure>{block.svg}<figcaption>{html.escape(block.caption)}</figcaption></figure>"
    head = _html_row("th", block.align, block.headers)
    rows = "".join(_html_row("td", block.align, row) for row in block.rows)
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def _html_row(tag: str, align: str, row: Row) -> str:
    cells = (f"<{tag} class={side}>{html.escape(as_text(cell))}" for side, cell in zip(align, row, strict=True))
    return f"<tr>{''.join(cells)}\n"


# The policy forbids scripts and any load, should something ever slip through the escaping.
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$name – Terrane</title>
<style>
:root { color-scheme: light dark; --ink: #1d232b; --soft: #66707d; --line: #e3e6ea; --page: #fbfbfa; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #98a2af; --line: #2d343d; --page: #14181d; --card: #1a1f26 }
}
body { margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 58rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); font-size: 1.1rem }
p, dt, th, figcaption, header span { color: var(--soft) }
header p { margin: .6rem 0 0; font-size: 1.1rem; color: var(--ink) }
figure { margin: 1rem 0; overflow-x: auto }
svg { display: block; width: 100%; min-width: 34rem; height: auto; color: var(--ink) }
svg text { font-family: inherit !important }
.wide { overflow-x: auto; margin: 1rem 0 }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left }
th { font-weight: 500; white-space: nowrap }
td { max-width: 30rem; overflow-wrap: break-word; white-space: pre-wrap }
.r { text-align: right; white-space: nowrap }
th, dt, figcaption { font-size: .85rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
dl div { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card) }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
</style>
</head>
<body>
<header><span>Terrane run</span><h1>$name</h1><p>$outcome</p></header>
$body
</body>
</html>
""")
