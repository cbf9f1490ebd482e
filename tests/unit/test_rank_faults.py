"""The faults that strike inside a rank, on processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.fault_config import BaseFault, ErrorRank, HangRank, KillRank, OomRank
from orchestrator.runs import RunDir
from orchestrator.train.faults import Faults, _Slowed, run_out_of_memory
from tests.conftest import ROOT

BUSY = "while True: pass"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "run"))


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    yield process
    process.kill()
    process.wait()


def strike(run: RunDir, fault: BaseFault, rank: int = 0, workers: int = 2) -> None:
    Faults(run, [fault], rank, workers, "cpu").strike(fault.step, lambda: None)


def in_a_process(run: RunDir, fault: BaseFault) -> subprocess.Popen[bytes]:
    """A rank that is struck, and then says so."""
    script = f"""
from orchestrator.fault_config import *
from orchestrator.runs import RunDir
from orchestrator.train.faults import Faults
fault = {type(fault).__name__}(**{fault.model_dump()})
Faults(RunDir({run.uri!r}), [fault], 0, 1, "cpu").strike(fault.step, lambda: print("closed", flush=True))
print("lives", flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)


def test_a_fault_strikes_once_over_all_attempts(run: RunDir) -> None:
    fault = ErrorRank(kind="error_rank", rank=0, step=3)
    with pytest.raises(RuntimeError, match="error_rank of the recipe's faults, at step 3"):
        strike(run, fault)
    strike(run, fault)
    (event,) = run.events()
    assert (event["event"], event["kind"], event["rank"], event["step"]) == ("fault_injected", "error_rank", 0, 3)


def test_a_fault_strikes_its_own_rank_and_step_only(run: RunDir) -> None:
    fault = ErrorRank(kind="error_rank", rank=1, step=3)
    strike(run, fault, rank=0)
    Faults(run, [fault], 1, 2, "cpu").strike(2, lambda: None)
    assert run.events() == []


def test_ranks_are_counted_on_where_there_are_fewer(run: RunDir) -> None:
    with pytest.raises(RuntimeError):
        strike(run, ErrorRank(kind="error_rank", rank=5, step=3), rank=1, workers=2)


def test_out_of_memory_is_what_the_allocator_says(run: RunDir) -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        strike(run, OomRank(kind="oom_rank", rank=0, step=1))
    with pytest.raises(RuntimeError):
        run_out_of_memory("cpu")


def test_a_killed_rank_has_ended_its_saves(run: RunDir) -> None:
    process = in_a_process(run, KillRank(kind="kill_rank", rank=0, step=4))
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGKILL, b"closed\n")


def test_a_hanging_rank_stays_and_does_nothing(run: RunDir) -> None:
    process = in_a_process(run, HangRank(kind="hang_rank", rank=0, step=4))
    try:
        await_status(process, psutil.STATUS_STOPPED)
    finally:
        process.kill()
    assert process.communicate()[0] == b""


def test_a_slowed_process_gets_a_part_of_the_time_until_it_is_let_go(busy: subprocess.Popen[bytes]) -> None:
    before = psutil.Process().children(recursive=True)
    slowed = _Slowed(busy.pid, 9.0)
    await_status(busy, psutil.STATUS_STOPPED)
    slowed.end()
    await_status(busy, psutil.STATUS_RUNNING)
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_what_slows_a_process_ends_with_it(busy: subprocess.Popen[bytes]) -> None:
    slowed = _Slowed(busy.pid, 2.0)
    busy.kill()
    busy.wait()
    assert slowed._process.wait(timeout=10) is not None


def await_status(process: subprocess.Popen[bytes], status: str) -> None:
    end = time.monotonic() + 60
    while psutil.Process(process.pid).status() != status:
        assert time.monotonic() < end, psutil.Process(process.pid).status()
        time.sleep(0.005)
