"""What the cluster has for a run at present: a plan for it, held by the lease, and the waiting where there is none."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import replace

from orchestrator import cluster
from orchestrator.accelerators import ACCELERATORS, NodePool
from orchestrator.config import Recipe
from orchestrator.data import tokenizer
from orchestrator.data.manifest import load_manifest
from orchestrator.drivers import Driver
from orchestrator.elastic import Change, wanted_change
from orchestrator.errors import CapacityError, Interrupted, PlanError, RunFailed
from orchestrator.lease import Lease, NodesBusy
from orchestrator.nodes import plan_around, with_speeds
from orchestrator.planning.live import predicted_anew
from orchestrator.planning.past import NOTHING, Past, learned, load_s
from orchestrator.planning.plan import Plan
from orchestrator.planning.shape import ModelShape, model_shape
from orchestrator.runs import RunDir
from orchestrator.stop_requests import asked_to_stop

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""Between two looks at the cluster."""
LOOK_ON_S3_S = 10.0
"""Where a look costs requests: what is known of the nodes is stored with the run."""
AGENT_START_S = 30.0
"""How long an agent may take to start on a node that is alive."""
AGENT_START_BESIDE_S = 8.0
"""The same while an attempt runs, which is not seen meanwhile."""
AVOID_S = 15.0
"""How long a node is left out after its agent has ended, or others turned out to have its devices."""
MOST_AVOID_S = 120.0
"""The same of devices that others have had again and again."""
LEAST_CHANGE_S = 5.0
"""Without a step, for a change whose workers stand ready: a checkpoint, the load, the first batch."""
OF_NO_USE_S = 60.0
"""How long the same nodes are not thought through anew: with thousands of them that takes seconds."""
OWN_CLUSTER_S = 60.0
"""How long a cluster that was started for this command alone is given to come back."""


def make_plan(
    run: RunDir,
    recipe: Recipe,
    without: Collection[str] = (),
    prefer: Collection[str] = (),
    past: Past | None = None,
) -> Plan:
    """The plan for the nodes alive now.

    Args:
        without: ids of nodes to leave out.
        prefer: ids of nodes to take before others.
        past: what the run's attempts have taught, where it is known already; read from its events otherwise.
    """
    pools, shape = _without(cluster.node_pools(), without), trained_shape(run, recipe)
    return plan_around(run, recipe, shape, pools, frozenset(prefer), past or learned(run.events()))


def trained_shape(run: RunDir, recipe: Recipe) -> ModelShape:
    """With the vocabulary of the corpus, or the one that it will have."""
    manifest = load_manifest(run.corpus)
    return model_shape(recipe, manifest.vocab_size if manifest else tokenizer.planned_vocabulary(recipe))


class Capacity:
    """
    Args:
        own_cluster: whether the cluster is this command's own, so that nobody will add nodes to it.
    """

    def __init__(self, run: RunDir, recipe: Recipe, lease: Lease, driver: Driver, own_cluster: bool) -> None:
        self._run = run
        self._recipe = recipe
        self._lease = lease
        self._driver = driver
        self._patience_s = OWN_CLUSTER_S if own_cluster else None
        self._busy: dict[str, float] = {}
        """Until when nodes are left out whose devices others had (time.monotonic)."""
        self._busy_times: dict[str, int] = {}
        self._of_no_use: set[str] = set()
        """Nodes that gave nothing better than the live plan."""
        self._look_again = 0.0
        self._accelerator = ""
        self._past = NOTHING

    def plan(self, prefer: Collection[str] = ()) -> Plan:
        """The best plan for what is there, held; waits until there is one.

        Args:
            prefer: ids of nodes to take before others, as of those where workers stand by.

        Raises:
            PlanError: more devices would not help.
            RunFailed: none will come, or another driver has taken over.
            Interrupted: the run was asked to stop meanwhile.
        """
        self._past = learned(self._run.events())
        chosen = self._held(prefer)
        self._lease.keep(chosen.node_ids)
        self._accelerator = chosen.accelerator
        workers, cut = max(self._past.workers, chosen.workers), (chosen.tensor_parallel, chosen.pipeline_stages)
        self._past = replace(self._past, workers=workers, cut=cut)
        return chosen

    def _held(self, prefer: Collection[str]) -> Plan:
        began, missing = time.monotonic(), ""
        try:
            while True:
                try:
                    return self.hold(self._best(prefer or self._lease.agents.keys()))
                except CapacityError as lacking:
                    missing = self._wait(began, missing, lacking)
        finally:
            if missing:
                self._ask_for(0)
                self._run.log_event("waited", seconds=round(time.monotonic() - began, 3))

    def hold(self, chosen: Plan, timeout_s: float = AGENT_START_S) -> Plan:
        """
        Raises:
            CapacityError: others have the devices.
        """
        try:
            self._lease.hold(chosen, self._recipe.train.cpus_per_worker, timeout_s)
        except NodesBusy as busy:
            for node_id in busy.node_ids:
                self._busy_times[node_id] = times = self._busy_times.get(node_id, 0) + 1
                self._busy[node_id] = time.monotonic() + min(AVOID_S * 2.0 ** (times - 1), MOST_AVOID_S)
            raise CapacityError(str(busy), "wait, or free them", missing=str(busy)) from None
        return chosen

    def change(self, live: Plan, step_s: float, steps_left: int, slow: dict[str, float]) -> Change | None:
        """What should take the place of a live plan, if anything.

        Args:
            slow: by how many times nodes of the plan are slower than their like.
        """
        leaving = cluster.draining()
        nodes = dict(live.placement)
        there = {node.id for pool in cluster.node_pools() for node in pool.nodes} - self._avoided()
        known = there <= nodes.keys() or (there == self._of_no_use and time.monotonic() < self._look_again)
        if known and not slow and not nodes.keys() & leaving.keys():
            return None
        change = self._change(live, leaving, step_s, steps_left, slow)
        self._of_no_use, self._look_again = (set() if change else there), time.monotonic() + OF_NO_USE_S
        return change

    def _change(
        self, live: Plan, leaving: Collection[str], step_s: float, steps_left: int, slow: dict[str, float]
    ) -> Change | None:
        nodes = dict(live.placement)
        kept = nodes.keys() - slow.keys()
        try:
            candidate = self._best(kept, slow)
        except PlanError as lacking:
            if nodes.keys() & set(leaving):
                return Change(plan=live, kind="drain", reason=f"its nodes will go: {lacking.message}")
            return None
        pools = with_speeds(self._run, cluster.node_pools())
        return wanted_change(
            predicted_anew(live, self._recipe, trained_shape(self._run, self._recipe), pools),
            candidate,
            leaving=leaving,
            slow=slow,
            step_s=step_s,
            steps_left=steps_left,
            change_s=max(LEAST_CHANGE_S, 2 * load_s(self._run.events())),  # what is loaded is saved before
        )

    def after_trial(self, live: Plan, step_s: float) -> Plan:
        """What comes after the trial of a layout, whose steps have taken so long: the next one, or the fastest.

        Raises:
            PlanError: there is none without the nodes that will go.
        """
        layout = str(live)
        if layout not in self._past.tried:
            self._run.log_event("tried", layout=layout, step_s=step_s, predicted_s=live.step_time_s)
            log.info("tried: %s: %.3g s a step (predicted: %.3g)", layout, step_s, live.step_time_s)
            self._past = self._past.after_trial(layout, step_s)
        return self._best(live.node_ids)

    def _avoided(self) -> set[str]:
        now = time.monotonic()
        recent = {node for node, since in self._lease.lost.items() if now < since + AVOID_S}
        return recent | {node for node, until in self._busy.items() if now < until}

    def _best(self, prefer: Collection[str], slow: Collection[str] = ()) -> Plan:
        without = {*self._avoided(), *cluster.draining(), *slow}
        return make_plan(self._run, self._recipe, without, prefer, self._past)

    def _ask_for(self, workers: int) -> None:
        """Tell an autoscaler, once it is known what devices the run is on."""
        if self._accelerator:
            resource = ACCELERATORS[self._accelerator].ray_resource
            each = self._recipe.train.cpus_per_worker if resource == "CPU" else 1
            cluster.ask_for(workers, {resource: each})

    def _wait(self, began: float, before: str, lacking: CapacityError) -> str:
        """Say what is missing where that is news, and wait for a moment. Returns what was said."""
        if lacking.missing != before:
            log.warning("waiting for capacity: %s", lacking.missing)
            self._run.log_event("waiting", missing=lacking.missing)
            self._ask_for(self._recipe.train.workers.min)
        self._driver.check()
        self._lease.poll(0)  # agents that have ended are planned on no more
        if self._patience_s is not None and time.monotonic() > began + self._patience_s:
            raise RunFailed(lacking.message, lacking.hint)
        if asked_to_stop(self._run):
            raise Interrupted("stopped while it waited for capacity", "run the same command")
        time.sleep(min(LOOK_S, 0.2 + (time.monotonic() - began) / 10))
        return lacking.missing


def _without(pools: list[NodePool], node_ids: Collection[str]) -> list[NodePool]:
    kept = [replace(pool, nodes=tuple(n for n in pool.nodes if n.id not in node_ids)) for pool in pools]
    return [pool for pool in kept if pool.nodes]
