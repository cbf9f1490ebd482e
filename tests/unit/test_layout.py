"""How a model is cut: what a recipe may ask for, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.accelerators import Node, NodePool
from orchestrator.config import Recipe
from orchestrator.errors import PlanError
from orchestrator.planning.layout import Layout, layout_of
from orchestrator.planning.live import plan
from orchestrator.planning.memory import Load, Memory, memory_by_stage, worker_memory
from orchestrator.planning.plan import Plan
from orchestrator.planning.shape import ModelShape, model_shape
from orchestrator.planning.throughput import PLATFORMS, step_time_s
from orchestrator.stages import check_inputs
from orchestrator.train_config import TrainConfig

GIB = 2**30
SHAPE = ModelShape(
    layers=10,
    hidden_size=1024,
    heads=8,
    kv_heads=4,
    ffn_size=2732,
    vocab_size=32_000,
    parameters=160_000_000,
    block_parameters=12_000_000,
)


def train(asked: dict[str, Any] | None = None, **values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 10, "lr": 0.1, "layout": asked or {}, **values})


def layout(dtype: str = "fp32", **asked: Any) -> Layout:
    return layout_of(train(asked), SHAPE, dtype)


def cpu_pool(*cpus: int, gib: int = 64) -> NodePool:
    return NodePool(
        accelerator="cpu",
        nodes=tuple(
            Node(id=f"n{n}", address=f"10.0.0.{n}", cpus=count, gpus=0, memory_bytes=gib * GIB)
            for n, count in enumerate(cpus)
        ),
    )


CORPUS = {"sources": [{"name": "a", "path": "/data"}]}


def recipe(asked: dict[str, Any], model: Any = None, corpus: Any = CORPUS, **values: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "corpus": corpus,
            "model": model or {},
            "train": {
                "steps": 10,
                "lr": 0.1,
                "global_batch_size": 8,
                "sequence_length": 256,
                "layout": asked,
                **values,
            },
        }
    )


def planned(pool: NodePool, asked: dict[str, Any], **values: Any) -> Plan:
    return plan(recipe(asked, **values), SHAPE, [pool])


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "blocks"), [(1, (10,)), (2, (5, 5)), (3, (3, 3, 4)), (4, (2, 2, 3, 3)), (10, (1,) * 10)]
)
def test_layers_are_split_evenly_and_the_first_stage_takes_the_fewest(stages: int, blocks: tuple[int, ...]) -> None:
    assert layout(pipeline_stages=stages).layers_per_stage == blocks


def test_layers_are_split_as_the_recipe_says() -> None:
    assert layout(pipeline_stages=3, layers_per_stage=(1, 4, 5)).layers_per_stage == (1, 4, 5)


@pytest.mark.parametrize(
    ("asked", "dtype", "stage"),
    [
        ({}, "fp32", 2),
        ({}, "bf16", 2),
        ({"tensor_parallel": 2}, "fp32", 1),
        ({"pipeline_stages": 2}, "fp32", 1),
        ({"zero_stage": 0}, "fp32", 0),
        ({"zero_stage": 3, "tensor_parallel": 2}, "bf16", 3),
        ({"zero_stage": 1, "pipeline_stages": 2}, "bf16", 1),
        ({"zero_stage": 0}, "bf16", 1),
        ({"zero_stage": 0}, "fp16", 1),
        ({"zero_stage": 0, "tensor_parallel": 2}, "fp32", 1),
        ({"zero_stage": 0, "pipeline_stages": 2}, "fp32", 1),
        ({"zero_stage": 3, "offload": True, "recompute": True}, "fp32", 3),
        ({"offload": True}, "fp32", 2),
        ({"offload": True, "pipeline_stages": 2}, "fp32", 1),
    ],
)
def test_the_zero_stage_is_one_that_computes_rightly(asked: dict[str, Any], dtype: str, stage: int) -> None:
    found = layout(dtype, **asked)
    assert found.zero_stage == stage
    assert (found.offload, found.recompute) == (asked.get("offload", False), asked.get("recompute", False))


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel=3 does not divide the model's 8 heads", "use 1, 2, 4"),
        ({"tensor_parallel": 8}, "tensor_parallel=8 does not divide the model's 4 heads of keys", "use 1, 2, 4"),
        ({"pipeline_stages": 11}, "pipeline_stages=11 is more than the model's 10 layers", "use 10 or less"),
        ({"pipeline_stages": 2, "layers_per_stage": (5, 6)}, r"\[5, 6\] must have .* add up to .* 10 layers", "leave"),
        ({"pipeline_stages": 2, "layers_per_stage": (10,)}, r"\[10\] must have one entry for each of the 2", "leave"),
        ({"layers_per_stage": (5, 4)}, r"\[5, 4\] must have .* add up to .* 10 layers", "leave"),
        ({"pipeline_stages": 2, "zero_stage": 2}, "zero_stage=2 does not go with pipeline_stages=2", "0 or 1"),
        ({"pipeline_stages": 2, "zero_stage": 3}, "zero_stage=3 does not go with pipeline_stages=2", "0 or 1"),
        ({"zero_stage": 0, "offload": True}, "offload needs ZeRO", "1, 2 or 3"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(asked: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(PlanError, match=message) as refused:
        layout(**asked)
    assert hint in refused.value.hint


def test_tensor_parallelism_that_does_not_divide_the_feed_forward_network_is_refused() -> None:
    odd = replace(SHAPE, kv_heads=None, ffn_size=2734)
    with pytest.raises(PlanError, match="does not divide the model's 2734 feed-forward features") as refused:
        layout_of(train({"tensor_parallel": 4}), odd, "fp32")
    assert refused.value.hint == "use 1, 2"


def test_a_shape_knows_its_feed_forward_networks() -> None:
    for model in ({}, {"architecture": "llama"}):
        found = model_shape(recipe({}, model={"hidden_size": 64, "heads": 4, "ffn_size": 100, **model}), 300)
        assert found.ffn_size == 100


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ({"keep_documents_apart": True}, "bf16", "keep_documents_apart needs a mask"),
        ({}, "fp32", "computes in 16 bits only"),
    ],
)
def test_flash_attention_is_refused_where_it_cannot_compute(values: dict[str, Any], dtype: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        layout_of(train(attention="flash_attention_2", **values), SHAPE, dtype)


def test_flash_attention_is_taken_where_it_can_compute() -> None:
    assert layout_of(train(attention="flash_attention_2"), SHAPE, "bf16").zero_stage == 2


def test_a_layout_that_cannot_be_is_refused_before_a_corpus_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    corpus = {"sources": [{"name": "a", "path": str(tmp_path)}]}
    possible = recipe({"pipeline_stages": 12}, corpus=corpus)
    assert len(check_inputs(possible)) == 1
    with pytest.raises(PlanError, match="pipeline_stages=13 is more than the model's 12 layers"):
        check_inputs(recipe({"pipeline_stages": 13}, corpus=corpus))


def test_a_layout_says_what_it_is() -> None:
    assert str(layout()) == "ZeRO-2"
    asked = {"tensor_parallel": 2, "pipeline_stages": 3, "offload": True, "recompute": True}
    assert str(layout(**asked)) == "ZeRO-1, tensor parallel 2, 3 stages of 3+3+4 layers, offload, recompute"


# --- plans ------------------------------------------------------------------------------------------------------------


def test_ranks_of_a_tensor_parallel_group_are_neighbours_and_stages_are_apart() -> None:
    found = planned(cpu_pool(8), {"tensor_parallel": 2, "pipeline_stages": 2}, workers=8)
    assert (found.data_parallel, found.workers) == (2, 8)
    assert [found.coordinates(rank) for rank in range(8)] == [
        (stage, data_rank, tensor_rank) for stage in (0, 1) for data_rank in (0, 1) for tensor_rank in (0, 1)
    ]
    assert [found.role(rank).reads for rank in range(8)] == [True, False] * 4


def test_only_the_first_and_the_last_stage_read() -> None:
    found = planned(cpu_pool(3), {"pipeline_stages": 3})
    assert [found.role(rank).reads for rank in range(3)] == [True, False, True]
    assert [found.blocks(stage, SHAPE.layers) for stage in range(3)] == [range(3), range(3, 6), range(6, 10)]


def test_a_plan_without_stages_has_all_layers_in_one() -> None:
    assert planned(cpu_pool(2), {}).blocks(0, SHAPE.layers) == range(10)


def test_workers_are_a_multiple_of_a_replica() -> None:
    assert [planned(cpu_pool(n), {"pipeline_stages": 3}).workers for n in (3, 5, 6, 8)] == [3, 3, 6, 6]


@pytest.mark.parametrize(("workers", "hint"), [(3, "2 or 4"), ({"min": 5, "max": 5}, "4 or 6")])
def test_workers_that_are_no_multiple_of_a_replica_are_refused_as_such(workers: Any, hint: str) -> None:
    with pytest.raises(PlanError, match="no number of workers that is a multiple of the 2 devices") as caught:
        planned(cpu_pool(8), {"tensor_parallel": 2}, workers=workers)
    assert caught.value.hint == f"set train.workers={hint}"


def test_tensor_parallel_ranks_share_a_node() -> None:
    assert planned(cpu_pool(3, 3), {"tensor_parallel": 2}).workers == 4
    with pytest.raises(PlanError, match=r"needs 4 devices, 4 a replica \(tensor_parallel=4"):
        planned(cpu_pool(3, 3), {"tensor_parallel": 4})


def test_fewer_devices_than_a_replica_are_refused_with_what_is_there() -> None:
    with pytest.raises(PlanError, match=r"needs 4 devices, 4 a replica .* no pool has as many \(1 cpu node: 2\)"):
        planned(cpu_pool(2), {"tensor_parallel": 2, "pipeline_stages": 2})
    with pytest.raises(PlanError, match=r"workers.max=2 is less than the 4 devices of one replica"):
        planned(cpu_pool(8), {"tensor_parallel": 2, "pipeline_stages": 2}, workers={"min": 1, "max": 2})


def test_a_plan_that_takes_another_zero_stage_says_so() -> None:
    assert "ZeRO-1 in place of ZeRO-0" in planned(cpu_pool(2), {"zero_stage": 0}, dtype="bf16").reason
    assert "in place of" not in planned(cpu_pool(2), {"zero_stage": 0}).reason
    assert "in place of" not in planned(cpu_pool(2), {"pipeline_stages": 2}).reason


# --- memory and time --------------------------------------------------------------------------------------------------


def memory(
    accelerator: str = "cuda", dtype: str = "bf16", replicas: int = 4, accumulation: int = 4, **asked: Any
) -> Memory:
    return worker_memory(
        SHAPE,
        layout(dtype, **asked),
        accelerator=accelerator,
        dtype=dtype,
        data_parallel=replicas,
        micro_batch_size=2,
        accumulation=accumulation,
        sequence_length=512,
    )


def test_each_zero_stage_splits_one_thing_more() -> None:
    stages = [memory(zero_stage=stage) for stage in (1, 2, 3)]
    whole = memory(zero_stage=3, replicas=1)
    assert [m.optimizer for m in stages] == [whole.optimizer // 4] * 3
    with_last_in_bf16 = 6 * whole.gradients // 4
    assert [m.gradients for m in stages] == [with_last_in_bf16, whole.gradients // 4, whole.gradients // 4]
    assert [m.weights for m in stages] == [whole.weights, whole.weights, whole.weights // 4]
    states = [m.weights + m.gradients + m.optimizer for m in stages]
    assert states == sorted(states, reverse=True)


def test_zero_3_fetches_a_small_model_as_a_whole_and_saves_nothing() -> None:
    two, three = memory(zero_stage=2), memory(zero_stage=3)
    assert three.buffers - two.buffers == two.weights


def test_zero_0_keeps_no_second_copy_of_the_weights() -> None:
    plain, split = memory(dtype="fp32", zero_stage=0), memory(dtype="fp32", zero_stage=1, replicas=1)
    assert plain.optimizer == 2 * plain.weights
    assert split.optimizer == 3 * split.weights


def test_tensor_parallelism_halves_weights_and_logits_but_not_all_activations() -> None:
    one, two = memory(zero_stage=1), memory(zero_stage=1, tensor_parallel=2)
    assert (two.weights, two.logits) == (one.weights // 2, one.logits // 2)
    assert one.activations / 2 < two.activations < one.activations


def stages(accumulation: int = 4, **asked: Any) -> tuple[Memory, ...]:
    load = Load(dtype="bf16", data_parallel=4, micro_batch_size=2, accumulation=accumulation, sequence_length=512)
    return memory_by_stage(SHAPE, layout("bf16", zero_stage=1, **asked), PLATFORMS["cuda"], load)


def test_a_pipeline_holds_fewer_weights_and_the_activations_of_as_many_micro_batches() -> None:
    (one,), (first, last) = stages(), stages(pipeline_stages=2)
    assert first.weights < one.weights
    assert first.activations == one.activations, "half the layers, two micro-batches"
    assert last.activations == one.activations // 2, "which the last stage hands back at once"
    assert stages(pipeline_stages=2, accumulation=1)[0].activations == one.activations // 2
    assert (one.logits, first.logits, last.logits) == (last.logits, 0, one.logits)


def test_the_stage_with_most_layers_decides() -> None:
    even, uneven = memory(pipeline_stages=2), memory(pipeline_stages=2, layers_per_stage=(2, 8))
    assert uneven.total > even.total


def test_recomputation_and_offload_need_less_memory() -> None:
    usual = memory()
    assert memory(recompute=True).activations < usual.activations / 3
    assert memory(offload=True).optimizer == 0
    assert memory("cpu", offload=True).optimizer == usual.optimizer, "host memory is all there is"


def seconds(replicas: int = 4, accumulation: int = 4, **asked: Any) -> float:
    return step_time_s(
        SHAPE,
        PLATFORMS["cuda"],
        layout("bf16", **asked),
        data_parallel=replicas,
        accumulation=accumulation,
        micro_batch_size=2,
        global_batch_size=2 * accumulation * replicas,
        sequence_length=512,
        width=2,
    )


def test_recomputation_uneven_stages_and_few_micro_batches_cost_time() -> None:
    assert seconds(recompute=True) > seconds()
    assert seconds(pipeline_stages=2, layers_per_stage=(2, 8)) > seconds(pipeline_stages=2)
    of_a_sample = [seconds(accumulation=n, pipeline_stages=5) / n for n in (1, 2, 8, 64)]
    assert of_a_sample == sorted(of_a_sample, reverse=True), "a pipeline fills and drains once a step"


def test_devices_that_share_a_replica_take_less_than_one_and_more_than_their_part() -> None:
    alone = seconds(replicas=1)
    for asked in ({"tensor_parallel": 2}, {"pipeline_stages": 2}):
        assert alone / 2 < seconds(replicas=1, **asked) < alone
