"""`terrane doctor --calibrate` on the machine that the tests run on."""

from __future__ import annotations

from pathlib import Path

from orchestrator.calibration import calibrate
from orchestrator.planning.platform import device_file


def test_machine_is_measured_into_a_platform_file(tmp_path: Path) -> None:
    found = calibrate(str(tmp_path / "here.toml"))
    known = device_file(str(tmp_path / "here.toml"))
    assert known.accelerator == found.accelerator
    assert known.tflops["fp32"] > 0.0001
    assert 0 < known.efficiency <= 1
    assert 0.1 < known.base_memory_gib < 10
    assert {size for rates in found.flops_by_size.values() for size in rates} >= {"256", "512"}
