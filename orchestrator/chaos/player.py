"""Plays the faults of a recipe that strike from outside, while `terrane run` trains on a cluster of the player's."""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from orchestrator import storage
from orchestrator.chaos.disk import SmallDisk
from orchestrator.chaos.local_cluster import LocalCluster
from orchestrator.chaos.s3_proxy import S3Proxy
from orchestrator.data.manifest import load_manifest
from orchestrator.errors import Interrupted, RunFailed
from orchestrator.fault_config import (
    CorruptShard,
    CutLink,
    DrainNode,
    Fault,
    FillDisk,
    KillDriver,
    KillNode,
    NodeFault,
    OutsideFault,
    RankFault,
    S3Errors,
)
from orchestrator.runs import RunDir

log = logging.getLogger(__name__)

POLL_S, S3_POLL_S = 0.2, 1.0
TRIES = 6
"""Of the command, where it fails by itself: as the backoffLimit of a RayJob."""


class Player:
    """
    Args:
        command: of the run, as typed; it is started again when a fault has killed it, or when it failed.
        disk: that the run's storage is on, where there is one that can be filled.
        proxy: that the run reaches its object store through, where it does.
        out: where the command's output goes; None: to this process's.
    """

    def __init__(
        self,
        run: RunDir,
        faults: Sequence[Fault],
        cluster: LocalCluster,
        command: Sequence[str],
        disk: SmallDisk | None = None,
        proxy: S3Proxy | None = None,
        out: IO[str] | None = None,
    ) -> None:
        self._run = run
        self._cluster = cluster
        self._command = command
        self._disk = disk
        self._proxy = proxy
        self._out = out
        outside = (fault for fault in faults if not isinstance(fault, RankFault))
        self._due: list[OutsideFault] = sorted(outside, key=lambda fault: fault.step)
        self._struck_at = 0
        self._hurt: set[int] = set()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._driver: subprocess.Popen[str] | None = None

    def play(self) -> int:
        """Train to the end. Returns the exit code of the last try.

        Raises:
            RunFailed: a fault cannot be played here.
        """
        self._refuse_what_cannot_be_played()
        try:
            return self._play()
        finally:
            self._end_driver()
            while self._later:  # what was broken for some seconds is whole again, whatever ended the run
                heapq.heappop(self._later)[2]()

    def _play(self) -> int:
        for number in range(1, TRIES + 1):
            code = self._try()
            if code in (0, Interrupted.exit_code, 2) or number == TRIES:
                return code
            log.warning("chaos: the command ended with %d; try %d of %d", code, number + 1, TRIES)
            self._wait_for_repairs()
        raise AssertionError("unreachable")

    def _try(self) -> int:
        """The command to its end, through the kills of its driver. Returns its exit code."""
        self._start_driver()
        while True:
            assert self._driver
            code = self._driver.poll()
            if code is not None:
                return code
            for node in self._cluster.tend():
                log.info("chaos: node %d had ended, and is started again", node)
            self._catch_up()
            self._strike_due()
            time.sleep(S3_POLL_S if storage.is_s3(self._run.uri) else POLL_S)

    def _wait_for_repairs(self) -> None:
        while self._later:
            self._catch_up()
            time.sleep(POLL_S)

    def _catch_up(self) -> None:
        """Do what was put off until now."""
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), call))

    # --- the driver ---------------------------------------------------------------------------------------------------

    def _start_driver(self) -> None:
        self._driver = self._cluster.popen(self._command, self._out)

    def _end_driver(self) -> None:
        if self._driver and self._driver.poll() is None:
            kill_tree(self._driver)

    def _replace_driver(self) -> None:
        self._end_driver()
        self._start_driver()

    # --- the faults ---------------------------------------------------------------------------------------------------

    def _strike_due(self) -> None:
        """The next fault, once its step is done, and one more than when the last one struck: none falls on a run that
        stands still."""
        if not self._due:
            return
        fault, step = self._due[0], last_step(self._run)
        if step < fault.step or step == self._struck_at or not self._can_strike(fault):
            return
        self._due.remove(fault)
        self._struck_at = step
        if self._run.claim_fault(fault):
            facts: dict[str, Any] = {"kind": fault.kind, "name": fault.name, "step": step, **fault.target}
            self._run.log_event("fault_injected", **facts)
            log.warning("chaos: step %d: %s", step, fault)
            self._act(fault)

    def _can_strike(self, fault: OutsideFault) -> bool:
        """A node that is down, or about to be, is struck when it is there again."""
        return not isinstance(fault, NodeFault) or (
            fault.node not in self._hurt and fault.node in self._cluster.alive()
        )

    def _heal(self, seconds: float, node: int, call: Callable[[int], None]) -> None:
        def heal() -> None:
            self._hurt.discard(node)
            call(node)

        self._hurt.add(node)
        self._after(seconds, heal)

    def _act(self, fault: OutsideFault) -> None:
        cluster = self._cluster
        match fault:
            case KillNode(node=node, seconds=seconds):
                cluster.kill(node)
                self._heal(seconds, node, cluster.replace)
            case CutLink(node=node, seconds=seconds):
                cluster.cut_link(node)
                self._heal(seconds, node, cluster.mend_link)
            case DrainNode(node=node, deadline_s=deadline_s, seconds=seconds):
                cluster.drain(node, deadline_s)
                self._after(deadline_s, lambda: cluster.kill(node))
                self._heal(deadline_s + seconds, node, cluster.replace)
            case FillDisk(seconds=seconds) if self._disk:
                self._disk.fill()
                self._after(seconds, self._disk.empty)
            case CorruptShard(shard=shard, seconds=seconds):
                for file in self._copies(shard):
                    self._after(seconds, flip_a_bit(file))
            case S3Errors(answer="errors", seconds=seconds) if self._proxy:
                self._proxy.fail(seconds)
            case S3Errors(seconds=seconds, delay_s=delay_s) if self._proxy:
                self._proxy.slow_down(seconds, delay_s)
            case KillDriver():
                self._replace_driver()
            case _:
                raise AssertionError(f"{fault} was refused at the start")

    def _copies(self, index: int) -> list[Path]:
        """The files that hold a shard for the ranks."""
        manifest = load_manifest(self._run.corpus)
        assert manifest is not None, "a run has a corpus once it has steps"
        shards = manifest.shards("train")
        shard = shards[index % len(shards)]
        if not storage.is_s3(self._run.corpus):
            return [Path(self._run.corpus, shard.name)]
        cached = [self._cluster.cache(node) / f"{shard.xxh3}.arrow" for node in self._cluster.nodes]
        return [file for file in cached if file.exists()]

    def _refuse_what_cannot_be_played(self) -> None:
        for fault in self._due:
            if isinstance(fault, FillDisk) and not self._disk:
                raise RunFailed(f"{fault}: needs root, and storage on this machine", "leave it out of faults")
            if isinstance(fault, S3Errors) and not self._proxy:
                raise RunFailed(f"{fault}: needs storage on s3:// and AWS_ENDPOINT_URL=http://...", "leave it out")


def last_step(run: RunDir) -> int:
    """The last step in the metrics of the newest attempt, 0 before the first."""
    names = storage.list_files(run.path("metrics"))
    lines = storage.read(run.path("metrics", names[-1])).splitlines(keepends=True) if names else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def flip_a_bit(file: Path) -> Callable[[], None]:
    """Damage a file as a new one, since another process may have the old one mapped. Returns what restores it."""
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1

    def put(content: bytes) -> None:
        temporary = file.with_name(f".{file.name}.chaos")
        temporary.write_bytes(content)
        temporary.replace(file)

    def restore() -> None:
        if file.exists() and file.read_bytes() == damaged:  # what was damaged may be gone, or fetched anew
            put(whole)

    put(bytes(damaged))
    return restore


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process that we started, and to all below it."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def copy_back(run: RunDir, target: str) -> None:
    """Keep a run whose disk goes."""
    shutil.copytree(run.uri, target, dirs_exist_ok=True)
