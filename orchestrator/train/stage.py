"""A stage: consecutive layers of a causal language model, as one rank of a layout holds them.

Without pipeline parallelism the only stage is the whole model. The layers are those of Transformers, built on the meta
device and cut there, so that a process never holds more than its own part. Imports no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from orchestrator.train.fragments import Box
from orchestrator.train.models import meta_model
from orchestrator.train.tensor_parallel import (
    ALONE,
    TensorGroup,
    VocabularyEmbedding,
    VocabularyHead,
    cross_entropy,
    reduce_gradients_of_each_head,
    shard_block,
)

NOT_A_TARGET = -100


@dataclass(frozen=True)
class Part:
    """What a rank holds of a parameter."""

    name: str
    """Of the parameter, in the Hugging Face model."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    box: Box
    """May reach past the end of the parameter: the vocabulary is padded."""


@dataclass(frozen=True)
class Skeleton:
    """A Transformers model on the meta device, and where its layers are."""

    model: Any
    decoder: Any
    prefix: str
    """Of the decoder's names."""
    norm: str
    """Name of the last norm."""

    @staticmethod
    def of(config: Any, dtype: torch.dtype, attention: str) -> Skeleton:
        model = meta_model(config, dtype, attention)
        if hasattr(model.model, "decoder"):  # OPT
            return Skeleton(model, model.model.decoder, "model.decoder", "final_layer_norm")
        return Skeleton(model, model.model, "model", "norm")

    @property
    def tied(self) -> bool:
        return bool(self.model.config.tie_word_embeddings)


class Stage(nn.Module):
    """
    Args:
        config: of the model, a transformers configuration.
        blocks: the decoder blocks it holds; the embedding goes with the first, the head with the last of the model.
        recompute: keep a block's input only, and compute the rest again in the backward pass.
    """

    embed_tokens: Any
    embed_positions: Any
    project_in: Any
    norm: Any
    project_out: Any
    lm_head: Any

    def __init__(
        self,
        config: Any,
        blocks: range,
        *,
        dtype: torch.dtype,
        tensor: TensorGroup = ALONE,
        recompute: bool = False,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        skeleton = Skeleton.of(config, dtype, attention)
        self.config, self.tensor, self.recompute = config, tensor, recompute
        self.first, self.last = blocks.start == 0, blocks.stop == config.num_hidden_layers
        self._parts: dict[str, Part] = {}
        if self.first:
            self._embed(skeleton)
        self.blocks = nn.ModuleDict()
        for number in blocks:
            self._add_block(skeleton, number)
        self._rotary_kind: Any = type(skeleton.decoder.rotary_emb) if hasattr(skeleton.decoder, "rotary_emb") else None
        self._rotary: Any = None
        if self.last:
            self._finish(skeleton)

    # --- layers -------------------------------------------------------------------------------------------------------

    def _embed(self, skeleton: Skeleton) -> None:
        self.embed_tokens = self._vocabulary(skeleton, "embed_tokens", "embed_tokens")
        for name in ("embed_positions", "project_in"):
            self._add(name, getattr(skeleton.decoder, name, None), f"{skeleton.prefix}.{name}")

    def _add_block(self, skeleton: Skeleton, number: int) -> None:
        block, name = skeleton.decoder.layers[number], f"{skeleton.prefix}.layers.{number}"
        shapes = {path: tuple(parameter.shape) for path, parameter in block.named_parameters()}
        cut = shard_block(block, self.tensor) if self.tensor.size > 1 else {}
        for path, shape in shapes.items():
            self._parts[f"blocks.{number}.{path}"] = Part(f"{name}.{path}", shape, cut.get(path, Box.whole(shape)))
        self.blocks[str(number)] = block

    def _finish(self, skeleton: Skeleton) -> None:
        self._add("norm", getattr(skeleton.decoder, skeleton.norm, None), f"{skeleton.prefix}.{skeleton.norm}")
        self._add("project_out", getattr(skeleton.decoder, "project_out", None), f"{skeleton.prefix}.project_out")
        if not skeleton.tied:
            self.lm_head = self._vocabulary(skeleton, "lm_head", None)
        elif not self.first:
            self.lm_head = self._vocabulary(skeleton, "lm_head", "embed_tokens")
        else:
            self.lm_head = VocabularyHead(self.embed_tokens.weight, self.tensor)

    def _add(self, name: str, module: nn.Module | None, prefix: str) -> None:
        setattr(self, name, module)
        for path, parameter in module.named_parameters() if module else ():
            shape = tuple(parameter.shape)
            self._parts[f"{name}.{path}"] = Part(f"{prefix}.{path}", shape, Box.whole(shape))

    def _vocabulary(self, skeleton: Skeleton, name: str, of_decoder: str | None) -> nn.Module:
        """The embedding, or the head, with the rows of the vocabulary that this rank holds."""
        whole = getattr(skeleton.decoder, of_decoder) if of_decoder else getattr(skeleton.model, name)
        vocab_size, width = whole.weight.shape
        rows = self.tensor.rows(vocab_size)
        prefix = f"{skeleton.prefix}.{of_decoder}" if of_decoder else name
        box = Box((self.tensor.rank * rows, 0), (rows, width))
        self._parts[f"{name}.weight"] = Part(f"{prefix}.weight", (vocab_size, width), box)
        weight = nn.Parameter(whole.weight.new_empty(rows, width))
        embedding = name == "embed_tokens"
        return (VocabularyEmbedding if embedding else VocabularyHead)(weight, self.tensor)

    # --- life ---------------------------------------------------------------------------------------------------------

    def materialize(self, device: torch.device, settled: Callable[[nn.Module], None] | None = None) -> None:
        """Give the layers memory, all zeros, one after the other.

        Args:
            settled: called with every layer that has its memory.
        """
        tied = self.last and self.first and self.lm_head.weight is self.embed_tokens.weight
        for layer in self.layers():
            layer.to_empty(device=device)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
            if tied and layer is self.embed_tokens:
                self.lm_head.weight = self.embed_tokens.weight
            if settled:
                settled(layer)
        for part, parameter in self.parts():
            if part.box.lengths != part.shape:  # DeepSpeed counts it in the norm on every rank of the group
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        if self.tensor.size > 1:
            reduce_gradients_of_each_head(self.blocks, self.tensor)
        if self._rotary_kind:
            with torch.device(device):
                self._rotary = self._rotary_kind(config=self.config)

    def layers(self) -> Iterator[nn.Module]:
        """Those with parameters of their own, first to last."""
        for name, child in self.named_children():
            if child is self.blocks:
                yield from self.blocks.values()
            elif name != "lm_head" or not self.first or self.lm_head.weight is not self.embed_tokens.weight:
                yield child

    def parts(self) -> Iterator[tuple[Part, nn.Parameter]]:
        """Every parameter of this rank, and what it is of the model."""
        for path, parameter in self.named_parameters():
            yield self._parts[path], parameter

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """The embedding, where another stage holds it too."""
        if not self.config.tie_word_embeddings or self.first == self.last:
            return None
        copy: nn.Parameter = self.embed_tokens.weight if self.first else self.lm_head.weight
        return copy

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Any) -> Any:
        """
        Args:
            inputs: tokens int64 [sequences, length] to the first stage, else hidden states [sequences, length, width];
                where documents are kept apart, a pair of it and of document numbers int64 [sequences, length].

        Returns:
            logits [sequences, length, rows of the vocabulary] of the last stage, else what the next one takes.
        """
        values, documents = inputs if isinstance(inputs, tuple) else (inputs, None)
        positions = torch.arange(values.shape[1], device=values.device)[None]
        hidden = self._embedded(values, positions) if self.first else values
        rotation = self._rotary(hidden, positions) if self._rotary else None
        masks = _Masks(positions, documents)
        for block in self.blocks.values():
            given: dict[str, Any] = {
                "attention_mask": masks.of(block),
                "position_ids": positions,
                "position_embeddings": rotation,
            }
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False, **given)
            else:
                hidden = block(hidden, **given)
        if self.last:
            return self._logits(hidden)
        return hidden if documents is None else (hidden, documents)

    def _embedded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embed_tokens(tokens)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(None, 0, position_ids=positions)
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in (self.norm, self.project_out):
            hidden = layer(hidden) if layer is not None else hidden
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of the cross entropy over the targets of each sequence, in nats, fp32 [sequences].

        Args:
            labels: int64 [sequences, length]; a token's is the token, or NOT_A_TARGET. The first of a sequence is none.
        """
        positions = logits[:, :-1].flatten(0, 1)
        losses = cross_entropy(positions, labels[:, 1:].flatten(), self.config.vocab_size, self.tensor)
        return losses.view(len(labels), -1).sum(-1)


class _Masks:
    """Which positions attend to which: those before in the same document, and in the window of the block if it has one.

    None where plain causal attention does it, which has the fastest kernels.
    """

    def __init__(self, positions: torch.Tensor, documents: torch.Tensor | None) -> None:
        self._positions, self._documents = positions[0], documents
        self._made: dict[int | None, torch.Tensor | None] = {}

    def of(self, block: nn.Module) -> torch.Tensor | None:
        attention: Any = block.self_attn
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        window = window if window and window < len(self._positions) else None
        if window not in self._made:
            self._made[window] = self._make(window)
        return self._made[window]

    def _make(self, window: int | None) -> torch.Tensor | None:
        if window is None and self._documents is None:
            return None
        distance = self._positions[:, None] - self._positions[None, :]
        mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        if self._documents is not None:
            mask = mask & (self._documents[:, :, None] == self._documents[:, None, :])
        return mask[None, None] if mask.dim() == 2 else mask[:, None]


def document_numbers(tokens: torch.Tensor, end: int) -> torch.Tensor:
    """Number of the document that each token belongs to within its sequence, int64 like tokens.

    Args:
        end: the token that ends a document; it belongs to the document that it ends.
    """
    ends = (tokens == end).long()
    return ends.cumsum(-1) - ends
