"""The `model` and `tokenizer` sections of a recipe: what training begins from."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from orchestrator.config_section import Count, InputPath, Section, settled_path

_HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*@[\w./-]+")


def is_hub_model(path: str) -> bool:
    """Whether a `model.path` is `org/name@revision`."""
    return _HUB_MODEL.fullmatch(path) is not None


def _settled_model(path: str) -> str:
    return path if is_hub_model(path) else settled_path(path)


def _settled_tokens(tokens: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(tokens, str):
        return tokens if tokens == "galactica" else settled_path(tokens)
    if blank := [token for token in tokens if token != token.strip() or "\n" in token]:
        raise ValueError(f"{blank[0]!r} has blanks around it")
    if len(set(tokens)) != len(tokens):
        raise ValueError("a token stands there twice")
    return tokens


MOST_LAYERS = 10_000
"""Of a model: each is counted one by one."""

ModelPath = Annotated[str, Field(min_length=1), AfterValidator(_settled_model)]
AddedTokens = Annotated[str, Field(min_length=1)] | tuple[Annotated[str, Field(min_length=1)], ...]


class ModelConfig(Section):
    path: ModelPath | None = None
    """A model to adapt, of the families OPT (Galactica), Llama, Qwen2, Qwen3, Mistral and Aquila: a Hugging Face
    directory, on a path that every node has, or `org/name@revision` of the Hugging Face hub or the mirror that
    HF_ENDPOINT names. Without it, a model is made from random weights."""
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    """Of a model of the hub: what its revision meant when the run began. A run finds and keeps it by itself."""
    preset: Literal["galactica-125m", "galactica-1.3b", "galactica-6.7b", "galactica-30b", "galactica-120b"] | None = (
        None
    )
    """A published size of Galactica, in place of the keys below."""
    architecture: Literal["galactica", "llama", "qwen2", "qwen3", "mistral"] = "galactica"
    """Decoder family. Galactica is an OPT with GeLU, no biases and learned positions; the others have rotary positions
    and gated feed-forward networks."""
    layers: int = Field(default=12, ge=1, le=MOST_LAYERS)
    hidden_size: int = Field(default=768, ge=8)
    heads: int = Field(default=12, ge=1)
    kv_heads: Count | None = None
    """Heads of keys and values, each shared by heads/kv_heads of queries; as many as heads unless given."""
    ffn_size: Count | None = None
    """Inner size of the feed-forward networks; 4 x hidden_size unless given, 8/3 of it where they are gated."""
    tied_embeddings: bool = False
    """Whether input and output embeddings are one matrix. Galactica's always are."""

    @model_validator(mode="after")
    def sizes_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden_size={self.hidden_size}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        rotary = self.architecture != "galactica"
        if rotary and self.hidden_size // self.heads % 2:
            raise ValueError(f"rotary positions need heads of an even size, not {self.hidden_size // self.heads}")
        if not rotary and (self.kv_heads or self.tied_embeddings):
            key = "kv_heads" if self.kv_heads else "tied_embeddings"
            raise ValueError(f"{key} is not for galactica: it has as many heads of keys as of queries, and ties")
        if self.commit and not (self.path and is_hub_model(self.path)):
            raise ValueError("commit is for a model.path of the hub, as in org/name@main")
        return self


class TokenizerConfig(Section):
    path: InputPath | None = None
    """A Hugging Face tokenizer directory; without one it is that of `model.path`, or a byte-level BPE trained on the
    corpus."""
    add: Annotated[AddedTokens, AfterValidator(_settled_tokens)] = ()
    """Tokens for the tokenizer of `model.path` to learn: `galactica` for the special tokens of Galactica, a list of
    tokens, or a file with one a line. Their embeddings begin as the mean of all others (Hewitt, 2021)."""
    vocab_size: int = Field(default=50_000, ge=300)
    """Of the trained tokenizer, special tokens included."""
    sample_mib: int = Field(default=64, ge=1)
    """MiB of text that the tokenizer is trained on, a random sample of the training documents."""
