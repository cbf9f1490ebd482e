"""The lease of a run: an agent on every node that it uses, which together hold its devices from attempt to attempt.

Workers ask Ray for next to nothing and are pinned to the nodes of their plan, so that the workers of the next attempt
can stand ready beside those of the present one, and no other job takes the devices in between.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.accelerators import ACCELERATORS
from orchestrator.node_agent import Introduction, NodeAgent, Report
from orchestrator.planning.plan import Plan
from orchestrator.train.beats import Sign
from orchestrator.train.fragment_memory import Held, new_token

log = logging.getLogger(__name__)

WORKER_CPUS = 0.01
"""What a worker asks Ray for itself; its agent holds the rest, less this for a worker that stands by."""


ANSWER_S = 3.0
"""For an agent to answer a question; the links of a node that takes longer are cut, or will be known to be."""
STACKS_S = 15.0


class NodesBusy(Exception):
    """Devices that Ray counts as the nodes' own are held by others."""

    def __init__(self, node_ids: Iterable[str]) -> None:
        self.node_ids = tuple(node_ids)
        super().__init__(f"devices are taken by others on {', '.join(node[:12] for node in self.node_ids)}")


@dataclass
class _Held:
    """What the run holds of a node: the first actor is the agent, others hold more devices."""

    memory_address: str
    actors: list[Any] = field(default_factory=list)
    devices: int = 0
    ids: list[int] = field(default_factory=list)
    """Of the GPUs."""
    seen: int = 0
    """Reports of the agent that were taken."""
    news: Any = None
    """Reference to the reports after those."""
    silent_since: float | None = None
    """When it first gave no answer to a question, if it has given none since (time.monotonic)."""


class Lease:
    """Use it as a context; its agents end with it.

    Args:
        copies: whether nodes keep copies of checkpoints in memory.
    """

    def __init__(self, copies: bool) -> None:
        self.token = new_token() if copies else ""
        self.examined: set[str] = set()
        """Nodes that preflight has seen, or sees, since they were taken."""
        self._held: dict[str, _Held] = {}
        self.lost: dict[str, float] = {}
        """Nodes whose agent has ended, and when (time.monotonic)."""

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.keep(())

    def hold(self, plan: Plan, cpus_per_worker: float, timeout_s: float) -> None:
        """Hold the devices of a plan, besides what is held already.

        Raises:
            NodesBusy: some of them are held by others; what could be had of the rest is held.
        """
        fresh: dict[Any, tuple[str, int, Any]] = {}
        for node_id, workers in plan.placement:
            held = self._held.get(node_id)
            lacking = workers - (held.devices if held else 0)
            if lacking > 0:
                actor = _agent(node_id, lacking, plan.accelerator, cpus_per_worker, "" if held else self.token)
                fresh[actor.introduce.remote()] = (node_id, lacking, actor)
        self._take(fresh, timeout_s)

    def _take(self, fresh: dict[Any, tuple[str, int, Any]], timeout_s: float) -> None:
        import ray

        answers, missing = list(fresh), []
        answered, _ = ray.wait(answers, num_returns=len(answers), timeout=timeout_s) if answers else ([], [])
        for reference, (node_id, devices, actor) in fresh.items():
            try:
                found: Introduction | None = ray.get(reference) if reference in answered else None
            except ray.exceptions.RayError:  # the node went away
                found = None
            if found is None:
                ray.kill(actor)
                missing.append(node_id)
                continue
            held = self._held.setdefault(node_id, _Held(memory_address=found.memory_address))
            held.actors.append(actor)
            held.devices += devices
            held.ids += found.devices
            self.lost.pop(node_id, None)
        if missing:
            raise NodesBusy(missing)

    def keep(self, node_ids: Iterable[str]) -> None:
        """Give back every other node."""
        for node_id in self._held.keys() - set(node_ids):
            self._drop(node_id)

    def _drop(self, node_id: str) -> None:
        import ray

        self.examined.discard(node_id)
        for actor in self._held.pop(node_id).actors:
            ray.kill(actor)

    @property
    def agents(self) -> dict[str, Any]:
        """Handle of the agent by node id."""
        return {node_id: held.actors[0] for node_id, held in self._held.items()}

    @property
    def device_ids(self) -> dict[str, list[int]]:
        """Of the GPUs held, by node id."""
        return {node_id: held.ids for node_id, held in self._held.items() if held.ids}

    def poll(self, timeout_s: float) -> list[Report]:
        """What the agents have to report; waits for it no longer than that. Nodes whose agent ended are `lost`."""
        import ray

        waiting = {}
        for node_id, held in self._held.items():
            held.news = held.news or held.actors[0].news.remote(held.seen)
            waiting[held.news] = node_id
        if not waiting:
            time.sleep(timeout_s)
            return []
        answered, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        more, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        reports: list[Report] = []
        for reference in {*answered, *more}:
            reports += self._reports_of(waiting[reference])
        return reports

    def _reports_of(self, node_id: str) -> list[Report]:
        import ray

        held = self._held[node_id]
        try:
            reports: list[Report] = ray.get(held.news)
        except ray.exceptions.RayError as error:
            log.debug("agent of node %s: %s", node_id, error)
            self.lost[node_id] = time.monotonic()
            self._drop(node_id)
            return []
        held.seen, held.news = held.seen + len(reports), None
        return [replace(report, node_id=node_id) for report in reports]

    def give_up_silent(self, seconds: float) -> None:
        """Count nodes as lost whose agent has given no answer for so long."""
        now = time.monotonic()
        for node_id, held in list(self._held.items()):
            if held.silent_since is not None and now > held.silent_since + seconds:
                log.warning("the agent of node %s gives no answer: the node is given up", node_id[:12])
                self.lost[node_id] = now
                self._drop(node_id)

    def go(self, node_ids: Iterable[str], group: str, job: Mapping[str, Any] | None) -> None:
        """Send a group off; without a job, home."""
        for node_id in node_ids:
            if node_id in self._held:
                self._held[node_id].actors[0].go.remote(group, job)

    def end(self, node_ids: Iterable[str], group: str, timeout_s: float) -> None:
        """End the processes of a group on the nodes that are still there."""
        there = [node_id for node_id in node_ids if node_id in self._held]
        if len(self._asked("end", there, timeout_s, group)) < len(there):
            log.warning("some workers of group %s do not end", group)

    def signs(self, node_ids: Iterable[str], group: str) -> dict[int, Sign | None]:
        """What every rank of a group last said of itself; none of those on a node that gives no answer."""
        return _merged(self._asked("signs", node_ids, ANSWER_S, group))

    def states(self, node_ids: Iterable[str], group: str) -> dict[int, str]:
        """Of the processes of a group, by rank (train.stacks.state)."""
        return _merged(self._asked("states", node_ids, ANSWER_S, group))

    def stacks(self, node_ids: Iterable[str], group: str) -> dict[int, str]:
        """What the ranks of a group are doing, thread by thread."""
        return _merged(self._asked("stacks", node_ids, STACKS_S, group))

    def memories(self, node_ids: Iterable[str]) -> dict[str, str]:
        """Addresses of the copies in memory, by node id, in this order of the nodes."""
        return {node: self._held[node].memory_address for node in node_ids if node in self._held}

    def copies(self) -> dict[str, list[Held]]:
        """The files of checkpoints that are in memory, by the address of the memory."""
        found = self._asked("copies", list(self._held), ANSWER_S) if self.token else {}
        return {self._held[node_id].memory_address: files for node_id, files in found.items()}

    def _asked(self, method: str, node_ids: Iterable[str], timeout_s: float, *args: Any) -> dict[str, Any]:
        """The answers of those agents that give one in time, by node id."""
        import ray

        asked = {
            getattr(self._held[node_id].actors[0], method).remote(*args): node_id
            for node_id in node_ids
            if node_id in self._held
        }
        if not asked:
            return {}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        answers = {}
        for reference, node_id in asked.items():
            if held := self._held.get(node_id):
                held.silent_since = None if reference in answered else held.silent_since or time.monotonic()
        for reference in answered:
            with contextlib.suppress(ray.exceptions.RayError):  # `poll` tells of nodes that are lost
                answers[asked[reference]] = ray.get(reference)
        return answers


def _merged(answers: Mapping[str, dict[int, Any]]) -> dict[int, Any]:
    return {rank: found for answer in answers.values() for rank, found in answer.items()}


def _agent(node_id: str, devices: int, accelerator: str, cpus_per_worker: float, token: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = devices if ACCELERATORS[accelerator].ray_resource == "GPU" else 0
    return (
        ray.remote(NodeAgent)
        .options(
            num_cpus=round(devices * max(cpus_per_worker - 2 * WORKER_CPUS, 0.0), 4),
            num_gpus=gpus,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(token)
    )
