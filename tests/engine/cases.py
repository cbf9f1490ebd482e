"""What the ranks of the engine tests train on: a schedule with steps of every kind, made-up tokens, a small model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orchestrator.data.exclusions import Exclusions, LostShard, Run
from orchestrator.data.order import Batches, Order, Pool, Stage
from orchestrator.data.schedule import Role, Schedule, Share
from orchestrator.train.fragments import Box
from orchestrator.train_config import TrainConfig

LENGTH, VOCAB, SAMPLES, FILLER = 32, 300, 64, 2
POISON = VOCAB - 1
STEPS = 9
UNTRAINED, SAVED = 1, 5
"""Steps after which there are checkpoints: nothing was learned before the first; both were passed over themselves."""
HELD_OUT = 8
"""The step whose samples an evaluation takes: excluded ones among them, and not as many for every rank."""

SCHEDULE = Schedule(
    order=Order(
        pools=(Pool(0, SAMPLES),),
        stages=(Stage((1.0,)),),
        batches=(Batches(2, 3), Batches(8, 3), Batches(5)),
        seed=7,
        block=8,
    ),
    sequence_length=LENGTH,
    corpus_hash="",
    skip_steps=((UNTRAINED, UNTRAINED), (SAVED, SAVED)),
    exclusions=Exclusions(
        lost=(LostShard(name="lost", first=8, samples=10, reason="missing"),),
        quarantined={
            "a middle": tuple(Run(sample, 5, 12) for sample in range(20, SAMPLES, 4)),
            "a beginning": tuple(Run(sample, 0, 3) for sample in range(21, SAMPLES, 8)),
        },
        filler=FILLER,
    ),
)
CONFIG = TrainConfig(sequence_length=LENGTH, global_batch_size=8, steps=100, lr=3e-3, clip_norm=0.8)
LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine's way through the schedule."""

    shares: tuple[int, ...]
    """Of the replicas."""
    stages: tuple[int, ...] = ()
    """Decoder blocks of each pipeline stage."""
    tensor: int = 1
    zero: int = 2
    offload: bool = False
    recompute: bool = False
    dtype: str = "fp32"
    family: str = "galactica"
    apart: bool = False
    """Documents do not see each other."""
    micro_batch: int = 2
    folder: str = "checkpoints"
    load: int = 0
    """The step to go on after; 0: from the beginning."""
    last: int = STEPS
    save: tuple[int, ...] = ()
    """Commit after these steps."""
    attempt: int = 1
    dropped: tuple[int, ...] = ()
    """Steps whose update is not accepted."""
    poisoned: tuple[int, ...] = ()
    """Steps in which the last replica sees a token whose embedding is NaN."""

    @property
    def ranks(self) -> int:
        return len(self.shares) * max(len(self.stages), 1) * self.tensor


def share_of(step: int, role: Role) -> Share:
    """What orchestrator.data.stream and orchestrator.train.replicas give, without Ray."""
    reads = replace(role, tensor_rank=0).reads and not SCHEDULE.skips(step)
    return SCHEDULE.share(step, role, samples(SCHEDULE.ids([step], role)) if reads else None)


def samples(ids: np.ndarray) -> np.ndarray:
    """Something that a model can learn: runs of counting tokens, in which a document ends somewhere."""
    starts = np.random.default_rng(1).integers(0, POISON - LENGTH, SAMPLES)[ids]
    tokens = starts[:, None] + np.arange(LENGTH)
    tokens[np.arange(len(ids)), ids % LENGTH] = FILLER
    return tokens.astype(np.uint16)


def poison(share: Share) -> Share:
    """With the token that no other share has."""
    assert share.tokens is not None
    tokens = share.tokens.copy()
    tokens[-1, 1] = POISON
    return replace(share, tokens=tokens)


def configuration(family: str = "galactica") -> Any:
    """Of a small model of a family, as transformers has it."""
    from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config

    small = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    opt = small | {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": LENGTH, "dropout": 0.0}
    gated = small | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    if family == "galactica":
        return OPTConfig(**opt, activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False)
    if family == "opt":
        return OPTConfig(**opt | {"word_embed_proj_dim": 16, "do_layer_norm_before": False})
    kind = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    window = {"sliding_window": 12} if family == "mistral" else {}
    return kind(
        **gated, **window, tie_word_embeddings=family == "qwen2", **({"head_dim": 8} if family == "qwen3" else {})
    )


@functools.cache
def model(family: str = "galactica") -> Any:
    """The same in every process."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(configuration(family), dtype=torch.float32)


class ModelWeights:
    """The weights of a model in memory, as the engine asks for them."""

    def __init__(self, model: Any) -> None:
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def poison(self) -> None:
        embedding = self._parameters["model.embed_tokens.weight"] = self._parameters[
            "model.embed_tokens.weight"
        ].clone()
        embedding[POISON] = float("nan")

    def read(self, name: str, box: Box) -> Any:
        return self._parameters[name][box.slices]
