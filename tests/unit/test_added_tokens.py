"""A model's own tokenizer learns new tokens, and the model rows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from orchestrator.config import Recipe, load_recipe
from orchestrator.data import tokenizer as tokenizers
from orchestrator.data.encoding import Encoder
from orchestrator.errors import UserError
from orchestrator.model_config import TokenizerConfig
from orchestrator.planning.shape import model_shape
from orchestrator.train.fragments import Box
from orchestrator.train.models import build_model
from orchestrator.train.weights import ResizedWeights, open_weights
from tests.model_directories import FAMILIES, config_of, model_of

TEXT = "See [START_REF] A Title, Author[END_REF] for x[START_SUP]2[END_SUP] and <work>1+1</work>, <kelvin> or kelvin."


def llama_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer that knows neither Galactica's tokens nor a padding token; returns its size."""
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the title of a paper by an author"] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=tokens[0], eos_token=tokens[1])
    fast.save_pretrained(folder)
    return len(fast)


def model_with_tokenizer(folder: Path, family: str = "llama", padding: int = 0) -> tuple[Any, int]:
    """A model's directory whose tokenizer has as many entries as the model rows, `padding` aside."""
    size = llama_tokenizer(folder)
    model = model_of(config_of(family, vocab_size=size + padding))
    model.save_pretrained(folder)
    return model, size


def recipe(folder: Path, add: Any, **values: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "corpus": {"sources": [{"name": "a", "path": "/data"}]},
            "model": {"path": str(folder)},
            "tokenizer": {"add": add},
            "train": {"steps": 1, "lr": 1e-3, "sequence_length": 64, **values},
        }
    )


# --- tokens -----------------------------------------------------------------------------------------------------------


def extended(folder: Path, add: Any) -> Any:
    tokenizer = tokenizers.load(folder)
    tokenizers.extend(tokenizer, TokenizerConfig(add=add))
    return tokenizer


def test_galacticas_tokens_are_learned_after_the_models_own(tmp_path: Path) -> None:
    size = llama_tokenizer(tmp_path)
    before = tokenizers.load(tmp_path)
    tokenizer = extended(tmp_path, "galactica")
    assert tokenizer.convert_tokens_to_ids(tokenizers.SPECIAL_TOKENS[4:]) == list(range(size, size + 19))
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (before.eos_token_id, before.bos_token_id)
    plain = "the title of a paper"
    assert tokenizer(plain).input_ids == before(plain).input_ids
    ids = tokenizer(TEXT).input_ids
    assert [tokenizer.decode([i]) for i in ids if i >= size] == [
        "[START_REF]",
        "[END_REF]",
        "[START_SUP]",
        "[END_SUP]",
        "<work>",
        "</work>",
    ]
    assert tokenizer.decode(ids) == TEXT
    assert "[START_REF]" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("add", ["galactica", ["<kelvin>", "[END_REF]"]], ids=str)
def test_an_extended_tokenizer_keeps_its_tokens_in_files_and_in_the_encoder(add: Any, tmp_path: Path) -> None:
    llama_tokenizer(tmp_path / "before")
    tokenizer = extended(tmp_path / "before", add)
    tokenizer.save_pretrained(tmp_path / "after")
    saved = tokenizers.load(tmp_path / "after")
    assert saved.get_vocab() == tokenizer.get_vocab()
    encoder = Encoder(Tokenizer.from_file(str(tmp_path / "after" / "tokenizer.json")), end=1)
    (ids,) = encoder.encode([TEXT])
    assert ids.tolist() == [*tokenizer(TEXT).input_ids, 1]
    assert encoder.vocab_size == int(np.max(list(tokenizer.get_vocab().values()))) + 1


def test_the_planned_vocabulary_is_that_of_the_extended_tokenizer(tmp_path: Path) -> None:
    _, size = model_with_tokenizer(tmp_path)
    for add in ("galactica", ["<kelvin>", "the"], ["<kelvin>", "[END_REF]"]):
        entries = len(extended(tmp_path, add))
        assert tokenizers.planned_vocabulary(recipe(tmp_path, add)) == entries
    assert tokenizers.planned_vocabulary(recipe(tmp_path, [])) == size


def test_tokens_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("<kelvin>\n\n[END_REF]\n")
    assert tokenizers.added_tokens(TokenizerConfig(add=str(file))) == ["<kelvin>", "[END_REF]"]
    for content, message in (("", "names no token"), ("a\na\n", "names a token twice")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            tokenizers.added_tokens(TokenizerConfig(add=str(file)))
    with pytest.raises(UserError, match="cannot be read"):
        tokenizers.added_tokens(TokenizerConfig(add=str(tmp_path / "none.txt")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.add=galactica"], "tokenizer.add does nothing without model.path"),
        (["model.path=/m", "tokenizer.add=galactica", "tokenizer.path=/t"], "does nothing beside tokenizer.path"),
        (["model.path=/m", "tokenizer.add=[a, a]"], "twice"),
        (["model.path=/m", "tokenizer.add=[' a']"], "blanks around it"),
        (["model.path=/m", "tokenizer.add=['']"], "tokenizer.add"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: r\ncorpus: {sources: [{name: a, path: /a}]}\ntrain: {steps: 1, lr: 1e-3}\n")
    with pytest.raises(UserError, match=message):
        load_recipe(file, overrides)


# --- rows -------------------------------------------------------------------------------------------------------------


def embeddings(model: Any) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in parameters if name.endswith(("embed_tokens.weight", "lm_head.weight"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_old_rows_stay_and_new_rows_are_their_mean(family: str, tmp_path: Path) -> None:
    model, size = model_with_tokenizer(tmp_path, family)
    chosen = recipe(tmp_path, "galactica")
    grown = build_model(chosen.model, vocab_size=size + 19, sequence_length=64, seed=1, dtype=torch.float32)
    assert grown.config.vocab_size == size + 19
    assert model_shape(chosen, size + 19).parameters == sum(p.numel() for p in grown.parameters())
    before, after = embeddings(model), embeddings(grown)
    assert len(after) == (1 if model.config.tie_word_embeddings else 2)
    for name, rows in after.items():
        assert torch.equal(rows[:size], before[name])
        mean = before[name].mean(0).expand(19, -1)
        torch.testing.assert_close(rows[size:], mean)
    others = {name: p for name, p in model.named_parameters() if name not in before}
    assert all(torch.equal(dict(grown.named_parameters())[name], p) for name, p in others.items())
    ids = torch.arange(64)[None]
    torch.testing.assert_close(grown(ids).logits[..., :size], model.eval()(ids).logits)


def test_rows_that_a_model_has_for_padding_are_taken_by_new_tokens(tmp_path: Path) -> None:
    model, size = model_with_tokenizer(tmp_path, padding=30)
    weights = open_weights(recipe(tmp_path, ["<kelvin>"]).model, size + 1, 64, seed=1)
    name, old = "lm_head.weight", dict(model.named_parameters())["lm_head.weight"].detach()
    assert weights.shapes[name] == (size + 30, 32)
    rows = weights.read(name, Box.whole(weights.shapes[name]))
    torch.testing.assert_close(rows[size:], old[:size].mean(0).expand(30, -1))
    unchanged = open_weights(recipe(tmp_path, []).model, size, 64, seed=1)
    assert torch.equal(unchanged.read(name, Box.whole(old.shape)), old), "no new token: nothing changes"


def test_a_larger_tokenizer_never_takes_rows_by_itself(tmp_path: Path) -> None:
    _, size = model_with_tokenizer(tmp_path, padding=30)
    values = recipe(tmp_path, []).model_dump() | {"tokenizer": {"path": str(tmp_path)}}
    other = Recipe.model_validate(values)
    assert model_shape(other, size).vocab_size == size + 30
    with pytest.raises(UserError, match=rf"has {size + 1} entries, the model .* knows {size}") as caught:
        model_shape(other, size + 1)
    assert "tokenizer.add" in caught.value.hint
    (tmp_path / "tokenizer.json").unlink()
    assert model_shape(other, size + 30).vocab_size == size + 30


def test_a_box_of_a_resized_matrix_is_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.train.weights.BLOCK", 100)  # the mean in many pieces
    _, size = model_with_tokenizer(tmp_path)
    chosen = recipe(tmp_path, "galactica").model
    weights = open_weights(chosen, size + 19, 64, seed=1)
    assert isinstance(weights, ResizedWeights)
    whole = weights.read("lm_head.weight", Box.whole((size + 19, 32)))
    for first, rows in ((0, 5), (size - 2, 4), (size, 19), (size + 3, 1)):
        box = Box((first, 8), (rows, 20))
        assert torch.equal(weights.read("lm_head.weight", box), whole[box.slices])
