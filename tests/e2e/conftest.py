"""A real Ray cluster with a dashboard, an S3 server, and the runs that several tests look at."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import storage
from orchestrator.runs import RunDir, find_run
from tests.conftest import ROOT
from tests.manifests import K8S, entrypoint, ray_objects

BIN = Path(sys.executable).parent
RECIPE = "jobs/recipes/tiny.yaml"
BUCKET = "s3://terrane-runs"


def wait_for(condition: Callable[[], object], what: str, deadline_s: float = 300.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {deadline_s:.0f} s"
        time.sleep(0.2)


def terrane(*arguments: str, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    done = subprocess.run([str(BIN / "terrane"), *arguments], capture_output=True, text=True, cwd=cwd)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_processes(root: subprocess.Popen[str]) -> None:
    """End a process that we started and all that it started."""
    processes = [*psutil.Process(root.pid).children(recursive=True), psutil.Process(root.pid)]
    for process in processes:
        with_suppress(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with_suppress(process.kill)
    psutil.wait_procs(alive, timeout=15)
    root.wait()


def with_suppress(call: Callable[[], object]) -> None:
    try:
        call()
    except psutil.NoSuchProcess:
        return


@dataclass
class RayCluster:
    """One node with a dashboard, as `ray start --head` makes it."""

    dashboard: str
    address: str
    environment: dict[str, str] = field(default_factory=dict)

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._command(str(BIN / "ray"), *arguments)

    def serve(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._command(str(BIN / "serve"), *arguments)

    def submit(self, entrypoint: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- ENTRYPOINT` in a shell, as KubeRay's submitter does, to its end."""
        command = f"{BIN}/ray job submit --address {self.dashboard} --working-dir . -- {entrypoint}"
        return self._command("sh", "-c", command)

    def _command(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=self.environment)


@pytest.fixture(scope="package")
def ray_cluster(s3_endpoint: str) -> Iterator[RayCluster]:
    storage._s3.cache_clear()
    storage._s3().create_bucket(Bucket=BUCKET.removeprefix("s3://"))
    folder = Path(tempfile.mkdtemp(prefix="trn-", dir="/tmp"))
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # an activated environment: jobs say `python`
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TERRANE_STORAGE": BUCKET,
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += ["--object-store-memory=300000000", f"--temp-dir={folder}", "--disable-usage-stats"]
    log = (folder / "start.log").open("w")
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, text=True)
    cluster = RayCluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment)
    try:
        wait_for(lambda: answers(f"{cluster.dashboard}/api/version"), "the dashboard", 120)
        yield cluster
    finally:
        end_processes(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C in a terminal: SIGINT to the whole foreground process group."""
    os.killpg(process.pid, signal.SIGINT)


def manifest_of(kind: str, overlay: str) -> dict[str, Any]:
    return next(found for found in ray_objects(K8S / overlay) if found["kind"] == kind)


@pytest.fixture(scope="package")
def tiny(ray_cluster: RayCluster) -> RunDir:
    """The run that the RayJob's entrypoint makes, as written, through `ray job submit`."""
    done = ray_cluster.submit(entrypoint(manifest_of("RayJob", "base/train")))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return find_run(f"{BUCKET}/tiny")


@pytest.fixture(scope="package")
def calm(tiny: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same training on the same corpus with no fault, on a cluster of its own and a local disk."""
    root = tmp_path_factory.mktemp("calm")
    storage.download_directory(tiny.corpus, root / "tiny" / "corpus")
    terrane("run", RECIPE, f"storage={root}", "faults=[]", "--stage", "train")
    return find_run(str(root / "tiny"))
