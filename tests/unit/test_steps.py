from __future__ import annotations

import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import steps
from orchestrator.data.encoding import superscripts


def test_cleaning_mends_white_space_and_control_characters() -> None:
    assert steps.clean("a \r\nb\x00\r\r\r\r\nc\n\n\n\nd\t\n") == "a\nb\n\nc\n\nd"
    assert steps.clean("one page\x0canother") == "one page\nanother"
    assert steps.clean("one page\x0canother β") == "one page\nanother β"


def test_what_stands_at_the_start_of_a_line_stays() -> None:
    text = "    first line\n- item\n  - nested\n\tdef f():\n\t    return 1"
    assert steps.clean(text) == text
    assert steps.clean(text + " β") == text + " β"


@pytest.mark.parametrize(
    ("written", "clean"),
    [
        ("e\u0301", "\u00e9"),
        ("2\u00a0µm,\u2009about\u30003", "2 µm, about 3"),
        ("\ufeffof\u00adten ze\u200bro \u202awidth\u202c", "often zero width"),
        ("hyphe\u00ad\nnated", "hyphenated"),
        ("e\ufb03cient \ufb02ow", "efficient flow"),
        ("\uf0b7item\U000f0000", "item"),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("\x93quoted\x94 \x96 in Latin-1", "“quoted” – in Latin-1"),
        ("one\u2028two\u2029three", "one\ntwo\n\nthree"),
        ("نمی\u200cخواهم", "نمی\u200cخواهم"),
        ("x² and H₂O", "x[START_SUP]2[END_SUP] and H[START_SUB]2[END_SUB]O"),
    ],
)
def test_characters_that_a_page_only_carries_are_mended(written: str, clean: str) -> None:
    assert steps.clean(written) == clean


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize(
    "text",
    [
        "it’s – “so”…",
        "café, Müller, Größe, créée",
        "3 × 4",
        "20 °C ± 2 µm²",
        "TGFβ and Δσ with λ",
        "x ≤ −5 → y",
        "ﬁnal",
    ],
)
def test_utf8_that_was_read_as_another_encoding_is_read_again(text: str, encoding: str) -> None:
    def misread(byte: int) -> str:
        try:
            return bytes([byte]).decode(encoding)
        except UnicodeDecodeError:
            return chr(byte)

    broken = "".join(map(misread, text.encode()))
    assert steps.clean(broken) == superscripts(text.replace("ﬁ", "fi"))


@pytest.mark.parametrize(
    "text", ["â€ cut â€", "1.5 Å–2.0 Å", "20 Å²", "⟨Â²⟩ − ⟨Â⟩²", "AMANHÔ", "«CAFɻ", "pâté", "Ã X = Ã² Y", "vœu"]
)
def test_text_that_only_looks_misread_stays(text: str) -> None:
    assert steps.clean(text) == superscripts(text)


STAMPS = {
    "download stamp": (
        [
            "Downloaded from http://science.sciencemag.org/ on March 3, 2016",
            "Downloaded from www.annualreviews.org",
            "Downloaded by [University of Somewhere] at 12:34 07 May 2015",
            "This content downloaded from 130.1.2.3 on Mon, 12 Mar 2018 10:00:00 UTC",
        ],
        [
            "Downloaded from www.ncbi.nlm.nih.gov, the sequences were aligned in 2015.",
            "Downloaded data were aligned to the reference genome of 2009.",
        ],
    ),
    "licensed use": (
        ["Authorized licensed use limited to: Some University. Downloaded on May 7,2015 from IEEE Xplore."],
        ["Authorized licensed users had access to the data."],
    ),
    "copyright": (
        [
            "© 2019 The Authors. Published by Elsevier Ltd. This is an open access article.",
            "Copyright: © 2010 Smith et al.",
            "Copyright (c) 2015, The Developers.",
            "All rights reserved.",
            "This article is protected by copyright. All rights reserved",
        ],
        [
            "(c) 2010 data were excluded from the analysis.",
            "Copyright 1976 was the year of the act.",
            "All rights reserved by the states are listed in the annex.",
            "This article is protected from light.",
        ],
    ),
    "open access notice": (
        ["This is an open-access article distributed under the terms of the Creative Commons Attribution License."],
        ["This is an open question under the terms of the model."],
    ),
    "doi": (
        ["doi:10.1371/journal.pbio.0020188", "DOI: https://doi.org/10.1000/182"],
        ["doi:10.1371/journal.pbio.0020188 gives the data", "https://doi.org/10.1000/182"],
    ),
    "editorial dates": (
        [
            "Received: 3 March 2015; Accepted: 4 May 2015; Published: 2 June 2015",
            "Received March 3, 2015, accepted May 4, 2015",
        ],
        [
            "Received in 1999, the samples were accepted in 2001.",
            "Received pronunciation was accepted in 1950 and in 1960.",
        ],
    ),
    "preprint stamp": (
        [
            "arXiv:1911.02782v3 [cs.CL] 7 Jul 2020",
            "bioRxiv preprint doi: https://doi.org/10.1101/123; this version posted May 1, 2020.",
        ],
        ["arXiv:1911.02782 describes the corpus.", "The copyright holder must be asked."],
    ),
    "journal banner": (
        [
            "Contents lists available at ScienceDirect",
            "journal homepage: www.elsevier.com/locate/x",
            "Page 3 of 12",
            "ISSN: 1234-567X",
        ],
        [
            "Page 3 of 12 was missing.",
            "Contents listed below are given in percent.",
            "Available online at the usual price",
        ],
    ),
    "publisher's note": (
        ["Publisher’s note: Springer Nature remains neutral with regard to jurisdictional claims in published maps."],
        ["Publisher's notes on the second edition"],
    ),
    "cover sheet": (["View publication stats"], ["View publication statistics by year"]),
    "navigation": (["Skip to main content", "Back to top"], ["Skip to the main result", "Back to topology"]),
    "badges": (
        ["[![CI](https://ci.org/b.svg)](https://ci.org)", "[![a](b.svg)](c) [![d](e.svg)](f)"],
        ["![Figure 1](figure.png)", "[![CI](https://ci.org/b.svg)](https://ci.org) builds every commit"],
    ),
}


def test_every_kind_of_boilerplate_has_its_examples() -> None:
    assert STAMPS.keys() == steps.BOILERPLATE.keys()


@pytest.mark.parametrize(("kind", "line"), [(kind, line) for kind, (gone, _) in STAMPS.items() for line in gone])
def test_a_line_of_boilerplate_goes(kind: str, line: str) -> None:
    assert re.fullmatch(steps.BOILERPLATE[kind][1], line)
    assert steps.clean(f"Before.\n\n{line}\n\nAfter.") == "Before.\n\nAfter."
    indented = f"Before.\n\n    {line}\n\nAfter."
    assert steps.clean(indented) == indented, "code is no boilerplate"


@pytest.mark.parametrize("line", [line for _, stays in STAMPS.values() for line in stays])
def test_a_line_that_says_something_stays(line: str) -> None:
    assert steps.clean(line) == line


@given(st.text(alphabet=st.characters(codec=None)))
def test_clean_text_has_one_form(text: str) -> None:
    clean = steps.clean(text)
    assert unicodedata.is_normalized("NFC", clean)
    assert not re.search(r"[\r\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xa0\ud800-\uf8ff\ufeff]|[ \t]$|\n{3}", clean)
    clean.encode()


def test_what_is_passed_over_needs_no_mending() -> None:
    """The quick test for characters to mend must miss none that normalization or the table would change."""
    everything = [chr(code) for code in range(sys.maxunicode + 1)]
    decompositions = (unicodedata.decomposition(character) for character in everything)
    composing = {chr(int(d.split()[1], 16)) for d in decompositions if d and d[0] != "<" and " " in d}
    composing |= {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # Hangul composes by rule
    passed = [character for character in everything if not steps._SUSPECT.match(character)]
    assert not composing.intersection(passed)
    assert not [c for c in passed if unicodedata.combining(c) or steps._ODD.match(c)]
    assert unicodedata.is_normalized("NFC", "".join(passed))


def test_equal_content_has_one_hash() -> None:
    assert steps.content_hash("A  b\nc") == steps.content_hash("a b c")
    assert steps.content_hash("a b c") != steps.content_hash("a b d")


def test_the_held_out_share_is_about_what_was_asked() -> None:
    held = [steps.is_held_out(steps.content_hash(str(n)), 0.1) for n in range(5000)]
    assert 400 < sum(held) < 600


def test_a_text_does_not_end_its_document() -> None:
    assert (
        steps.clean("a </s> b <s>c <pad> d <unk> <sub> [START_REF]")
        == "a < /s> b < s>c < pad> d <unk> <sub> [START_REF]"
    )
