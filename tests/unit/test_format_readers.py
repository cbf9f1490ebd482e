"""HTML, PDF and source code: what their readers write, and what they refuse."""

from __future__ import annotations

import difflib
import json
import random
import re
import time
from collections.abc import Callable

import psutil
import pytest

from orchestrator.data.readers import Unreadable, code, html, pdf
from tests.conftest import SHARED_DATA

PAPERS = SHARED_DATA / "papers"
SECONDS = 20.0
"""A hostile document of a megabyte takes three at most; the machine may be busy."""


RANDOM = random.Random(0).randbytes(100_000)


def shared(path: str) -> bytes:
    file = PAPERS / path
    if not file.is_file():
        pytest.skip("no papers beside the repository")
    return file.read_bytes()


def reason(read: Callable[[bytes], str], data: bytes) -> str:
    before = time.process_time()
    with pytest.raises(Unreadable) as caught:
        read(data)
    assert time.process_time() - before < SECONDS
    return str(caught.value)


# HTML

PROSE = "<p>A sentence about physics and chemistry that is long enough to be the main text of a page.</p>"
PAGE = f"""<!DOCTYPE html><html><head><meta charset="utf-8"><title>Photosynthesis - Site</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/in">Log in</a></li></ul></nav><article><h1>Photosynthesis</h1>
<p>It turns CO<sub>2</sub> to sugar on 10 m<sup>2</sup>, as <a href="/p">Priestley</a> found.<sup><a
href="#n">[1]</a></sup> The rate is <math alttext="{{\\displaystyle r=kE^{{2}}}}"><mi>r</mi></math> with
<math><semantics><mi>k</mi><annotation encoding="application/x-tex">k_0</annotation></semantics></math> and \\(E\\):</p>
{PROSE}<h2>Steps<span class="mw-editsection">[edit]</span></h2><ul><li>light<ul><li>nested</li></ul></li>
<li>dark</li></ul><table><caption>Rates</caption><tr><th>Plant</th><th>Rate</th></tr><tr><td>Maize</td><td>4|0</td></tr></table>
<pre><code class="language-python">def f(x):
    return x ** 2
</code></pre>{PROSE}<h2>References</h2><ol><li>Priestley, 1772.</li></ol></article>
<footer><p>Privacy and cookies</p></footer></body></html>"""


def test_a_page_is_its_main_text() -> None:
    text = html.read(PAGE.encode())
    prose = PROSE[3:-4]
    assert text.split("\n\n") == [
        "# Photosynthesis",
        "It turns CO[START_SUB]2[END_SUB] to sugar on 10 m[START_SUP]2[END_SUP], as Priestley found. "
        "The rate is $r=kE^{2}$ with $k_0$ and $E$:",
        prose,
        "## Steps",
        "- light\n  - nested\n- dark",
        "Rates",
        "| Plant | Rate |\n| --- | --- |\n| Maize | 4\\|0 |",
        "```python\ndef f(x):\n    return x ** 2\n```",
        prose,
    ]


def test_formulas_drawn_by_scripts_are_written_once() -> None:
    katex = (
        '<span class="katex"><span class="katex-mathml"><math><semantics><mi>a</mi><annotation '
        'encoding="application/x-tex">a_1</annotation></semantics></math></span>'
        '<span class="katex-html" aria-hidden="true">a1</span></span>'
    )
    mathjax = '<span class="MathJax">drawn</span><script type="math/tex; mode=display">b^2</script>'
    text = html.read(
        f"<html><body><article>{PROSE}<p>So {katex} and {mathjax} hold.</p></article></body></html>".encode()
    )
    assert text.endswith("So $a_1$ and\n\n$$ b^2 $$\n\nhold.") and "drawn" not in text


def test_headings_survive_where_no_article_is_marked() -> None:
    sections = "".join(f'<div class="chapter"><h2>Part {n}</h2>{PROSE * 3}</div>' for n in range(4))
    text = html.read(f"<html><head><title>All</title></head><body>{sections}</body></html>".encode())
    assert re.findall("^#.*", text, re.MULTILINE) == ["# All", *(f"## Part {n}" for n in range(4))]


def test_a_page_without_main_text_gives_what_it_has() -> None:
    assert html.read(b"<html><body><script>var a</script><span>Only this.</span></body></html>") == "Only this."
    assert reason(html.read, b"<html><body><!-- no --><script>x</script><style>y</style></body></html>") == "no text"


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1", "windows-1252", "shift_jis"])
def test_pages_are_decoded_as_they_declare(charset: str) -> None:
    word = "日本" if charset == "shift_jis" else "Käse"
    page = f'<html><head><meta http-equiv="Content-Type" content="text/html; charset={charset}"></head><body><p>{word}'
    assert html.read(page.encode(charset)) == word


@pytest.mark.parametrize(
    "data,why",
    [
        (b"", "not html"),
        (b"{" * 1_000_000, "not html"),
        (b"plain text", "not html"),
        (b"<!-- <p> -->", "not html"),
        (b"<p>a\0b</p>", "not html"),
        (RANDOM, "not utf-8"),
        ("<p>Käse</p>".encode("latin-1"), "not utf-8"),
        (b'<meta charset="shift_jis"><p>\xff\xff', "not in its charset"),
        (b'<meta charset="nonsense"><p>x', "unknown charset"),
        (b"<p>" + b"x" * html.MAX_BYTES, "too large"),
        (b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000, "no text"),
        (b"<p>a" * (html.MAX_ELEMENTS + 1), "too large"),
    ],
)
def test_pages_that_are_none_are_refused(data: bytes, why: str) -> None:
    assert reason(html.read, data) == why


@pytest.mark.parametrize("tag", ["div", "span", "blockquote", "ul><li", "table><tr><td", "sup", "font"])
def test_nested_pages_end(tag: str) -> None:
    before = time.process_time()
    text = html.read(b"<html><body>" + f"<{tag}>text ".encode() * 100)
    assert "text" in text and time.process_time() - before < SECONDS


def test_control_characters_do_not_break_a_page() -> None:
    for character in [*map(chr, range(1, 32)), "&#1;", "&#x1F;", "&#65535;"]:
        assert "after" in html.read(f"<html><body>{PROSE}<p>Some [words] {character} <b>after</b></p>".encode())


def test_memory_does_not_grow_with_pages() -> None:
    def page(number: int) -> bytes:
        words = "".join(
            f"<p>Paragraph {number} {n} with words that no other page has, and some more.</p>" for n in range(20)
        )
        return PAGE.replace(PROSE, words).encode()

    for number in range(30):
        html.read(page(number))
    before = psutil.Process().memory_info().rss
    for number in range(30, 230):
        html.read(page(number))
    assert psutil.Process().memory_info().rss - before < 16 << 20


# PDF

Text = tuple[float, float, float, str]
"""Left and bottom in points, size of the type, the words; * before them for bold type."""


def make_pdf(pages: list[list[Text]], encrypted: bool = False) -> bytes:
    kids = " ".join(f"{5 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        *(f"<</Type/Font/Subtype/Type1/Encoding/WinAnsiEncoding/BaseFont/{n}>>" for n in ("Times-Roman", "Times-Bold")),
    ]
    for n, page in enumerate(pages):
        drawn = "\n".join(
            f"BT /F{2 if words.startswith('*') else 1} {size} Tf {left} {bottom} Td ({words.lstrip('*')}) Tj ET"
            for left, bottom, size, words in page
        )
        fonts = "<</Font<</F1 3 0 R/F2 4 0 R>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources{fonts}/Contents {6 + 2 * n} 0 R>>")
        objects.append(f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream")
    data, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n"
    lock = f"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{'5a' * 32}>/U<{'a5' * 32}>>>/ID[<00><00>]" if encrypted else ""
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    trailer = f"trailer<</Size {len(objects) + 1}/Root 1 0 R{lock}>>\nstartxref\n{len(data)}\n%%EOF"
    return f"{data}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode("latin-1")


def column(lines: list[str], top: float = 700, left: float = 60, size: float = 10) -> list[Text]:
    return [(left, top - 12 * n, size, line) for n, line in enumerate(lines)]


FULL = "These words fill the line of a column from its left to its right"


def body_words(tei: bytes) -> list[str]:
    text = re.sub(rb"<[^>]+>", b" ", tei[tei.index(b"<body>") : tei.index(b"</body>")]).decode()
    return re.findall(r"[a-z]{2,}", text.lower().replace("-", ""))


def test_a_real_paper_has_the_words_of_its_tei_in_order() -> None:
    text = pdf.read(shared("pdf/N18-3011.pdf"))
    expected = body_words(shared("pdf/N18-3011.tei.xml"))
    found = re.findall(r"[a-z]{2,}", text.lower().replace("-", ""))
    matcher = difflib.SequenceMatcher(None, expected, found, autojunk=False)
    assert sum(block.size for block in matcher.get_matching_blocks()) > 0.97 * len(expected)


def test_a_real_paper_has_its_title_and_headings() -> None:
    text = pdf.read(shared("pdf/N18-3011.pdf"))
    assert text.startswith("# Construction of the Literature Graph in Semantic Scholar\n\n## Abstract\n\nWe describe a")
    record = json.loads(shared("pdf/N18-3011.json"))
    sections = {paragraph["section"] for paragraph in record["pdf_parse"]["body_text"]} - {""}
    headings = {heading.strip("# ") for heading in re.findall("^#{2,} .*", text, re.MULTILINE)}
    assert sections <= headings and headings - sections == {"Abstract"}
    assert "Proceedings of NAACL" not in text and "\n84\n" not in text
    assert "heterogeneous graph to facilitate algorithmic manipulation" in text


def test_heads_and_page_numbers_that_repeat_are_left_out() -> None:
    pages = [
        [(60, 770, 8, f"Journal of Things {n}"), *column([f"{n * 'x'} {FULL}"] * 9), (300, 30, 10, str(n))]
        for n in range(7, 11)
    ]
    text = pdf.read(make_pdf(pages))
    assert text.count(FULL) == 36 and "Journal" not in text and not re.search(r"\d", text)


def test_divided_words_and_lines_are_joined() -> None:
    text = pdf.read(
        make_pdf([column([FULL, "and an experi-", "ment with self-", "attention, where self-attention is in", FULL])])
    )
    assert text == f"{FULL} and an experiment with self-attention, where self-attention is in {FULL}"


def test_paragraphs_begin_at_indents_gaps_and_bullets() -> None:
    lines = [*column([FULL + ".", "Short end."]), (72, 676, 10, "Indented. " + FULL), *column([FULL, FULL + "."], 664)]
    lines += [*column(["Behind a gap. " + FULL, FULL + "."], 620), *column(["\\225 one", "\\225 two"], 580, 70)]
    assert pdf.read(make_pdf([lines])).split("\n\n") == [
        f"{FULL}. Short end.",
        f"Indented. {FULL} {FULL} {FULL}.",
        f"Behind a gap. {FULL} {FULL}.",
        "- one\n- two",
    ]


def test_headings_are_numbered_bold_lines_and_references_end_the_text() -> None:
    lines = [
        (60, 740, 18, "*On the Growth of Things"), (60, 715, 10, "A. Author"), (60, 690, 10, "*Abstract"),
        *column([FULL], 675), (60, 650, 12, "*1 Introduction"), *column([FULL, "2 Dogs are in this line."], 635),
        (60, 600, 10, "*1.1 Earlier Work"), *column([FULL], 585), (60, 560, 10, "*7 Out of turn"),
        *column([FULL + "."], 545), (60, 520, 12, "*References"), *column(["[1] Somebody. Some title. 1999."], 505),
        (60, 480, 12, "*Appendix"), *column([FULL], 465),
    ]  # fmt: skip
    assert pdf.read(make_pdf([lines])).split("\n\n") == [
        "# On the Growth of Things", "## Abstract", FULL, "## Introduction", f"{FULL} 2 Dogs are in this line.",
        "### Earlier Work", FULL, "7 Out of turn", f"{FULL}.", "## Appendix", FULL,
    ]  # fmt: skip


def test_captions_wait_for_the_end_of_the_paragraph() -> None:
    lines = [
        *column([FULL, FULL]),
        *column(["Figure 3: A graph of", "all things."], 640),
        *column([f"and {FULL}", "ends."], 600),
    ]
    assert pdf.read(make_pdf([lines])) == f"{FULL} {FULL} and {FULL} ends.\n\nFigure 3: A graph of all things."


PLAIN_PDF = make_pdf([column([FULL] * 5)])


@pytest.mark.parametrize(
    "data,why",
    [
        (b"", "broken pdf"),
        (RANDOM, "broken pdf"),
        (b"{" * 1_000_000, "broken pdf"),
        ("Käse".encode("latin-1"), "broken pdf"),
        (PLAIN_PDF[:300], "broken pdf"),
        (make_pdf([]), "broken pdf"),
        (make_pdf([[]]), "no text in pdf"),
        (make_pdf([[(60, 700, 10, "Scanned by X")]]), "no text in pdf"),
        (make_pdf([column([FULL] * 5)], encrypted=True), "encrypted pdf"),
    ],
)
def test_files_that_are_no_readable_pdf_are_refused(data: bytes, why: str) -> None:
    assert reason(pdf.read, data) == why


def test_pages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "MAX_PAGES", 2)
    page = column([FULL] * 9)
    assert FULL in pdf.read(make_pdf([page] * 2))
    assert reason(pdf.read, make_pdf([page] * 3)) == "too many pages"


def test_a_truncated_paper_is_refused() -> None:
    assert reason(pdf.read, shared("pdf/N18-3011.pdf")[:80_000]) == "broken pdf"


# Source code


@pytest.mark.parametrize("suffix", sorted(set(code.SUFFIXES) - {".ipynb"}))
def test_code_is_fenced_with_its_language(suffix: str) -> None:
    assert code.read(b"\xef\xbb\xbfa = 1\r\n\r\nb\n", f"src/file{suffix.upper()}") == (
        f"```{code.SUFFIXES[suffix]}\na = 1\n\nb\n```"
    )


def test_a_fence_in_the_code_does_not_end_it() -> None:
    assert code.read(b"x\n````\ny\n", "a.py") == "`````python\nx\n````\ny\n`````"
    assert code.read(b"x = 1", "Makefile") == "```\nx = 1\n```"


@pytest.mark.parametrize(
    "data,why",
    [
        (b"", "no text"),
        (b"\n \n", "no text"),
        (b"a\0b", "binary"),
        (RANDOM, "binary"),
        ("# Käse".encode("latin-1"), "not utf-8"),
        (b"{" * 1_000_000, "minified code"),
        (b"\n".join([b"x" * 300] * 9), "minified code"),
        (b"# Generated by the protocol buffer compiler.  DO NOT EDIT!\nx = 1\n", "generated code"),
        (b"// @generated from a.proto\nx\n", "generated code"),
        (b"# This file was automatically generated by SWIG\n", "generated code"),
        (b"x = 1\n" * (code.MAX_BYTES // 6 + 1), "too large"),
    ],
)
def test_code_that_teaches_nothing_is_refused(data: bytes, why: str) -> None:
    assert reason(lambda found: code.read(found, "a.py"), data) == why


def test_code_that_speaks_of_generating_is_kept() -> None:
    kept = b"# Ids may be auto-generated; edit them with care.\n__version__ = 1  # DO NOT EDIT THIS LINE\n"
    assert code.read(kept, "a.py")


def notebook(*cells: dict[str, object]) -> bytes:
    return json.dumps({"cells": cells, "metadata": {"language_info": {"name": "julia"}}}).encode()


def test_a_notebook_is_its_text_and_code_without_outputs() -> None:
    data = notebook(
        {"cell_type": "markdown", "source": ["# Title\n", "Text $x$ ![p](data:image/png;base64,AAAA)"]},
        {"cell_type": "code", "source": "f(x) = x^2\n", "outputs": [{"text": "secret"}]},
        {"cell_type": "code", "source": []},
    )
    assert code.read(data, "a.ipynb") == "# Title\nText $x$ ![p]()\n\n```julia\nf(x) = x^2\n```"


@pytest.mark.parametrize(
    "data,why",
    [
        (b"{", "broken notebook"),
        (b"[]", "broken notebook"),
        (b"[" * 1_000_000, "broken notebook"),
        (notebook(), "no text"),
        (b'{"cells": 3, "worksheets": [1]}', "no text"),
        (b'{"cells": [1, {"source": 5}, {"source": [5]}], "metadata": 1}', "no text"),
    ],
)
def test_notebooks_that_are_none_are_refused(data: bytes, why: str) -> None:
    assert reason(lambda found: code.read(found, "a.ipynb"), data) == why
