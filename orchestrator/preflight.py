"""Preflight: nodes that are new to a run are measured before it relies on them, and bad ones put in quarantine.

Knows of Ray only that an agent's methods are called by `.remote(...)` and give something to await.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from orchestrator import nodes
from orchestrator.config import Recipe
from orchestrator.findings import Finding, Link, Links, NodeResult, faster, judge
from orchestrator.links import rounds
from orchestrator.nodes import Examination
from orchestrator.planning.plan import Plan
from orchestrator.runs import RunDir

log = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT_S = 120.0
"""For a node to answer. Contexts of eight GPUs on a busy machine take a while; a hang takes for ever."""
LINK_TIMEOUT_S = 15.0
GRACE_S = 10.0
"""That an agent may take beyond its own time-out before it counts as lost."""


def preflight(
    run: RunDir,
    recipe: Recipe,
    plan: Plan,
    agents: Mapping[str, Any],
    devices: Mapping[str, list[int]],
    hosts: Mapping[str, str],
) -> list[Finding]:
    """Examine those nodes of a plan that this run has not examined of late, and quarantine the bad ones.

    It blocks for seconds; call it beside the start of an attempt's workers, from any thread without an event loop.

    Args:
        agents: handle by node id.
        devices: by node id, the machine's numbers of the GPUs to examine; nothing on CPU nodes.
        hosts: names by node id.

    Returns:
        what speaks against which nodes. Nodes that go away meanwhile are passed over.

    Raises:
        StorageError: no node can write to the storage of the run.
    """
    known = nodes.examinations(run, agents)
    fresh = sorted(agents.keys() - known.keys())
    if not fresh:
        return []
    began = time.monotonic()
    request = functools.partial(_ask, run, recipe, plan, agents, devices)
    visit = _Visit(agents=agents, request=request, dtype=plan.dtype, fresh=fresh, known=known)
    findings = asyncio.run(visit.make())
    for node_id, examination in visit.examinations().items():
        nodes.keep(run, node_id, examination)
    for found in findings:
        nodes.quarantine(run, found.node_id, hosts.get(found.node_id, ""), found.reason, for_good=found.corrupt)
    bad = sorted({found.node_id for found in findings})
    seconds = time.monotonic() - began
    run.log_event("preflight", seconds=seconds, nodes=fresh, bad=bad)
    log.info("preflight: %d nodes examined in %.1f s, %d bad", len(fresh), seconds, len(bad))
    return findings


def _ask(
    run: RunDir, recipe: Recipe, plan: Plan, agents: Mapping[str, Any], devices: Mapping[str, list[int]], node_id: str
) -> Awaitable[NodeResult]:
    answer: Awaitable[NodeResult] = agents[node_id].preflight.remote(
        accelerator=plan.accelerator,
        devices=list(devices.get(node_id, [])),
        dtypes=sorted({"fp32", plan.dtype}),
        threads=max(1, int(recipe.train.cpus_per_worker)),
        storage_uri=run.preflights,
        timeout_s=TIMEOUT_S,
    )
    return answer


@dataclass(kw_only=True)
class _Visit:
    """One preflight: what was asked of whom, and what came back."""

    agents: Mapping[str, Any]
    request: Callable[[str], Awaitable[NodeResult]]
    dtype: str
    fresh: list[str]
    known: Mapping[str, Examination]
    results: dict[str, NodeResult] = field(default_factory=dict)
    """Of the fresh nodes that answered."""
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    """Of pairs with a fresh node."""

    async def make(self) -> list[Finding]:
        answers = await asyncio.gather(*(self._examined(node_id) for node_id in self.fresh))
        self.results = {node: found for node, found in zip(self.fresh, answers, strict=True) if found}
        await self._measure_links(self.results)
        findings = self._judged()
        if doubtful := sorted({found.node_id for found in findings if found.doubtful}):
            await self._look_again(doubtful)
            findings = self._judged()
        return findings

    def examinations(self) -> dict[str, Examination]:
        """Of the fresh nodes."""
        return {
            node_id: Examination(time=time.time(), result=result, links=dict(self._links_of(node_id)))
            for node_id, result in self.results.items()
        }

    def _judged(self) -> list[Finding]:
        """What speaks against the fresh nodes, beside those that are known."""
        results = {node_id: found.result for node_id, found in self.known.items()} | self.results
        return [found for found in judge(results, self._all_links(), self.dtype) if found.node_id in self.results]

    def _all_links(self) -> Links:
        before = {
            (node_id, other): link
            for node_id, found in self.known.items()
            for other, link in found.links.items()
            if other in self.known
        }
        return before | self.links

    def _links_of(self, node_id: str) -> Iterable[tuple[str, Link]]:
        for (one, other), link in self.links.items():
            if node_id in (one, other):
                yield (other if node_id == one else one), link

    async def _examined(self, node_id: str) -> NodeResult | None:
        return await _or_none(self.request(node_id), TIMEOUT_S + GRACE_S, node_id)

    async def _look_again(self, doubtful: list[str]) -> None:
        """One at a time, so that none is in another's way."""
        for node_id in doubtful:
            log.info("preflight: node %s is slow, and examined a second time", node_id[:12])
            if again := await self._examined(node_id):
                self.results[node_id] = faster(self.results[node_id], again)
        before = dict(self.links)
        await self._measure_links(doubtful)
        for pair, link in before.items():
            self.links[pair] = max(link, self.links[pair], key=lambda one: one.bytes_per_s)

    async def _measure_links(self, of: Collection[str]) -> None:
        """Between these nodes and all others, pair by pair."""
        there = [node_id for node_id in self.agents if node_id in self.known or node_id in self.results]
        plan = [[pair for pair in pairs if not set(pair).isdisjoint(of)] for pairs in rounds(there)]
        if not any(plan):
            return
        opened = [_or_none(self.agents[node].open_link.remote(), LINK_TIMEOUT_S, node) for node in there]
        ends = dict(zip(there, await asyncio.gather(*opened), strict=True))
        for pairs in plan:
            ready = [(one, other) for one, other in pairs if ends[other]]
            measured = [
                _or_none(self.agents[one].measure_link.remote(ends[other]), LINK_TIMEOUT_S, one) for one, other in ready
            ]
            found = zip(ready, await asyncio.gather(*measured), strict=True)
            self.links |= {pair: link or Link(error="no answer") for pair, link in found}
        closed = [_or_none(self.agents[node].close_link.remote(), LINK_TIMEOUT_S, node) for node in there]
        await asyncio.gather(*closed)


async def _or_none(answer: Awaitable[T], timeout_s: float, node_id: str) -> T | None:
    """None from a node that is gone: the loss of a node is the supervisor's to see."""
    try:
        return await asyncio.wait_for(_awaited(answer), timeout_s)
    except Exception as error:
        log.warning("preflight: node %s gives no answer: %s", node_id[:12], str(error) or type(error).__name__)
        return None


async def _awaited(answer: Awaitable[T]) -> T:
    return await answer
