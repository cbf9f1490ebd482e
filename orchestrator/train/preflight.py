"""What a node can do, measured in a process of its own, whose memory and device contexts end with it.

    python -m orchestrator.train.preflight --accelerator cpu --dtypes fp32,bf16 --storage runs/tiny

prints one line of JSON, a NodeResult. Imports no Ray.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import storage
from orchestrator.accelerators import ACCELERATORS, Accelerator
from orchestrator.errors import StorageError
from orchestrator.findings import DeviceResult, NodeResult, StorageResult

if TYPE_CHECKING:
    import torch

STORAGE_BYTES = 4 * 2**20
STORAGE_TIMEOUT_S = 30.0


def main(arguments: Sequence[str]) -> None:
    asked = _parsed(arguments)
    # Whoever waits for the answer may be gone by then. No handler: the kernel ends a process that hangs in a driver.
    signal.alarm(math.ceil(asked.timeout_s))
    accelerator = ACCELERATORS[asked.accelerator]
    if accelerator.visible_devices and asked.devices:
        os.environ[accelerator.visible_devices] = asked.devices
    numbers = [int(number) for number in (asked.devices or "0").split(",")]
    result = measure(accelerator, numbers, asked.dtypes.split(","), asked.threads, asked.storage)
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # not held up by a storage that does not answer


def measure(
    accelerator: Accelerator, devices: Sequence[int], dtypes: Sequence[str], threads: int, storage_uri: str | None
) -> NodeResult:
    """
    Args:
        devices: the machine's numbers of those that this process sees, in their order. CPU workers are alike: one is
            measured, while every core is tested.
        threads: of a CPU worker.
        storage_uri: of a directory to write a file in, and delete it; None leaves that out.
    """
    import torch

    began = time.monotonic()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        examined = tuple(_device(accelerator, place, number, dtypes) for place, number in enumerate(devices))
    stored = _storage(storage_uri) if storage_uri else None
    return NodeResult(accelerator=accelerator.name, devices=examined, storage=stored, seconds=time.monotonic() - began)


def _device(accelerator: Accelerator, place: int, number: int, dtypes: Sequence[str]) -> DeviceResult:
    import torch

    from orchestrator.train import speeds
    from orchestrator.train.self_test import DTYPES

    device = torch.device(accelerator.torch_device, place)
    wrong: list[str] = []
    unfit: dict[str, str] = {}
    rates: dict[str, speeds.Rate] = {}
    try:
        name = _name(device)
        bandwidth = speeds.memory_bandwidth(device)
        for dtype in dtypes:
            try:
                before = speeds.matrix_flops(device, DTYPES[dtype])
                wrong += _wrong_answers(device, dtype)
                rates[dtype] = max(before, speeds.matrix_flops(device, DTYPES[dtype]))  # a busy moment passes meanwhile
            except RuntimeError as error:  # what torch raises for a kernel that does not exist
                unfit[dtype] = _first_line(error)
    except (RuntimeError, AssertionError) as error:  # no driver, no such device, or one that fell off the bus
        return DeviceResult(device=number, error=_first_line(error))
    return DeviceResult(
        device=number,
        name=name,
        flops={dtype: rate.best for dtype, rate in rates.items()},
        typical_flops={dtype: rate.median for dtype, rate in rates.items()},
        bytes_per_s=bandwidth.best,
        wrong=tuple(wrong),
        unfit=unfit,
    )


def _wrong_answers(device: torch.device, dtype: str) -> list[str]:
    """Of a device, or of each core of the host in turn: cores break one at a time (Hochschild et al., "Cores that don't
    count", 2021)."""
    import torch

    from orchestrator.train.self_test import wrong_answers

    if device.type != "cpu":
        return wrong_answers(device, dtype)
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for core in sorted(os.sched_getaffinity(0)):
        with _on_core(core):
            found += [f"core {core}: {told}" for told in wrong_answers(device, dtype)]
    torch.set_num_threads(threads)
    return found


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _storage(uri: str) -> StorageResult:
    """In a thread: clients of object stores try again for minutes."""
    results: list[StorageResult] = []
    thread = threading.Thread(target=lambda: results.append(_probed(uri)), daemon=True)
    thread.start()
    thread.join(STORAGE_TIMEOUT_S)
    silent = StorageResult(error=f"{uri} did not answer within {STORAGE_TIMEOUT_S:.0f} s")
    return results[0] if results else silent


def _probed(uri: str) -> StorageResult:
    try:
        latency_s = storage.probe(uri, 1)
        return StorageResult(latency_s=latency_s, write_bytes_per_s=STORAGE_BYTES / storage.probe(uri, STORAGE_BYTES))
    except StorageError as error:
        return StorageResult(error=error.message)


def _name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.train.preflight", description=__doc__)
    parser.add_argument("--accelerator", choices=sorted(ACCELERATORS), required=True)
    parser.add_argument("--devices", help="the machine's numbers of GPUs, separated by commas")
    parser.add_argument("--dtypes", default="fp32", help="separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--storage", help="a directory or URI to write a file in")
    parser.add_argument("--timeout-s", type=float, default=120.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
