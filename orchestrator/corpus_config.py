"""The `corpus` section of a recipe: where documents come from, and which of them are trained on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config_section import Count, InputPath, Positive, Section, Share

SourceFormat = Literal[
    "auto",
    "jsonl",
    "parquet",
    "text",
    "markdown",
    "html",
    "latex",
    "jats",
    "tei",
    "s2orc",
    "pdf",
    "code",
    "docstrings",
    "metadata",
]


class Source(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    path: InputPath
    """File, directory or glob, on a local path or s3://. `${site_packages}` stands for the running Python's."""
    include: tuple[str, ...] = ()
    """File name patterns to take from a directory; empty takes every format that Terrane reads."""
    format: SourceFormat = "auto"
    """auto goes by each file's name, then by its content. docstrings takes the documentation out of Python sources."""
    select: Literal["all", "abstract_introduction_conclusion"] = "all"
    """What of a paper is kept: everything, or what AstroLLaMA was trained on."""
    text_field: str = Field(default="text", min_length=1)
    """Of JSON Lines and Parquet: the field that holds the text, as Markdown or plain."""


class MixtureStage(Section):
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """Share of every batch by source; they are scaled to add up to 1. A source that is not named gets none."""
    tokens: int | None = Field(default=None, ge=1)
    """How long the stage lasts. None, for the last one: to the end."""

    @model_validator(mode="after")
    def something_is_drawn(self) -> Self:
        total = sum(self.weights.values())
        if not total:
            raise ValueError("every weight is 0")
        if small := [name for name, weight in self.weights.items() if 0 < weight < total / 1e4]:
            raise ValueError(f"the weight of {small[0]} is below 1/10000 of the batch")
        return self


class QualityConfig(Section):
    """Documents outside of these limits are dropped, each with its reason; null turns a rule off.

    The defaults let papers, textbooks and technical documentation through, with their tables, code and formulas. Words
    are what stands between blanks; rules on words skip text in scripts that write none, as Chinese.
    """

    min_characters: Count | None = 200
    max_characters: Count | None = None
    min_mean_word_length: Positive | None = 2.5
    """Characters. Broken scans fall below: single letters, specks. Gopher takes 3."""
    max_mean_word_length: Positive | None = 30.0
    """Characters. Encoded data and lists of links lie above; documentation with many links reaches 25, papers 7. Gopher
    takes 10."""
    min_plain_word_share: Share | None = 0.2
    """Of words that are two letters or more and nothing else, punctuation around them aside. Papers have 0.65 and more,
    code 0.3; specks that were read as text, and tables of numbers, have less."""
    min_prose_share: Share | None = 0.04
    """Of words that end a sentence or are function words of a larger language in Latin script. Prose has 0.3, terse
    documentation 0.1, a list of names next to nothing. Text in other scripts passes."""
    max_digit_share: Share | None = 0.4
    """Of the characters that are not blank. Papers have 0.05."""
    max_symbol_word_ratio: Positive | None = 0.2
    """Hashtags and ellipses per word. Gopher takes 0.1."""
    max_short_line_share: Share | None = 0.8
    """Of words that stand in lines of 3 words at most, as in menus and lists of names. Papers have 0.02, reference
    documentation up to 0.5."""
    max_bullet_line_share: Share | None = 0.9
    """Of lines that are list items (Gopher)."""
    max_ellipsis_line_share: Share | None = 0.3
    """Of lines that break off in an ellipsis (Gopher)."""
    max_duplicate_line_share: Share | None = 0.6
    """Of the text's characters, in lines that stood there before. The reference of an API repeats up to 0.6, papers
    0.05; Gopher takes 0.2. A repeated paragraph is repeated lines."""
    max_top_ngram_share: Share | None = 0.3
    """Of the characters of a sample in its commonest sequence of 2, 3 or 4 words. Gopher takes 0.20, 0.18 and 0.16."""
    max_unbroken_share: Share | None = 0.3
    """Of the characters in words of more than 200, such as embedded images and minified code; marked sequences such as
    [START_DNA] are none."""
    max_replacement_share: Share | None = 0.01
    """Of characters that some conversion before could not read (U+FFFD)."""
    max_compression_ratio: Annotated[float, Field(gt=1)] | None = 12.0
    """Bytes of the text per byte of it compressed (zstd level 1): repetition at any distance. Papers have 2.7."""


class CorpusConfig(Section):
    sources: tuple[Source, ...] = Field(min_length=1)
    mixture: tuple[MixtureStage, ...] = ()
    """Stages of training and their shares by source; without it every document is drawn once an epoch."""
    near_duplicates: Annotated[float, Field(ge=0.3, le=1)] | None = 0.8
    """Of documents whose word 5-grams have this Jaccard similarity or more, the first stays; null keeps them all."""
    duplicate_spans: bool = False
    """Cut passages of 100 bytes or more that an earlier document holds too (Galactica, 2022)."""
    decontaminate: InputPath | None = None
    """Directory of evaluation sets. A document that shares a run of 13 words with one of them is dropped."""
    held_out: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of the documents kept out of training for evaluation."""
    languages: tuple[Annotated[str, Field(pattern="^[a-z]{2}$")], ...] = ()
    """ISO 639-1 codes, as in [en, de]; documents that are surely in another language are dropped. Empty keeps all."""
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def names_are_unique(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources share a name: {', '.join(names)}")
        for stage in self.mixture:
            if unknown := sorted(set(stage.weights) - set(names)):
                raise ValueError(f"mixture names {unknown[0]}, which is no source (sources: {', '.join(names)})")
        if any(stage.tokens is None for stage in self.mixture[:-1]):
            raise ValueError("only the last stage of a mixture may leave out its tokens")
        if self.mixture and self.mixture[-1].tokens is not None:
            raise ValueError("the last stage of a mixture lasts to the end: leave out its tokens")
        return self
