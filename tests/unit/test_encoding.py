"""Galactica's tokenizer, and the fast way to its ids and to those of others."""

from __future__ import annotations

import functools
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.encoding import Encoder, load_encoder, superscripts
from orchestrator.data.tokenizer import MARKER, SPECIAL_TOKENS, guard
from orchestrator.errors import UserError
from tests.conftest import ROOT, SHARED_DATA

PROSE = [path.read_text() for path in sorted((ROOT / "orchestrator").rglob("*.py"))] + [
    "Water, H[START_SUB]2[END_SUB]O, boils at 100 °C; the Schrödinger equation iħ∂ψ/∂t = Ĥψ holds.\n\n" * 20
]
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(
        [
            *SPECIAL_TOKENS,
            MARKER,
            " ",
            "  ",
            "\n",
            "\n\n",
            "\t",
            "a",
            " the",
            "12",
            "==",
            "=",
            "(",
            "é",
            "é",
            "ﬁ",
            "…",
            "̸",
            "\u200d",
            "👩\u200d🔬",
            "中文",
            "\xa0",
            ".",
            "'s",
            "A",
            "C(=O)N",
            "x²",
            "\U000e0001",
            "\u1ccd6",
        ]
    )
).map("".join)


@pytest.fixture(scope="module")
def galactica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("galactica")
    tokenizers.train(PROSE, 1200).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GPT-2's steps, and a tokenizer with steps that nothing is known of."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    found = {}
    for name, splitter, normalizer in (
        ("gpt2", pre_tokenizers.ByteLevel(add_prefix_space=False), None),
        ("unknown", pre_tokenizers.Metaspace(), normalizers.Lowercase()),
    ):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
        if normalizer:
            tokenizer.normalizer = normalizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=["</s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(PROSE, trainer)
        found[name] = tmp_path_factory.mktemp(name)
        tokenizer.save(str(found[name] / "tokenizer.json"))
        (found[name] / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return found


@functools.cache
def library(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def library_ids(folder: Path, text: str) -> list[int]:
    """What the tokenizers library itself says."""
    tokenizer = library(folder)
    guarded = guard(text) if tokenizers.splits_spans(tokenizer) else text
    ids: list[int] = tokenizer.encode(guarded, add_special_tokens=False).ids
    return ids


def pieces(folder: Path, text: str) -> list[str]:
    return [library(folder).decode([id_], skip_special_tokens=False) for id_ in library_ids(folder, text)]


def test_special_tokens_are_ids_0_to_22_and_one_token_each(galactica: Path) -> None:
    assert len(SPECIAL_TOKENS) == 23
    for number, token in enumerate(SPECIAL_TOKENS):
        assert library_ids(galactica, token) == [number]
        assert pieces(galactica, f"x{token}y") == ["x", token, "y"]


def test_digits_and_brackets_stand_alone_and_operators_with_their_like(galactica: Path) -> None:
    assert pieces(galactica, "2048") == list("2048")
    assert pieces(galactica, "((x))") == ["(", "(", "x", ")", ")"]
    assert pieces(galactica, "a=b+c") == ["a", "=", "b", "+", "c"]
    assert "".join(pieces(galactica, "===")) == "==="


@pytest.mark.parametrize("kind", ["DNA", "AMINO", "SMILES", "I_SMILES"])
def test_sequences_have_a_token_for_every_character(galactica: Path, kind: str) -> None:
    inside = "CC(=O)Nthe11"
    found = pieces(galactica, f"of [START_{kind}]{inside}[END_{kind}] the")
    start = found.index(f"[START_{kind}]")
    assert found[start + 1 : start + 2 + len(inside)] == [*inside, f"[END_{kind}]"]
    found = pieces(galactica, f"[START_{kind}]{inside}")
    assert found == [f"[START_{kind}]", *inside], "a prompt need not close its span"


def test_superscripts_are_no_ordinary_digits(galactica: Path) -> None:
    assert superscripts("10⁻³ x² H₂O 5ª™") == (
        "10[START_SUP]-3[END_SUP] x[START_SUP]2[END_SUP] H[START_SUB]2[END_SUB]O 5ª™"
    )
    assert pieces(galactica, superscripts("x²")) == ["x", "[START_SUP]", "2", "[END_SUP]"]


@settings(max_examples=200)
@given(TEXT)
def test_ids_are_those_of_the_library(galactica: Path, others: dict[str, Path], text: str) -> None:
    for folder in (galactica, *others.values()):
        encoder = load_encoder(folder)
        (ids,) = encoder.encode([text])
        assert ids.dtype == np.uint32
        assert ids.tolist() == [*library_ids(folder, text), encoder.end]


def test_ids_of_real_sources_are_those_of_the_library(galactica: Path, others: dict[str, Path]) -> None:
    for folder in (galactica, *others.values()):
        encoder = load_encoder(folder)
        for text, ids in zip(PROSE, encoder.encode(PROSE), strict=True):
            assert ids.tolist() == [*library_ids(folder, text), encoder.end]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
def test_ids_of_real_papers_are_those_of_the_library(galactica: Path) -> None:
    encoder = load_encoder(galactica)
    for name in ("plos-starter", "openstax-chemistry-2e"):
        for line in (SHARED_DATA / "corpus" / f"{name}.jsonl").read_text().splitlines()[:30]:
            text = superscripts(json.loads(line)["text"])
            assert encoder.encode([text])[0].tolist()[:-1] == library_ids(galactica, text)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
def test_special_tokens_of_real_prompts_are_single_ids(galactica: Path) -> None:
    for line in (SHARED_DATA / "galai" / "prompt_examples.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt_literal"]
        ids = library_ids(galactica, prompt)
        for number, token in enumerate(SPECIAL_TOKENS):
            assert ids.count(number) == prompt.count(token), (prompt, token)


@given(st.text(st.sampled_from("abc XYZ019()=+-.,:;\n\t\"'[]{}é€中")))
def test_what_was_encoded_is_decoded(galactica: Path, text: str) -> None:
    assert library(galactica).decode(library_ids(galactica, text)) == unicodedata.normalize("NFKC", text)


def test_a_long_text_is_cut_where_it_changes_nothing(galactica: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.data import encoding

    text = "".join(PROSE)[:200_000]
    whole = load_encoder(galactica).encode([text])[0]
    monkeypatch.setattr(encoding, "PIECE", 1000)
    assert np.array_equal(load_encoder(galactica).encode([text])[0], whole)


def test_an_endless_word_stalls_neither_training_nor_encoding(galactica: Path) -> None:
    word = "".join(chr(97 + (n * n) % 26) for n in range(2_000_000))
    trained = tokenizers.train([word, *PROSE[:5]], 600)
    assert len(trained) == 600
    (ids,) = load_encoder(galactica).encode([word])
    assert len(ids) > 100_000


def test_the_memory_of_words_is_bounded(galactica: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    from orchestrator.data import encoding

    monkeypatch.setattr(encoding, "REMEMBERED", 50)
    encoder: Any = Encoder(Tokenizer.from_file(str(galactica / "tokenizer.json")), 2)
    for text in PROSE:
        assert encoder.encode([text])[0].tolist()[:-1] == library_ids(galactica, text)
        assert len(encoder._memory) + len(encoder._memory._older) <= 100


def test_the_end_of_a_document_comes_from_the_tokenizer(tmp_path: Path, galactica: Path) -> None:
    assert load_encoder(galactica).end == 2
    (tmp_path / "tokenizer.json").write_text((galactica / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="no eos token"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        load_encoder(tmp_path)
