"""One driver a run: who holds it, and who takes it over, with real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from orchestrator import drivers, storage
from orchestrator.drivers import Pace, claim
from orchestrator.errors import RunFailed
from orchestrator.runs import RunDir
from tests.driver import PACE, launch, said


@pytest.fixture
def run(anywhere: str) -> RunDir:
    return RunDir(storage.join(anywhere, "r"))


@contextlib.contextmanager
def driven(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    process = launch(run)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()
    return said(process)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as one of another machine, which sees no process of this one."""
    monkeypatch.setattr(drivers, "_machine", lambda: "another machine")


def files(run: RunDir) -> list[str]:
    return storage.list_files(run.drivers)


def test_the_second_is_told_who_holds_the_run(run: RunDir) -> None:
    with driven(run) as first:
        who = rf"is driven by process {first.pid} on .*last sign of life: "
        with pytest.raises(RunFailed, match=who) as refused, claim(run, PACE):
            pass
        assert f"terrane stop {run.uri}" in refused.value.hint
        assert tell(first) == "still holds it"


def test_the_same_command_takes_over_at_once_from_a_driver_that_was_killed(run: RunDir) -> None:
    with driven(run) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        with claim(run, Pace(beat_s=1, silence_s=1e9)) as second:
            second.check()
    assert "000002.released" in files(run)


def test_a_driver_that_ended_in_order_leaves_nothing_to_wait_for(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with claim(run, PACE):
        pass
    elsewhere(monkeypatch)
    with claim(run, Pace(beat_s=1, silence_s=1e9)):
        pass
    assert [name for name in files(run) if not name.endswith(".beat")] == [
        "000001.json",
        "000001.released",
        "000002.json",
        "000002.released",
    ]


def test_from_another_machine_signs_of_life_are_waited_for(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with driven(run) as first:
        elsewhere(monkeypatch)
        with pytest.raises(RunFailed, match=f"is driven by process {first.pid} on "), claim(run, PACE):
            pass


def test_a_driver_that_was_stopped_is_taken_over_and_finds_out_when_it_wakes_up(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with driven(run) as first:
        first.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, first.pid, os.WSTOPPED)
        elsewhere(monkeypatch)
        with claim(run, PACE) as second:
            first.send_signal(signal.SIGCONT)
            while (told := tell(first)) == "still holds it":  # where its sign of life takes longer than its patience
                pass
            assert told.startswith(f"another driver took over {run.uri}: process {os.getpid()} on ")
            second.check()


def test_a_process_id_that_was_given_again_is_another_process(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with driven(run) as first, monkeypatch.context() as patched:
        patched.setattr(drivers, "_began", lambda pid: 1)
        with claim(run, PACE):
            assert first.poll() is None


def test_of_two_that_take_over_one_does(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    create = storage.create

    def overtaken(uri: str, data: bytes) -> bool:
        monkeypatch.setattr(storage, "create", create)
        stack.enter_context(driven(run))
        return create(uri, data)

    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(storage, "create", overtaken)
        with pytest.raises(RunFailed, match="is driven by"), claim(run, PACE):
            pass


def test_a_storage_that_does_not_answer_ends_no_driver(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError("no answer")

    with claim(run, Pace(beat_s=1e-3, silence_s=0)) as driver, monkeypatch.context() as patched:
        patched.setattr(storage, "write", broken)
        driver.check()


def test_claims_of_the_past_go(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "KEPT", 2)
    for _ in range(5):
        with claim(run, PACE):
            pass
    assert [name for name in files(run) if name.endswith(".json")] == ["000003.json", "000004.json", "000005.json"]


def test_a_claim_that_cannot_be_read_is_waited_for_like_one_of_another_machine(run: RunDir) -> None:
    storage.write(storage.join(run.drivers, "000001.json"), b"x")
    with claim(run, PACE) as driver:
        driver.check()
    assert "000002.released" in files(run)
