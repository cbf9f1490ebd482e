"""What the first device of a machine does, for a platform file; in a process of its own, as preflight is.

    python -m orchestrator.train.calibration --accelerator cpu

prints one line of JSON, a Calibration. Imports no Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from orchestrator.accelerators import ACCELERATORS, Accelerator, prepare_process
from orchestrator.calibration import DTYPES, Calibration
from orchestrator.planning.platform import Dtype
from orchestrator.planning.platform import device as device_figures

if TYPE_CHECKING:
    import torch

Rates = Mapping[str, tuple[float, float]]
"""(best, median) by size."""
_COPIED_BYTES = 2**28
_COPIES = 10


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--accelerator", choices=sorted(ACCELERATORS), required=True)
    accelerator = ACCELERATORS[parser.parse_args(arguments).accelerator]
    prepare_process(accelerator)
    sys.stdout.write(json.dumps(asdict(measure(accelerator))) + "\n")


def measure(accelerator: Accelerator) -> Calibration:
    """Of the first device: products, copies and base memory before a model is there, then training steps."""
    import deepspeed  # noqa: F401, a worker has it in memory, too
    import torch

    from orchestrator.train import speeds
    from orchestrator.train.calibration_steps import train_two

    device = torch.device(accelerator.torch_device, 0)
    torch.set_num_threads(1)  # a CPU counts as as many devices as it has cores
    with torch.inference_mode():
        known = set(device_figures(accelerator.name).tflops)
        by_size = {
            dtype: speeds.matrix_flops_by_size(device, getattr(torch, name))
            for dtype, name in DTYPES.items()
            if dtype in known
        }
        bandwidth = speeds.memory_bandwidth(device)
        base_bytes = _base_bytes(device)
        links = [_copy_rate(device, torch.device("cpu"))] if device.type == "cuda" else []
        on_cpu = device.type == "cpu"
        count = len(os.sched_getaffinity(0)) if on_cpu else torch.cuda.device_count()
        memory_bytes = speeds.free_bytes(device) // count if on_cpu else torch.cuda.mem_get_info(device)[1]
        between = None if on_cpu or count == 1 else _copy_rate(device, torch.device("cuda", 1))
    return Calibration(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        accelerator=accelerator.name,
        devices=count,
        memory_bytes=memory_bytes,
        flops_by_size={dtype: rates for dtype, rates in by_size.items() if rates},
        memory_bytes_per_s=bandwidth.median,
        host_link_bytes_per_s=links[0] if links else None,
        device_link_bytes_per_s=between,
        base_bytes=base_bytes,
        trained=train_two(accelerator, trained_dtype(accelerator.name, by_size), speeds.free_bytes(device)),
    )


def trained_dtype(accelerator: str, by_size: Mapping[Dtype, Rates]) -> Dtype:
    """What `train.dtype=auto` would take: fp32 on a CPU, elsewhere bf16, unless it is slow as where it is emulated."""
    if accelerator == "cpu":
        return "fp32"
    best = {dtype: max((rate for rate, _ in rates.values()), default=0.0) for dtype, rates in by_size.items()}
    preferred: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
    return next(dtype for dtype in preferred if best.get(dtype, 0) >= max(best.values()) / 2)


def _base_bytes(device: torch.device) -> int:
    """Of this process, with what it has imported and what its kernels need, without its tensors."""
    import psutil
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free - torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)


def _copy_rate(device: torch.device, to: torch.device) -> float:
    """Bytes a second, one way."""
    import torch

    from orchestrator.train import speeds

    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=to, pin_memory=to.type == "cpu")
    return _COPIED_BYTES / min(speeds.seconds(device, lambda: target.copy_(source, non_blocking=True), _COPIES))


if __name__ == "__main__":
    main(sys.argv[1:])
