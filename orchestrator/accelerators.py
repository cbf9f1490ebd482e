"""What Terrane knows of each kind of accelerator, and the pools that a cluster's nodes form by it.

Ray knows no Hygon DCU: start such nodes with `--num-gpus N --labels terrane.io/accelerator=dcu`. A ROCm build of torch
answers to the `torch.cuda` API, so a DCU is a "cuda" device to torch and DeepSpeed, with RCCL under the name nccl.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LABEL = "terrane.io/accelerator"
MEMORY_LABEL = "terrane.io/device-memory-gib"

# Memory of one device by Ray's accelerator type (`ray.io/accelerator-type`), from the vendors' data sheets. A node's
# MEMORY_LABEL goes before it; what neither names counts as the smallest card in common use.
DEVICE_MEMORY_GIB = {
    "A100": 40,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
    "L4": 24,
    "L40S": 48,
    "A10G": 24,
    "V100": 16,
    "T4": 16,
}
UNKNOWN_DEVICE_MEMORY_GIB = 16
WITHOUT_BF16 = ("P100", "P4", "T4", "V100")
"""Ray's accelerator types of NVIDIA cards before Ampere, whose matrix units know fp16 alone."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    name: str
    ray_resource: str
    """Ray's resource that counts the devices."""
    visible_devices: str
    """Environment variable that limits a process to its devices; empty where there is none."""
    backend: str
    """torch.distributed backend."""
    torch_device: str
    keep_visible: tuple[str, ...]
    """Environment variables that keep Ray from hiding the devices of a worker that has asked for none."""
    smi: tuple[str, ...]
    """Commands that list the devices; the first one found on PATH tells that a machine has them."""


CUDA = Accelerator(
    name="cuda",
    ray_resource="GPU",
    visible_devices="CUDA_VISIBLE_DEVICES",
    backend="nccl",
    torch_device="cuda",
    keep_visible=("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",),
    smi=("nvidia-smi",),
)
DCU = Accelerator(
    name="dcu",
    ray_resource="GPU",
    visible_devices="HIP_VISIBLE_DEVICES",
    backend="nccl",
    torch_device="cuda",
    keep_visible=("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES"),
    smi=("hy-smi", "rocm-smi"),
)
CPU = Accelerator(
    name="cpu", ray_resource="CPU", visible_devices="", backend="gloo", torch_device="cpu", keep_visible=(), smi=()
)
ACCELERATORS = {accelerator.name: accelerator for accelerator in (CUDA, DCU, CPU)}


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What was measured of a node."""

    flops: Mapping[str, float]
    """Operations a second in matrix products on its slowest device, by dtype."""
    link_bytes_per_s: float | None = None
    """To another node, over TCP; None without another."""
    link_latency_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Node:
    id: str
    address: str
    cpus: float
    gpus: float
    memory_bytes: int
    """Host memory that Ray may give to tasks and actors."""
    speeds: Speeds | None = None
    """None before it was examined."""


@dataclass(frozen=True, kw_only=True)
class NodePool:
    """Nodes with like devices: what one plan may span."""

    accelerator: str
    nodes: tuple[Node, ...]
    device_memory_bytes: int = 0
    """Of one GPU or DCU; a CPU worker has its share of its node's memory instead."""
    bf16: bool = True
    """Whether the devices compute in bf16, where their kind does at all."""

    def devices_by_node(self, cpus_per_worker: float) -> list[int]:
        """Devices that workers can take: a worker does not span two nodes."""
        if ACCELERATORS[self.accelerator].ray_resource == "GPU":
            return [int(node.gpus) for node in self.nodes]
        return [int(node.cpus / cpus_per_worker + 1e-9) for node in self.nodes]

    def devices(self, cpus_per_worker: float) -> int:
        return sum(self.devices_by_node(cpus_per_worker))

    def memory_per_device(self, cpus_per_worker: float) -> int:
        """Bytes."""
        if ACCELERATORS[self.accelerator].ray_resource == "GPU":
            return self.device_memory_bytes
        return min(int(node.memory_bytes / max(int(node.cpus / cpus_per_worker), 1)) for node in self.nodes)

    def __str__(self) -> str:
        return f"{len(self.nodes)} {self.accelerator} node{'s' if len(self.nodes) > 1 else ''}"


def local_accelerator() -> Accelerator:
    """The accelerator of this machine, by the tools on its PATH."""
    for accelerator in (CUDA, DCU):
        for command in accelerator.smi:
            if shutil.which(command) and subprocess.run([command], capture_output=True).returncode == 0:
                return accelerator
    return CPU


def prepare_process(accelerator: Accelerator) -> None:
    """Set what torch and DeepSpeed read from the environment. Call it before importing either.

    The directory of compiled extensions is kept with the Python environment, so that what `make .venv` built is found.
    """
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
        drop_stale_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    os.environ["DS_ACCELERATOR"] = accelerator.torch_device
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bin_directory = str(Path(sys.executable).parent)  # ninja and the compiler wrappers of an unactivated environment
    if bin_directory not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([bin_directory, os.environ.get("PATH", "")])


_alive: list[int] = []
"""File descriptors of locks that are held for as long as the process lives."""


def drop_stale_locks(extensions: Path) -> None:
    """Delete the locks under which killed processes were building torch extensions: torch waits for them for ever.

    Every process that calls this holds a lock of its own, shared with the others, to its end, which the kernel sees to.
    Who gets that lock alone knows that nobody is building.
    """
    extensions.mkdir(parents=True, exist_ok=True)
    handle = os.open(extensions / "alive", os.O_CREAT | os.O_RDWR, 0o666)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in extensions.glob("*/lock"):
            lock.unlink(missing_ok=True)
    fcntl.flock(handle, fcntl.LOCK_SH)
    _alive.append(handle)
