"""The workers of one attempt: `TorchTrainer.fit()` in a thread, whose workers wait at their node's agent for a job.

A group that has arrived and waits is what makes a restart fast: its processes are up, have imported what they need and
know each other. It holds host memory (about 0.4 GB a worker, 0.7 GB for Ray Train's controller), and nothing of a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orchestrator import cluster, storage
from orchestrator.accelerators import ACCELERATORS
from orchestrator.config import Recipe
from orchestrator.lease import WORKER_CPUS, Lease
from orchestrator.node_agent import Report
from orchestrator.planning.plan import Plan
from orchestrator.preflight import preflight
from orchestrator.runs import RunDir
from orchestrator.train.beats import Sign

log = logging.getLogger(__name__)

SLOW_TIMES = 3
"""Windows in a row in which a rank must be found slow: the load of a neighbour passes."""


class Examination(threading.Thread):
    """Preflight of those nodes of a plan that are new to the run, beside the start of the workers there."""

    def __init__(self, run: RunDir, recipe: Recipe, plan: Plan, lease: Lease) -> None:
        super().__init__(name="preflight", daemon=True)
        fresh = set(plan.node_ids) - lease.examined  # the others train, or have done so
        self._lease, self._fresh = lease, fresh
        lease.examined |= fresh
        agents = {node: agent for node, agent in lease.agents.items() if node in fresh}
        self._arguments = (run, recipe, plan, agents, lease.device_ids, cluster.hosts())
        self._bad = False
        self._error: Exception | None = None
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self._bad = bool(preflight(*self._arguments))
        except Exception as error:  # raised by the caller of found_fault
            self._error = error
            self._lease.examined -= self._fresh
        finally:
            self.ended.set()

    @property
    def failed(self) -> bool:
        """Whether a node was found bad, or the examination came to nothing."""
        return self._bad or self._error is not None

    def found_fault(self) -> bool:
        """Whether a node was put in quarantine; waits for the end.

        Raises:
            StorageError: no node can write to the storage of the run.
        """
        while not self.ended.wait(0.2):
            pass
        if self._error:
            raise self._error
        return self._bad


class WorkerGroup:
    """It begins to start when it is made.

    Args:
        plan: where the workers stand. What they do is in the job that they are sent off with.
        examination: of their nodes, under way.
        cold: whether the job comes at once.
    """

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        vocab_size: int,
        plan: Plan,
        lease: Lease,
        examination: Examination,
        cold: bool,
    ) -> None:
        self.name = uuid.uuid4().hex[:12]
        self.plan = plan
        self.examination = examination
        self._lease = lease
        self.arrived: set[int] = set()
        self.finished: set[int] = set()
        self.errors: dict[int, BaseException] = {}
        self.deaths: dict[int, Report] = {}
        self.nodes: dict[int, str] = {}
        """Id of the node by rank, of those that have reported."""
        self.slow: dict[int, float] = {}
        """By how many times ranks are slower than their peers, of those that are so for long."""
        self.failed_at: float | None = None
        """When the first worker failed or died, in unix seconds."""
        self._slow_for: dict[int, int] = {}
        self._sent = False
        self._ending_since: float | None = None
        self._fit = _Fit(
            _trainer(run, recipe, vocab_size, plan, self.name, lease.agents, cold),
            storage.join(run.ray_train, self.name),
        )
        self._fit.start()

    def take(self, reports: Iterable[Report]) -> None:
        """Take note of those about this group."""
        for report in reports:
            if report.group == self.name:
                self._take(report)

    def _take(self, report: Report) -> None:
        if report.kind != "slow":
            self.nodes[report.rank] = report.node_id
        match report.kind:
            case "arrived":
                self.arrived.add(report.rank)
            case "finished":
                self.finished.add(report.rank)
            case "slow":
                self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in report.slow}
                self.slow = {rank: report.slow[rank] for rank, times in self._slow_for.items() if times >= SLOW_TIMES}
            case "failed" if report.error is not None:
                self.errors[report.rank] = report.error
            case "died":
                self.deaths[report.rank] = report
        if report.kind in ("failed", "died"):
            self.failed_at = min(self.failed_at or math.inf, report.time)

    @property
    def ready(self) -> bool:
        """Whether every worker waits for its job, or has had it."""
        return len(self.arrived) == self.plan.workers and not self.broken

    @property
    def sound(self) -> bool:
        """Whether its nodes were examined and found good."""
        return self.examination.ended.is_set() and not self.examination.failed

    @property
    def lost_nodes(self) -> tuple[str, ...]:
        """Nodes of the group whose agent has ended."""
        return tuple(node for node, _ in self.plan.placement if node in self._lease.lost)

    @property
    def broken(self) -> bool:
        return bool(self.errors or self.deaths or self.lost_nodes or self._fit.ended.is_set())

    def fits(self, plan: Plan) -> bool:
        """Whether its workers stand where a plan wants them."""
        same = (plan.accelerator, dict(plan.placement)) == (self.plan.accelerator, dict(self.plan.placement))
        return same and not self.broken

    def over(self, patience_s: Callable[[], float]) -> bool:
        """Whether the attempt has ended, and all that is worth waiting for is known of its end.

        Args:
            patience_s: how long to wait for more than is known, after the first sign of the end.
        """
        if len(self.finished) == self.plan.workers:
            return True
        if not self.broken:
            return False
        now = time.monotonic()
        self._ending_since = self._ending_since or now
        known = len(self.errors) + len(self.deaths) + len(self.finished)
        return known >= self.plan.workers or now > self._ending_since + patience_s()

    def go(self, job: Mapping[str, Any]) -> None:
        self._sent = True
        self._lease.go(self._nodes, self.name, job)

    def end(self, timeout_s: float = 10.0) -> None:
        """End what is left of its processes. Ray Train notices by itself."""
        self._lease.end(self._nodes, self.name, timeout_s)

    def signs(self) -> dict[int, Sign | None]:
        """What every rank last said of itself."""
        return self._lease.signs(self._nodes, self.name)

    def stopped(self) -> list[int]:
        """Ranks whose process is stopped."""
        return [rank for rank, state in self._lease.states(self._nodes, self.name).items() if state == "T"]

    def stacks(self) -> dict[int, str]:
        """What the ranks are doing, thread by thread."""
        return self._lease.stacks(self._nodes, self.name)

    @property
    def busy(self) -> bool:
        """Whether it was sent off, and has not come to its end."""
        return self._sent and len(self.finished) < self.plan.workers and not self._fit.ended.is_set()

    def dismiss(self) -> None:
        """Send workers home that wait for a job."""
        self._lease.go(self._nodes, self.name, None)

    def unwound(self, timeout_s: float) -> bool:
        """Whether Ray Train has cleared away after the group; waits for it no longer than that."""
        return self._fit.ended.wait(timeout_s)

    def fit_error(self, timeout_s: float) -> Exception | None:
        """What Ray Train has to say of the end, if it says it in time."""
        self._fit.ended.wait(timeout_s)
        return self._fit.error

    @property
    def _nodes(self) -> list[str]:
        return [node for node, _ in self.plan.placement]


class _Fit(threading.Thread):
    """Wait on `ended`, not in `join`: Python 3.11 takes a thread for dead when Ctrl-C comes during its join."""

    def __init__(self, trainer: Any, folder: str) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self._folder = folder
        self.error: Exception | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # judged with the agents' reports: this is the one place where it is caught
            self.error = error
        finally:
            self.ended.set()
            with contextlib.suppress(Exception):  # what is left goes with the directory of all groups
                storage.delete(self._folder)


def _trainer(
    run: RunDir, recipe: Recipe, vocab_size: int, plan: Plan, name: str, agents: Mapping[str, Any], cold: bool
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.train.worker import Waiting, train_worker

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    for unused in ("ENABLE_PREEMPTION_WATCHER", "METRICS_ENABLED"):  # the supervisor looks, and measures, for itself
        os.environ.setdefault(f"RAY_TRAIN_{unused}", "0")
    accelerator = ACCELERATORS[plan.accelerator]
    where = [{"ray.io/node-id": node} for node, workers in plan.placement for _ in range(workers)]
    waiting = Waiting(
        recipe=recipe.model_dump(mode="json"),
        vocab_size=vocab_size,
        group=name,
        accelerator=plan.accelerator,
        agents=dict(agents),
        cold=cold,
    )
    return TorchTrainer(
        train_worker,
        train_loop_config=vars(waiting),
        torch_config=TorchConfig(backend=accelerator.backend),
        scaling_config=ScalingConfig(
            num_workers=plan.workers, resources_per_worker={"CPU": WORKER_CPUS}, label_selector=where
        ),
        run_config=RunConfig(
            name=name,
            storage_path=run.ray_train,
            worker_runtime_env={"env_vars": dict.fromkeys(accelerator.keep_visible, "1")}
            if accelerator.keep_visible
            else None,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )
