"""What this machine or a cluster can run, and how to mend what it cannot."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from orchestrator import accelerators
from orchestrator.accelerators import CPU

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "tokenizers", "pyarrow")
COMPILE_TIMEOUT_S = 600
MEASURE_TIMEOUT_S = 120
MIN_FREE_GIB = 5


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    fix: str = ""


def examine(address: str | None = None) -> list[Check]:
    """Every check, of this machine or of the cluster at an address."""
    return list(_cluster(address) if address else _machine())


def measured() -> Iterator[Check]:
    """How fast the first device of this machine computes, and whether correctly; takes seconds."""
    from orchestrator.examiner import examine as measure

    accelerator = accelerators.local_accelerator().name
    with tempfile.TemporaryDirectory(prefix="terrane-") as folder:
        found = asyncio.run(measure(accelerator, [], ("fp32", "bf16"), 1, folder, MEASURE_TIMEOUT_S))
    if found.error:
        yield Check("preflight", False, found.error, "look at the device's driver")
    for device in found.devices:
        speeds = [f"{value / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, value in device.flops.items()]
        wrong = device.error or "; ".join(device.wrong)
        told = wrong or f"{', '.join(speeds)}, memory {device.bytes_per_s / 1e9:,.0f} GB/s"
        yield Check(device.name or accelerator, not wrong, told, "test the device, and leave it out meanwhile")


def _machine() -> Iterator[Check]:
    yield Check("python", sys.version_info[:2] >= (3, 11), sys.version.split()[0], "use Python 3.11 or later")
    for name in PACKAGES:
        yield _package(name)
    compiler = shutil.which("g++") or shutil.which("c++")
    yield Check("C++ compiler", compiler is not None, compiler or "none", "install g++")
    accelerator = accelerators.local_accelerator()
    yield Check("accelerator", True, accelerator.name)
    yield _torch(accelerator)
    if accelerator is CPU:
        yield _extension()
    free = shutil.disk_usage(".").free / 2**30
    yield Check("free disk", free >= MIN_FREE_GIB, f"{free:.0f} GiB", "make room, or set storage= to another disk")
    yield Check("CPUs and memory", True, f"{os.cpu_count()} CPUs, {_memory_gib():.0f} GiB")
    unsafe = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in os.environ
    yield Check(
        "safe loading", not unsafe, "weights only" if not unsafe else "off", "unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    )


def _package(name: str) -> Check:
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", "make .venv")


def _torch(accelerator: accelerators.Accelerator) -> Check:
    import torch

    if accelerator is CPU:
        return Check("torch device", True, f"cpu, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    fix = f"install the torch build for {accelerator.name}: this one is {torch.__version__}"
    return Check("torch device", count > 0, f"{count} x {accelerator.name}", fix)


def _extension() -> Check:
    """DeepSpeed's communication op for CPUs, built now if it is not yet: workers would wait for it otherwise.

    Built in a process of its own, since the environment must be set before DeepSpeed is imported.
    """
    code = (
        "from orchestrator import accelerators; accelerators.prepare_process(accelerators.CPU);"
        "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder;"
        "ShareMemCommBuilder().load(verbose=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Check("DeepSpeed CPU op", done.returncode == 0, "built" if done.returncode == 0 else last, "install g++")


def _cluster(address: str) -> Iterator[Check]:
    import ray

    from orchestrator import cluster

    with cluster.connection(address):
        yield Check("ray", True, ray.__version__)
        for pool in cluster.node_pools():
            yield Check(str(pool), True, f"{pool.devices(1.0)} devices")


def _memory_gib() -> float:
    import psutil

    return float(psutil.virtual_memory().total) / 2**30
