"""Nodes whose devices computed wrong numbers: kept with the run, left out of plans that can do without them."""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import replace
from typing import Any

from orchestrator.accelerators import NodePool
from orchestrator.config import Recipe
from orchestrator.errors import PlanError, SilentCorruption
from orchestrator.planning.past import NOTHING, Past
from orchestrator.planning.search import Plan, plan
from orchestrator.planning.shape import ModelShape
from orchestrator.runs import RunDir

log = logging.getLogger(__name__)

VERDICTS = 2
"""That a majority stood against a node before the run goes on without it: the first may have been a cosmic ray."""


def note(run: RunDir, attempt: int, error: SilentCorruption) -> None:
    """Keep who was named."""
    found = read(run)
    for suspect in error.suspects:
        node = next((known for known in found if known["node_id"] == suspect["node_id"]), None)
        if node is None:
            node = {"node_id": suspect["node_id"], "host": suspect["host"], "verdicts": []}
            found.append(node)
        place = {"attempt": attempt, "step": error.step, "rank": suspect["rank"], "sure": suspect["sure"]}
        node["verdicts"].append(place)
        log.warning("attempt %d: %s", attempt, in_words(node))
    run.write_json(run.suspect_nodes, found)
    run.log_event("corruption", attempt=attempt, step=error.step, suspects=list(error.suspects))


def read(run: RunDir) -> list[dict[str, Any]]:
    """Every node that was named: node_id, host and verdicts."""
    return list(run.read_json(run.suspect_nodes) or [])


def in_words(node: dict[str, Any]) -> str:
    places = ", ".join(f"attempt {v['attempt']} step {v['step']}" for v in node["verdicts"] if v["sure"])
    doubts = ", ".join(f"attempt {v['attempt']} step {v['step']}" for v in node["verdicts"] if not v["sure"])
    parts = [f"computed wrong numbers ({places})"] * bool(places) + [f"perhaps did ({doubts})"] * bool(doubts)
    return f"node {node['node_id'][:12]} on {node['host']} {' and '.join(parts)}"


def plan_around(
    run: RunDir,
    recipe: Recipe,
    shape: ModelShape,
    pools: list[NodePool],
    prefer: Set[str] = frozenset(),
    past: Past = NOTHING,
) -> Plan:
    """The plan without the nodes that were named often, or with them where there is none without.

    Args:
        prefer, past: as `plan` takes them.

    Raises:
        PlanError: no layout fits.
    """
    named = {node["node_id"] for node in read(run) if sum(v["sure"] for v in node["verdicts"]) >= VERDICTS}
    out = [node for pool in pools for node in pool.nodes if node.id in named]
    if not out:
        return plan(recipe, shape, pools, prefer, past)
    names = ", ".join(f"{node.id[:12]} ({node.address})" for node in out)
    try:
        found = plan(recipe, shape, _without(pools, named), prefer, past)
    except PlanError as error:
        log.warning("the run goes on with nodes that computed wrong numbers, %s: %s", names, error.message)
        return plan(recipe, shape, pools, prefer, past)
    return replace(found, reason=f"{found.reason}; without {names}, which computed wrong numbers")


def _without(pools: list[NodePool], named: set[str]) -> list[NodePool]:
    kept = [replace(pool, nodes=tuple(node for node in pool.nodes if node.id not in named)) for pool in pools]
    return [pool for pool in kept if pool.nodes]
