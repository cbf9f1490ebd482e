"""The parts of the chaos player that need no Ray: hosts, the proxy before S3, the small disk, the score."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import storage
from orchestrator.chaos import hosts
from orchestrator.chaos.disk import small_disk
from orchestrator.chaos.player import flip_a_bit
from orchestrator.chaos.s3_proxy import S3Proxy, s3_proxy
from orchestrator.chaos.score import score, table
from orchestrator.chaos.show import size_for
from orchestrator.config import load_recipe
from orchestrator.fault_config import KillDriver, KillNode, KillRank, SlowRank
from tests.conftest import ROOT

FOREVER = "sleep 1000 & sleep 1000 & wait"


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def sleepers(environment: dict[str, str]) -> list[int]:
    """Pids of processes with that environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                values = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if all(f"{key}={value}".encode() in values for key, value in environment.items()):
                found.append(int(folder.name))
    return found


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["namespaces", "loopback"])
def network(request: pytest.FixtureRequest) -> Iterator[hosts.Network]:
    made: hosts.Network | None = hosts._namespaces() if request.param == "namespaces" else hosts.Loopback()
    if made is None:
        pytest.skip("namespaces need root")
    yield made
    made.close()


def test_a_killed_host_leaves_no_process_and_can_be_booted_again(network: hosts.Network, tmp_path: Path) -> None:
    host, mark = network.host(0), {"CHAOS_TEST": tmp_path.name}
    for _ in range(2):
        host.boot(["sh", "-c", FOREVER], {**os.environ, **mark}, tmp_path / "log")
        wait_for(lambda: len(sleepers(mark)) >= 3, "the host's processes")
        assert host.lives()
        host.kill()
        assert sleepers(mark) == []
        assert not host.lives()


def test_a_host_ends_when_its_command_does(network: hosts.Network, tmp_path: Path) -> None:
    host = network.host(0)
    host.boot(["true"], dict(os.environ), tmp_path / "log")
    wait_for(lambda: not host.lives(), "the end of the host")
    host.kill()


def test_a_command_runs_on_its_host(network: hosts.Network, tmp_path: Path) -> None:
    host = network.host(1)
    host.boot(["sh", "-c", FOREVER], dict(os.environ), tmp_path / "log")
    command = host.command(["sh", "-c", "pwd; hostname"])
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == str(Path.cwd())
    assert said[1] == ("node-1" if isinstance(network, hosts.Namespaces) else socket.gethostname())
    host.kill()


def test_a_cut_link_is_silent_until_it_is_mended(network: hosts.Network, tmp_path: Path) -> None:
    host = network.host(0)
    address = network.outside() if isinstance(network, hosts.Namespaces) else "127.0.0.1"
    with socket.create_server((address, 0)) as server:
        server.settimeout(20)
        ask = f"while :; do echo x >/dev/tcp/{address}/{server.getsockname()[1]}; sleep 0.05; done"
        host.boot(["bash", "-c", ask], dict(os.environ), tmp_path / "log")
        server.accept()[0].close()
        host.cut_link()
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            for _ in range(200):  # those that were on their way
                server.accept()[0].close()
        host.mend_link()
        server.settimeout(20)
        server.accept()[0].close()
    host.kill()


def test_nothing_of_the_namespaces_is_left() -> None:
    made = hosts._namespaces()
    if made is None:
        pytest.skip("namespaces need root")
    before = _devices()
    made.outside()
    assert _devices() > before
    made.close()
    wait_for(lambda: _devices() == before, "the end of the cable")


def test_namespaces_end_with_the_program_that_made_them_even_when_it_is_killed(tmp_path: Path) -> None:
    made = hosts._namespaces()
    if made is None:
        pytest.skip("namespaces need root")
    made.close()
    script = f"""
import os, time, pathlib
from orchestrator.chaos import hosts
host = hosts.Namespaces().host(0)
host.boot(["sh", "-c", {FOREVER!r}], dict(os.environ), pathlib.Path({str(tmp_path / "log")!r}))
time.sleep(1000)
"""
    mark = {"CHAOS_TEST": tmp_path.name}
    maker = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **mark})
    try:
        wait_for(lambda: len(sleepers(mark)) >= 6, "the program, the switch and the host's processes")
    finally:
        maker.kill()
        maker.wait()
    wait_for(lambda: sleepers(mark) == [], "the end of the host")


def _devices() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    with s3_proxy(os.environ["AWS_ENDPOINT_URL"], "127.0.0.1") as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        storage._s3.cache_clear()
        yield made
    storage._s3.cache_clear()


def test_storage_works_through_the_proxy(proxy: S3Proxy, bucket: str) -> None:
    uri = f"{bucket}/folder/a b+c"
    assert storage.create(uri, b"one")
    assert not storage.create(uri, b"two")
    assert (storage.read(uri), storage.size(uri)) == (b"one", 3)
    assert storage.read_range(uri, 1, 2) == b"ne"
    assert storage.list_files(bucket) == ["folder/a b+c"]
    storage.delete(uri)
    assert not storage.exists(uri)


def test_errors_and_slow_answers_of_the_store_lose_nothing(proxy: S3Proxy, bucket: str) -> None:
    proxy.fail(0.3)
    storage.write(f"{bucket}/a", b"one")
    assert proxy.refused > 0
    proxy.slow_down(30, 0.1)
    assert storage.read(f"{bucket}/a") == b"one"
    assert proxy.delayed > 0


def test_a_small_disk_is_full_and_empty_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        if disk is None:
            pytest.skip("a mount needs root")
        disk.fill()
        with pytest.raises(OSError) as caught:
            storage.write(str(tmp_path / "disk" / "a"), b"x" * 8192)
        assert caught.value.errno == errno.ENOSPC
        disk.empty()
        storage.write(str(tmp_path / "disk" / "a"), b"x" * 8192)
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_flipped_bit_is_flipped_back(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(b"content")
    with file.open("rb") as reader:
        restore = flip_a_bit(file)
        assert reader.read() == b"content", "who has the file open is not struck in the middle of a step"
    assert file.read_bytes() != b"content"
    restore()
    assert file.read_bytes() == b"content"


def test_what_was_fetched_anew_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(b"content")
    restore = flip_a_bit(file)
    file.write_bytes(b"other")
    restore()
    assert file.read_bytes() == b"other"


# --- the score --------------------------------------------------------------------------------------------------------


def at(time_s: float, event: str, **facts: Any) -> dict[str, Any]:
    return {"event": event, "time": time_s, **facts}


def steps(attempt: int, first: int, times: list[float]) -> list[dict[str, Any]]:
    return [{"attempt": attempt, "step": first + n, "time": time_s} for n, time_s in enumerate(times)]


def test_a_fault_is_scored_by_what_followed_it() -> None:
    faults = [
        KillNode(kind="kill_node", node=1, step=7),
        KillRank(kind="kill_rank", rank=0, step=2),
        SlowRank(kind="slow_rank", rank=0, step=5),
        KillDriver(kind="kill_driver", step=6),
    ]
    events = [
        at(0, "attempt_started", attempt=1),
        at(12, "fault_injected", name="kill_rank-rank-0-step-2"),
        at(13, "attempt_ended", attempt=1, outcome="worker_lost"),
        at(14, "attempt_started", attempt=2),
        at(25, "fault_injected", name="slow_rank-rank-0-step-5"),
        at(26.5, "fault_injected", name="kill_driver-step-6"),
        at(30, "attempt_started", attempt=3),
        at(40, "attempt_ended", attempt=3, outcome="finished"),
    ]
    # After the driver was killed, its workers did one more step; attempt 2 repeats step 2.
    metrics = [
        *steps(1, 1, [10, 11.9]),
        *steps(2, 2, [20, 21, 22, 24.9, 26, 27]),
        *steps(3, 7, [35, 36]),
    ]
    rows = score(faults, events, metrics)
    assert [(row.step, row.outcome, row.recovery_s) for row in rows] == [
        (2, "worker_lost", 9),
        (5, "went on", 1),
        (6, "driver lost", 9.5),
        (7, "did not strike", None),
    ]
    assert "kill_node, node 1" in table(rows)


def test_a_run_that_ended_with_a_fault_did_not_recover() -> None:
    fault = KillRank(kind="kill_rank", rank=0, step=2)
    events = [
        at(0, "attempt_started", attempt=1),
        at(12, "fault_injected", name=fault.name),
        at(13, "attempt_ended", attempt=1, outcome="error"),
    ]
    (row,) = score([fault], events, steps(1, 1, [10, 11]))
    assert (row.outcome, row.recovery_s) == ("error", None)


def test_the_cluster_has_a_node_for_every_fault_and_a_cpu_for_every_worker() -> None:
    faults = "faults=[{kind: kill_node, node: 3, step: 1}]"
    recipe = load_recipe(ROOT / "jobs/recipes/tiny.yaml", ["train.workers=6", "train.cpus_per_worker=1", faults])
    assert (size_for(recipe).nodes, size_for(recipe).cpus) == (3, 2)
