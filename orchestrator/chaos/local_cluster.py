"""A Ray cluster of several nodes on this machine, whose nodes can be killed, cut off, drained and replaced."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.chaos.hosts import Host, Network, ray_command
from orchestrator.data.shard_cache import FOLDER_VARIABLE
from orchestrator.errors import RunFailed

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES, NODE_MEMORY_BYTES = 150 * 2**20, 4 * 2**30
START_DEADLINE_S, POLL_S = 120.0, 0.1
FAST_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""A lost node is known within 4 s; Ray's defaults take a minute."""
_PREEMPTION = 2
"""Ray's DRAIN_NODE_REASON_PREEMPTION; a node that has work refuses to be drained for the other reason, idleness."""
_ALIVE = 0
_LABEL = "chaos-node"


@dataclass(frozen=True, kw_only=True)
class Size:
    nodes: int
    """That take work; the head, node 0, is one more and takes none."""
    cpus: int
    """Of each."""


@contextlib.contextmanager
def local_cluster(size: Size, made: Network, environment: Mapping[str, str] | None = None) -> Iterator[LocalCluster]:
    """Start a cluster on a network's hosts; afterwards nothing of it is left.

    Args:
        environment: of every node and command, beside this process's own.
    """
    folder = Path(tempfile.mkdtemp(prefix="trn-", dir="/tmp"))  # short: Ray's sockets live below it
    cluster = LocalCluster(size, made, folder, environment or {})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


class LocalCluster:
    def __init__(self, size: Size, made: Network, folder: Path, environment: Mapping[str, str]) -> None:
        self._network = made
        self._size = size
        self._folder = folder
        self._environment = dict(environment)
        self._hosts: list[Host] = [made.host(index) for index in range(size.nodes + 1)]
        self._down: set[int] = set()
        self._port = 6379 if self._hosts[0].address != "127.0.0.1" else _free_port()

    @property
    def address(self) -> str:
        return f"{self._hosts[0].address}:{self._port}"

    @property
    def nodes(self) -> range:
        """Those that take work."""
        return range(1, self._size.nodes + 1)

    def start(self) -> None:
        """Start every node, and wait until all of them are there."""
        log.info("chaos: %d nodes of %d CPUs and a head, as %s", self._size.nodes, self._size.cpus, self._network.kind)
        self._network.outside()  # so that Ray's head can be asked from here
        self._boot(0)
        self._await(lambda: bool(self.alive()), "the head")
        for node in self.nodes:
            self._boot(node)
        self._await(lambda: len(self.alive()) == self._size.nodes + 1, "the nodes")

    def stop(self) -> None:
        for host in reversed(self._hosts):
            host.kill()

    # --- what can be done to a node -----------------------------------------------------------------------------------

    def kill(self, node: int) -> None:
        """All of its processes end at once; nothing takes its place before `replace`."""
        self._down.add(node)
        self._hosts[node].kill()

    def replace(self, node: int) -> None:
        """A new node, where one was killed."""
        self._down.discard(node)
        self._boot(node)

    def cut_link(self, node: int) -> None:
        self._hosts[node].cut_link()

    def mend_link(self, node: int) -> None:
        self._hosts[node].mend_link()

    def drain(self, node: int, deadline_s: float) -> None:
        """Announce, as a cloud does of a spot node, that it will be taken. Of a node that comes or goes at this moment
        it is told again."""
        from ray.exceptions import RaySystemError, RpcError

        deadline_ms = int((time.time() + deadline_s) * 1000)
        give_up = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                found = self._gcs().drain_node(self.node_id(node), _PREEMPTION, "a fault of the recipe", deadline_ms)
                accepted, reason = found
            except (RaySystemError, RpcError, RunFailed) as error:
                accepted, reason = False, str(error)
            if accepted:
                return
            if time.monotonic() > give_up:
                raise RunFailed(f"node {node} cannot be drained: {reason}")
            self.tend()
            time.sleep(POLL_S)

    def tend(self) -> list[int]:
        """Start the nodes again whose Ray has ended by itself, as after a cut link; returns them. Call it regularly."""
        ended = [node for node, host in enumerate(self._hosts) if node not in self._down and not host.lives()]
        for node in ended:
            self._hosts[node].kill()
            self._boot(node)
        return ended

    # --- what is asked of it ------------------------------------------------------------------------------------------

    def popen(self, command: Sequence[str], out: IO[str] | int | None = None, node: int = 0) -> subprocess.Popen[str]:
        """Start a command on a node: on the head, as a driver is, unless told otherwise."""
        return subprocess.Popen(
            self._hosts[node].command(command),
            env=self._variables(node),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out is not None else None,
            text=True,
            start_new_session=True,
        )

    def alive(self) -> dict[int, str]:
        """Ray's ids of the nodes that it takes for alive, by node; nothing where it does not answer."""
        from ray.exceptions import RpcError

        try:
            rows = self._gcs().get_all_node_info(timeout=5).values()
        except (RpcError, OSError):
            return {}
        return {int(row.labels[_LABEL]): row.node_id.hex() for row in rows if row.state == _ALIVE}

    def node_id(self, node: int) -> str:
        """Ray's.

        Raises:
            RunFailed: Ray knows no such live node.
        """
        found = self.alive().get(node)
        if found is None:
            raise RunFailed(f"Ray knows no live node {node}")
        return found

    def cache(self, node: int) -> Path:
        """Where a node keeps shards."""
        return self._folder / f"node-{node}" / "cache"

    # --- parts --------------------------------------------------------------------------------------------------------

    def _boot(self, node: int) -> None:
        host, folder = self._hosts[node], self._folder / f"node-{node}"
        shutil.rmtree(folder / "ray", ignore_errors=True)
        (folder / "ray").mkdir(parents=True)
        head = ["--head", f"--port={self._port}", "--include-dashboard=false"]
        command = ["start", "--block", *(head if node == 0 else [f"--address={self.address}"])]
        command += [f"--node-ip-address={host.address}", f"--num-cpus={self._size.cpus if node else 0}", "--num-gpus=0"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--memory={NODE_MEMORY_BYTES}"]
        command += [f"--labels={_LABEL}={node}", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={_free_port()}"]
        host.boot(ray_command(*command), self._variables(node), folder / "start.log")

    def _variables(self, node: int) -> dict[str, str]:
        own = {
            **FAST_HEALTH_CHECKS,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": self._hosts[node].interface,
            FOLDER_VARIABLE: str(self.cache(node)),
        }
        return {**os.environ, **own, **self._environment}

    def _gcs(self) -> Any:
        """Ray's own client of its head: a driver would cost seconds, and this one may be asked from anywhere."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        host, port = self.address.split(":")
        socket.create_connection((host, int(port)), timeout=1).close()  # the client waits 40 s for a head
        return GcsClient(address=self.address)

    def _await(self, condition: Any, what: str) -> None:
        end = time.monotonic() + START_DEADLINE_S
        while not condition():
            if time.monotonic() > end or not self._hosts[0].lives():
                said = "".join(path.read_text()[-500:] for path in sorted(self._folder.glob("node-*/start.log")))
                raise RunFailed(f"{what} of the cluster did not start: {said}")
            time.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
