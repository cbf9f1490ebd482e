"""Who drives a run: one process at a time, which says so on storage and gives signs of life.

    drivers/000002.json       the claim, created conditionally: host, process, since when
    drivers/000002.beat       written again and again; whether it changes is all that another host looks at
    drivers/000002.released   it ended in order

Clocks of hosts are never compared. A driver that another has taken over finds out when it wakes up, and ends; what its
workers commit meanwhile does not count (`train.succession`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator import storage
from orchestrator.errors import LastingStorageError, RunFailed
from orchestrator.runs import RunDir, holder

log = logging.getLogger(__name__)

_CLAIM = re.compile(r"(\d+)\.(json|beat|released)", re.ASCII)
KEPT = 20
"""Claims of the past that stay."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    beat_s: float
    """Between two signs of life."""
    silence_s: float
    """A driver that gave none for so long, by the clock of the one who waits, is taken over."""


LOCAL = Pace(beat_s=5, silence_s=15)
S3 = Pace(beat_s=10, silence_s=30)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of a claim."""

    host: str
    machine: str
    """Within which a process id means one process; empty where that cannot be told."""
    pid: int
    began: int
    """When the process started, by its machine: a process id is given again."""
    since: str
    by: str
    """Tells two claims of one process apart."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """Whether this machine can tell if the process lives."""
        return bool(self.machine) and self.machine == _machine()

    def is_gone(self) -> bool:
        """Whether it is known that the process has ended."""
        return self.is_here and _began(self.pid) != self.began


class Driver:
    """The claim of this process on a run. A thread gives the signs of life.

    Args:
        number: of the claim.
    """

    def __init__(self, run: RunDir, number: int, pace: Pace) -> None:
        self._run = run
        self._number = number
        self._pace = pace
        self._beats = 0
        self._beating = threading.Lock()
        self._beaten = time.monotonic()
        self._taken_over = ""
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="driver", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See that no other process has taken over the run. Costs nothing, but for a process that has just woken up.

        Raises:
            RunFailed: one has.
        """
        if self._is_silent() and self._beating.acquire(timeout=self._pace.silence_s):
            self._beating.release()
            if self._is_silent():  # unless the thread has woken up, too, and was first
                self._beat()
        if self._taken_over:
            raise RunFailed(f"another driver took over {self._run.uri}: {self._taken_over}", "leave the run to it")

    def _is_silent(self) -> bool:
        return time.monotonic() - self._beaten > self._pace.silence_s

    def release(self) -> None:
        """So that the next driver does not wait. Without storage it does."""
        self._released.set()
        self._thread.join(self._pace.beat_s)
        try:
            storage.write(_file(self._run, self._number, "released"), b"released\n")
            storage.delete(_file(self._run, self._number, "beat"))
        except Exception as error:
            log.warning("driver: the run was not released: %s", str(error) or type(error).__name__)

    def _keep_beating(self) -> None:
        self._beat()
        while not self._released.wait(self._pace.beat_s) and not self._taken_over:
            self._beat()

    def _beat(self) -> None:
        """A storage that does not answer takes nothing from the claim; another driver meets the same."""
        with self._beating:
            try:
                self._beats += 1
                storage.write(_file(self._run, self._number, "beat"), f"{self._beats}\n{_now()}\n".encode())
                newest = max(_claims(self._run), default=self._number)
                if newest > self._number:
                    self._taken_over = str(_holder(self._run, newest) or "its claim cannot be read")
            except Exception as error:
                log.warning("driver: no sign of life written: %s", str(error) or type(error).__name__)
            self._beaten = time.monotonic()


@contextlib.contextmanager
def claim(run: RunDir, pace: Pace | None = None) -> Iterator[Driver]:
    """Hold the run for as long as the block lasts. Waits where only silence can tell that another driver has ended.

    Raises:
        RunFailed: another process holds it; says which.
    """
    pace = pace or (S3 if storage.is_s3(run.uri) else LOCAL)
    driver = Driver(run, _take(run, pace), pace)
    try:
        yield driver
    finally:
        driver.release()


def _take(run: RunDir, pace: Pace) -> int:
    """The number of a new claim."""
    while True:
        claims = _claims(run)
        newest = max(claims, default=0)
        if newest and "released" not in claims[newest]:
            _wait_for_end(run, newest, pace)
        if storage.create(_file(run, newest + 1, "json"), _content()):
            for number in sorted(claims)[:-KEPT]:
                for kind in claims[number]:
                    storage.delete(_file(run, number, kind))
            return newest + 1


def _wait_for_end(run: RunDir, number: int, pace: Pace) -> None:
    """Return when the process of a claim is known to have ended, or has not given a sign of life for long enough.

    Raises:
        RunFailed: it lives.
    """
    known = _holder(run, number)
    who, before = known or "a process that cannot be told", _last_beat(run, number)
    if known and known.is_gone():
        log.info("driver: %s is gone; this one goes on", who)
        return
    if not (known and known.is_here):
        log.info("driver: the run is held by %s: waiting up to %.0f s for a sign of life", who, pace.silence_s)
        if not _until(lambda: _last_beat(run, number) != before, pace.silence_s):
            log.info("driver: %s gives no sign of life; this one goes on", who)
            return
    last = (_last_beat(run, number) or "").strip().rpartition("\n")[2] or "none seen yet"
    raise RunFailed(
        f"{run.uri} is driven by {who} (last sign of life: {last})",
        f"let it finish, or stop it: terrane stop {run.uri}",
    )


def _until(happened: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(min(0.5, timeout_s / 10))
    return False


def _claims(run: RunDir) -> dict[int, set[str]]:
    """The kinds of files of each claim, by number."""
    found: dict[int, set[str]] = {}
    for name in filter(None, map(_CLAIM.fullmatch, storage.list_files(run.drivers))):
        found.setdefault(int(name[1]), set()).add(name[2])
    return {number: kinds for number, kinds in found.items() if "json" in kinds}


def _holder(run: RunDir, number: int) -> Holder | None:
    try:
        return Holder(**(run.read_json(_file(run, number, "json")) or {}))
    except (TypeError, ValueError, LastingStorageError):
        return None


def _last_beat(run: RunDir, number: int) -> str | None:
    try:
        return storage.read(_file(run, number, "beat")).decode()
    except FileNotFoundError:
        return None


def _file(run: RunDir, number: int, kind: str) -> str:
    return storage.join(run.drivers, f"{number:06d}.{kind}")


def _content() -> bytes:
    pid = os.getpid()
    mine = Holder(
        host=socket.gethostname(), machine=_machine(), pid=pid, began=_began(pid) or 0, since=_now(), by=holder()
    )
    return (json.dumps(asdict(mine), indent=2) + "\n").encode()


def _began(pid: int) -> int | None:
    """When a process of this machine started, in ticks since the boot; None where there is none, or its status alone.
    The boot's time of day, which psutil adds, moves as clocks are set right."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _machine() -> str:
    """Host, boot and process namespace: hosts share names, and containers hosts. Empty where Linux does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
