from __future__ import annotations

import itertools
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator import cluster
from orchestrator.accelerators import Node, NodePool, Speeds
from orchestrator.config import Recipe
from orchestrator.errors import CapacityError, PlanError, UserError
from orchestrator.planning.layout import layout_of
from orchestrator.planning.live import plan, predicted_anew
from orchestrator.planning.memory import worker_memory
from orchestrator.planning.past import NOTHING, Past, learned
from orchestrator.planning.plan import Plan
from orchestrator.planning.platform import nominal
from orchestrator.planning.prediction import predict
from orchestrator.planning.shape import ModelShape
from orchestrator.planning.throughput import PLATFORMS, platform_of, step_time_s

GIB = 2**30
SMALL = ModelShape(layers=4, hidden_size=256, heads=4, vocab_size=8192, parameters=5_000_000, block_parameters=786_432)
LARGE = ModelShape(
    layers=32, hidden_size=4096, heads=32, vocab_size=50_000, parameters=6_700_000_000, block_parameters=201_326_592
)


def recipe(**train: Any) -> Recipe:
    values = {"steps": 10, "lr": 0.1, "sequence_length": 256, "global_batch_size": 16, **train}
    return Recipe.model_validate(
        {"name": "r", "corpus": {"sources": [{"name": "a", "path": "/data"}]}, "train": values}
    )


def pool(
    accelerator: str = "cpu", nodes: int = 1, cpus: float = 2, gpus: float = 0, gib: int = 16, bf16: bool = True
) -> NodePool:
    return NodePool(
        accelerator=accelerator,
        nodes=tuple(
            Node(id=f"{accelerator}{n}", address=f"10.0.0.{n}", cpus=cpus, gpus=gpus, memory_bytes=gib * GIB)
            for n in range(nodes)
        ),
        device_memory_bytes=gib * GIB if gpus else 0,
        bf16=bf16,
    )


def test_the_plan_follows_the_cluster() -> None:
    assert [plan(recipe(), SMALL, [pool(nodes=n)]).workers for n in (1, 2, 4)] == [2, 4, 8]


def test_any_number_of_workers_shares_the_batch() -> None:
    found = plan(recipe(), SMALL, [pool(nodes=3)])  # 6 devices, batch 16
    assert (found.workers, found.shares) == (6, (1,) * 6)
    assert found.micro_batch_size * found.accumulation >= 3, "the largest share"
    assert plan(recipe(workers={"min": 1, "max": 3}), SMALL, [pool(cpus=3)]).workers == 3


def test_the_plan_holds_the_largest_batch_of_a_ramp() -> None:
    found = plan(recipe(batch_ramp=[{"steps": 5, "sequences": 64}], workers=2), SMALL, [pool(cpus=2)])
    assert found.micro_batch_size * found.accumulation >= 32


def test_a_cpu_worker_may_be_half_a_cpu() -> None:
    assert plan(recipe(cpus_per_worker=0.5), SMALL, [pool()]).workers == 4


def test_the_fastest_pool_is_chosen_and_the_others_say_why_not() -> None:
    found = plan(recipe(), SMALL, [pool(nodes=4), pool("cuda", gpus=1), pool("dcu", gpus=4)])
    assert (found.accelerator, found.workers, found.dtype) == ("dcu", 4, "fp16") or found.accelerator == "cuda"
    assert any("s a step against" in loser for loser in found.losers)
    assert all(node_id.startswith(found.accelerator) for node_id in found.node_ids)


def unlike_nodes(cpus: dict[str, float]) -> NodePool:
    nodes = [Node(id=name, address=name, cpus=count, gpus=0, memory_bytes=64 * GIB) for name, count in cpus.items()]
    return NodePool(accelerator="cpu", nodes=tuple(nodes))


def placement(cpus: dict[str, float], workers: int, prefer: frozenset[str] = frozenset(), **layout: int) -> Any:
    whole = {"tensor_parallel": 1, "pipeline_stages": 1}
    return dict(plan(recipe(workers=workers, layout=whole | layout), SMALL, [unlike_nodes(cpus)], prefer).placement)


def test_workers_stand_on_the_fewest_nodes() -> None:
    nodes = {"d": 3, "a": 2, "b": 3, "c": 6, "head": 0}
    assert placement(nodes, 2) == {"c": 2}
    assert placement(nodes, 8) == {"c": 6, "b": 2}
    assert placement(nodes, 12) == {"c": 6, "b": 3, "d": 3}
    assert placement(nodes, 14) == {"c": 6, "b": 3, "d": 3, "a": 2}


def test_tensor_parallel_groups_are_not_torn() -> None:
    assert placement({"a": 3, "b": 3, "c": 2}, 6, tensor_parallel=2) == {"a": 2, "b": 2, "c": 2}
    assert placement({"a": 3, "b": 5}, 4, tensor_parallel=2) == {"b": 4}
    assert placement({"a": 5, "b": 5}, 8, tensor_parallel=2, pipeline_stages=2) == {"a": 4, "b": 4}


def test_a_replan_stays_where_the_run_is() -> None:
    nodes = {"a": 4, "b": 4, "c": 8}
    assert placement(nodes, 4, prefer=frozenset({"b"})) == {"b": 4}
    assert placement(nodes, 6, prefer=frozenset({"b", "gone"})) == {"b": 4, "c": 2}


@given(
    cpus=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    tensor_parallel=st.sampled_from([1, 2, 4]),
    prefer=st.frozensets(st.sampled_from("abcdef")),
)
def test_every_worker_has_a_device_of_its_own(cpus: list[int], tensor_parallel: int, prefer: frozenset[str]) -> None:
    nodes = dict(zip("abcdef", cpus, strict=False))
    room = {name: count // tensor_parallel * tensor_parallel for name, count in nodes.items()}
    assume(sum(room.values()))
    for workers in range(tensor_parallel, min(sum(room.values()), 16) + 1, tensor_parallel):
        placed = placement(nodes, workers, prefer, tensor_parallel=tensor_parallel)
        assert sum(placed.values()) == workers
        assert all(0 < count <= room[name] and count % tensor_parallel == 0 for name, count in placed.items())


def test_memory_prunes_before_time_ranks() -> None:
    found = plan(recipe(sequence_length=2048, global_batch_size=64), LARGE, [pool("cuda", nodes=8, gpus=8, gib=80)])
    assert found.memory_bytes <= 80 * GIB
    with pytest.raises(PlanError, match=r"needs [0-9.]+ of 16\.0 GiB, most of it [0-9.]+ GiB of gradients"):
        plan(recipe(sequence_length=2048), LARGE, [pool("dcu", gpus=1, gib=16)])


def test_more_workers_than_devices_are_refused_with_the_number_that_is_there() -> None:
    with pytest.raises(PlanError, match="asks for 4 workers") as caught:
        plan(recipe(workers=4), SMALL, [pool(cpus=2)])
    assert caught.value.hint == "set train.workers=2"


def test_more_workers_than_sequences_are_refused() -> None:
    with pytest.raises(PlanError, match="is more than train"):
        plan(recipe(workers={"min": 32, "max": 64}), SMALL, [pool(nodes=40)])


@pytest.mark.parametrize(
    ("pools", "asked", "chosen"),
    [
        ([pool()], "auto", "fp32"),
        ([pool()], "bf16", "bf16"),
        ([pool("cuda", gpus=2)], "auto", "bf16"),
        ([pool("cuda", gpus=2, bf16=False)], "auto", "fp16"),
        ([pool("dcu", gpus=2)], "auto", "fp16"),
        ([pool(), pool("dcu", gpus=2)], "fp16", "fp16"),
    ],
)
def test_the_precision_is_one_that_the_devices_compute_in(pools: list[NodePool], asked: str, chosen: str) -> None:
    assert plan(recipe(dtype=asked), SMALL, pools).dtype == chosen


def test_a_precision_that_no_device_computes_in_is_refused() -> None:
    with pytest.raises(PlanError, match=r"train\.dtype=fp16 is not for cpu"):
        plan(recipe(dtype="fp16"), SMALL, [pool()])
    with pytest.raises(PlanError, match=r"train\.dtype=bf16 is not for cuda"):
        plan(recipe(dtype="bf16"), SMALL, [pool("cuda", gpus=2, bf16=False)])


def test_what_the_pool_lacks_that_could_is_said_before_what_another_pool_cannot() -> None:
    with pytest.raises(PlanError, match=r"needs [0-9.]+ of 16.0 GiB"):
        plan(recipe(dtype="fp16", sequence_length=2048), LARGE, [pool(), pool("dcu", gpus=1, gib=16)])


def test_flash_attention_is_refused_on_cpus() -> None:
    with pytest.raises(PlanError, match=r"attention=flash_attention_2 is not for 1 cpu node"):
        plan(recipe(attention="flash_attention_2", dtype="bf16"), SMALL, [pool()])


def test_what_would_help_against_a_lack_of_memory_is_named() -> None:
    def hint(gib: int, **layout: Any) -> str:
        asked = recipe(layout=layout, workers=4, sequence_length=2048)
        with pytest.raises(PlanError) as caught:
            plan(asked, LARGE, [pool("cuda", gpus=4, gib=gib)])
        return caught.value.hint

    whole: dict[str, Any] = {"tensor_parallel": 1, "pipeline_stages": 1, "offload": False}
    assert re.match(r"any of these is enough: 2 nodes in place of 1.*; devices of [0-9.]+ GiB \(TP4 PP1", hint(8))
    assert "train.layout.zero_stage=3 (TP1 PP1 DP4 ZeRO-3" in hint(40, zero_stage=1, **whole)
    assert "train.layout.recompute=true (TP1" in hint(40, recompute=False, zero_stage=3, **whole)


def test_zero_splits_the_states_and_not_the_weights() -> None:
    def memory(ranks: int) -> Any:
        return worker_memory(
            SMALL,
            layout_of(recipe().train, SMALL, "bf16"),
            accelerator="cpu",
            dtype="bf16",
            data_parallel=ranks,
            micro_batch_size=1,
            accumulation=1,
            sequence_length=256,
        )

    one, four = memory(1), memory(4)
    assert one.weights == four.weights == 2 * SMALL.parameters
    assert (one.optimizer, four.optimizer) == (12 * SMALL.parameters, 3 * SMALL.parameters)


def test_more_devices_take_less_time() -> None:
    times = [
        step_time_s(
            LARGE,
            PLATFORMS["cuda"],
            layout_of(recipe().train, LARGE, "bf16"),
            data_parallel=n,
            accumulation=16 // n,
            micro_batch_size=1,
            global_batch_size=16,
            sequence_length=2048,
            width=2,
        )
        for n in (1, 2, 4)
    ]
    assert times == sorted(times, reverse=True)


def test_the_live_planner_predicts_as_everybody_else() -> None:
    for devices, accelerator in ((pool(), "cpu"), (pool("cuda", gpus=4, gib=80), "cuda")):
        found = plan(recipe(), SMALL, [devices])
        again = predict(
            SMALL,
            found.layout,
            nominal(accelerator),
            available_bytes=found.available_bytes,
            dtype=found.dtype,
            data_parallel=found.data_parallel,
            micro_batch_size=found.micro_batch_size,
            global_batch_size=16,
            sequence_length=256,
            host_memory=accelerator == "cpu",
        )
        assert (again.fits, again.peak_memory_bytes) == (True, found.memory_bytes)
        assert again.step.total == pytest.approx(found.step_time_s)


# --- memory that was not what was predicted ---------------------------------------------------------------------------


def ended(attempt: int, found: Plan, outcome: str) -> list[dict[str, Any]]:
    """The events of an attempt."""
    values = json.loads(json.dumps(vars(found)))
    planned = {"event": "planned", "attempt": attempt, "plan": values, "trial": str(found) if found.trial else ""}
    return [planned, {"event": "attempt_ended", "attempt": attempt, "outcome": outcome}]


def test_after_a_lack_of_memory_the_next_plan_takes_a_tenth_less_and_in_the_end_the_least() -> None:
    events: list[dict[str, Any]] = []
    took: list[Plan] = []
    while len(took) < 2 or took[-1].in_full != took[-2].in_full:
        took.append(plan(recipe(workers=2, sequence_length=2048), SMALL, [pool(gib=64)], past=learned(events)))
        events += ended(len(took), took[-1], "out_of_memory")
    *less, least, again = took
    assert all(after.memory_bytes <= 0.9 * before.memory_bytes for before, after in itertools.pairwise(less))
    assert least.memory_bytes <= less[-1].memory_bytes
    assert [found.recompute for found in took] == sorted(found.recompute for found in took)
    assert least.recompute
    assert least.micro_batch_size == 1
    assert len(took) < 10
    assert "since more ran out of memory" in took[1].reason
    assert again.reason == "takes the least of all layouts, since more ran out of memory"


def test_what_ran_out_of_memory_on_one_kind_of_device_says_nothing_of_another() -> None:
    found = plan(recipe(), SMALL, [pool()])
    past = learned(ended(1, found, "out_of_memory") + ended(2, found, "worker_lost"))
    assert past.ceilings == {"cpu": pytest.approx(0.9 * found.memory_bytes / found.available_bytes)}
    assert plan(recipe(), SMALL, [pool("dcu", gpus=2)], past=past) == plan(recipe(), SMALL, [pool("dcu", gpus=2)])


def test_a_device_with_more_memory_may_take_more() -> None:
    """Predictions err by a factor: what does not hold 8 of 16 GiB does not hold 32 of 64 either, but it holds 16."""
    found = plan(recipe(workers=2), SMALL, [pool()])
    past = learned(ended(1, found, "out_of_memory"))
    assert plan(recipe(workers=2), SMALL, [pool(gib=64)], past=past).micro_batch_size == found.micro_batch_size


def test_events_of_earlier_versions_teach_what_they_can() -> None:
    found = {"accelerator": "cpu", "data_parallel": 3, "memory_bytes": 1}
    events = [{"event": "planned", "attempt": 1, "plan": found}, {"event": "started_over", "last_attempt": 1}]
    ending = {"event": "attempt_ended", "attempt": 1, "outcome": "out_of_memory"}
    assert learned([*events, ending, {**ending, "attempt": 2}]) == Past(ceilings={}, workers=3, cut=(1, 1))
    assert learned([]) == Past()


def test_recomputation_is_for_what_does_not_fit_otherwise() -> None:
    large: dict[str, Any] = {"sequence_length": 2048, "global_batch_size": 16}
    whole: dict[str, Any] = {"zero_stage": 3, "tensor_parallel": 1, "pipeline_stages": 1}
    assert not plan(recipe(**large), SMALL, [pool()]).recompute
    roomy = plan(recipe(**large, layout={"recompute": True, **whole}), LARGE, [pool("cuda", nodes=2, gpus=8)])
    tight = [pool("cuda", nodes=2, gpus=8, gib=roomy.memory_bytes // GIB + 1)]
    with pytest.raises(PlanError, match="no layout fits"):
        plan(recipe(**large, layout={"recompute": False, **whole}), LARGE, tight)
    found = plan(recipe(**large, layout=whole), LARGE, tight)
    asked = plan(recipe(**large, layout={"recompute": True, **whole}), LARGE, tight)
    assert (found.recompute, found.memory_bytes, found.step_time_s) == (True, asked.memory_bytes, asked.step_time_s)
    assert any(loser.startswith("no recomputation: needs ") for loser in found.losers)
    assert not any(loser.startswith("no recomputation") for loser in asked.losers)


def test_a_model_that_no_device_holds_is_cut() -> None:
    found = plan(recipe(sequence_length=2048), LARGE, [pool("dcu", nodes=8, gpus=4)])
    assert found.memory_bytes <= 16 * GIB
    assert found.tensor_parallel * found.pipeline_stages > 1
    assert found.workers == 32
    assert found.losers


def test_layouts_that_are_as_fast_do_not_take_turns() -> None:
    """What the run has goes before what cuts the model less, and that before what is faster by next to nothing."""
    pools = [pool("cuda", nodes=2, gpus=8, gib=80)]
    first = plan(recipe(sequence_length=2048, global_batch_size=64), LARGE, pools)
    seen = set()
    for cut in ((1, 1), (2, 1), (1, 2), (4, 1), (8, 1), (2, 4)):
        found = plan(recipe(sequence_length=2048, global_batch_size=64), LARGE, pools, past=Past(cut=cut))
        has = (found.tensor_parallel, found.pipeline_stages)
        assert has in (cut, (first.tensor_parallel, first.pipeline_stages))
        assert found.step_time_s <= 1.05 * first.step_time_s
        seen.add(has)
    assert len(seen) > 1


# --- layouts on trial -------------------------------------------------------------------------------------------------


def trials(seconds: Mapping[str, float], given: NodePool, **train: Any) -> list[Plan]:
    """The plans of a run up to the first that is no trial.

    Args:
        seconds: that steps take, by words of the layout; 1 without them.
    """
    events: list[dict[str, Any]] = []
    plans: list[Plan] = []
    while not plans or plans[-1].trial:
        plans.append(plan(recipe(**train), SMALL, [given], past=learned(events)))
        events += ended(len(plans), plans[-1], "yielded")
        step_s = next((of_it for words, of_it in seconds.items() if words in str(plans[-1])), 1.0)
        events.insert(-1, {"event": "tried", "layout": str(plans[-1]), "step_s": step_s})
    return plans


def test_the_best_layouts_are_tried_and_the_fastest_goes_on() -> None:
    *tried, first = trials({"tensor parallel 2": 0.5}, pool(), trials=3)
    assert [one.reason for one in tried] == [f"on trial, layout {n} of 3" for n in (1, 2, 3)]
    assert len({str(one) for one in tried}) == 3
    assert (first.tensor_parallel, first.reason) == (2, "fastest of 3 that were tried, 0.5 s a step")
    assert trials({"2 stages": 0.5}, pool(), trials=3)[-1].pipeline_stages == 2


def test_one_device_tries_sizes_of_micro_batches() -> None:
    *tried, first = trials({"micro-batch 8": 0.5}, pool(cpus=1), trials=3)
    assert len({str(one) for one in tried}) == 3
    assert {one.workers for one in tried} == {1}
    assert first.micro_batch_size == 8


def test_what_fails_on_trial_is_left_out() -> None:
    events: list[dict[str, Any]] = []
    first = plan(recipe(trials=2), SMALL, [pool()], past=learned(events))
    events += ended(1, first, "error")
    second = plan(recipe(trials=2), SMALL, [pool()], past=learned(events))
    assert (second.trial, str(second) != str(first)) == (True, True)
    events += [{"event": "tried", "layout": str(second), "step_s": 3.0}, *ended(2, second, "yielded")]
    last = plan(recipe(trials=2), SMALL, [pool()], past=learned(events))
    assert not last.trial


def test_other_numbers_of_devices_are_not_tried_again() -> None:
    events: list[dict[str, Any]] = []
    for number in (1, 2):
        found = plan(recipe(trials=2), SMALL, [pool()], past=learned(events))
        events += [*ended(number, found, "yielded"), {"event": "tried", "layout": str(found), "step_s": 1.0}]
    assert not plan(recipe(trials=2), SMALL, [pool(nodes=2)], past=learned(events)).trial


# --- devices that are not there ---------------------------------------------------------------------------------------


def lacking(pools: list[NodePool], shape: ModelShape = SMALL, past: Past = NOTHING, **train: Any) -> CapacityError:
    with pytest.raises(CapacityError) as caught:
        plan(recipe(**train), shape, pools, past=past)
    return caught.value


@pytest.mark.parametrize(
    ("pools", "train", "missing"),
    [
        ([pool()], {"workers": 4}, "2 more devices: 2 of the 4 that train.workers.min asks for are there"),
        ([pool(), pool("dcu", gpus=3)], {"workers": 4}, "1 more device: 3 of the 4 that train.workers.min asks for"),
        ([pool(cpus=0)], {}, "1 more device: 0 of the 1 that train.workers.min asks for are there"),
        ([pool(cpus=3)], {"layout": {"tensor_parallel": 4}}, "4 more devices: 0 of the 4 that train.layout takes"),
        ([pool(cpus=3)], {"layout": {"pipeline_stages": 4}}, "1 more device: 3 of the 4 that train.layout takes"),
        (
            [pool(cpus=3)],
            {"workers": {"min": 7, "max": 8}, "layout": {"pipeline_stages": 4}},
            "5 more devices: 3 of the 8 that train.workers.min asks for",
        ),
        ([], {}, "a node: none is there"),
    ],
)
def test_what_is_missing_is_said_in_devices(pools: list[NodePool], train: dict[str, Any], missing: str) -> None:
    error = lacking(pools, **train)
    assert error.missing.startswith(missing)
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.hint, again.missing) == (error.message, error.hint, error.missing)


def test_devices_are_missing_where_one_pool_could_and_another_never_can() -> None:
    assert lacking([pool(nodes=8), pool("dcu", gpus=1)], workers=2, dtype="fp16").missing.startswith("1 more device")


def test_more_devices_are_no_help_to_what_cannot_be() -> None:
    """A wait for them would never end."""
    for train, pools, shape in [
        ({"workers": 4, "dtype": "fp16"}, [pool()], SMALL),
        ({"workers": {"min": 1, "max": 1}, "layout": {"pipeline_stages": 2}}, [pool(cpus=1)], SMALL),
        ({"workers": 32}, [pool()], SMALL),  # more than there are sequences
        ({"workers": 2, "sequence_length": 2048}, [pool("dcu", gpus=1, gib=16)], LARGE),
        ({"sequence_length": 2048}, [pool("dcu", gpus=1, gib=16)], LARGE),
    ]:
        with pytest.raises(PlanError) as caught:
            plan(recipe(**train), shape, pools)  # type: ignore[arg-type]
        assert not isinstance(caught.value, CapacityError), train


def test_a_run_that_had_enough_devices_for_its_memory_waits_for_them() -> None:
    settings: dict[str, Any] = {"sequence_length": 2048, "layout": {"zero_stage": 3, "offload": False}}
    whole = plan(recipe(**settings), LARGE, [pool("dcu", nodes=2, gpus=8, gib=64)])
    past = learned(ended(1, whole, "node_lost"))
    half = [pool("dcu", gpus=1, gib=64)]
    error = lacking(half, LARGE, past, **settings)
    assert error.missing == "2 more devices: 1 of the 3 that the model needs to fit into memory are there"
    with pytest.raises(PlanError, match="no layout fits"):
        plan(recipe(**settings), LARGE, half)
    with pytest.raises(PlanError, match="no layout fits"):
        plan(recipe(**settings, workers=1), LARGE, half, past=past)


# --- measured speeds --------------------------------------------------------------------------------------------------


def measured(given: NodePool, *flops: float, **link: float) -> NodePool:
    found = [Speeds(flops={"fp32": value, "bf16": 2 * value, "fp16": 2 * value}, **link) for value in flops]
    return replace(given, nodes=tuple(replace(n, speeds=speeds) for n, speeds in zip(given.nodes, found, strict=False)))


def test_the_slowest_measured_device_takes_the_place_of_the_nominal_one() -> None:
    fast, slow = (measured(pool("cuda", nodes=3, gpus=8), *speeds) for speeds in ((3e14,) * 3, (3e14, 3e13, 3e14)))
    assert platform_of(slow, "bf16").flops == pytest.approx(platform_of(fast, "bf16").flops / 10, rel=0.3)
    assert platform_of(slow, "fp32").flops < platform_of(slow, "bf16").flops
    assert platform_of(pool("cuda", gpus=8), "bf16") == PLATFORMS["cuda"]


def test_the_noise_of_a_measurement_does_not_change_a_plan() -> None:
    one, again = (platform_of(measured(pool(), value), "fp32") for value in (0.86e11, 1.15e11))
    assert one == again == PLATFORMS["cpu"]


def test_a_slow_wire_counts_where_training_uses_it_and_a_fast_one_makes_gloo_no_faster() -> None:
    slow, fast = {"link_bytes_per_s": 1e8, "link_latency_s": 1e-3}, {"link_bytes_per_s": 9e9, "link_latency_s": 1e-6}
    found = platform_of(measured(pool(), 1e11, **slow), "fp32")
    assert (found.link_bytes_per_s, found.link_latency_s) == pytest.approx((1e8, 1e-3), rel=0.2)
    for kept in (measured(pool(), 1e11, **fast), measured(pool("cuda", gpus=1), 1e14, **slow)):
        nominal = PLATFORMS[kept.accelerator]
        assert platform_of(kept, "fp32").link_bytes_per_s == nominal.link_bytes_per_s
        assert platform_of(kept, "fp32").link_latency_s == nominal.link_latency_s


def test_the_pool_that_measures_faster_is_chosen() -> None:
    dcu, cuda = pool("dcu", gpus=4), pool("cuda", gpus=4)
    assert plan(recipe(workers=4), SMALL, [dcu, cuda]).accelerator == "cuda"
    assert plan(recipe(workers=4), SMALL, [measured(dcu, 1e14), measured(cuda, 1e12)]).accelerator == "dcu"


def test_a_plan_that_was_made_by_other_speeds_is_predicted_anew() -> None:
    before = plan(recipe(), SMALL, [pool()])
    slow = [measured(pool(), 1e9)]
    anew = predicted_anew(before, recipe(), SMALL, slow)
    assert anew.step_time_s == plan(recipe(workers=2), SMALL, slow).step_time_s > before.step_time_s
    assert replace(anew, step_time_s=before.step_time_s) == before
    assert predicted_anew(before, recipe(), SMALL, [pool("cuda", gpus=1)]) == before, "its nodes are gone"


def test_a_plan_survives_json() -> None:
    found = plan(recipe(), SMALL, [pool()])
    values = json.loads(json.dumps(vars(found)))
    assert Plan(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}) == found


def ray_node(**values: Any) -> dict[str, Any]:
    node = {"NodeID": "n", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 4.0, "memory": 8.0}, "Labels": {}}
    return {**node, **values}


@pytest.mark.parametrize(
    ("labels", "gpus", "kind"),
    [
        ({}, 0, ("cpu", 0, True)),
        ({"ray.io/accelerator-type": "A100"}, 4, ("cuda", 40 * GIB, True)),
        ({"ray.io/accelerator-type": "V100"}, 4, ("cuda", 16 * GIB, False)),
        ({"terrane.io/accelerator": "dcu"}, 4, ("dcu", 16 * GIB, True)),
        ({"terrane.io/accelerator": "dcu", "terrane.io/device-memory-gib": "64"}, 4, ("dcu", 64 * GIB, True)),
        ({}, 1, ("cuda", 16 * GIB, True)),
    ],
)
def test_nodes_are_told_apart_by_devices_and_labels(
    labels: dict[str, str], gpus: int, kind: tuple[str, int, bool]
) -> None:
    node = ray_node(Labels=labels, Resources={"CPU": 4.0, "GPU": float(gpus)})
    assert cluster._kind(node) == kind


def test_an_unknown_accelerator_label_is_refused() -> None:
    with pytest.raises(UserError, match="accelerator=tpu"):
        cluster._kind(ray_node(Labels={"terrane.io/accelerator": "tpu"}))
