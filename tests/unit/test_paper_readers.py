"""Readers of scientific papers in XML: JATS and GROBID's TEI."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.readers import Unreadable, citations, jats, tei

REFERENCES = """
<ref id="r1"><element-citation publication-type="journal"><person-group person-group-type="author"><name>
  <surname>Watson</surname><given-names>JD</given-names></name><name><surname>Crick</surname></name></person-group>
  <article-title>A structure for <italic>DNA</italic>.</article-title><source>Nature</source></element-citation></ref>
<ref id="r2"><mixed-citation publication-type="book"><name><surname>Darwin</surname></name><source>On the origin of
  species</source></mixed-citation></ref>
<ref id="r3"><mixed-citation publication-type="journal"><string-name><surname>Perdew</surname> JP</string-name>
  <source>Phys. Rev. Lett.</source> <volume>77</volume>, <fpage>3865</fpage></mixed-citation></ref>
<ref id="r4"><mixed-citation>Hansen J, Sato M (2012) Pace of climate change. Nature 4.</mixed-citation></ref>
<ref id="r5"><label>5</label></ref>"""
WATSON = "[START_REF] A structure for DNA, Watson[END_REF]"
DARWIN = "[START_REF] On the origin of species, Darwin[END_REF]"
PERDEW = "[START_REF] Phys. Rev. Lett. 77, 3865, Perdew[END_REF]"
HANSEN = "[START_REF] Pace of climate change, Hansen[END_REF]"


def article(body: str, front: str = "", back: str = "") -> bytes:
    return f"""<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML">
    <front><article-meta>{front}</article-meta></front><body>{body}</body>
    <back>{back}<ref-list>{REFERENCES}</ref-list></back></article>""".encode()


def text(body: str, **parts: str) -> str:
    return jats.read(article(body, **parts))


# JATS


def test_headings_follow_the_nesting_of_sections() -> None:
    front = "<title-group><article-title>On<xref ref-type='fn'>*</xref> CO<sub>2</sub></article-title></title-group>"
    front += "<abstract><p>Short.</p></abstract><abstract abstract-type='toc'><p>Teaser.</p></abstract>"
    body = """<sec><title>Methods</title><sec><title>Cells</title><p>Grown.</p></sec><sec><title>Empty</title></sec>
    </sec><sec><title>Results</title><p>Many.</p></sec>"""
    assert text(body, front=front).split("\n\n") == [
        "# On CO[START_SUB]2[END_SUB]",
        "## Abstract",
        "Short.",
        "## Methods",
        "### Cells",
        "Grown.",
        "## Results",
        "Many.",
    ]


def test_a_body_without_a_first_heading_is_told_apart_from_the_abstract() -> None:
    front = "<abstract><p>Short.</p></abstract>"
    assert "## Introduction\n\nFirst." in text("<p>First.</p><sec><title>End</title><p>x</p></sec>", front=front)
    assert text("<p>All.</p>", front=front) == "## Abstract\n\nShort.\n\n## Main text\n\nAll."


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("known [{r1}].", f"known {WATSON}."),
        ("known {[r1]}, {[r2]}.", f"known {WATSON} {DARWIN}."),
        ("known [{r1}–{r3}] well", f"known {WATSON} {DARWIN} {PERDEW} well"),
        ("known [{r1}]–[{r3}]", f"known {WATSON} {DARWIN} {PERDEW}"),
        ("known<sup>{r1},{r2}</sup> well", f"known {WATSON} {DARWIN} well"),
        ("known ({r1}; {r2})", f"known {WATSON} {DARWIN}"),
        ("(see {r1}; {r2}, Fig. 1)", f"(see {WATSON} {DARWIN}, Fig. 1)"),
        ("Watson ({r1}) said", f"Watson {WATSON} said"),
        ("known [{r1 r2}]", f"known {WATSON} {DARWIN}"),
        ("known [{r4}]", f"known {HANSEN}"),
        ("known [{r5}] or [{gone}]", "known [r5] or [gone]"),
        ("[{r1} and {r2}]", f"{WATSON} {DARWIN}"),
        ("[{r1}] and [{r2}]", f"{WATSON} and {DARWIN}"),
    ],
)
def test_citations_carry_title_and_author(source: str, expected: str) -> None:
    xrefs = re.sub(r"\{(\W?)([\w ]+)(\W?)\}", r'<xref ref-type="bibr" rid="\2">\1\2\3</xref>', source)
    assert text(f"<p>{xrefs}</p>") == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("Hansen JE, Sato M (2012) Pace of change, in: Climate. Springer.", "Pace of change, in: Climate, Hansen"),
        ("O’Connor FM, et al.. (2010) Role of wetlands. Rev 48.", "Role of wetlands, O’Connor"),
        ("R Core Team (2013) R: A Language. Vienna.", "R: A Language, R Core Team"),
        ("K. Bretonnel Cohen and H. L. Johnson. 2010. Structure of abstracts. BMC.", "Structure of abstracts, Cohen"),
        ("Li F, Hu M and Ouyang Q. A globally attractive cycle. 2014.", "A globally attractive cycle, Li"),
        ("http://example.org/data", "http://example.org/data"),
    ],
)
def test_printed_entries_give_title_and_author(entry: str, expected: str) -> None:
    assert citations.work_from_text(entry) == f"[START_REF] {expected}[END_REF]"


def test_a_range_takes_its_ends_from_empty_references_too() -> None:
    body = '<p>x [<xref rid="r1">1</xref><xref rid="r2"/>–<xref rid="r3">3</xref>]</p>'
    assert text(body) == f"x {WATSON} {DARWIN} {PERDEW}"


def test_formulas_are_latex_wherever_the_source_allows_it() -> None:
    tex = r"\documentclass{minimal}\begin{document}$$E = mc^2$$\end{document}"
    body = f"""<p>So <inline-formula><alternatives><inline-graphic/><tex-math>{tex}</tex-math>
    <mml:math><mml:mi>E</mml:mi></mml:math></alternatives></inline-formula> and <inline-formula><mml:math><mml:msup>
    <mml:mi>x</mml:mi><mml:mn>2</mml:mn></mml:msup></mml:math></inline-formula> and <inline-formula><italic>y</italic>
    </inline-formula>, but <inline-formula><inline-graphic/></inline-formula>: <disp-formula><label>(1)</label>
    <mml:math><mml:mi>α</mml:mi></mml:math></disp-formula>, where it is.</p>"""
    assert text(body) == "So $E = mc^2$ and $x^2$ and y, but [IMAGE]:\n\n$$\\alpha \\tag{1}$$\n\nwhere it is."


def test_cells_that_span_are_filled() -> None:
    table = """<table-wrap><label>Table 1</label><caption><title>Doses</title></caption><alternatives><graphic/><table>
    <thead><tr><th rowspan="2">Group</th><th colspan="2">Weight</th></tr><tr><th>mean</th><th>SD</th></tr></thead>
    <tbody><tr><td colspan="3">Women</td></tr><tr><td rowspan="2">a|b</td><td>1<sup>a</sup></td><td>2</td></tr>
    <tr><td>3</td><td>4</td></tr><tr><td/><td/><td/></tr></tbody></table></alternatives>
    <table-wrap-foot><fn><label>a</label><p>Approximate.</p></fn></table-wrap-foot></table-wrap>"""
    assert text(f"<sec><title>T</title>{table}</sec>") == "\n".join(
        [
            "## T",
            "",
            "Table 1. Doses",
            "",
            "| Group | Weight mean | Weight SD |",
            "| --- | --- | --- |",
            "| Women |  |  |",
            "| a\\|b | 1[START_SUP]a[END_SUP] | 2 |",
            "| a\\|b | 3 | 4 |",
            "",
            "[START_SUP]a[END_SUP] Approximate.",
        ]
    )


def test_a_span_beyond_all_sense_stays_small() -> None:
    table = '<table><tr><td colspan="999999999" rowspan="999999999">a</td><td>b</td></tr><tr><td>c</td></tr></table>'
    assert len(text(f"<p>x</p><table-wrap>{table}</table-wrap>")) < 5000


def test_figures_are_their_captions_and_labels_come_once() -> None:
    figure = "<fig><label>{}</label><caption><title>{}</title><p>Scale 1 mm.</p></caption><graphic/></fig>"
    assert text(figure.format("Figure 1.", "A cell")) == "Figure 1. A cell. Scale 1 mm."
    assert text(figure.format("Figure 1", "Figure 1: A cell.")) == "Figure 1: A cell. Scale 1 mm."


def test_lists_and_definitions_and_code() -> None:
    body = """<p>Then<list list-type="order"><list-item><p>one</p><list list-type="bullet"><list-item><p>deep</p>
    </list-item></list></list-item><list-item><p>two</p></list-item></list>after</p>
    <def-list><def-item><term>AC</term><def><p>anchor cell</p></def></def-item></def-list><code># no heading\n x</code>
    <disp-quote><p>Said.</p></disp-quote><p># of cells</p>"""
    assert text(body).split("\n\n") == [
        "Then",
        "1. one\n   - deep\n2. two",
        "after",
        "- AC: anchor cell",
        "```\n# no heading\n x\n```",
        "> Said.",
        "\\# of cells",
    ]


def test_footnotes_stand_below_the_paragraph_that_has_their_mark() -> None:
    body = (
        '<p>One<xref ref-type="fn" rid="n1"><sup>1</sup></xref>.</p><p>Two<fn><label>2</label><p>Inside.</p></fn>.</p>'
    )
    back = '<fn-group><fn id="n1"><label>1</label><p>Below.</p></fn><fn id="n9"><p>No interests.</p></fn></fn-group>'
    assert text(body, back=back).split("\n\n") == [
        "One[START_SUP]1[END_SUP].",
        "[START_SUP]1[END_SUP] Below.",
        "Two[START_SUP]2[END_SUP].",
        "[START_SUP]2[END_SUP] Inside.",
    ]


@pytest.mark.parametrize(
    ("kind", "inside", "expected"),
    [
        ("gene", "5’-GATTACAGATTACA-3’", "5’-[START_DNA]GATTACAGATTACA[END_DNA]-3’"),
        ("gene", "CAT", "CAT"),
        ("protein-sequence", "MKTAYIAKQRQISFVK", "[START_AMINO]MKTAYIAKQRQISFVK[END_AMINO]"),
        ("protein", "Rhomboid", "Rhomboid"),
        ("smiles", "CC(=O)O", "[START_SMILES]CC(=O)O[END_SMILES]"),
        ("genus-species", "GATTACAGATTACA", "GATTACAGATTACA"),
    ],
)
def test_sequences_are_wrapped_where_the_source_marks_one(kind: str, inside: str, expected: str) -> None:
    assert text(f'<p>x <named-content content-type="{kind}">{inside}</named-content>.</p>') == f"x {expected}."


def test_metadata_and_sub_articles_are_not_text() -> None:
    front = """<contrib-group><contrib><name><surname>Smith</surname></name></contrib><aff>Cambridge</aff>
    </contrib-group><author-notes><corresp>smith@example.org</corresp></author-notes><permissions><p>Licence</p></permissions>"""
    data = article("<p>Text.</p>", front=front).replace(
        b"</article>", b"<sub-article><body><p>Review.</p></body></sub-article></article>"
    )
    assert jats.read(data) == "Text."


def test_namespaces_wrappers_and_character_names_are_understood() -> None:
    data = b"""<!DOCTYPE record PUBLIC "-//NLM//DTD JATS//EN" "JATS-archivearticle1.dtd"><record><metadata>
    <article xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/"><body><p>TGF-&alpha;<!-- c -->&mdash;ok</p></body>
    </article></metadata></record>"""
    assert jats.read(data) == "TGF-α—ok"


# What is refused, and why

NESTED = b'<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "broken xml"),
        (b"<article><body>", "broken xml"),
        (b"<article><body><p>\x00</p></body></article>", "broken xml"),
        (NESTED + b"<article><body><p>&b;</p></body></article>", "entity in xml"),
        (NESTED + b'<article x="&b;"><body><p>x</p></body></article>', "entity in xml"),
        (NESTED.decode().encode("utf-16") + "<article/>".encode("utf-16-le"), "entity in xml"),
        (b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><article><body>&x;</body></article>', "entity in xml"),
        (b'<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x"> %x;]><article/>', "entity in xml"),
        (b"<article><body><p>&nosuch;</p></body></article>", "entity in xml"),
        (b"<article>" + b"<sec>" * 5000 + b"</sec>" * 5000 + b"</article>", "xml too deep"),
        (b"<html><body><p>x</p></body></html>", "not jats"),
        (b"<article><front/><body><sec><title>Only</title></sec></body></article>", "no text"),
    ],
)
def test_what_cannot_be_read_says_why_in_a_few_words(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        jats.read(data)


@pytest.mark.parametrize("tag", ["sec", "p", "list", "italic", "disp-formula", "math", "mrow", "table", "td"])
def test_no_depth_of_nesting_breaks_the_reader(tag: str) -> None:
    for depth in (50, 120, 240):
        nested = f"<{tag}>" * depth + "x" + f"</{tag}>" * depth
        try:
            assert "x" in text(f"<p>{nested}</p>")
        except Unreadable as reason:
            assert str(reason) in ("xml too deep", "no text")


TAGS = """sec title p list list-item label def-list def-item term def disp-formula inline-formula math mrow mi mo mn
mfrac msup msubsup mover mtable mtr mtd mfenced tex-math alternatives table-wrap table thead tbody tr th td caption fig
xref sup named-content fn disp-quote statement boxed-text ref abstract supplementary-material""".split()


def trees() -> st.SearchStrategy[str]:
    words = st.sampled_from(["x", "α ", " [", "]", "–", "$", "|", "12", "", "# a"])
    return st.recursive(
        words,
        lambda inner: st.builds(
            lambda tag, attributes, inside: f"<{tag}{attributes}>{''.join(inside)}</{tag}>",
            st.sampled_from(TAGS),
            st.sampled_from(
                ["", ' rid="r1 r2"', ' colspan="3"', ' rowspan="2"', ' ref-type="fn"', ' content-type="dna"']
            ),
            st.lists(inner, max_size=4),
        ),
        max_leaves=25,
    )


@settings(max_examples=150)
@given(trees())
def test_any_order_of_elements_is_read_or_refused(tree: str) -> None:
    try:
        markdown = text(tree)
    except Unreadable:
        return
    assert "\x01" not in markdown and "\x02" not in markdown
    assert markdown.count("[START_REF]") == markdown.count("[END_REF]")


# TEI

TEI = """<TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><fileDesc><titleStmt><title>T</title></titleStmt></fileDesc>
<profileDesc><abstract><div><p><s>One.</s><s>Two.</s></p></div></abstract></profileDesc></teiHeader><text><body>{}</body>
<back><div type="acknowledgement"><div><head>Thanks</head><p>All.</p></div></div><div type="references"><listBibl>
<biblStruct xml:id="b0"><analytic><title level="a" type="main">Attention</title><author><persName>
<surname>Vaswani</surname></persName></author></analytic><monogr><title level="m">NIPS</title></monogr></biblStruct>
<biblStruct xml:id="b1"><monogr><title/><author><persName><surname>Bruna</surname></persName></author></monogr>
<note type="raw_reference">Joan Bruna and Yann LeCun. 2014. Spectral networks on graphs. ICLR.</note></biblStruct>
</listBibl></div></back></text></TEI>"""


def tei_blocks(body: str) -> list[str]:
    blocks = tei.read(TEI.format(body).encode()).split("\n\n")
    assert blocks[:3] == ["# T", "## Abstract", "One. Two."] and blocks[-2:] == ["## Thanks", "All."]
    return blocks[3:-2]


def test_tei_sections_are_as_deep_as_their_numbers() -> None:
    body = """<div><head n="1">First</head><p>a</p></div><div><head n="1.1">Below</head><p>b</p></div>
    <div><head n="2">Over a deeper one</head></div><div><head n="2.1.1">Deep</head><p>c</p></div>
    <div><head>Figure 3</head><p>d</p></div>"""
    assert tei_blocks(body) == [
        "## First", "a", "### Below", "b", "## Over a deeper one", "#### Deep", "c", "d",
    ]  # fmt: skip


def test_tei_sections_of_the_ieee_count_in_roman_numbers() -> None:
    heads = ["I. INTRODUCTION", "II. METHOD", "A. Data", "1) Sources", "C. elegans data", "III. END"]
    body = "".join(f"<div><head>{head}</head><p>x</p></div>" for head in heads)
    assert [block.split(" ")[0] for block in tei_blocks(body)[::2]] == ["##", "##", "###", "####", "###", "##"]


def test_tei_citations_notes_formulas_and_tables() -> None:
    body = """<div><p>So (e.g., <ref type="bibr" target="#b0">Vaswani et al., 2017)</ref>, <ref type="bibr"
    target="#b1">[2]</ref> and <ref type="bibr">Doe, 2001</ref><ref type="bibr">Roe</ref>.<ref type="foot"
    target="#n1">1</ref></p><formula>a = b<label>(3)</label></formula><p>x<hi rend="superscript">2</hi>
    </p></div><note place="headnote">Journal of X</note><note place="foot" n="1" xml:id="n1">A note.</note>
    <figure><head>Figure 1 :</head><label>1</label><figDesc>Figure 1: Cells.</figDesc></figure>
    <figure><head/><label/><figDesc>Unnamed.</figDesc></figure>
    <figure type="table"><head>Table 2</head><label>2</label><figDesc/><table><row><cell cols="2">Head</cell></row>
    <row><cell>1</cell><cell>2</cell></row></table><note>Said below.</note></figure>"""
    vaswani, bruna = (
        "[START_REF] Attention, Vaswani[END_REF]",
        "[START_REF] Spectral networks on graphs, Bruna[END_REF]",
    )
    assert tei_blocks(body) == [
        "## Main text",
        f"So (e.g., {vaswani}), {bruna} and Doe, 2001 Roe.[START_SUP]1[END_SUP]",
        "[START_SUP]1[END_SUP] A note.",
        "$$a = b \\tag{3}$$",
        "x[START_SUP]2[END_SUP]",
        "Figure 1: Cells.",
        "Figure: Unnamed.",
        "Table 2. Said below.",
        "| Head |  |\n| --- | --- |\n| 1 | 2 |",
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<TEI><text/></TEI>", "no text"),
        (b"<article/>", "not tei"),
        (b"<TEI>", "broken xml"),
        (b'<!DOCTYPE a [<!ENTITY x "y">]><TEI/>', "entity in xml"),
        (b"<TEI>" + b"<div>" * 5000 + b"</div>" * 5000 + b"</TEI>", "xml too deep"),
    ],
)
def test_tei_that_cannot_be_read_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        tei.read(data)
