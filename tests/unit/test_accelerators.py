from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BUILDER = """
import sys
from pathlib import Path
from orchestrator.accelerators import drop_stale_locks
folder = Path(sys.argv[1])
drop_stale_locks(folder)
lock = folder / "op" / "lock"
lock.parent.mkdir(exist_ok=True)
if sys.argv[2] == "build":
    lock.touch()
print(lock.exists(), flush=True)
sys.stdin.read()
"""


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(folder), what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def sees_lock(process: subprocess.Popen[str]) -> bool:
    assert process.stdout
    return process.stdout.readline() == "True\n"


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_the_lock_of_a_killed_builder_is_dropped_once_no_other_lives(tmp_path: Path) -> None:
    builder = start(tmp_path, "build")
    assert sees_lock(builder)
    waiting = start(tmp_path, "look")
    assert sees_lock(waiting), "a living process may be building"
    end(builder)
    second = start(tmp_path, "look")
    assert sees_lock(second), "another lives, which may be the builder"
    end(waiting)
    end(second)
    after = start(tmp_path, "look")
    assert not sees_lock(after)
    end(after)
