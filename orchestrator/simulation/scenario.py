"""What is simulated: islands of nodes, what goes wrong on them, and what a save and a restart cost. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.failures import Outcome
from orchestrator.goodput import Kind

HOUR_S = 3600.0

StepTime = Callable[[int], float]
"""Seconds of a step of the whole global batch on so many nodes of an island, if it were alone."""


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Seconds from the decision that there is another attempt to its first step."""

    scheduling_s: float = 0.0
    preflight_s: float = 0.0
    start_up_s: float = 0.0
    load_s: float = 0.0

    @property
    def phases(self) -> tuple[tuple[Kind, float], ...]:
        """In their order."""
        return (
            ("scheduling", self.scheduling_s),
            ("preflight", self.preflight_s),
            ("start_up", self.start_up_s),
            ("load", self.load_s),
        )

    @property
    def total_s(self) -> float:
        return sum(seconds for _, seconds in self.phases)


@dataclass(frozen=True, kw_only=True)
class Costs:
    cold: Restart
    """With new workers."""
    standby: Restart | None = None
    """With workers that stand by; None: none do."""
    standby_start_s: float = 0.0
    """From the first step of an attempt until the workers of the next stand by."""
    checkpoint_s: float
    """That training stands still for a save."""
    write_s: float = 0.0
    """From then to the commit, while training goes on."""
    data_wait_s: float = 0.0
    """Of each step."""
    detection_s: float = 0.0
    """From a failure until somebody knows of it."""
    detection_by_outcome_s: Mapping[str, float] = field(default_factory=dict)
    """Where it takes another time."""
    closing_s: float = 0.0
    """After the last commit, until the command ends."""

    def detection(self, outcome: str) -> float:
        """Seconds."""
        return self.detection_by_outcome_s.get(outcome, self.detection_s)


@dataclass(frozen=True, kw_only=True)
class Hazard:
    """Failures of one kind that come at any time alike."""

    outcome: Outcome
    """Of the attempt that they end. yielded: it is asked to end, and commits before, as for maintenance."""
    mtbf_hours: float
    of: Literal["node", "run"] = "node"
    """What has that mean time between failures: every node, or the island's attempt as a whole."""
    takes_node: bool = False
    """Whether the node is gone with it, and under repair. Such failures strike nodes that stand idle, too."""


@dataclass(frozen=True, kw_only=True)
class Reclaims:
    """Of spot nodes, by their owner."""

    mean_hours: float
    """That a node stays."""
    notice_s: float
    back_hours: float
    """Mean time until another node takes the place."""


@dataclass(frozen=True, kw_only=True)
class Slowdowns:
    """Nodes that compute more slowly for a time, and all others with them."""

    mtbf_hours: float
    """Between two of one node."""
    factor: float
    """How many times as long its steps take."""
    mean_hours: float
    """How long it stays so."""


@dataclass(frozen=True, kw_only=True)
class Island:
    """Like devices that train as one group, and fail as one."""

    name: str = "nodes"
    nodes: int
    """That it trains on when all are there."""
    least_nodes: int | None = None
    """The fewest that it goes on with, elastic; None: with all of them or not at all."""
    spare_nodes: int = 0
    """Held beside those."""
    devices_per_node: int = 1
    price_per_device_hour: float = 0.0
    step_s: StepTime
    hazards: tuple[Hazard, ...] = ()
    repair_hours: float = 24.0
    """Mean time until a node that failed, or another in its place, is back."""
    reclaims: Reclaims | None = None
    slowdowns: Slowdowns | None = None

    @property
    def least(self) -> int:
        return self.nodes if self.least_nodes is None else self.least_nodes


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A failure that comes when the run has done a step: one line of a fault script."""

    step: float
    """The part behind the point is that of the step under way which is done."""
    outcome: str
    """Of the attempt that it ends; driver_lost: of the command. slow: of none, the nodes are slower for a time. outage:
    of storage, which ends an attempt that saves or loads before `seconds` are over. stopped: the run commits and
    ends."""
    island: int = 0
    takes_node: bool = False
    notice_s: float = 0.0
    """From the word that the node will go to its end."""
    seconds: float = 0.0
    """Until the node, or the storage, is back."""
    standby: bool | None = None
    """Whether the next attempt begins with workers that stand by; None: as it turns out."""
    slow_factor: float = 1.0
    slow_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    islands: tuple[Island, ...]
    steps: int
    costs: Costs
    checkpoint_every: int | Literal["auto"] = "auto"
    """Steps; auto: as `train.checkpoint_every: auto` does."""
    interval_s: float | None = None
    """Seconds of training between two saves, instead of `checkpoint_every`."""
    saves_at: tuple[tuple[int, ...], ...] | None = None
    """The steps that each attempt saves at, instead of both, in order; the last holds for all after it."""
    exchange_s: float = 0.0
    """That a step takes longer where several islands train."""
    max_restarts: int = 10
    strikes: tuple[Strike, ...] = ()
    """In the order in which they come."""
    longest_s: float = float("inf")
    """Of simulated time, after which the run is given up."""

    @property
    def ideal_s(self) -> float:
        """Of all steps on all nodes, with nothing else."""
        together = 1 / sum(1 / island.step_s(island.nodes) for island in self.islands)
        return self.steps * (together + (self.exchange_s if len(self.islands) > 1 else 0.0))


def scaled(step_s: float, nodes: int) -> StepTime:
    """Step times of a fixed global batch that is spread over other numbers of nodes.

    Args:
        step_s: on so many nodes.
    """
    return lambda others: step_s * nodes / others
