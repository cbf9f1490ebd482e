"""`python -m jobs.chaos RECIPE [key=value ...]`: a recipe and its faults, on a cluster of its own on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrator import storage
from orchestrator.chaos.disk import SmallDisk, small_disk
from orchestrator.chaos.hosts import Network, network
from orchestrator.chaos.local_cluster import LocalCluster, Size, local_cluster
from orchestrator.chaos.player import Player, copy_back
from orchestrator.chaos.s3_proxy import S3Proxy, s3_proxy
from orchestrator.chaos.score import Row, score
from orchestrator.config import Recipe, load_recipe
from orchestrator.errors import UserError
from orchestrator.fault_config import FillDisk, NodeFault
from orchestrator.runs import RunDir, run_of
from orchestrator.stages import STAGES

log = logging.getLogger(__name__)

FEWEST_NODES = 2
DISK_MIB = 2048


@dataclass(frozen=True, kw_only=True)
class Played:
    run: RunDir
    exit_code: int
    """0: the run came to its end."""
    rows: list[Row]


def play(path: str, overrides: Sequence[str], stages: Sequence[str] = STAGES, out: IO[str] | None = None) -> Played:
    """Start a cluster, train on it while the recipe's faults are played, and take all of it down.

    Args:
        stages: of `terrane run`; the faults are played in the train stage, and the others come before and after it.
        out: where the output of `terrane run` goes; None: to this process's.

    Raises:
        UserError: the recipe is wrong, or a fault cannot be played here.
    """
    recipe = load_recipe(path, list(overrides))
    with _small_disk(recipe) as disk:
        storage_uri = str(disk.folder) if disk else storage.absolute(recipe.storage)
        run = RunDir(storage.join(storage_uri, recipe.name))
        with network() as made, _proxy(recipe, made) as proxy, _cluster(recipe, made, proxy) as cluster:
            command = [sys.executable, "-m", "orchestrator", "run", path, *overrides, f"storage={storage_uri}"]
            command += ["--address", cluster.address]
            commands = [command] if tuple(stages) == STAGES else [[*command, "--stage", stage] for stage in stages]
            for command in commands:
                code = Player(run, recipe.faults, cluster, command, disk, proxy, out).play()
                if code:
                    break
        rows = score(recipe.faults, run.events(), run.metric_lines())
        if disk:
            copy_back(run, run_of(recipe).uri)
    return Played(run=run_of(recipe), exit_code=code, rows=rows)


def size_for(recipe: Recipe) -> Size:
    """Nodes for every fault, and CPUs for the workers that the recipe asks for."""
    named = [fault.node for fault in recipe.faults if isinstance(fault, NodeFault)]
    nodes = max([FEWEST_NODES, *named])
    workers = recipe.train.workers.max or nodes
    return Size(nodes=nodes, cpus=max(1, math.ceil(math.ceil(workers / nodes) * recipe.train.cpus_per_worker)))


@contextlib.contextmanager
def _small_disk(recipe: Recipe) -> Iterator[SmallDisk | None]:
    if storage.is_s3(recipe.storage) or not any(isinstance(fault, FillDisk) for fault in recipe.faults):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="trn-disk-") as folder, small_disk(Path(folder), DISK_MIB) as disk:
        if disk and Path(run_of(recipe).uri).exists():
            copy_back(run_of(recipe), str(Path(folder, recipe.name)))  # the same command goes on
        yield disk


@contextlib.contextmanager
def _proxy(recipe: Recipe, made: Network) -> Iterator[S3Proxy | None]:
    """None where the run needs no object store, or one that a proxy cannot stand before: it would break signatures."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if not storage.is_s3(recipe.storage) or not endpoint.startswith("http://"):
        yield None
        return
    with s3_proxy(endpoint, made.outside()) as proxy:
        yield proxy


def _cluster(recipe: Recipe, made: Network, proxy: S3Proxy | None) -> contextlib.AbstractContextManager[LocalCluster]:
    return local_cluster(size_for(recipe), made, {"AWS_ENDPOINT_URL": proxy.url} if proxy else {})


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 where the run came to its end."""
    from orchestrator.chaos.score import table
    from orchestrator.console import set_up_logging

    if not arguments or arguments[0].startswith("-"):
        raise UserError("no recipe given", "python -m jobs.chaos RECIPE [key=value ...]")
    set_up_logging()
    played = play(arguments[0], arguments[1:])
    sys.stdout.write(table(played.rows) + "\n")
    return played.exit_code
