"""What is looked at again, and when: capacity beside a live attempt, and groups that are to stand by."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator import capacity, cluster, standby
from orchestrator.accelerators import NodePool
from orchestrator.capacity import Capacity
from orchestrator.errors import PlanError
from orchestrator.planning.plan import Plan
from orchestrator.runs import RunDir
from orchestrator.standby import Standby
from tests.unit.test_elastic import plan_on
from tests.unit.test_planning import pool


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(capacity.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_same_nodes_are_not_thought_through_at_every_look(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[NodePool] = [pool(nodes=2)]
    leaving: dict[str, float] = {}
    searches: list[str] = []

    def nothing_better(*_: Any) -> Plan:
        searches.append("search")
        raise PlanError("nothing fits")

    monkeypatch.setattr(cluster, "node_pools", lambda: there)
    monkeypatch.setattr(cluster, "draining", lambda: leaving)
    monkeypatch.setattr(capacity, "make_plan", nothing_better)
    nobody = cast(Any, None)
    capable = Capacity(nobody, nobody, cast(Any, SimpleNamespace(lost={})), nobody, own_cluster=False)
    live = plan_on("cpu0", "cpu1")

    def look(slow: dict[str, float] | None = None) -> int:
        capable.change(live, 1.0, 100, slow or {})
        return len(searches)

    assert look() == 0, "nothing new"
    there[:] = [pool(nodes=3)]
    assert look() == look() == look() == 1
    clock.now += capacity.OF_NO_USE_S + 1
    assert look() == look() == 2
    there[:] = [pool(nodes=4)]
    assert look() == look() == 3
    assert look({"cpu0": 2.0}) == 4, "a slow node is another reason"
    leaving["cpu1"] = 0.0
    assert look() == 5, "and so is one that goes"


def test_groups_that_come_to_nothing_are_started_less_and_less_often(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[float] = []

    class Group:
        """Its workers have ended before they stood ready."""

        broken = True
        plan = plan_on("a")

        def fits(self, plan: Plan) -> bool:
            return False

        def dismiss(self) -> None:
            pass

        def unwound(self, timeout_s: float) -> bool:
            return True

    def start(self: Standby, plan: Plan, cold: bool) -> Group:
        started.append(clock.now)
        return Group()

    monkeypatch.setattr(standby.Standby, "_start", start)
    recipe: Any = SimpleNamespace(train=SimpleNamespace(standby=True))
    waiting = Standby(cast(Any, None), recipe, 400, cast(Any, None))
    while clock.now < 1000.0 + 6 * 3600:
        waiting.prepare(plan_on("a"))
        clock.now += 1
    pauses = [after - before for before, after in itertools.pairwise(started)]
    assert pauses[:4] == pytest.approx([31, 61, 121, 241], abs=2)
    assert pauses[-1] == pytest.approx(standby.MOST_AGAIN_S, abs=2)


def test_ctrl_c_does_not_leave_threads_of_ray_behind(tmp_path: Path) -> None:
    """They end the process when Ray is shut down under them."""
    asked: list[float] = []

    class Group:
        """Its workers are starting, and somebody is impatient twice."""

        busy = False

        def unwound(self, timeout_s: float) -> bool:
            asked.append(timeout_s)
            if len(asked) in (1, 3):
                raise KeyboardInterrupt
            return len(asked) > 4

        def end(self) -> None:
            raise AssertionError("it has ended by itself")

    waiting = Standby(RunDir(str(tmp_path)), cast(Any, None), 400, cast(Any, None))
    waiting._started = [cast(Any, Group())]
    with pytest.raises(KeyboardInterrupt):
        waiting.close()
    assert len(asked) == 5
