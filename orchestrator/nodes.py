"""What a run knows of single nodes: how fast they are, and which ones it leaves out of its plans, and why.

Ray gives a node another id when it is started again, so a repaired node that was restarted begins with a clean record.
To trust one under its old id at once, delete `quarantined_nodes.json` in the run directory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from orchestrator import storage
from orchestrator.accelerators import Node, NodePool, Speeds
from orchestrator.config import Recipe
from orchestrator.errors import PlanError, SilentCorruption
from orchestrator.findings import Link, NodeResult
from orchestrator.planning.live import plan
from orchestrator.planning.past import NOTHING, Past
from orchestrator.planning.plan import Plan
from orchestrator.planning.shape import ModelShape
from orchestrator.runs import RunDir

log = logging.getLogger(__name__)

VERDICTS = 2
"""That a majority stood against a node before the run goes on without it: the first may have been a cosmic ray."""
VALID_S = 6 * 3600.0
"""How long an examination holds, and a quarantine for anything but wrong numbers: what was slow or out of reach may be
mended, and shows in the next examination when it is not."""


# --- quarantine -------------------------------------------------------------------------------------------------------


def quarantine(run: RunDir, node_id: str, host: str, reason: str, for_good: bool = False) -> None:
    """Leave a node out of the plans to come.

    Args:
        for_good: it computed wrong numbers, and a good examination does not make it trusted.
    """
    found = read(run)
    finding = {"reason": reason, "time": time.time(), "for_good": for_good}
    _entry(found, node_id, host)["findings"].append(finding)
    run.write_json(run.quarantined_nodes, found)
    _tell(run, node_id, host, reason)


def note_corruption(run: RunDir, attempt: int, error: SilentCorruption) -> None:
    """Keep who was named; who was named often is quarantined."""
    found = read(run)
    run.log_event("corruption", attempt=attempt, step=error.step, suspects=list(error.suspects))
    for suspect in error.suspects:
        node = _entry(found, suspect["node_id"], suspect["host"])
        place = {"attempt": attempt, "step": error.step, "rank": suspect["rank"], "sure": suspect["sure"]}
        node["verdicts"].append(place)
        if suspect["sure"] and _sure(node) == VERDICTS:
            _tell(run, node["node_id"], node["host"], _reason(node))
        else:
            log.warning("attempt %d: %s", attempt, in_words(node))
    run.write_json(run.quarantined_nodes, found)


def read(run: RunDir) -> list[dict[str, Any]]:
    """Every node that something was found against: node_id, host, findings, and verdicts of corruption."""
    return list(run.read_json(run.quarantined_nodes) or [])


def left_out(run: RunDir) -> dict[str, str]:
    """The nodes that plans do without, with the reason of each."""
    return {node["node_id"]: _reason(node) for node in read(run) if _counts(node)}


def _corrupt(run: RunDir) -> set[str]:
    """Of those, the nodes that computed wrong numbers."""
    found = [node for node in read(run) if _counts(node)]
    return {n["node_id"] for n in found if _sure(n) >= VERDICTS or any(f["for_good"] for f in n["findings"])}


def in_words(node: dict[str, Any]) -> str:
    state = " is quarantined" if _counts(node) else ""
    return f"node {node['node_id'][:12]} on {node['host']}{state}: {_reason(node)}"


def _entry(found: list[dict[str, Any]], node_id: str, host: str) -> dict[str, Any]:
    node = next((known for known in found if known["node_id"] == node_id), None)
    if node is None:
        node = {"node_id": node_id, "host": host, "findings": [], "verdicts": []}
        found.append(node)
    return node


def _counts(node: dict[str, Any]) -> bool:
    return bool(_in_force(node)) or _sure(node) >= VERDICTS


def _in_force(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [f for f in node["findings"] if f["for_good"] or time.time() - f["time"] < VALID_S]


def _sure(node: dict[str, Any]) -> int:
    return sum(verdict["sure"] for verdict in node["verdicts"])


def _reason(node: dict[str, Any]) -> str:
    places = ", ".join(f"attempt {v['attempt']} step {v['step']}" for v in node["verdicts"] if v["sure"])
    doubts = ", ".join(f"attempt {v['attempt']} step {v['step']}" for v in node["verdicts"] if not v["sure"])
    parts = [f"computed wrong numbers ({places})"] * bool(places) + [f"perhaps did ({doubts})"] * bool(doubts)
    return " and ".join([*dict.fromkeys(f["reason"] for f in _in_force(node) or node["findings"]), *parts])


def _tell(run: RunDir, node_id: str, host: str, reason: str) -> None:
    log.warning("node %s on %s is quarantined: %s", node_id[:12], host, reason)
    run.log_event("node_quarantined", node_id=node_id, host=host, reason=reason)


# --- examinations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What preflight measured of a node, and when."""

    time: float
    result: NodeResult
    links: Mapping[str, Link] = field(default_factory=dict)
    """By the id of the other node."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        links = {other: Link(**link) for other, link in values["links"].items()}
        return cls(time=values["time"], result=NodeResult.from_json(values["result"]), links=links)


def keep(run: RunDir, node_id: str, examination: Examination) -> None:
    run.write_json(run.preflight(node_id), asdict(examination))


def examinations(run: RunDir, node_ids: Iterable[str]) -> dict[str, Examination]:
    """Those of these nodes that were examined in this run, and not too long ago."""
    there = {name.removesuffix(".json") for name in storage.list_files(run.preflights) if name.endswith(".json")}
    chosen = sorted(there & set(node_ids))
    with ThreadPoolExecutor(16) as threads:  # a request each, on S3
        values = threads.map(lambda node_id: run.read_json(run.preflight(node_id)), chosen)
        read_ = {node_id: Examination.from_json(found) for node_id, found in zip(chosen, values, strict=True) if found}
    return {node_id: found for node_id, found in read_.items() if time.time() - found.time < VALID_S}


def doubt(run: RunDir, node_id: str) -> None:
    """Have a node examined again before it is used again: a failure is blamed on it."""
    storage.delete(run.preflight(node_id))


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_around(
    run: RunDir,
    recipe: Recipe,
    shape: ModelShape,
    pools: list[NodePool],
    prefer: Set[str] = frozenset(),
    past: Past = NOTHING,
) -> Plan:
    """The plan by measured speeds, without the nodes in quarantine, or with them where there is none without.

    Args:
        prefer, past: as `plan` takes them.

    Raises:
        PlanError: no layout fits.
    """
    pools, reasons = with_speeds(run, pools), left_out(run)
    there = {node.id: f"{node.id[:12]} ({node.address})" for pool in pools for node in pool.nodes}
    for without in (there.keys() & reasons.keys(), there.keys() & _corrupt(run)):
        if without:
            try:
                found = plan(recipe, shape, _without(pools, without), prefer, past)
            except PlanError as error:
                names = ", ".join(there[node_id] for node_id in sorted(without))
                log.warning("no plan does without the nodes in quarantine, %s: %s", names, error.message)
            else:
                names = "; ".join(f"{there[node_id]}: {reasons[node_id]}" for node_id in sorted(without))
                return replace(found, reason=f"{found.reason}; without {names}")
    return plan(recipe, shape, pools, prefer, past)


def with_speeds(run: RunDir, pools: list[NodePool]) -> list[NodePool]:
    """The same pools, with what was measured of their nodes."""
    known = examinations(run, [node.id for pool in pools for node in pool.nodes])
    return [replace(pool, nodes=tuple(_measured(node, known.get(node.id)) for node in pool.nodes)) for pool in pools]


def _measured(node: Node, examination: Examination | None) -> Node:
    return replace(node, speeds=speeds(examination)) if examination and examination.result.devices else node


def speeds(examination: Examination) -> Speeds:
    """Of the slowest device, and of the link in the middle."""
    devices = examination.result.devices
    dtypes = set.intersection(*(set(device.flops) for device in devices))
    links = sorted((link for link in examination.links.values() if not link.error), key=lambda link: link.bytes_per_s)
    link = links[len(links) // 2] if links else None
    return Speeds(
        flops={dtype: min(device.flops[dtype] for device in devices) for dtype in sorted(dtypes)},
        link_bytes_per_s=link.bytes_per_s if link else None,
        link_latency_s=link.latency_s if link else None,
    )


def _without(pools: list[NodePool], named: Set[str]) -> list[NodePool]:
    kept = [replace(pool, nodes=tuple(node for node in pool.nodes if node.id not in named)) for pool in pools]
    return [pool for pool in kept if pool.nodes]
