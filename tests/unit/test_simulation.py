"""Simulated runs: every second once, the supervisor's own decisions, nodes that come and go, a fault script."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator import failures
from orchestrator.fault_config import CorruptShard, CutLink, DrainNode, KillDriver, KillNode, KillRank, SlowRank
from orchestrator.planning.checkpointing import interval_s, mtbf_s
from orchestrator.simulation.fault_script import strikes_of, unplayed
from orchestrator.simulation.progress import Progress
from orchestrator.simulation.run import Result, simulate
from orchestrator.simulation.scenario import (
    Costs,
    Hazard,
    Island,
    Reclaims,
    Restart,
    Scenario,
    Slowdowns,
    Strike,
    scaled,
)

COLD = Restart(scheduling_s=3.0, start_up_s=5.0, load_s=2.0)
COSTS = Costs(cold=COLD, checkpoint_s=1.0, detection_s=4.0)


def island(**values: Any) -> Island:
    return Island(**{"nodes": 4, "step_s": scaled(1.0, 4), "repair_hours": 1.0, **values})


def run(*strikes: Strike, **values: Any) -> Scenario:
    chosen = {"islands": (island(),), "steps": 100, "costs": COSTS, "checkpoint_every": 10, "strikes": strikes}
    return Scenario(**{**chosen, **values})


def tiles(result: Result) -> bool:
    return sum(result.seconds.values()) == pytest.approx(result.wall_s)


# --- one run ----------------------------------------------------------------------------------------------------------


def test_undisturbed_run_trains_and_saves() -> None:
    found = simulate(run())
    assert found.seconds == pytest.approx(
        {"productive": 100.0, "checkpoint": 10.0, "scheduling": 3.0, "start_up": 5.0, "load": 2.0}
    )
    assert (found.wall_s, found.steps, found.saves, found.failures) == (pytest.approx(120.0), 100, 10, 0)


def test_killed_worker_costs_the_steps_since_the_save_the_detection_and_a_restart() -> None:
    found = simulate(run(Strike(step=57.5, outcome="worker_lost")))
    assert found.seconds["lost_work"] == pytest.approx(7.5)
    assert found.seconds["productive"] == pytest.approx(100.0)
    assert found.seconds["detection"] == pytest.approx(4.0)
    assert found.seconds["start_up"] == pytest.approx(2 * 5.0)
    assert (found.endings, found.steps_repeated) == ({"worker_lost": 1}, 7)
    assert tiles(found)


def test_failure_before_a_save_is_written_goes_back_to_the_one_before() -> None:
    slow = replace(COSTS, write_s=5.0)
    found = simulate(run(Strike(step=53, outcome="worker_lost"), costs=slow))
    assert found.seconds["lost_work"] == pytest.approx(13.0 + 1.0), "the save is lost, too"
    safe = simulate(run(Strike(step=56, outcome="worker_lost"), costs=slow))
    assert safe.seconds["lost_work"] == pytest.approx(6.0)


def test_workers_that_stand_by_shorten_a_restart_once_they_are_ready() -> None:
    costs = replace(COSTS, standby=Restart(start_up_s=0.5), standby_start_s=20.0)
    early = simulate(run(Strike(step=12, outcome="worker_lost"), costs=costs))
    late = simulate(run(Strike(step=30, outcome="worker_lost"), costs=costs))
    assert early.seconds["start_up"] == pytest.approx(10.0)
    assert late.seconds["start_up"] == pytest.approx(5.5)


def test_wait_for_data_is_told_apart_from_steps() -> None:
    found = simulate(run(Strike(step=55, outcome="worker_lost"), costs=replace(COSTS, data_wait_s=0.25)))
    assert found.seconds["data_wait"] == pytest.approx(25.0)
    assert found.seconds["productive"] == pytest.approx(100.0)
    assert found.seconds["lost_work"] == pytest.approx(5 * 1.25)


def test_decisions_are_those_of_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def decide(endings: Any, max_restarts: int) -> failures.Decision:
        asked.append((endings[-1].outcome, endings[-1].committed_step, endings[-1].last_step, max_restarts))
        return failures.Decision("restart", "because", wait_s=100.0)

    monkeypatch.setattr("orchestrator.simulation.island.failures.decide", decide)
    found = simulate(run(Strike(step=57, outcome="hang"), max_restarts=3))
    assert asked == [("hang", 50, 57, 3)]
    assert found.seconds["scheduling"] == pytest.approx(2 * 3.0 + 100.0)


def test_run_that_gets_nowhere_is_given_up() -> None:
    often = Hazard(outcome="worker_lost", mtbf_hours=2 / 3600, of="run")
    found = simulate(run(islands=(island(hazards=(often,)),), max_restarts=3))
    assert "train.max_restarts" in found.gave_up
    assert found.steps < 100
    assert found.endings["worker_lost"] == 4


def test_back_off_grows_with_failures_in_a_row() -> None:
    twice = [Strike(step=0.5, outcome="network"), Strike(step=0.75, outcome="network")]
    found = simulate(run(*twice))
    assert found.seconds["scheduling"] == pytest.approx(3 * 3.0 + 5.0 + 10.0)


def test_saves_by_time_follow_the_clock_of_training() -> None:
    found = simulate(run(steps=100_000, checkpoint_every="auto"))
    at, saves = 0.0, 0
    while at < 100_000:
        at, saves = at + interval_s(1.0 if saves else None, mtbf_s(0, at)) + 1.0, saves + 1
    assert found.saves == pytest.approx(saves, rel=0.03)
    assert tiles(found)


@pytest.mark.parametrize("write_s", [0.0, 3.0, 400.0])
@pytest.mark.parametrize("strike", [(), (Strike(step=3217.3, outcome="yielded"),)], ids=["", "a planned stop"])
def test_cycles_passed_over_in_one_go_count_as_one_by_one(
    write_s: float, strike: tuple[Strike, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = Hazard(outcome="worker_lost", mtbf_hours=0.5, of="run")
    scenario = run(
        steps=9_999,
        interval_s=80.3,
        costs=replace(COSTS, write_s=write_s),
        islands=(island(hazards=(chance,)),),
        strikes=strike,
    )
    fast = simulate(scenario, seed=5)
    monkeypatch.setattr(Progress, "_whole_cycles", lambda *_: 0.0)
    slow = simulate(scenario, seed=5)
    assert fast.seconds == pytest.approx(slow.seconds)
    assert (fast.saves, fast.endings, fast.steps_repeated) == (slow.saves, slow.endings, slow.steps_repeated)


def test_same_seed_is_the_same_run_and_another_is_not() -> None:
    chance = Hazard(outcome="worker_lost", mtbf_hours=0.01, of="run")
    scenario = run(islands=(island(hazards=(chance,)),), steps=1000)
    assert simulate(scenario, 1) == simulate(scenario, 1)
    assert simulate(scenario, 1) != simulate(scenario, 2)


# --- nodes ------------------------------------------------------------------------------------------------------------


def lost_at(step: float, seconds: float) -> Strike:
    return Strike(step=step, outcome="node_lost", takes_node=True, seconds=seconds)


def test_fixed_run_waits_for_its_node() -> None:
    found = simulate(run(lost_at(50.5, seconds=64.0)))
    assert found.seconds["waiting"] == pytest.approx(60.0), "4 s of it went by unnoticed"
    assert tiles(found)


def test_spare_node_takes_the_place() -> None:
    found = simulate(run(lost_at(50.5, seconds=64.0), islands=(island(spare_nodes=1),)))
    assert "waiting" not in found.seconds
    assert found.seconds["productive"] == pytest.approx(100.0)


def test_elastic_run_shrinks_and_grows_again() -> None:
    """On three of four nodes a step takes 4/3 s; the node is back after 100 s, and 30 s later the run grows, after a
    commit and a cold start."""
    found = simulate(run(lost_at(501.5, seconds=100.0), islands=(island(least_nodes=2),), steps=1000))
    assert "waiting" not in found.seconds
    assert found.endings == {"node_lost": 1, "yielded": 1}
    assert 1000 < found.seconds["productive"] < 1000 + 150 / 4
    assert found.seconds["start_up"] == pytest.approx(3 * 5.0)
    assert found.seconds["lost_work"] == pytest.approx(1.5), "growing loses nothing"


def test_run_near_its_end_does_not_grow() -> None:
    found = simulate(run(lost_at(900, seconds=40.0), islands=(island(least_nodes=2),), steps=960))
    assert found.endings == {"node_lost": 1}


def test_elastic_run_does_not_shrink_below_its_least() -> None:
    three = [lost_at(20 * n, seconds=5000.0) for n in (1, 2, 3)]
    found = simulate(run(*three, islands=(island(least_nodes=2),)))
    assert found.seconds["waiting"] > 4000


def test_notice_of_a_reclaim_saves_what_is_done() -> None:
    noticed = Strike(step=55.5, outcome="node_lost", notice_s=60.0, seconds=1e4)
    found = simulate(run(noticed, islands=(island(least_nodes=2),)))
    assert found.endings == {"yielded": 1}
    assert "lost_work" not in found.seconds
    short = simulate(run(replace(noticed, notice_s=5.0), islands=(island(least_nodes=2),)))
    assert short.endings == {"node_lost": 1}
    assert short.seconds["lost_work"] > 0


def test_attempt_that_made_way_is_not_struck_when_the_node_goes() -> None:
    """Its restart takes longer than the notice."""
    noticed = Strike(step=55.5, outcome="node_lost", notice_s=60.0, seconds=1e4)
    slow = replace(COSTS, cold=Restart(start_up_s=200.0))
    assert simulate(run(noticed, islands=(island(least_nodes=2),), costs=slow)).endings == {"yielded": 1}


def test_reclaimed_nodes_come_back() -> None:
    spot = Reclaims(mean_hours=1.0, notice_s=120.0, back_hours=0.1)
    found = simulate(run(islands=(island(least_nodes=1, reclaims=spot),), steps=20_000))
    assert found.steps == 20_000
    assert found.endings["yielded"] > 10
    assert tiles(found)


def test_failures_of_nodes_come_as_often_as_they_should() -> None:
    """2,000 nodes that fail once in 1,000 hours, over 500 hours of training: 1,000 failures, give or take 32."""
    often = Hazard(outcome="node_lost", mtbf_hours=1000.0, takes_node=True)
    many = Island(nodes=2000, spare_nodes=40, step_s=scaled(10.0, 2000), hazards=(often,), repair_hours=1.0)
    found = simulate(run(islands=(many,), steps=180_000, costs=replace(COSTS, checkpoint_s=0.0, detection_s=0.0)))
    expected = found.wall_s / 3600 * 2000 / 1000
    assert found.failures == pytest.approx(expected, abs=4 * expected**0.5)


def test_nodes_are_paid_for_while_they_are_there() -> None:
    found = simulate(run(islands=(island(spare_nodes=1, devices_per_node=8, price_per_device_hour=2.0),)))
    assert found.device_hours == pytest.approx(5 * 8 * 120 / 3600)
    assert found.cost == pytest.approx(2.0 * found.device_hours)


def test_straggler_slows_all_until_it_is_left_out() -> None:
    slow = Strike(step=100, outcome="slow", slow_factor=3.0, slow_steps=1000)
    kept = simulate(run(slow, steps=2000))
    assert kept.seconds["productive"] == pytest.approx(2000 + 2 * 1000, rel=0.02)
    left_out = simulate(run(slow, steps=2000, islands=(island(spare_nodes=1),)))
    assert left_out.endings == {"yielded": 1}
    assert left_out.seconds["productive"] == pytest.approx(2000 + 2 * 40, abs=4)


def test_straggler_that_is_kept_is_slow_after_a_restart_too() -> None:
    slow = Strike(step=100, outcome="slow", slow_factor=3.0, slow_steps=1000)
    found = simulate(run(slow, Strike(step=300.0, outcome="worker_lost"), steps=2000))
    assert found.seconds["productive"] == pytest.approx(2000 + 2 * 1000, rel=0.03)


def test_slow_nodes_come_by_chance_and_go_again() -> None:
    rough = Slowdowns(mtbf_hours=2.0, factor=2.0, mean_hours=0.05)
    found = simulate(run(islands=(island(slowdowns=rough),), steps=50_000))
    assert 1.02 < found.seconds["productive"] / 50_000 < 1.3
    assert found.failures == 0


# --- islands ----------------------------------------------------------------------------------------------------------


def two(*strikes: Strike, exchange_s: float = 0.0, **values: Any) -> Scenario:
    """The second does a third of the work."""
    islands = (island(step_s=scaled(1.5, 4)), island(step_s=scaled(3.0, 4)))
    return run(*strikes, islands=islands, exchange_s=exchange_s, **values)


def test_islands_share_a_step_by_their_speeds() -> None:
    found = simulate(two(exchange_s=0.25))
    assert found.seconds["productive"] == pytest.approx(100 * 1.25)
    assert tiles(found)


def test_lost_island_costs_its_share_and_not_the_run() -> None:
    found = simulate(two(Strike(step=55.5, outcome="worker_lost", island=1)))
    assert found.seconds["lost_work"] == pytest.approx(0.5), "the step under way"
    assert found.seconds["detection"] == pytest.approx(4.0 / 3)
    assert found.wall_s - simulate(two()).wall_s < 14.0 / 3 + 1.0
    assert tiles(found)


def test_run_goes_back_when_its_last_island_fails() -> None:
    both = [Strike(step=55.5, outcome="worker_lost", island=1), Strike(step=57.5, outcome="worker_lost", island=0)]
    found = simulate(two(*both))
    assert found.seconds["lost_work"] > 7.0
    assert found.steps == 100


# --- a fault script ---------------------------------------------------------------------------------------------------


def test_fault_script_of_a_recipe_is_played() -> None:
    faults = (
        KillRank(kind="kill_rank", rank=1, step=15),
        SlowRank(kind="slow_rank", rank=0, step=25, factor=3, steps=10),
        KillNode(kind="kill_node", node=2, step=45, seconds=10),
        KillDriver(kind="kill_driver", step=55),
        CutLink(kind="cut_link", node=1, step=65, seconds=10),
        DrainNode(kind="drain_node", node=2, step=75, deadline_s=30, seconds=5),
        CorruptShard(kind="corrupt_shard", shard=0, step=80),
    )
    islands = (island(least_nodes=2),)
    found = simulate(run(*strikes_of(faults, islands), islands=islands))
    assert found.endings == {"worker_lost": 1, "node_lost": 1, "driver_lost": 1, "network": 1, "yielded": 1}
    assert found.steps == 100
    assert unplayed(faults) == ("corrupt_shard-shard-0-step-80",)


def test_faults_strike_the_island_of_their_rank_or_node() -> None:
    islands = (island(devices_per_node=2), island())
    faults = (KillRank(kind="kill_rank", rank=9, step=1), KillNode(kind="kill_node", node=4, step=2))
    assert [strike.island for strike in strikes_of(faults, islands)] == [1, 0]


@pytest.mark.parametrize(("seconds", "failed"), [(3.0, 0), (30.0, 1)])
def test_storage_that_is_away_ends_an_attempt_that_saves(seconds: float, failed: int) -> None:
    found = simulate(run(Strike(step=51, outcome="outage", seconds=seconds)))
    assert (found.endings.get("storage", 0) >= 1) == bool(failed)
    assert found.steps == 100
