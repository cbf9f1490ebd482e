"""`terrane simulate`: from a recipe and a cluster file to a forecast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config import Recipe
from orchestrator.errors import UserError
from orchestrator.model_config import ModelConfig
from orchestrator.planning.cluster_file import Cluster
from orchestrator.simulation import command
from orchestrator.simulation.command import Options
from orchestrator.simulation.estimates import estimate, quantile_of_t
from orchestrator.simulation.experiments import best_interval, forecast, worth_sparing
from orchestrator.simulation.scenario import Costs, Hazard, Island, Restart, Scenario, scaled
from tests.made_runs import recipe
from tests.unit.test_replay import eventful

POOL = {"name": "a", "nodes": 64, "devices_per_node": 8, "node_mtbf_hours": 2000.0, "memory_gib": 80}


def cluster(*pools: dict[str, Any], **values: Any) -> Cluster:
    return Cluster.model_validate({"pools": [{**POOL, **pool} for pool in pools or ({},)], **values})


def wanted(**values: Any) -> Recipe:
    return recipe("/nowhere", **{"steps": 20_000, "workers": 512, "global_batch_size": 512, **values})


def test_pool_becomes_an_island(tmp_path: Path) -> None:
    slow = {"mtbf_hours": 400, "factor": 2}
    pool = {
        "spot": {"reclaimed_after_hours": 9, "notice_s": 30},
        "stragglers": slow,
        "price_per_device_hour": 2,
        "spare_nodes": 3,
    }
    found = command.scenario_of(wanted(), cluster(pool), Options(step_time_s=10.0))
    (island,) = found.islands
    assert (island.nodes, island.least, island.spare_nodes, island.step_s(64)) == (64, 64, 3, 10.0)
    assert [(h.outcome, h.mtbf_hours, h.takes_node) for h in island.hazards] == [("node_lost", 2000.0, True)]
    assert island.reclaims and island.reclaims.notice_s == 30
    assert island.slowdowns and (island.slowdowns.factor, island.slowdowns.mean_hours) == (2.0, 1.0)
    assert (found.steps, found.checkpoint_every, found.max_restarts) == (20_000, 100, 10)


def test_workers_of_the_recipe_say_how_many_nodes_train() -> None:
    few = command.scenario_of(wanted(workers={"min": 30, "max": 100}), cluster(), Options(step_time_s=10.0))
    (island,) = few.islands
    assert (island.nodes, island.least, island.spare_nodes) == (13, 4, 51)
    with pytest.raises(UserError, match=r"workers.min=513 is more than the 512 devices"):
        command.scenario_of(wanted(workers=513), cluster(), Options(step_time_s=10.0))


def test_command_line_goes_before_the_files() -> None:
    told = Options(
        step_time_s=5.0, mtbf_hours=77.0, checkpoint_s=3.0, restart_s=40.0, detection_s=9.0, steps=7, spares=2
    )
    found = command.scenario_of(wanted(), cluster(), told)
    assert found.islands[0].hazards[0].mtbf_hours == 77.0
    assert (found.steps, found.islands[0].spare_nodes) == (7, 2)
    assert (found.costs.checkpoint_s, found.costs.cold.total_s, found.costs.detection("hang")) == (3.0, 40.0, 9.0)


def test_cluster_in_which_nothing_fails_is_refused() -> None:
    with pytest.raises(UserError, match="nothing fails"):
        command.scenario_of(wanted(), cluster({"node_mtbf_hours": None}), Options(step_time_s=1.0))


def test_two_pools_share_the_step() -> None:
    both = command.scenario_of(wanted(), cluster({}, {"name": "b", "devices_per_node": 4}), Options(step_time_s=9.0))
    assert both.ideal_s == pytest.approx(20_000 * 9.0)
    apart = command.scenario_of(wanted(), cluster({}, {"name": "b"}), Options(step_time_s=9.0, exchange_s=0.5))
    assert apart.ideal_s == pytest.approx(20_000 * 9.5)
    elastic = wanted(workers={"min": 96, "max": 192})
    parts = command.scenario_of(elastic, cluster({}, {"name": "b"}), Options(step_time_s=9.0)).islands
    assert [(island.nodes, island.least) for island in parts] == [(12, 6), (12, 6)], "each has half of the workers"


def test_step_time_is_what_the_planner_says_of_so_many_nodes() -> None:
    pool = {"nodes": 8, "devices_per_node": 4, "tflops": {"bf16": 100}}
    model = {"layers": 24, "hidden_size": 2048, "heads": 16}
    asked = wanted(workers={"min": 4, "max": 32}, global_batch_size=64, sequence_length=2048)
    asked = asked.model_copy(update={"model": ModelConfig(**model)})
    (island,) = command.scenario_of(asked, cluster(pool), Options()).islands
    half = {**pool, "tflops": {"bf16": 50}}
    (slower,) = command.scenario_of(asked, cluster(half), Options()).islands
    assert 0 < island.step_s(8) < island.step_s(4)
    assert slower.step_s(8) > island.step_s(8)


def test_plan_that_does_not_fit_says_what_to_do() -> None:
    with pytest.raises(UserError, match="pool a, 64 of its nodes") as caught:
        command.scenario_of(wanted(), cluster({"memory_gib": 0.001}), Options())
    assert "--step-time-s" in caught.value.hint


def test_costs_can_be_those_that_a_run_measured(tmp_path: Path) -> None:
    run = eventful(tmp_path, seed=1)
    found = command.scenario_of(wanted(), cluster(), Options(step_time_s=1.0, like=run.uri))
    assert found.costs.cold.start_up_s == pytest.approx(2.5, rel=0.1)
    assert found.costs.closing_s == 0.0


# --- the questions ----------------------------------------------------------------------------------------------------


def failing(**values: Any) -> Scenario:
    lost = Hazard(outcome="node_lost", mtbf_hours=500.0, takes_node=True)
    island = Island(nodes=100, step_s=scaled(30.0, 100), hazards=(lost,), repair_hours=10.0)
    costs = Costs(cold=Restart(start_up_s=120.0), checkpoint_s=20.0, detection_s=10.0)
    return Scenario(**{"islands": (island,), "steps": 20_000, "costs": costs, "longest_s": 1e9, **values})


def test_spare_nodes_pay_until_they_stand_idle() -> None:
    """Two nodes are away at a time, by Little's law."""
    best, tried = worth_sparing(failing(), replications=4)
    by_number = {one.nodes: one for one in tried}
    assert 2 <= best <= 8
    assert by_number[best].device_hours < 0.9 * by_number[0].device_hours
    assert by_number[best].wall_s < by_number[0].wall_s


def test_best_interval_beats_others_on_the_same_failures() -> None:
    scenario = replace(failing(), islands=(replace(failing().islands[0], spare_nodes=20),))
    found = best_interval(scenario, replications=4)
    best = forecast(replace(scenario, interval_s=found.interval_s), 4).goodput.mean
    assert best == pytest.approx(found.goodput)
    for other_s in (found.interval_s / 4, found.interval_s * 4):
        assert forecast(replace(scenario, interval_s=other_s), 4).goodput.mean < best
    assert found.steps == round(found.interval_s / 30.0)


def test_search_goes_on_where_the_closed_form_is_far_off() -> None:
    """Of four islands one at a time fails, as a rule, which costs its share and no step of the others."""
    often = Hazard(outcome="worker_lost", mtbf_hours=2.0, of="run")
    island = Island(nodes=1, step_s=scaled(60.0, 1), hazards=(often,))
    scenario = replace(failing(), islands=(island,) * 4)
    found = best_interval(scenario, replications=4)
    assert found.closed_form_s < found.interval_s <= 16 * found.closed_form_s
    assert found.goodput >= max(goodput for _, goodput in found.tried)


def test_interval_of_confidence_narrows_with_replications() -> None:
    scenario = replace(failing(), steps=5000, islands=(replace(failing().islands[0], spare_nodes=20),))
    few, many = (forecast(scenario, count).goodput for count in (4, 40))
    assert many.half_width < few.half_width
    assert few.low < many.mean < few.high


def test_confidence_is_student_s() -> None:
    for freedom, expected in [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (15, 2.131), (100, 1.984)]:
        assert quantile_of_t(0.975, freedom) == pytest.approx(expected, rel=0.02)
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert (found.low, found.high) == (pytest.approx(0.446, abs=0.05), pytest.approx(4.554, abs=0.05))


# --- the command ------------------------------------------------------------------------------------------------------

CLUSTER = """\
pools:
  - {name: h100, nodes: 32, devices_per_node: 8, node_mtbf_hours: 3000, spare_nodes: 2, price_per_device_hour: 2}
"""


def invoke(folder: Path, *options: str) -> Any:
    (folder / "cluster.yaml").write_text(CLUSTER)
    arguments = ["simulate", "jobs/recipes/tiny.yaml", "--cluster", str(folder / "cluster.yaml"), "train.workers=256"]
    found = CliRunner().invoke(app, [*arguments, "--step-time-s", "20", "--steps", "50000", *options])
    assert found.exit_code == 0, found.output
    return found.output


def test_command_prints_a_table(tmp_path: Path) -> None:
    text = invoke(tmp_path, "--replications", "4", "--mtbf-hours", "1000")
    for said in ("goodput", "wall time", "cost", "lost work", "best checkpoint interval", "spare nodes worth holding"):
        assert said in text
    assert "one node lost in 1,000 node-hours" in text


def test_command_prints_json(tmp_path: Path) -> None:
    found = json.loads(invoke(tmp_path, "--replications", "4", "--json"))
    assert 0 < found["goodput"]["low"] < found["goodput"]["mean"] < found["goodput"]["high"] < 1
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"]["mean"])
    assert found["cost"]["mean"] == pytest.approx(2 * found["device_hours"]["mean"])
    assert found["inputs"]["pools"][0]["mtbf_hours"] == {"node_lost": 3000.0}
    assert found["best_interval"]["interval_s"] > 0
    assert found == json.loads(invoke(tmp_path, "--replications", "4", "--json")), "the same seed, the same answer"
