"""How long a run stands still after a fault, by kind of fault, and after the same kills in Ray Train's elastic mode.

A model of 2.6 million parameters on two nodes of one CPU each, made of network namespaces where this process is root,
with fast health checks for both. From the fault to the end of the next new step. BENCH_ROUNDS faults of each kind, one
after the other over one run each; BENCH_CASES names some of them, with ; between. Writes results/recovery.json.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.chaos.hosts import network
from orchestrator.chaos.local_cluster import LocalCluster, Size, local_cluster
from orchestrator.chaos.player import Player, kill_tree, last_step
from orchestrator.chaos.score import next_new_step
from orchestrator.config import load_recipe
from orchestrator.runs import RunDir
from tests.benchmarks.measuring import save
from tests.e2e.conftest import wait_for
from tests.e2e.test_chaos import run_on, write_recipe

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
APART = int(os.environ.get("BENCH_STEPS_APART", "60"))
"""Steps between two faults of a worker: enough for the next attempt's workers to stand by again."""
NODES_APART = 3 * APART
"""The same of a node: enough for the node that takes its place to be taken in."""
AFTER = 2
"""Steps from a checkpoint to the next fault. The steps that are done again are a matter of the interval, not of the
recovery."""
MODEL = "model={layers: 4, hidden_size: 192, heads: 4}"
SIZES = ("train.sequence_length=128", "train.global_batch_size=16", "train.checkpoint_every=10")
PEER = Path(__file__).with_name("elastic_train.py")
CASES = {
    "worker killed, standby": ("kill_rank, rank: 1", APART, ()),
    "worker killed, cold": ("kill_rank, rank: 1", APART, ("train.standby=false",)),
    "node lost": ("kill_node, node: 2, seconds: 5", NODES_APART, ()),
    "node drained": ("drain_node, node: 2, deadline_s: 30, seconds: 5", NODES_APART, ()),
}
PEERS = {"Ray Train elastic, worker killed": "rank", "Ray Train elastic, node lost": "node"}
WANTED = os.environ.get("BENCH_CASES", ";".join([*CASES, *PEERS])).split(";")
MOST_S = {"worker killed, standby": 3, "worker killed, cold": 10, "node lost": 12}
"""What is asked, of the median."""
PHASES = ("detect", "decide", "start", "ready", "load", "step", "again")
"""Until the attempt has ended; the next one is sent off; its worker has the job, which it has before where it stood by;
it builds its engine; its state is loaded; a step is done; a step is done that was not done before."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with network() as made, local_cluster(Size(nodes=2, cpus=1), made) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    write_recipe(folder)
    return folder / "r.yaml"


@pytest.mark.timeout(7200)
def test_recovery(cluster: LocalCluster, recipe: Path) -> None:
    corpus = corpus_for(cluster, recipe)
    found: dict[str, list[dict[str, float]]] = {}
    assert set(WANTED) <= {*CASES, *PEERS}
    for name, (fault, apart, values) in CASES.items():
        if name not in WANTED:
            continue
        run = played(cluster, recipe, corpus, fault, apart, values)
        found[name] = resizes(run, "drain") if name == "node drained" else recoveries(run)
        if name == "node lost":
            found["planned resize, a node came back"] = resizes(run, "resize")
    for name, victim in PEERS.items():
        if name in WANTED:
            found[name] = [{"total": seconds} for seconds in peer(cluster, recipe.parent, victim)]
    show(found)
    save("recovery", {"rounds": ROUNDS, "steps_apart": APART, "seconds": found})
    medians = {name: statistics.median(row["total"] for row in found[name]) for name in MOST_S if name in found}
    assert {name: median for name, median in medians.items() if median > MOST_S[name]} == {}


# --- Terrane ----------------------------------------------------------------------------------------------------------


def command(cluster: LocalCluster, recipe: Path, stage: str, *values: str) -> list[str]:
    begin = [sys.executable, "-m", "orchestrator", "run", str(recipe), f"storage={recipe.parent}", MODEL, *SIZES]
    return [*begin, *values, "--address", cluster.address, "--stage", stage]


def corpus_for(cluster: LocalCluster, recipe: Path) -> str:
    run_on(cluster, command(cluster, recipe, "corpus", "name=corpus"))
    return RunDir(str(recipe.parent / "corpus")).corpus


def strikes(apart: int) -> list[int]:
    """The steps after which faults strike."""
    return [apart * (number + 1) + AFTER for number in range(ROUNDS)]


def played(cluster: LocalCluster, recipe: Path, corpus: str, fault: str, apart: int, values: Sequence[str]) -> RunDir:
    run = RunDir(str(recipe.parent / f"run-{len(list(recipe.parent.glob('run-*')))}"))
    shutil.copytree(corpus, run.corpus)
    faults = ", ".join(f"{{kind: {fault}, step: {step}}}" for step in strikes(apart))
    values = [*values, f"name={run.name}", f"train.steps={apart * (ROUNDS + 1)}", f"faults=[{faults}]"]
    planned = load_recipe(recipe, [MODEL, *SIZES, *values])
    with (recipe.parent / f"{run.name}.log").open("w") as out:
        player = Player(run, planned.faults, cluster, command(cluster, recipe, "train", *values), out=out)
        assert player.play() == 0, Path(out.name).read_text()[-4000:]
    return run


def recoveries(run: RunDir) -> list[dict[str, float]]:
    """Of each fault that ended an attempt: seconds in all, and by phase."""
    struck = [event["time"] for event in run.events() if event["event"] == "fault_injected"]
    return phases_of(run, struck)


def resizes(run: RunDir, kind: str) -> list[dict[str, float]]:
    """Of each attempt that made room for another plan: seconds from its last step on."""
    ended = [event["attempt"] for event in run.events() if event["event"] == "resized" and event["kind"] == kind]
    lasts = [max(line["time"] for line in run.metric_lines(attempt)) for attempt in ended]
    return phases_of(run, lasts)


def phases_of(run: RunDir, begins: Sequence[float]) -> list[dict[str, float]]:
    found = [phases(run, at, until) for at, until in itertools.pairwise([*begins, float("inf")])]
    return [row for row in found if row]


def phases(run: RunDir, at: float, until: float) -> dict[str, float] | None:
    """None where the attempt went on, or the next one did no step before the next fault."""
    facts: dict[str, dict[str, Any]] = {}
    for event in run.events():
        if at <= event["time"] < until:
            facts.setdefault(event["event"], event)
    if not {"attempt_ended", "attempt_started", "worker_started"} <= facts.keys():
        return None
    worker, started = facts["worker_started"], facts["attempt_started"]["time"]
    step = min((line["time"] for line in run.metric_lines(worker["attempt"])), default=None)
    new = next_new_step(started, run.metric_lines())
    if step is None or new is None:
        return None
    times = [at, facts["attempt_ended"]["time"], started, *(worker[key] for key in ("began", "engine_began", "loaded"))]
    split = [after - before for before, after in itertools.pairwise([*times, step, new])]
    return {"total": new - at, **dict(zip(PHASES, split, strict=True))}


# --- Ray Train's own --------------------------------------------------------------------------------------------------


def peer(cluster: LocalCluster, folder: Path, victim: str) -> list[float]:
    """The same faults in a run of ScalingConfig(num_workers=(1, 2)) with a checkpoint every 10 steps."""
    place = folder / f"elastic-{victim}"
    kills = strikes(APART)
    metrics = place / "metrics" / "attempt-001.jsonl"
    metrics.parent.mkdir(parents=True)
    steps = APART * (ROUNDS + 1)
    settings = {
        "address": cluster.address,
        "folder": str(place),
        "steps": steps,
        "kills": kills if victim == "rank" else [],
    }
    process = cluster.popen([sys.executable, str(PEER), json.dumps(settings)], subprocess.DEVNULL)
    struck = []
    try:
        for step in kills:
            reached(place, step)
            if victim == "node":
                struck.append(kill_node(cluster))
            reached(place, step + 1)
        wait_for(lambda: process.poll() is not None, "the end of the peer's run", 1200)
    finally:
        if process.poll() is None:
            kill_tree(process)
    struck = struck or [float((place / f"killed-{step}").read_text()) for step in kills]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    after = [[record for record in records if record["step"] > step] for step in kills]  # its rank 0 may be behind
    new = [next_new_step(at, lines) for at, lines in zip(struck, after, strict=True)]
    return [found - at for at, found in zip(struck, new, strict=True) if found is not None]


def reached(place: Path, step: int) -> None:
    wait_for(lambda: last_step(RunDir(str(place))) >= step, f"step {step} of the peer's run", 1200)


def kill_node(cluster: LocalCluster) -> float:
    """Take node 2 away, and put another in its place once its loss is known; returns when."""
    import time

    at = time.time()
    cluster.kill(2)
    wait_for(lambda: 2 not in cluster.alive(), "the loss of the node", 60)
    cluster.replace(2)
    return at


# --- the table --------------------------------------------------------------------------------------------------------


def show(found: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{'seconds':36} {'faults':>6} {'min':>7} {'median':>7} {'max':>7}   median of {', '.join(PHASES)}")
    for name, rows in found.items():
        if not rows:
            continue
        totals = [row["total"] for row in rows]
        split = "  ".join(f"{statistics.median(row[p] for row in rows):5.1f}" for p in PHASES if p in rows[0])
        median = statistics.median(totals)
        print(f"{name:36} {len(rows):6} {min(totals):7.1f} {median:7.1f} {max(totals):7.1f}   {split}")
