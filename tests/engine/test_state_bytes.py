"""Predicted bytes of weights, gradients and optimizer states are those that real engines hold, to the byte.

The planner does not count tensors one by one, so these differences are left, which the sizes of the models avoid:

- DeepSpeed pads what it splits to twice the replicas (each group of parameters, and with ZeRO-3 each parameter to the
  replicas): a few elements. All sizes here are multiples of 4.
- In fp32 ZeRO-2 keeps the gradients of a tensor whole where a rank has a part of it, of which the planner counts the
  embedding. The halves of `ALIGNED` meet between two tensors.
- Of tensors with 100,000 elements or fewer, norms and biases, ZeRO-3 keeps the whole between steps, too: here they are
  with what it fetches.
- Counters and flags of one element each do not count: Adam has one for each of its tensors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from orchestrator.planning.layout import Layout
from orchestrator.planning.memory import Load, Memory, memory_by_stage
from orchestrator.planning.platform import nominal
from orchestrator.planning.shape import shape_of
from tests.engine.cases import LENGTH, Case
from tests.engine.launching import torchrun

HIDDEN, LAYERS = 480, 4
ALIGNED = {
    "model_type": "opt",
    "vocab_size": 300,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "ffn_dim": 256,  # half the rows of the embeddings: the middle of the model lies before the last matrix of a block
    "max_position_embeddings": 210,
    "activation_function": "gelu",
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MUCH_VOCABULARY = ALIGNED | {"vocab_size": 10_400}
"""Most elements are of the embedding."""
VECTORS = (2 * LAYERS + 1) * HIDDEN
"""Elements of the norms of LLAMA."""

Values = dict[str, Any]
Held = dict[str, Any]


def cases(ranks: int) -> list[tuple[Case, Values]]:
    shares = (1,) * ranks
    plain = [Case(shares=shares, dtype="fp32", zero=zero) for zero in (0, 1, 2, 3)]
    plain += [Case(shares=shares, dtype="bf16", zero=zero) for zero in (1, 2, 3)]  # ZeRO-0 is for fp32 alone
    found = [(case, ALIGNED) for case in plain]
    found += [(Case(shares=shares, dtype=dtype, zero=zero), LLAMA) for dtype in ("fp32", "bf16") for zero in (1, 2, 3)]
    if ranks == 2:
        found += [(Case(shares=shares, dtype=dtype, zero=2), MUCH_VOCABULARY) for dtype in ("fp32", "bf16")]
        cut = [Case(shares=(1,), stages=(1, 3), dtype=dtype, zero=1) for dtype in ("fp32", "bf16")]
        cut += [Case(shares=(1,), tensor=2, dtype=dtype, zero=zero) for dtype in ("fp32", "bf16") for zero in (1, 2)]
        found += [(case, values) for case in cut for values in (ALIGNED, LLAMA)]
    return found


@functools.cache
def measured(ranks: int) -> list[list[Held]]:
    """By case and rank."""
    return torchrun("memory_rank.py", ranks, json.dumps([[asdict(case), values] for case, values in cases(ranks)]))  # type: ignore[return-value]


def of(case: Case, values: Values) -> list[Held]:
    return measured(case.ranks)[cases(case.ranks).index((case, values))]


def predicted(case: Case, values: Values) -> tuple[Memory, ...]:
    layout = Layout(
        tensor_parallel=case.tensor,
        pipeline_stages=max(len(case.stages), 1),
        layers_per_stage=case.stages or (LAYERS,),
        zero_stage=case.zero,
        offload=False,
        recompute=False,
    )
    load = Load(
        dtype=case.dtype,
        data_parallel=len(case.shares),
        micro_batch_size=case.micro_batch,
        accumulation=2,
        sequence_length=LENGTH,
    )
    return memory_by_stage(shape_of(values), layout, nominal("cpu"), load, host_memory=True)


def parts(memory: Memory | Held) -> dict[str, int]:
    told = memory if isinstance(memory, dict) else asdict(memory)
    return {part: told[part] for part in ("weights", "gradients", "optimizer")}


def fullest(ranks: Sequence[Held], stage: int) -> dict[str, int]:
    return {part: max(parts(rank)[part] for rank in ranks if rank["stage"] == stage) for part in parts(ranks[0])}


def name(case: Case) -> str:
    cut = f"PP{len(case.stages)}-" * bool(case.stages) + f"TP{case.tensor}-" * (case.tensor > 1)
    return f"{cut}DP{len(case.shares)}-ZeRO{case.zero}-{case.dtype}"


def exact(case: Case, values: Values) -> bool:
    """Whether no tensor lies in the middle of what ZeRO-2 splits in fp32."""
    return not (values is LLAMA and case.zero == 2 and case.dtype == "fp32" and len(case.shares) > 1)


EXACT = [(case, values) for ranks in (1, 2) for case, values in cases(ranks) if exact(case, values)]


@pytest.mark.parametrize(
    ("case", "values"),
    EXACT,
    ids=[f"{values['model_type']}-{values['vocab_size']}-{name(case)}" for case, values in EXACT],
)
def test_states_are_held_as_predicted(case: Case, values: Values) -> None:
    found, expected = of(case, values), predicted(case, values)
    for stage, memory in enumerate(expected):
        assert fullest(found, stage) == parts(memory)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_zero_3_holds_the_weights_that_it_fetches_for_the_forward_pass_until_the_backward_pass(dtype: str) -> None:
    width = 4 if dtype == "fp32" else 2
    parameters = shape_of(ALIGNED).parameters
    case = Case(shares=(1, 1), dtype=dtype, zero=3)
    (memory,) = predicted(case, ALIGNED)
    for rank in of(case, ALIGNED):
        assert rank["fetched"] == width * parameters
        assert rank["fetched"] + rank["buckets"] == memory.buffers


@pytest.mark.parametrize(
    ("ranks", "dtype", "zero"),
    [(1, "fp32", 1), (1, "fp32", 2), (1, "bf16", 1), (1, "bf16", 2), (2, "fp32", 1), (2, "fp32", 2), (2, "bf16", 2)],
)
def test_gradients_of_one_replica_are_put_in_a_bucket_too_but_by_zero_1_in_bf16(
    ranks: int, dtype: str, zero: int
) -> None:
    case = Case(shares=(1,) * ranks, dtype=dtype, zero=zero)
    (memory,) = predicted(case, ALIGNED)
    assert [rank["buckets_in_backward"] for rank in of(case, ALIGNED)] == [memory.buffers] * ranks


@pytest.mark.parametrize("zero", [2, 3])
def test_a_gradient_that_two_ranks_share_is_held_whole_by_zero_2_in_fp32(zero: int) -> None:
    """The middle of the nine norms is that of the fifth: each rank holds half a norm more. ZeRO-3 splits every tensor
    evenly."""
    case = Case(shares=(1, 1), dtype="fp32", zero=zero)
    (memory,) = predicted(case, LLAMA)
    assert fullest(of(case, LLAMA), 0)["gradients"] - memory.gradients == (4 * HIDDEN // 2 if zero == 2 else 0)
