"""A small disk in memory, for a storage that can be full without filling the machine's."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_FILLER = "filler"
_CHUNK = bytes(2**20)


@contextlib.contextmanager
def small_disk(folder: Path, size_mib: int) -> Iterator[SmallDisk | None]:
    """A file system of its own on an empty folder; None where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


class SmallDisk:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Afterwards no byte fits."""
        with (self.folder / _FILLER).open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(_CHUNK):
                pass

    def empty(self) -> None:
        (self.folder / _FILLER).unlink(missing_ok=True)
