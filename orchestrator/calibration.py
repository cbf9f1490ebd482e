"""`terrane doctor --calibrate`: what this machine's devices were measured to do, as a platform file for `--cluster`.

What was not measured keeps its nominal figure, and the file says of each figure where it is from.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import accelerators
from orchestrator.errors import UserError
from orchestrator.examiner import NoAnswer, answer_of
from orchestrator.planning.fitting import (
    Trained,
    bytes_per_parameter,
    fitted,
    predicted_bytes_per_parameter,
    predicted_step_s,
)
from orchestrator.planning.platform import Device, device

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""With their names in torch."""
TIMEOUT_S = 600.0
BYTES_MAY_DIFFER = 0.02
"""Share by which the bytes of a parameter may differ from the formula that plans are made with before the file has
them: the formula knows every dtype and ZeRO stage, and a figure of the file holds for all alike."""
_GIB, _GB, _TERA = 2**30, 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of one device."""

    name: str
    accelerator: str
    devices: int
    """Of the machine."""
    memory_bytes: int
    """Of a CPU's core its share of what is free."""
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
    trained: tuple[Trained, Trained]
    """A small model and a larger one."""

    @classmethod
    def from_json(cls, answer: dict[str, Any]) -> Calibration:
        return cls(**{**answer, "trained": tuple(Trained(**trained) for trained in answer["trained"])})

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
    found = Calibration.from_json(answer)
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
    nominal = device(found.accelerator).model_dump(exclude={"sources"}, exclude_none=True)
    calibrated = Device.model_validate(nominal | measured)
    known = nominal | measured | _of_training(found, calibrated)
    sources = dict.fromkeys(measured, f"Measured on {found.name}, {day}") | _sources_of_training(found, day, known)
    sources["*"] = f"Nominal, of {found.accelerator} as a kind"
    calibrated = Device.model_validate({**known, "sources": sources})
    lines = [
        f"# {found.name}, {day}. Products of square matrices, 10^12 operations a second (best, typical):",
        *_by_size(found),
        *_steps(found, calibrated),
    ]
    lines += [f"{key} = {_toml(value)}" for key, value in known.items()]
    lines += ["", "[sources]", *(f"{json.dumps(key)} = {json.dumps(text)}" for key, text in sources.items())]
    return "\n".join(lines) + "\n"


def _measured(found: Calibration) -> dict[str, Any]:
    rates = {dtype: found.best(dtype) for dtype in found.flops_by_size}
    figures: dict[str, Any] = {
        "tflops": {dtype: _rounded(best / _TERA) for dtype, (best, _) in rates.items()},
        "memory_gb_per_s": _rounded(found.memory_bytes_per_s / _GB),
        "devices_per_node": found.devices,
        "memory_gib": _rounded(found.memory_bytes / _GIB),
        "base_memory_gib": _rounded(found.base_bytes / _GIB),
    }
    if found.host_link_bytes_per_s:
        figures["host_link_gb_per_s"] = _rounded(found.host_link_bytes_per_s / _GB)
    if found.device_link_bytes_per_s:
        figures["device_link_gb_per_s"] = _rounded(found.device_link_bytes_per_s / _GB)
    return figures


def _of_training(found: Calibration, calibrated: Device) -> dict[str, Any]:
    small, larger = found.trained
    fit = fitted(small, larger, calibrated)
    figures: dict[str, Any] = {
        "efficiency": _rounded(fit.efficiency),
        "layer_overhead_us": _rounded(fit.layer_overhead_s * 1e6),
        "micro_batch_overhead_us": 0.0,
    }
    held, formula = _bytes_per_parameter(found, calibrated)
    if abs(held / formula - 1) > BYTES_MAY_DIFFER:
        figures["bytes_per_parameter"] = _rounded(held)
    return figures


def _bytes_per_parameter(found: Calibration, calibrated: Device) -> tuple[float, float]:
    """(measured, by the formula of plans)."""
    small, larger = found.trained
    platform = replace(calibrated.platform(larger.dtype), bytes_per_parameter=None, gradient_bytes=None)
    return bytes_per_parameter(small, larger), predicted_bytes_per_parameter(larger, platform)


def _sources_of_training(found: Calibration, day: str, known: Mapping[str, Any]) -> dict[str, str]:
    small, larger = found.trained
    models = f"{small.shape.parameters:,} and of {larger.shape.parameters:,} parameters"
    fit = f"Fitted to training steps of models of {models} in {larger.dtype} on {found.name}, {day}"
    sources = {"efficiency": fit, "layer_overhead_us": fit, "micro_batch_overhead_us": "In layer_overhead_us"}
    if "bytes_per_parameter" in known:
        sources["bytes_per_parameter"] = (
            f"Measured with ZeRO-{larger.zero_stage} in {larger.dtype}, between them; {day}"
        )
    return sources


def _steps(found: Calibration, calibrated: Device) -> Iterator[str]:
    larger = found.trained[1]
    yield f"# Training steps with ZeRO-{larger.zero_stage} in {larger.dtype} (measured, predicted with this file):"
    for trained in found.trained:
        predicted = predicted_step_s(trained, calibrated.platform(trained.dtype))
        yield f"#   {trained.shape.parameters:,} parameters  {trained.step_s:.4g} s, {predicted:.4g} s"
    held, formula = _bytes_per_parameter(found, calibrated)
    yield f"# Weights, gradients and optimizer states: {held:.4g} bytes a parameter; by the formula {formula:.4g}"


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
