"""Galactica's tokenizer: byte-level BPE with its special tokens at ids 0-22, trained on the corpus or loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

# In this order, ids 0-22 (Taylor et al., "Galactica: A Large Language Model for Science", 2022, and its release).
SPECIAL_TOKENS = (
    "<s> <pad> </s> <unk> [START_REF] [END_REF] [IMAGE] <fragments> </fragments> <work> </work> [START_SUP] [END_SUP] "
    "[START_SUB] [END_SUB] [START_DNA] [END_DNA] [START_AMINO] [END_AMINO] [START_SMILES] [END_SMILES] "
    "[START_I_SMILES] [END_I_SMILES]"
).split()


def train(texts: Iterable[str], vocab_size: int) -> Any:
    """A transformers PreTrainedTokenizerFast of at most vocab_size entries, special tokens included.

    Digits stand alone and text is NFKC, as in Galactica.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[4:],
        clean_up_tokenization_spaces=False,
    )


def check_directory(path: str) -> None:
    """
    Raises:
        UserError: no tokenizer that the tokenizers library can run is there.
    """
    if not Path(path).is_dir():
        raise UserError(f"no directory at {path}", "give a Hugging Face directory")
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has no tokenizer (tokenizer.json)",
            "save one there with AutoTokenizer.from_pretrained(...).save_pretrained(...), or set tokenizer.path",
        )


def vocabulary_size(path: str) -> int:
    """Entries of the tokenizer in a directory, added tokens included."""
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    try:
        return int(Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True))
    except Exception as error:  # the library raises the bare class
        raise UserError(f"{file} is no tokenizer: {error}") from None


def load(path: str | Path) -> Any:
    """The transformers tokenizer of a directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def document_end(tokenizer: Any) -> int:
    """Id of the token that closes a document.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos token to end documents with", "set eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)
