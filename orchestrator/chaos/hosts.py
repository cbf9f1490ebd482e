"""Several hosts on this one machine, which can lose their power and their network.

With root, a host is a set of Linux namespaces: its own network (a veth pair to a bridge, the switch), processes,
/dev/shm and name. All of it hangs on one process, and ends with it: nothing has a name in the machine's own namespaces,
so that nothing is left there, however the program that made it ends.

Without root, a host is the processes that carry its mark in their environment. Its network is cut by stopping them:
to the others it looks the same.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from orchestrator.errors import RunFailed

MARK = "TERRANE_CHAOS_HOST"
SHM_BYTES = 512 * 2**20
_READY = "ready"


class Host(Protocol):
    address: str
    interface: str

    def boot(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start the host, with one command that is its life: the host ends when the command does."""

    def command(self, command: Sequence[str]) -> list[str]:
        """What to execute to run a command on the host."""

    def lives(self) -> bool: ...

    def kill(self) -> None:
        """Take its power. Returns when no process of it is left."""

    def cut_link(self) -> None: ...

    def mend_link(self) -> None: ...


class Network(Protocol):
    kind: str

    def host(self, index: int) -> Host: ...

    def outside(self) -> str:
        """The address at which the hosts reach this process."""

    def close(self) -> None: ...


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """The best kind that this machine allows."""
    made = _namespaces() or Loopback()
    try:
        yield made
    finally:
        made.close()


def _namespaces() -> Namespaces | None:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter", "mount"))):
        return None
    try:
        return Namespaces()
    except (RunFailed, OSError):  # a container may be root and still not be let
        return None


# --- namespaces -------------------------------------------------------------------------------------------------------


_NUMBERS = itertools.count()
"""Of the networks of this process."""


class Namespaces:
    kind = "network namespaces"

    def __init__(self) -> None:
        pid, number = os.getpid(), next(_NUMBERS)
        self._prefix = f"10.{200 + pid % 50}.{(pid // 50 + number) % 250}"
        self._outside, self._here = "", f"trn{pid}n{number}"
        script = f"ip link add switch type bridge && ip link set switch up && echo {_READY} && exec cat >/dev/null"
        self._process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        _await_ready(self._process)

    def host(self, index: int) -> NamespaceHost:
        return NamespaceHost(self, index, f"{self._prefix}.{index + 1}")

    def outside(self) -> str:
        if not self._outside:
            self.plug("outside", self._here, os.getpid())
            _run(["ip", "addr", "add", f"{self._prefix}.254/24", "dev", self._here])
            _run(["ip", "link", "set", self._here, "up"])
            self._outside = f"{self._prefix}.254"
        return self._outside

    def plug(self, port: str, name: str, pid: int) -> None:
        """A cable from a port of the switch to the network of a process, where it has that name."""
        self._switch(f"ip link add {port} type veth peer name {name} netns {pid}")
        self._switch(f"ip link set {port} master switch up")

    def set_port(self, port: str, state: str) -> None:
        self._switch(f"ip link set {port} {state}")

    def _switch(self, command: str) -> None:
        _run(["nsenter", f"--net=/proc/{self._process.pid}/ns/net", *command.split()])

    def close(self) -> None:
        if self._outside:  # the kernel would clear it away with its other end, but later
            _run(["ip", "link", "del", self._here])
        _end_by_pipe(self._process)


class NamespaceHost:
    interface = "eth0"
    # PID 1 of the host: it takes in orphans, and when it ends, the kernel ends all other processes of the host. It
    # lives until the command ends, or the pipe to the program that made the host is closed.
    _SCRIPT = f"""
        exec 3<&0; echo {_READY}; read go <&3
        hostname "$1"; ip link set lo up; ip addr add "$2/24" dev eth0; ip link set eth0 up
        mount -t tmpfs -o size={SHM_BYTES} tmpfs /dev/shm
        shift 2; "$@" </dev/null 3<&- & life=$!
        {{ cat <&3 >/dev/null; kill -KILL $life; }} &
        wait $life
    """

    def __init__(self, network: Namespaces, index: int, address: str) -> None:
        self.address = address
        self._network = network
        self._index = index
        self._boots = 0
        self._process: subprocess.Popen[str] | None = None

    def boot(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._boots += 1
        spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        init = ["sh", "-c", self._SCRIPT, "host", f"node-{self._index}", self.address, *command]
        with log.open("a") as out:
            self._process = subprocess.Popen(
                ["unshare", *spaces, *init],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                start_new_session=True,
            )
        _await_ready(self._process)
        self._network.plug(self._port, self.interface, self._process.pid)
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    @property
    def _port(self) -> str:
        """Of the switch. A new one every time: the last one goes when the kernel has done away with its host."""
        return f"port{self._index}.{self._boots}"

    def command(self, command: Sequence[str]) -> list[str]:
        assert self._process, "the host has been booted"
        (init,) = psutil.Process(self._process.pid).children()
        spaces = ["--target", str(init.pid), "--net", "--mount", "--uts", "--pid"]
        return ["nsenter", *spaces, f"--wd={Path.cwd()}", "--", *command]

    def lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        if self._process:
            members = _tree(self._process)
            _kill_all(members)
            _close_pipes(self._process)
            self._process = None

    def cut_link(self) -> None:
        self._network.set_port(self._port, "down")

    def mend_link(self) -> None:
        if self.lives():
            self._network.set_port(self._port, "up")


# --- loopback ---------------------------------------------------------------------------------------------------------


class Loopback:
    kind = "processes on loopback (namespaces need root)"

    def __init__(self) -> None:
        self._token = uuid.uuid4().hex[:12]
        self._hosts: list[LoopbackHost] = []

    def host(self, index: int) -> LoopbackHost:
        self._hosts.append(LoopbackHost(f"{self._token}-{index}"))
        return self._hosts[-1]

    def outside(self) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        for host in self._hosts:
            host.kill()


class LoopbackHost:
    address = "127.0.0.1"
    interface = "lo"

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._process: subprocess.Popen[bytes] | None = None

    def boot(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                list(command),
                env={**environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def command(self, command: Sequence[str]) -> list[str]:
        return ["env", f"{MARK}={self._mark}", *command]

    def lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        while found := self._processes():  # one may be starting another meanwhile
            _kill_all(found)
        if self._process:
            self._process.wait()

    def cut_link(self) -> None:
        for process in self._processes():
            process.suspend()

    def mend_link(self) -> None:
        for process in self._processes():
            process.resume()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found


# --- processes --------------------------------------------------------------------------------------------------------


def ray_command(*arguments: str) -> list[str]:
    """`ray ...` of this Python environment."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def _await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    if process.stdout.readline().strip() != _READY:
        _end_by_pipe(process)
        raise RunFailed(f"cannot make a host: {shlex.join(process.args[:3]) if isinstance(process.args, list) else ''}")


def _end_by_pipe(process: subprocess.Popen[str]) -> None:
    _close_pipes(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
        return
    process.kill()
    process.wait()


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    process.wait()


def _tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill_all(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{shlex.join(command)}: {done.stderr.strip()}")
