"""The reader of S2ORC's JSON."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.readers import Unreadable, s2orc


def record(**parts: object) -> dict[str, object]:
    entries = {
        "BIBREF0": {"title": "Attention", "authors": [{"first": "A", "last": "Vaswani"}]},
        "BIBREF1": {"title": "", "authors": [], "raw_text": "Joan Bruna. 2014. Spectral networks on graphs. ICLR."},
    }
    return {"paper_id": "1", "title": "T", "bib_entries": entries, **parts}


def paragraph(text: str, section: object = "", **spans: dict[str, dict[str, str]]) -> dict[str, object]:
    """A paragraph whose spans are given by the text that they cover."""
    placed = {
        f"{kind}_spans": [
            {"start": text.index(part), "end": text.index(part) + len(part), **span} for part, span in of.items()
        ]
        for kind, of in spans.items()
    }
    return {"text": text, "section": section, **placed}


def test_s2orc_citations_formulas_and_floats_stand_in_their_places() -> None:
    body = [
        paragraph(
            "As INLINEFORM0 shows BIBREF0 , BIBREF1 (BIBREF9), Figure FIGREF0.",
            "Introduction",
            eq={"INLINEFORM0": {"latex": "x^2", "ref_id": "INLINEFORM0"}},
            cite={key: {"ref_id": key, "text": key[-1]} for key in ("BIBREF0", "BIBREF1", "BIBREF9")},
            ref={"FIGREF0": {"ref_id": "FIGREF0", "text": "3"}},
        ),
        paragraph("INLINEFORM1", "Introduction", eq={"INLINEFORM1": {"latex": " y\n= 1 ", "ref_id": "INLINEFORM1"}}),
    ]
    floats = {
        "FIGREF0": {"text": "Cells.", "type_str": "figure", "fig_num": "3"},
        "TABREF0": {
            "text": "Table 1: All.",
            "type": "table",
            "html": "<table><tr><th>a</th></tr><tr><td>1</td></tr></table>",
        },
        "TABREF1": {"text": ") of a sentence", "type": "table"},
    }
    back = [paragraph("Thanks.", "Acknowledgments")]
    parse = record(body_text=body, back_matter=back, ref_entries=floats)
    nested = {"title": "T", "abstract": "Short.", "pdf_parse": {}, "latex_parse": {**parse, "title": None}}
    attention, bruna = (
        "[START_REF] Attention, Vaswani[END_REF]",
        "[START_REF] Spectral networks on graphs, Bruna[END_REF]",
    )
    assert s2orc.from_record(nested).split("\n\n") == [
        "# T",
        "## Abstract",
        "Short.",
        "## Introduction",
        f"As $x^2$ shows {attention} {bruna} (9), Figure 3.",
        "Figure 3. Cells.",
        "$$y = 1$$",
        "Table 1: All.",
        "| a |\n| --- |\n| 1 |",
        "## Acknowledgments",
        "Thanks.",
    ]


def test_paragraphs_that_the_abstract_and_the_body_share_come_once() -> None:
    abstract = [paragraph("Short."), paragraph("First of the body.")]
    body = [paragraph("First of the body."), paragraph("More.", "II. METHOD"), paragraph("Data.", [["2.1", "Data"]])]
    assert s2orc.from_record(record(abstract=abstract, body_text=body)).split("\n\n")[1:] == [
        "## Abstract", "Short.", "## Introduction", "First of the body.",
        "## II. METHOD", "More.", "#### Data", "Data.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "broken json"),
        (b"\xff{}", "broken json"),
        (b"[" * 200_000, "broken json"),
        (b"[]", "not s2orc"),
        (b'{"text": "x"}', "not s2orc"),
        (b'{"body_text": []}', "no text"),
    ],
)
def test_s2orc_that_cannot_be_read_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        s2orc.read(data)


FIELDS = (
    "text section cite_spans ref_spans eq_spans start end ref_id latex title authors last type html BIBREF0".split()
)
SCALARS = st.sampled_from(["BIBREF0", "a \ud800 b", "x\x01y", "figure", "<table>", None, True, -1, 0, 2, 30, 1.5])
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner),
    max_leaves=20,
)


@settings(max_examples=150)
@given(JUNK, st.lists(JUNK), JUNK, JUNK)
def test_fields_of_any_type_never_break_it(abstract: object, body: list[object], bib: object, refs: object) -> None:
    parse = {"abstract": abstract, "body_text": body, "bib_entries": bib, "ref_entries": refs}
    for junk in parse, {"pdf_parse": parse, "title": bib}:
        try:
            s2orc.from_record(junk).encode()
        except Unreadable as reason:
            assert str(reason) in ("no text", "not s2orc")
