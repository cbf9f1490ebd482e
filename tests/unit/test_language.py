from __future__ import annotations

import json
import subprocess
import sys

import pytest

from orchestrator.data import language, steps
from orchestrator.errors import UserError
from tests.conftest import ROOT, SHARED_DATA
from tests.languages import PARAGRAPHS


@pytest.mark.parametrize("code", PARAGRAPHS)
def test_a_paragraph_is_in_the_language_that_it_was_written_in(code: str) -> None:
    found, probability = language.language_of(PARAGRAPHS[code])
    assert found == code
    assert probability > language.SURE


def test_code_tables_formulas_and_citations_do_not_hide_the_language() -> None:
    text = "\n\n".join(
        [
            "| temperature of the sample | pressure in the tube |\n| --- | --- |\n| high | low |",
            PARAGRAPHS["de"],
            "```\nfor name in the_list_of_names:\n    print('this is the name', name)\n```",
            "[START_REF] On the movement of glaciers and the water that is below them, Smith[END_REF] $E = m c^2$",
            "See https://example.org/the/speed/of/the/ice and [START_AMINO]MKVLAAGIVGLWTHEANDOFINTO[END_AMINO].",
        ]
    )
    assert language.language_of(text)[0] == "de"


def test_a_long_text_is_judged_by_what_it_mostly_is() -> None:
    english_title_and_references = "The movement of the ice and the water below it. " * 8
    text = english_title_and_references + PARAGRAPHS["fr"] * 30 + english_title_and_references
    assert language.language_of(text)[0] == "fr"


@pytest.mark.parametrize(
    "text", ["", "Ad hoc.", "x = 3 + 4\n" * 50, "3.14 2.72 1.41 " * 90, "[START_SMILES]CC(=O)O[END_SMILES]"]
)
def test_what_holds_too_little_running_text_is_of_any_language(text: str) -> None:
    assert language.language_of(text) == (language.UNKNOWN, 0.0)
    assert not language.foreign(text, ("en",))


def test_foreign_is_what_is_surely_in_another_language() -> None:
    assert language.foreign(PARAGRAPHS["de"], ("en", "fr"))
    assert not language.foreign(PARAGRAPHS["de"], ("en", "de"))
    assert not language.foreign(PARAGRAPHS["de"], ())
    assert not language.foreign(PARAGRAPHS["de"], ("en",), min_probability=1.1)


def test_a_language_that_cannot_be_identified_is_refused() -> None:
    language.check_languages(())
    language.check_languages(("en", "zh"))
    with pytest.raises(UserError, match=r"corpus.languages: qq, xx cannot be identified"):
        language.check_languages(("xx", "en", "qq"))


def test_the_module_loads_no_model_until_it_is_asked() -> None:
    code = (
        "import sys; from orchestrator.data import language\n"
        "assert not language.foreign('', ('en',)); print('py3langid' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert said.stdout.strip() == "False"


@pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"no {SHARED_DATA}")
def test_real_papers_and_textbooks_in_english_are_found_english() -> None:
    for file in sorted((SHARED_DATA / "corpus").glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            texts = [steps.clean(json.loads(line)["text"]) for line in lines]
        assert not [text[:80] for text in texts if language.foreign(text, ("en",))]
