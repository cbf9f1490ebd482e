"""A run's costs and failures, read from its log, and its ledger, which the simulation comes to again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator import storage
from orchestrator.errors import UserError
from orchestrator.runs import RunDir, open_run
from orchestrator.simulation.replay import inputs_of, replay, scenario_of
from tests.made_runs import recipe

EVERY = 20


class Log:
    """Writes what the attempts of a run leave, with times that vary as real ones do."""

    def __init__(self, root: Path, seed: int = 0, steps: int = 240) -> None:
        self.run = open_run(recipe(str(root), steps=steps, checkpoint_every=EVERY))
        self.at = 1e9
        self.committed = self.step = 0
        self._dice = random.Random(seed)
        self._events: list[dict[str, Any]] = []
        self._lines: list[dict[str, Any]] = []
        self._attempt = 0

    def spend(self, seconds: float) -> float:
        """Around so many."""
        self.at += seconds * self._dice.uniform(0.9, 1.1)
        return self.at

    def say(self, name: str, **facts: Any) -> None:
        self._events.append({"event": name, "time": self.at, **facts})

    def attempt(self, until: int, standby: bool = False, last_save: int = 10**9) -> None:
        """Train from the last commit to a step, and save up to another."""
        self._attempt, self.step, self._lines = self._attempt + 1, self.committed, []
        self.spend(0.3)
        self.say("attempt_started", attempt=self._attempt, resume_step=self.step, standby=standby, workers=2)
        began = self.spend(0.2 if standby else 6.0)
        engine = self.spend(0.1 if standby else 2.5)
        self.say("worker_started", attempt=self._attempt, began=began, engine_began=engine, loaded=self.spend(1.0))
        stood_s = 0.0
        while self.step < until:
            data_s, step_s = self._dice.uniform(0.02, 0.04), self._dice.uniform(0.8, 1.2)
            self.at += data_s + step_s
            self.step += 1
            facts = {"step": self.step, "time": self.at, "step_time_s": step_s, "data_s": data_s, "loss": 1.0}
            self._lines.append({**facts, "checkpoint_s": stood_s, "tokens": self.step * 32})
            stood_s = 0.0
            if self.step % EVERY == 0 and self.step <= last_save:
                stood_s = self.save()
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        storage.write(self.run.metrics(self._attempt), text.encode())

    def save(self) -> float:
        began = self.at
        self.spend(0.5)
        self.say(
            "committed", attempt=self._attempt, step=self.step, waited_s=0.0, copied_s=self.at - began, saved_s=0.0
        )
        self.committed = self.step
        return self.at - began

    def end(self, outcome: str, detection_s: float = 0.0, part_s: float = 0.0, wait_s: float = 0.0) -> None:
        if outcome in ("yielded", "stopped"):
            self.save()
        failed_at = self.spend(part_s)
        self.spend(detection_s)
        facts = {"outcome": outcome, "committed_step": self.committed, "failed_at": failed_at}
        self.say("attempt_ended", attempt=self._attempt, last_step=self.step, **facts)
        self.say("decided", attempt=self._attempt, action="restart", wait_s=wait_s)
        self.at += wait_s

    def wait(self, seconds: float) -> None:
        self.say("waiting", missing="a node")
        self.spend(seconds)
        self.say("waited", seconds=seconds)

    def written(self) -> RunDir:
        self.say("stage_finished", stage="train")
        for number, event in enumerate(self._events, 1):
            self.run.write_json(self.run.path("events", f"{number:06d}-{event['event']}.json"), event)
        return self.run


def eventful(root: Path, seed: int) -> RunDir:
    """A killed worker, a lost node that is waited for, a resize, a cut network and a killed driver."""
    log = Log(root, seed)
    log.say("stage_started", stage="train")
    log.attempt(57)
    log.end("worker_lost", detection_s=1.0, part_s=0.4)
    log.attempt(95, standby=True)
    log.end("node_lost", detection_s=6.0, part_s=0.7)
    log.wait(12.0)
    log.attempt(130)
    log.end("yielded")
    log.attempt(171, standby=True)
    log.end("network", detection_s=5.0, part_s=0.2, wait_s=5.0)
    log.attempt(205)
    log.spend(4.0)
    log.say("driver_started")
    log.say("stage_started", stage="train")
    log.attempt(240)
    log.end("finished")
    return log.written()


@pytest.mark.parametrize("seed", range(5))
def test_simulation_comes_to_the_ledger_of_the_run(tmp_path: Path, seed: int) -> None:
    found = replay(eventful(tmp_path, seed))
    assert abs(found.wall_error) < 0.05
    assert abs(found.goodput_error) < 0.03
    assert {kind for kind, error in found.kind_errors().items() if abs(error) > 0.1} == set()
    assert found.simulated.failures == 4
    assert found.simulated.steps == 240


def test_costs_are_read_from_the_log(tmp_path: Path) -> None:
    found = inputs_of(eventful(tmp_path, 0))
    costs = found.costs
    assert found.step_s == pytest.approx(1.0, rel=0.05)
    assert costs.data_wait_s == pytest.approx(0.03, rel=0.15)
    assert costs.checkpoint_s == pytest.approx(0.5, rel=0.2)
    assert costs.standby and costs.standby.start_up_s == pytest.approx(0.13, rel=0.15), "with the wait for a batch"
    assert costs.cold.load_s == pytest.approx(1.0, rel=0.2)
    assert costs.detection("node_lost") == pytest.approx(6.0, rel=0.15)
    assert (found.workers, found.first_step, found.last_step) == (2, 0, 240)
    assert found.saves_at[:3] == ((20, 40), (60, 80), (100, 120, 130))
    outcomes = [strike.outcome for strike in found.strikes]
    assert outcomes == ["worker_lost", "node_lost", "yielded", "network", "driver_lost"]
    assert [strike.takes_node for strike in found.strikes] == [False, True, False, False, False]
    assert found.strikes[0].step == pytest.approx(57.4, abs=0.1)


def test_back_off_of_the_supervisor_is_not_taken_for_a_cost_of_its_restarts(tmp_path: Path) -> None:
    """The simulation asks for the same decision, and waits by itself."""
    scheduling_s = inputs_of(eventful(tmp_path, 0)).costs.cold.scheduling_s
    assert scheduling_s == pytest.approx(6.3, rel=0.15)


def test_run_that_was_stopped_before_it_made_up_what_it_had_lost(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.say("stage_started", stage="train")
    log.attempt(157, last_save=40)
    log.end("node_lost", detection_s=2.0)
    log.attempt(90)
    log.end("stopped")
    found = replay(log.written())
    assert found.measured.strikes[-1].outcome == "stopped"
    assert found.simulated.steps == 90
    assert found.simulated.failures == 1
    assert abs(found.wall_error) < 0.05


def test_run_that_went_back_on_purpose_is_refused(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.say("stage_started", stage="train")
    log.attempt(50)
    log.say("rolled_back", attempt=1)
    with pytest.raises(UserError, match="has rolled back"):
        replay(log.written())


def test_run_without_failures_is_its_steps_and_saves(tmp_path: Path) -> None:
    log = Log(tmp_path, steps=100)
    log.say("stage_started", stage="train")
    log.attempt(100)
    log.end("finished")
    run = log.written()
    assert inputs_of(run).strikes == ()
    assert abs(replay(run).wall_error) < 0.01
    assert scenario_of(inputs_of(run)).steps == 100


def test_run_without_a_step_is_refused(tmp_path: Path) -> None:
    run = open_run(recipe(str(tmp_path)))
    with pytest.raises(UserError, match="no step yet"):
        inputs_of(run)
