"""The tokenizer's rules, and that the encoder's ids are the tokenizer's own."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from orchestrator.data import encoding
from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.encoding import Encoder, load_encoder, superscripts
from orchestrator.data.tokenizer import MARKER, SPECIAL_TOKENS, guard
from orchestrator.errors import UserError
from tests.conftest import ROOT, SHARED_DATA

FILES = (ROOT / "README.md", ROOT / "DECISIONS.md", *sorted((ROOT / "orchestrator").glob("*.py")))
SAMPLE = [file.read_text() for file in FILES] + ["SPLIT, SPLASH, SPLENDID. " * 50]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train(SAMPLE, vocab_size=2000).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    """As text, each token decoded by itself."""
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.encode(guard(text)).ids]


# --- rules ------------------------------------------------------------------------------------------------------------


def test_special_tokens_have_the_released_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_token(i) for i in range(23)] == SPECIAL_TOKENS
    assert tokenizer.encode("".join(SPECIAL_TOKENS)).ids == list(range(23))


def test_every_digit_stands_alone(tokenizer: Tokenizer) -> None:
    assert tokens(tokenizer, "737612.62") == list("737612.62")
    assert tokens(tokenizer, "in 2024") == ["in", " ", *"2024"]


def test_operators_stand_alone_or_with_their_own_repetitions(tokenizer: Tokenizer) -> None:
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(r"a+b==((\sqrt{c})--x_i^*)")]
    assert pieces == [
        "a",
        "+",
        "b",
        "==",
        "(",
        "(",
        "\\",
        "sqrt",
        "{",
        "c",
        "}",
        ")",
        "--",
        "x",
        "_",
        "i",
        "^",
        "*",
        ")",
    ]


def test_no_entry_of_the_vocabulary_mixes_what_the_rules_keep_apart(tokenizer: Tokenizer) -> None:
    for token, number in tokenizer.get_vocab().items():
        text = tokenizer.decode([number])
        if number >= len(SPECIAL_TOKENS) and len(text) > 1:
            assert not re.search(r"[0-9()\[\]{}\n]", text), token
            assert len(set(text)) == 1 or not re.search(r"[!-/:-?\\^_`|~]", text), token


@pytest.mark.parametrize(
    ("kind", "sequence"),
    [("DNA", "CGGTACCCTC"), ("AMINO", "MIRLGAPQTL"), ("SMILES", "C(C(=O)O)N"), ("I_SMILES", "C[C@H](N)C(=O)O")],
)
def test_every_character_of_a_sequence_is_a_token(tokenizer: Tokenizer, kind: str, sequence: str) -> None:
    span = f"[START_{kind}]{sequence}[END_{kind}]"
    assert tokens(tokenizer, span) == [f"[START_{kind}]", *sequence, f"[END_{kind}]"]
    assert tokens(tokenizer, f"x{span}\n{span} y").count(f"[END_{kind}]") == 2
    assert tokens(tokenizer, f"[START_{kind}]{sequence}") == [f"[START_{kind}]", *sequence], "a prompt"


@pytest.mark.parametrize(
    "text",
    [
        "[START_DNA] opens a sequence of bases\nand this is prose",
        "either [START_DNA] or [START_AMINO]",
        "[START_DNA]a name[END_AMINO]",
        "[START_REF] a title[END_REF]",
        "no span at all",
    ],
)
def test_what_is_no_span_is_left_alone(text: str) -> None:
    assert guard(text) == text


def test_a_span_inside_a_sequence_is_part_of_it(tokenizer: Tokenizer) -> None:
    text = "[START_DNA]A<s>[START_DNA]C[END_DNA]G"
    assert tokens(tokenizer, text) == ["[START_DNA]", *"A<s>[START_DNA]C", "[END_DNA]", "G"]


def test_a_combining_mark_leaves_the_marker_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(guard("[START_SMILES]C\u0301E\u0301\u0327C[END_SMILES]")).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[START_SMILES]\u0106\u0228\u0301C[END_SMILES]"


@pytest.mark.parametrize(
    "text", [MARKER, f"x{MARKER}1{MARKER}{MARKER}y", f"[START_DNA]A{MARKER}[END_DNA]{MARKER}\u0301"]
)
def test_a_text_that_holds_the_marker_keeps_it(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(guard(text)).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFKC", text)


def test_the_marker_tells_which_tokenizers_split_spans(directory: Path, tokenizer: Tokenizer) -> None:
    assert tokenizers.splits_spans(tokenizer)
    assert tokenizers.splits_spans(tokenizers.load(directory))
    other = Tokenizer(models.BPE())
    assert not tokenizers.splits_spans(other)
    other.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert not tokenizers.splits_spans(other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x²", "x[START_SUP]2[END_SUP]"),
        ("10⁻³ m", "10[START_SUP]-3[END_SUP] m"),
        ("H₂O", "H[START_SUB]2[END_SUB]O"),
        ("Ca²⁺, SO₄²⁻", "Ca[START_SUP]2+[END_SUP], SO[START_SUB]4[END_SUB][START_SUP]2-[END_SUP]"),
        ("Aᵀ tᵢ xⁿ⁽¹⁾", "A[START_SUP]T[END_SUP] t[START_SUB]i[END_SUB] x[START_SUP]n(1)[END_SUP]"),
        ("1ª 2º brand™ ½ é x2", "1ª 2º brand™ ½ é x2"),
    ],
)
def test_superscripts_become_spans(text: str, expected: str) -> None:
    assert superscripts(text) == expected
    assert superscripts(expected) == expected


def test_a_superscript_survives_nfkc(tokenizer: Tokenizer) -> None:
    assert tokens(tokenizer, "x²") == ["x", "2"]
    assert tokens(tokenizer, superscripts("x²")) == ["x", "[START_SUP]", "2", "[END_SUP]"]


ASSIGNED = st.characters(exclude_categories=["Cn", "Cs", "Co"])
PIECES = st.sampled_from(
    "\n|\n\n| |  |\t|\r\n|\u00a0|\u3000|\u2028|\x85|\x1c|a|The| foo|é|e\u0301|\u0301|\u0338|=|==|<|<<|>|--|.|...|…|!|'"
    "|'s|’s|1|23|4567|½|²|①|५|(|)|[|]|{|}|@|_|\\alpha|$|中|文。，|ﬁ|µ|´|🙂|👩\u200d🔬|\u200b|\ufeff|\u180e|한|ᄀ|ᅡ|À|ﷺ"
    "|</s>|<s>|[START_REF]|[END_REF]|[START_DNA]|[END_DNA]|[START_AMINO]|[END_AMINO]|[START_SMILES]|ACGT|C(=O)O|SPL1T"
    f"|\U00040000|\u0378|\x00|\x7f|~|`|^|#|%|{MARKER}".split("|")
) | st.sampled_from(["|", "<|end|>"])
TEXTS = st.lists(st.one_of(PIECES, st.text(st.characters(exclude_categories=["Cs"]), max_size=3)), max_size=20).map(
    "".join
)


@given(text=st.lists(st.one_of(PIECES, st.text(ASSIGNED)), max_size=20).map("".join))
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFKC", text)
    assert tokenizer.decode(tokenizer.encode(guard(text)).ids, skip_special_tokens=False) == text


def test_prompts_of_the_release_have_one_id_for_each_special_token(tokenizer: Tokenizer) -> None:
    rows = SHARED_DATA / "galai" / "prompt_examples.jsonl"
    if not rows.is_file():
        pytest.skip(f"{rows} is absent")
    found = 0
    for line in rows.read_text().splitlines():
        literal = ast.parse(json.loads(line)["prompt_literal"], mode="eval")  # f-strings too: their fixed parts
        prompt = "".join(str(node.value) for node in ast.walk(literal) if isinstance(node, ast.Constant))
        expected = re.findall("|".join(map(re.escape, SPECIAL_TOKENS)), prompt)
        ids = tokenizer.encode(guard(prompt)).ids
        assert [i for i in ids if i < len(SPECIAL_TOKENS)] == [SPECIAL_TOKENS.index(token) for token in expected]
        assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFKC", prompt)
        found += len(expected)
    assert found


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizers.train(SAMPLE[:2], vocab_size=400)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("word", ["a" * 300_000, "ACGTTGCA" * 40_000, "-" * 300_000, "漢字" * 100_000])
def test_no_endless_word_is_trained_on(word: str) -> None:
    pieces = list(tokenizers._prose(f"before {word} after"))
    assert "".join(pieces).replace("\n", "") == f"before {word} after"
    assert max(len(part) for piece in pieces for part in piece.split()) == tokenizers.LONGEST_WORD


def test_merges_come_from_prose_alone() -> None:
    text = "[START_REF] Title, Author[END_REF] and [START_DNA]ACGTACGTACGT[END_DNA] then <work>sums</work>"
    assert "|".join(tokenizers._prose(text)) == "| Title, Author| and ||| then |sums|"
    vocabulary = tokenizers.train([text * 50], vocab_size=400).get_vocab()
    assert not {"AC", "GT", "ACGT", "ST", "START"} & set(vocabulary)


# --- encoder ----------------------------------------------------------------------------------------------------------


def byte_level(*steps: Any, normalizer: Any = None, use_regex: bool = True) -> Tokenizer:
    """A tokenizer trained on the sample with these steps before the bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|end", "<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def by_pattern(pattern: str, normalizer: Any = None) -> Tokenizer:
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), normalizer=normalizer, use_regex=False)


def sentence_piece() -> Tokenizer:
    """As of Llama 2: blanks become letters, the text is one word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator([line for text in SAMPLE[:2] for line in text.splitlines()], trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "galactica": lambda: tokenizers.train(SAMPLE, vocab_size=2000).backend_tokenizer,
    "gpt-2": byte_level,
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), normalizer=normalizers.NFKC()),
    "llama-3": lambda: by_pattern(encoding._PATTERNS[0]),
    "qwen-2": lambda: by_pattern(encoding._PATTERNS[1], normalizers.NFC()),
    "unknown pattern": lambda: by_pattern(r"\s+|\S+\s|\S"),
    "llama-2": sentence_piece,
}
WITHOUT_UNITS = {"unknown pattern", "llama-2"}


@pytest.fixture(params=TOKENIZERS, scope="module")
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, Encoder]:
    """A tokenizer, and an encoder with its own copy."""
    original = TOKENIZERS[request.param]()
    encoder = Encoder(Tokenizer.from_str(original.to_str()), end=1)
    assert (encoder._units is None) == (request.param in WITHOUT_UNITS)
    return original, encoder


def assert_same_ids(both: tuple[Tokenizer, Encoder], texts: list[str]) -> None:
    tokenizer, encoder = both
    whole = [guard(text) for text in texts] if tokenizers.splits_spans(tokenizer) else texts
    expected = tokenizer.encode_batch_fast(whole, add_special_tokens=False)
    for text, ids, encoding_ in zip(texts, encoder.encode(texts), expected, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == [*encoding_.ids, encoder.end], text


@given(texts=st.lists(TEXTS, max_size=3))
def test_ids_are_those_of_the_tokenizer(both: tuple[Tokenizer, Encoder], texts: list[str]) -> None:
    assert_same_ids(both, texts)


@pytest.mark.parametrize("around", ["a{} b  c\n{}", "={}  =={} =", "5{}\nz5\t{}", "(a{} a'{}", "  {}x ' {}s\n\n{}"])
def test_ids_hold_around_every_kind_of_character(both: tuple[Tokenizer, Encoder], around: str) -> None:
    points = [*range(0x600), *range(0x600, 0x3400, 7), *range(0x1FE0, 0x2070), *range(0x3000, 0x30A0)]
    points += [*range(0xF900, 0x10000, 5), *range(0x10000, 0x20000, 251), 0xE0001, 0x10FFFF]
    assert_same_ids(both, [around.replace("{}", chr(point)) for point in points])


def test_ids_hold_on_real_documents(both: tuple[Tokenizer, Encoder]) -> None:
    files = sorted((SHARED_DATA / "corpus").glob("*.jsonl"))
    if not files:
        pytest.skip(f"{SHARED_DATA / 'corpus'} is absent")
    assert_same_ids(both, [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()[::40]])


def test_ids_hold_on_a_text_of_several_pieces(both: tuple[Tokenizer, Encoder]) -> None:
    paragraph = "The mass of π⁺ is 139.57 MeV/c² (naïve),\nso e = mc^2…\n\n  - " + "x" * 90 + "\tend. "
    text = "".join(f"{number} {paragraph}" for number in range(encoding.PIECE // len(paragraph) + 500))
    assert len(text) > encoding.PIECE
    assert_same_ids(both, [text, "short", text[: encoding.PIECE // 2]])


def test_a_long_text_is_cut_into_pieces(tokenizer: Tokenizer) -> None:
    encoder = Encoder(Tokenizer.from_str(tokenizer.to_str()), end=2)
    assert encoder._units is not None
    pieces = list(encoder._pieces("word and <work>number 12\n" * 200_000, encoder._units))
    assert max(sum(map(len, piece)) for piece in pieces) <= encoding.PIECE + 8
    assert "".join(unit for piece in pieces for unit in piece) == "word and <work>number 12\n" * 200_000


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr(encoding, "REMEMBERED", 20)
    encoder = Encoder(Tokenizer.from_str(tokenizer.to_str()), end=2)
    assert_same_ids((tokenizer, encoder), [*SAMPLE[:2], "y" * 1000])
    assert len(encoder._memory) <= 20
    assert len(encoder._memory._older) <= 20
    assert max(map(len, encoder._memory)) <= encoding.LONGEST_UNIT


def test_a_lone_surrogate_is_refused(both: tuple[Tokenizer, Encoder]) -> None:
    with pytest.raises(TypeError):
        both[1].encode(["a \ud800 b"])


@pytest.mark.parametrize(
    "change",
    [{"lstrip": True}, {"single_word": True}, {"normalized": True}],
)
def test_added_tokens_that_look_around_them_rule_units_out(tokenizer: Tokenizer, change: dict[str, bool]) -> None:
    content = json.loads(tokenizer.to_str())
    content["added_tokens"][4] |= change
    changed = Tokenizer.from_str(json.dumps(content))
    encoder = Encoder(Tokenizer.from_str(json.dumps(content)), end=2)
    assert encoder._units is None
    assert_same_ids((changed, encoder), ["a [START_REF] b[START_REF]c [START_DNA]AC[END_DNA]", SAMPLE[0]])


# --- directories ------------------------------------------------------------------------------------------------------


def test_the_encoder_agrees_with_transformers(directory: Path) -> None:
    auto, encoder = tokenizers.load(directory), load_encoder(directory)
    assert (encoder.end, encoder.vocab_size) == (tokenizers.document_end(auto), len(auto))
    assert encoder.vocab_size == tokenizers.vocabulary_size(str(directory)) == 2000
    text = SAMPLE[0] + "[START_REF] Title, Author[END_REF] naïve ½ 2024"
    (ids,) = encoder.encode([text])
    assert ids.tolist() == [*auto.encode(text, add_special_tokens=False), 2]


def test_equal_directories_share_an_encoder(directory: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    assert load_encoder(tmp_path) is load_encoder(str(directory))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": "</s>"}),
        ("generation_config.json", {"eos_token_id": 2}),
        ("generation_config.json", {"eos_token_id": [2, 7]}),
        ("config.json", {"eos_token_id": 2}),
    ],
)
def test_the_document_end_is_found_where_models_name_it(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps(content))
    assert load_encoder(tmp_path).end == 2


def test_a_directory_without_a_document_end_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no eos token"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none such>"}')
    with pytest.raises(UserError, match="no eos token"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="no directory"):
        load_encoder(tmp_path / "absent")


def test_a_saved_truncation_does_not_shorten_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    short = Tokenizer.from_str(tokenizer.to_str())
    short.enable_truncation(4)
    short.enable_padding()
    short.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert_same_ids((tokenizer, load_encoder(tmp_path)), [SAMPLE[0], "two", SAMPLE[1]])


def test_an_encoder_needs_neither_transformers_nor_torch(directory: Path) -> None:
    code = (
        "import sys; from orchestrator.data.encoding import load_encoder\n"
        f"load_encoder({str(directory)!r}).encode(['text'])\n"
        "print(sorted({'transformers', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("settings", ["{", "[]", "[" * 100_000, "\0"])
def test_settings_of_a_tokenizer_that_are_damaged_are_told(settings: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizers.check_directory(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(UserError, match=r"tokenizer_config\.json is damaged"):
        tokenizers.check_directory(str(tmp_path))
