"""The selection of sections that AstroLLaMA takes: abstract, introduction, conclusion."""

from __future__ import annotations

import pytest

from orchestrator.data.readers import Unreadable
from orchestrator.data.readers.markup import abstract_introduction_conclusion as select


def paper(*heads: str) -> str:
    return "\n\n".join(["# T", *(f"{head}\n\nbelow {number}" for number, head in enumerate(heads))])


def kept(*heads: str) -> list[str]:
    return [line for line in select(paper(*heads)).split("\n") if line.startswith("#")][1:]


@pytest.mark.parametrize(
    "head",
    [
        "Abstract",
        "ABSTRACT.",
        "Summary",
        "A B S T R A C T",
        "Introduction",
        "1 Introduction",
        "1. Introduction",
        "1.Introduction",
        "1Introduction",
        "I. INTRODUCTION",
        "I INTRODUCTION",
        "1. I N T R O D U C T I O N",
        "**1 Introduction**",
        "Introduction and motivation",
        "Background and introduction",
        "Section 1: Introduction",
        "Introduction {#sec:intro}",
        "Conclusion",
        "5 Conclusions",
        "VI. CONCLUSIONS AND OUTLOOK",
        "Concluding remarks",
        "Final Remarks",
        "Summary and conclusions",
        "Summary & Outlook",
        "Discussion and Conclusions",
        "Summary, discussion, and conclusions",
        "Conclusion and Future Work",
    ],
)
def test_a_heading_is_known_in_all_its_dresses(head: str) -> None:
    assert kept("## Methods", f"## {head}", "## Results") == [f"## {head}"]


@pytest.mark.parametrize(
    "head",
    [
        "Methods",
        "Conclusion of the proof of Theorem 1",
        "Inconclusive results",
        "Acknowledgments",
        "Discussion",
        "Summary statistics",
        "Civil engineering",
        "Abstraction layers",
        "Introductory courses",
    ],
)
def test_other_sections_are_left_out(head: str) -> None:
    with pytest.raises(Unreadable, match=r"^no abstract, introduction or conclusion$"):
        select(paper(f"## {head}"))


def test_subsections_stay_with_their_section_and_a_conclusion_may_be_one() -> None:
    heads = "## Abstract,### Background,### Conclusions,## 1 Introduction,### Aims,## Methods,### Cells,## Discussion"
    heads += ",### Limits,### Conclusions,## Acknowledgments"
    assert kept(*heads.split(",")) == [
        "## Abstract",
        "### Background",
        "### Conclusions",
        "## 1 Introduction",
        "### Aims",
        "### Conclusions",
    ]


def test_background_stands_in_for_an_introduction_alone() -> None:
    assert kept("## Abstract", "### Background", "## Background", "## Methods", "## Conclusions") == [
        "## Abstract",
        "### Background",
        "## Background",
        "## Conclusions",
    ]
    assert kept("## Introduction", "## Background") == ["## Introduction"]


def test_title_text_and_order_are_kept_and_nothing_else() -> None:
    markdown = "# Title\n\nAuthors\n\n## Abstract\n\nA.\n\nB.\n\n## Methods\n\nM.\n\n## Conclusion\n\nC.\n"
    assert select(markdown) == "# Title\n\n## Abstract\n\nA.\n\nB.\n\n## Conclusion\n\nC."


def test_a_document_may_have_sections_at_the_level_of_its_title() -> None:
    assert select("# T\n\nx\n\n# Introduction\n\ny\n\n# Data\n\nz") == "# T\n\n# Introduction\n\ny"
    assert select("# Introduction\n\ny\n\n# Data\n\nz") == "# Introduction\n\ny"


@pytest.mark.parametrize("fence", ["```", "~~~~"])
def test_text_inside_a_fence_is_no_heading(fence: str) -> None:
    code = f"{fence}\n# Introduction\n## Methods\n{fence}"
    with pytest.raises(Unreadable):
        select(f"# T\n\n## Methods\n\n{code}")
    assert select(f"# T\n\n## Introduction\n\n{code}\n\nafter\n\n## Methods\n\nm").endswith(f"{code}\n\nafter")
