"""`terrane doctor --calibrate`: what this machine's devices were measured to do, as a platform file for `--cluster`.

What was not measured keeps its nominal figure, and the file says of each figure where it is from.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import accelerators
from orchestrator.errors import UserError
from orchestrator.examiner import NoAnswer, answer_of
from orchestrator.planning.platform import Device, device

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""With their names in torch."""
TIMEOUT_S = 300.0
_GIB, _GB, _TERA = 2**30, 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of one device."""

    name: str
    accelerator: str
    devices: int
    """Of the machine."""
    memory_bytes: int | None
    """None: a share of the host's."""
    flops_by_size: Mapping[str, Mapping[str, tuple[float, float]]]
    """(best, median) a second in products of square matrices, by dtype and number of rows."""
    memory_bytes_per_s: float
    """Read and written by copies, the median."""
    host_link_bytes_per_s: float | None
    """To pinned memory of the host; None: the device computes there."""
    device_link_bytes_per_s: float | None
    """To the next device; None without one."""
    base_bytes: int
    """Of a process before the model."""

    def best(self, dtype: str) -> tuple[float, float]:
        """(best, median) of the size with the best median."""
        rates = self.flops_by_size[dtype].values()
        found = max(rates, key=lambda rate: rate[1])
        return found[0], found[1]


def calibrate(path: str) -> Calibration:
    """Measure the first device of this machine, and write a platform file.

    Raises:
        UserError: it cannot be measured, or the file cannot be written.
    """
    accelerator = accelerators.local_accelerator().name
    command = [sys.executable, "-m", "orchestrator.train.calibration", f"--accelerator={accelerator}"]
    try:
        answer = json.loads(asyncio.run(answer_of(command, TIMEOUT_S)).splitlines()[-1])
    except NoAnswer as error:
        raise UserError(f"calibration {error}", "look at the device's driver; terrane doctor says more") from None
    found = Calibration(**answer)
    try:
        Path(path).write_text(platform_file(found, datetime.now(UTC).date().isoformat()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "give another file") from None
    return found


def platform_file(found: Calibration, day: str) -> str:
    """TOML with the keys of a device.

    Args:
        day: of the measurement.
    """
    measured = _measured(found)
    values = device(found.accelerator).model_dump(exclude={"sources"}, exclude_none=True) | measured
    sources = dict.fromkeys(measured, f"Measured on {found.name}, {day}")
    sources["efficiency"] = f"{sources['efficiency']}: typical over best products; no training was measured"
    sources["*"] = f"Nominal, of {found.accelerator} as a kind"
    Device.model_validate({**values, "sources": sources})
    lines = [
        f"# {found.name}, {day}. Products of square matrices, 10^12 operations a second (best, typical):",
        *_by_size(found),
    ]
    lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    lines += ["", "[sources]", *(f"{json.dumps(key)} = {json.dumps(text)}" for key, text in sources.items())]
    return "\n".join(lines) + "\n"


def _measured(found: Calibration) -> dict[str, Any]:
    rates = {dtype: found.best(dtype) for dtype in found.flops_by_size}
    figures: dict[str, Any] = {
        "tflops": {dtype: _rounded(best / _TERA) for dtype, (best, _) in rates.items()},
        "efficiency": _rounded(min(median / best for best, median in rates.values())),
        "memory_gb_per_s": _rounded(found.memory_bytes_per_s / _GB),
        "devices_per_node": found.devices,
        "base_memory_gib": _rounded(found.base_bytes / _GIB),
    }
    if found.memory_bytes:
        figures["memory_gib"] = _rounded(found.memory_bytes / _GIB)
    if found.host_link_bytes_per_s:
        figures["host_link_gb_per_s"] = _rounded(found.host_link_bytes_per_s / _GB)
    if found.device_link_bytes_per_s:
        figures["device_link_gb_per_s"] = _rounded(found.device_link_bytes_per_s / _GB)
    return figures


def _by_size(found: Calibration) -> Iterator[str]:
    for dtype, rates in found.flops_by_size.items():
        told = ", ".join(f"{size}: {best / _TERA:.3g} {median / _TERA:.3g}" for size, (best, median) in rates.items())
        yield f"#   {dtype}  {told}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)
