"""The `faults` of a recipe: failures to inject once, to see the run survive them.

Plain data, so that one script is played on a real cluster and by a simulation alike. Faults of a rank strike inside it
(train.faults), in any run; the others are played from outside, on a cluster made for it: `python -m jobs.chaos RECIPE`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from orchestrator.config_section import Count, Positive, Section

Index = Annotated[int, Field(ge=0)]


class BaseFault(Section):
    kind: str
    step: Count
    """A fault of a rank strikes when the rank has done this step; the others when the run's metrics show it."""

    @property
    def target(self) -> dict[str, int]:
        """What it strikes, as in {"rank": 1}; empty where that goes without saying."""
        return self.model_dump(include={"rank", "node", "shard"})

    @property
    def name(self) -> str:
        """Tells it apart from every other fault of a recipe."""
        return "-".join([self.kind, *(f"{key}-{value}" for key, value in self.target.items()), f"step-{self.step}"])

    def __str__(self) -> str:
        return ", ".join([self.kind, *(f"{key} {value}" for key, value in self.target.items())])


class RankFault(BaseFault):
    rank: Index
    """Counted on from 0 again where the attempt has fewer ranks, so that a script fits every number of workers."""


class KillRank(RankFault):
    """SIGKILL."""

    kind: Literal["kill_rank"]


class HangRank(RankFault):
    """SIGSTOP: the process stays, and does nothing any more."""

    kind: Literal["hang_rank"]


class OomRank(RankFault):
    """An allocation that no device can serve: what torch raises then."""

    kind: Literal["oom_rank"]


class ErrorRank(RankFault):
    """An exception in the loop of steps."""

    kind: Literal["error_rank"]


class SlowRank(RankFault):
    """The process gets a part of the time only."""

    kind: Literal["slow_rank"]
    factor: float = Field(default=3.0, gt=1)
    """How many times as long it takes."""
    steps: Count = 10
    """How long."""


class NodeFault(BaseFault):
    node: Count
    """Nodes are counted from 0, the head, which runs the driver and no ranks; kill_driver is the fault for it."""


class KillNode(NodeFault):
    """All processes of a node end at once, as when its power goes."""

    kind: Literal["kill_node"]
    seconds: Positive = 10.0
    """Until a node takes its place."""


class CutLink(NodeFault):
    """A node's network goes; its processes live on."""

    kind: Literal["cut_link"]
    seconds: Positive = 10.0


class DrainNode(NodeFault):
    """The notice of a spot node: it is told that it ends, and ends."""

    kind: Literal["drain_node"]
    deadline_s: Positive = 30.0
    """From the notice to the end."""
    seconds: Positive = 10.0
    """From the end until a node takes its place."""


class FillDisk(BaseFault):
    """No byte more fits on the run's storage. Played on a small disk in memory, which needs root."""

    kind: Literal["fill_disk"]
    seconds: Positive = 5.0


class CorruptShard(BaseFault):
    """A bit of a shard flips: in every node's cached copy where the corpus is on s3://, else in the shard itself."""

    kind: Literal["corrupt_shard"]
    shard: Index
    """Counted in the manifest's order, and on from 0 again after the last."""
    seconds: Positive = 5.0
    """Until somebody has restored it."""


class S3Errors(BaseFault):
    """The object store answers 503 SlowDown, or late. Played between the run and the server at AWS_ENDPOINT_URL."""

    kind: Literal["s3_errors"]
    answer: Literal["errors", "slow"] = "errors"
    seconds: Positive = 3.0
    delay_s: Positive = 1.0
    """Of every slow answer."""


class KillDriver(BaseFault):
    """SIGKILL to `terrane run`; the same command is started again, as a RayJob's next try is."""

    kind: Literal["kill_driver"]


Fault = Annotated[
    KillRank
    | HangRank
    | OomRank
    | ErrorRank
    | SlowRank
    | KillNode
    | CutLink
    | DrainNode
    | FillDisk
    | CorruptShard
    | S3Errors
    | KillDriver,
    Field(discriminator="kind"),
]
OutsideFault = KillNode | CutLink | DrainNode | FillDisk | CorruptShard | S3Errors | KillDriver

FAULTS: dict[str, type[BaseFault]] = {
    get_args(fault.model_fields["kind"].annotation)[0]: fault for fault in get_args(get_args(Fault)[0])
}
"""By kind."""
