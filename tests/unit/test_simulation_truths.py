"""The simulation against what is known: Daly's closed form, and two published runs.

Llama 3: Llama Team, "The Llama 3 Herd of Models", 2024 (arXiv:2407.21783), section 3.3.4 and table 5.
GeoGalactica: Lin et al., "GeoGalactica: A Scientific Large Language Model in Geoscience", 2023 (arXiv:2401.00434).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import simpy

from orchestrator.planning.checkpointing import best_interval_s, efficiency
from orchestrator.simulation.experiments import best_interval, days, forecast
from orchestrator.simulation.run import simulate
from orchestrator.simulation.scenario import Costs, Hazard, Island, Restart, Scenario, scaled

HOUR, DAY = 3600.0, 24 * 3600.0


# --- the closed form --------------------------------------------------------------------------------------------------


def daly(cost_s: float, restart_s: float, mtbf_s: float, failures: int) -> Scenario:
    """A run as Daly's formula has it: failures at any time alike, in restarts too, and nothing else."""
    failing = Hazard(outcome="worker_lost", mtbf_hours=mtbf_s / HOUR, of="run")
    return Scenario(
        islands=(Island(nodes=1, step_s=scaled(1.0, 1), hazards=(failing,)),),
        steps=round(failures * mtbf_s),
        costs=Costs(cold=Restart(load_s=restart_s), checkpoint_s=cost_s),
        interval_s=float(round(best_interval_s(cost_s, mtbf_s))),
        max_restarts=10**9,
    )


@pytest.mark.parametrize(
    ("cost_s", "restart_s", "mtbf_s"),
    [(120.0, 300.0, 6 * HOUR), (5.0, 30.0, DAY), (60.0, 0.0, 1800.0)],
)
@pytest.mark.parametrize("times", [1 / 3, 1.0, 3.0], ids=["a third", "best interval", "three times"])
def test_goodput_is_that_of_the_closed_form(cost_s: float, restart_s: float, mtbf_s: float, times: float) -> None:
    scenario = daly(cost_s, restart_s, mtbf_s, failures=2000)
    interval_s = float(round(times * best_interval_s(cost_s, mtbf_s)))
    found = forecast(replace(scenario, interval_s=interval_s), replications=8).goodput
    expected = efficiency(interval_s, cost_s, restart_s, mtbf_s)
    assert found.mean == pytest.approx(expected, rel=0.01)
    assert found.low < expected < found.high, "within the confidence that is claimed"


def test_best_interval_is_that_of_the_closed_form() -> None:
    scenario = daly(20.0, 60.0, HOUR, failures=500)
    found = best_interval(scenario, replications=2)
    assert found.interval_s == pytest.approx(best_interval_s(20.0, HOUR), rel=0.25), "the optimum is flat"
    assert efficiency(found.interval_s, 20.0, 60.0, HOUR) == pytest.approx(
        efficiency(best_interval_s(20.0, HOUR), 20.0, 60.0, HOUR), rel=0.002
    )


# --- Llama 3 405B: 466 interruptions in 54 days on 16,384 GPUs, over 90 % of the time effective ----------------------

LLAMA_SERVERS = 16_384 // 8
LLAMA_PERIOD_S = 54 * DAY
LLAMA_UNEXPECTED, LLAMA_PLANNED, LLAMA_HARDWARE = 419, 47, 0.78
LLAMA_STEP_S = 6 * 405e9 * 16e6 / (16_384 * 400e12)
"""Batches of 16M tokens, at about 400 TFLOP/s a GPU."""
LLAMA_WRITE_S = 16_384 * 4e9 / 2e12
"""Up to 4 GB a GPU, at the 2 TB/s that the storage sustains."""


def llama(stands_still_s: float, restart_s: float) -> Scenario:
    """24,576 GPUs are in the cluster, of which 16,384 train."""
    server_hours = LLAMA_SERVERS * LLAMA_PERIOD_S / HOUR
    hardware = LLAMA_HARDWARE * LLAMA_UNEXPECTED
    hazards = (
        Hazard(outcome="node_lost", mtbf_hours=server_hours / hardware, takes_node=True),
        Hazard(outcome="worker_lost", mtbf_hours=server_hours / (LLAMA_UNEXPECTED - hardware)),
        Hazard(outcome="yielded", mtbf_hours=LLAMA_PERIOD_S / HOUR / LLAMA_PLANNED, of="run"),
    )
    return Scenario(
        islands=(
            Island(
                nodes=LLAMA_SERVERS,
                spare_nodes=(24_576 - 16_384) // 8,
                devices_per_node=8,
                step_s=scaled(LLAMA_STEP_S, LLAMA_SERVERS),
                hazards=hazards,
            ),
        ),
        steps=10**7,
        costs=Costs(
            cold=Restart(start_up_s=restart_s),
            checkpoint_s=stands_still_s,
            write_s=LLAMA_WRITE_S - stands_still_s,
        ),
        checkpoint_every="auto",
        longest_s=LLAMA_PERIOD_S,
    )


@pytest.mark.parametrize(
    ("stands_still_s", "restart_s"),
    [(LLAMA_WRITE_S, 150.0), (1.0, 600.0)],
    ids=["saves stop training, restarts of 2.5 minutes", "saves beside training, restarts of 10 minutes"],
)
def test_llama_3_trains_over_nine_tenths_of_the_time(stands_still_s: float, restart_s: float) -> None:
    """How long a restart took is not published. This is how long it may have taken."""
    found = forecast(llama(stands_still_s, restart_s), replications=8)
    interruptions = sum(found.endings.values())
    assert interruptions == pytest.approx(466, rel=0.06)
    assert found.endings["yielded"] == pytest.approx(47, abs=8)
    assert 0.90 < found.goodput.low < found.goodput.high < 0.95


def test_llama_3_would_not_have_with_restarts_of_half_an_hour() -> None:
    assert forecast(llama(1.0, 1800.0), replications=4).goodput.high < 0.90


def test_months_on_thousands_of_nodes_take_few_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """No event for a node, a step or a save: a run of months takes a fraction of a second."""
    steps = []
    step = simpy.Environment.step
    monkeypatch.setattr(simpy.Environment, "step", lambda env: (steps.append(1), step(env)))
    found = simulate(llama(1.0, 600.0))
    assert found.saves > 3000
    assert len(steps) < 60 * sum(found.endings.values())


# --- GeoGalactica: 16 days of compute in about a month ----------------------------------------------------------------

GEO_NODES, GEO_STEPS, GEO_STEP_S, GEO_SAVED_EVERY = 512, 7_324, 180.0, 100


def geogalactica(costs: Costs, every: int | str) -> Scenario:
    """How often its nodes failed is not published: taken to be as often as Llama 3's."""
    node_hours = LLAMA_SERVERS * LLAMA_PERIOD_S / HOUR / LLAMA_UNEXPECTED
    island = Island(
        nodes=GEO_NODES,
        spare_nodes=16,
        devices_per_node=4,
        step_s=scaled(GEO_STEP_S, GEO_NODES),
        hazards=(Hazard(outcome="node_lost", mtbf_hours=node_hours, takes_node=True),),
    )
    return Scenario(islands=(island,), steps=GEO_STEPS, costs=costs, checkpoint_every=every)  # type: ignore[arg-type]


def test_geogalactica_takes_about_a_month_by_hand() -> None:
    """Somebody looks after the run twice a day, so that it stands for six hours on average."""
    by_hand = Costs(cold=Restart(scheduling_s=600.0, start_up_s=600.0), checkpoint_s=60.0, detection_s=6 * HOUR)
    scenario = geogalactica(by_hand, GEO_SAVED_EVERY)
    assert days(scenario.ideal_s) == pytest.approx(16, rel=0.05)
    found = forecast(scenario, replications=32)
    assert 25 < days(found.wall_s.mean) < 34


def test_geogalactica_takes_little_more_than_its_compute_where_restarts_are_automatic() -> None:
    automatic = Costs(
        cold=Restart(scheduling_s=10.0, start_up_s=60.0, load_s=60.0), checkpoint_s=60.0, detection_s=60.0
    )
    found = forecast(geogalactica(automatic, "auto"), replications=32)
    assert days(found.wall_s.mean) < 1.06 * days(geogalactica(automatic, "auto").ideal_s)
