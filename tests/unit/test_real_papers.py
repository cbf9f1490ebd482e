"""The readers of papers over real ones: PLOS as JATS, one PDF as TEI and JSON, three records of S2ORC."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.data.readers import jats, s2orc, tei, xml
from tests.conftest import SHARED_DATA

PAPERS = SHARED_DATA / "papers"
PLOS = sorted((PAPERS / "jats").glob("*.xml"))
Markdown = dict[Path, str]
pytestmark = pytest.mark.skipif(not PLOS, reason="no papers in ../shared/data")


@pytest.fixture(scope="module")
def plos() -> Markdown:
    return {path: jats.read(path.read_bytes()) for path in PLOS}


def words(markup: str) -> Counter[str]:
    return Counter(re.findall(r"[^\W\d_]{2,}", markup))


def test_no_words_of_a_real_body_are_lost(plos: Markdown) -> None:
    for path, markdown in plos.items():
        read = re.sub(r"\[(START|END)_(SUP|SUB|DNA)\]", "", markdown)
        expected = words(text_of_body(path))
        lost = expected - words(read)
        assert sum(lost.values()) <= 0.03 * sum(expected.values()), (path.name, lost.most_common(10))


def text_of_body(path: Path) -> str:
    """All text but citations, formulas, identifiers and the types of files; cells and paragraphs apart."""
    body = xml.parse(path.read_bytes()).find("body")
    for element in list(body.iter("xref", "math", "tex-math", "object-id", "p")):
        is_other_mark = element.tag == "xref" and element.get("ref-type") != "bibr"
        is_text = element.tag == "p" and not re.fullmatch(r"\([\d.MKB ]*[A-Z0-9]+\)", xml.text_of(element))
        if not is_other_mark and not is_text:
            xml.drop(element)
    for element in body.iter("td", "th", "p", "title", "label"):
        element.tail = " " + (element.tail or "")
    return xml.text_of(body)


def test_real_papers_agree_with_their_plain_text(plos: Markdown) -> None:
    with (SHARED_DATA / "corpus" / "plos-starter.jsonl").open() as lines:
        plain = {record["id"].split("/")[1]: record["text"] for record in map(json.loads, lines)}
    shared = [path for path in PLOS if path.stem in plain]
    assert len(shared) > 50
    for path in shared:
        read = re.sub(r"\[(START|END)_(SUP|SUB|DNA)\]", "", plos[path])
        missing = words(plain[path.stem]) - words(read)
        # Plain text keeps `(Smith et al. 2001)`, of which the first author alone is left.
        assert sum(missing.values()) <= 0.04 * sum(words(plain[path.stem]).values()), (path.name, missing)


def test_real_papers_are_clean_markdown(plos: Markdown) -> None:
    for path, markdown in plos.items():
        assert re.search(r"</?[a-z][a-z-]*( [a-z:-]+=|/?>)|&[a-z]+;|\x01|\x02", markdown) is None, path.name
        assert re.search(r"\(\s*\)|\[\s*\]|  +(?!\|)|\[END_REF\] [.,;)]|\w\[START_REF\]", prose(markdown)) is None, (
            path.name
        )
        references = re.findall(r"\[START_REF\] (?:(?!\[START_REF\]).)+?\[END_REF\]", markdown)
        assert 2 * len(references) == markdown.count("_REF]"), path.name
        assert markdown.startswith("# ")


def prose(markdown: str) -> str:
    return "\n".join(line for line in markdown.split("\n") if not line.startswith(("|", "$$", " ")))


def test_rows_of_real_tables_are_equally_long(plos: Markdown) -> None:
    tables = 0
    for path, markdown in plos.items():
        for table in re.findall(r"(?:^\|.*\n?)+", markdown, re.MULTILINE):
            widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().split("\n")}
            assert len(widths) == 1, (path.name, table[:200])
            tables += 1
    assert tables >= 95


def test_citations_of_real_papers_resolve(plos: Markdown) -> None:
    marked = resolved = 0
    for path, markdown in plos.items():
        root = xml.parse(path.read_bytes())
        cited = [mark for place in ("body", "back") for mark in root.iterfind(f"{place}//xref[@ref-type='bibr']")]
        marked += len(cited)
        resolved += markdown.count("[START_REF]")
    assert marked > 5000
    assert resolved >= 0.99 * marked  # ranges add some, repeats within one bracket take some


def test_a_real_paper_takes_tens_of_milliseconds() -> None:
    papers = [path.read_bytes() for path in PLOS]
    jats.read(papers[0])
    start = time.process_time()
    for data in papers:
        jats.read(data)
    assert (time.process_time() - start) / len(papers) < 0.06


@pytest.mark.parametrize(
    ("read", "name"), [(tei.read, "N18-3011.tei.xml"), (s2orc.read, "N18-3011.json")], ids=["tei", "s2orc"]
)
def test_both_readings_of_one_real_pdf_agree(read: Callable[[bytes], str], name: str) -> None:
    markdown = read((PAPERS / "pdf" / name).read_bytes())
    heads = [line for line in markdown.split("\n") if line.startswith("#")]
    assert heads[:5] == [
        "# Construction of the Literature Graph in Semantic Scholar",
        "## Abstract",
        "## Introduction",
        "## Structure of The Literature Graph",
        "### Node Types",
    ]
    assert heads[-1] == "## Conclusion and Future Work"
    wu = "[START_REF] CiteSeerX: AI in a digital library search engine, Wu[END_REF]"
    assert f"(e.g., {wu}), researchers" in markdown
    marked = (PAPERS / "pdf" / "N18-3011.tei.xml").read_text().count('<ref type="bibr" target="#b')
    assert markdown.count("[START_REF]") == markdown.count("[END_REF]") == marked
    assert re.search(r" [,.;](?=\s)(?<!\. \.)|\(\)", prose(markdown)) is None


@pytest.mark.parametrize("name", ["18980380", "18980463", "94551546"])
def test_real_s2orc_records_resolve_their_citations(name: str) -> None:
    data = (PAPERS / "s2orc" / f"{name}.json").read_bytes()
    source = json.loads(data)
    spans = [span for part in source["body_text"] for span in part["cite_spans"]]
    markdown = s2orc.read(data)
    known = sum(span["ref_id"] in source["bib_entries"] for span in spans)
    assert markdown.count("[START_REF]") >= 0.97 * known
    assert markdown.count("[START_REF]") == markdown.count("[END_REF]")
    lost = words(" ".join(part["text"] for part in source["body_text"])) - words(markdown)
    lost -= words(" ".join(span["text"] for span in spans))
    assert not lost
    assert re.search(r"\[END_REF\] [.,;)]|  |^[.,;]", markdown.replace("|  |", ""), re.MULTILINE) is None
