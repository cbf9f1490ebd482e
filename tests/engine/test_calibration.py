"""`terrane doctor --calibrate` on the machine that the tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.accelerators import CPU, CUDA
from orchestrator.calibration import calibrate
from orchestrator.planning.fitting import bytes_per_parameter, predicted_step_s
from orchestrator.planning.platform import device_file
from orchestrator.train.calibration_steps import hidden_size


def test_machine_is_measured_into_a_platform_file(tmp_path: Path) -> None:
    found = calibrate(str(tmp_path / "here.toml"))
    known = device_file(str(tmp_path / "here.toml"))
    assert known.accelerator == found.accelerator
    assert known.tflops["fp32"] > 0.0001
    assert 0 < known.efficiency <= 1
    assert 0.1 < known.base_memory_gib < 10
    assert {size for rates in found.flops_by_size.values() for size in rates} >= {"256", "512"}
    assert "Fitted to training steps" in known.source("efficiency")
    small, larger = found.trained
    if known.efficiency < 1:  # else the machine was too busy for its steps to say more than that they are slow
        assert predicted_step_s(larger, known.platform(larger.dtype)) == pytest.approx(larger.step_s, rel=0.01)
    if found.accelerator == "cpu":
        assert (larger.dtype, bytes_per_parameter(small, larger)) == ("fp32", 20)
        assert known.bytes_per_parameter is None, "the formula says the same"


@pytest.mark.parametrize(("gib", "hidden"), [(80, 4096), (24, 2048), (16, 2048), (1, 512)])
def test_the_models_that_are_trained_fit_the_device(gib: int, hidden: int) -> None:
    assert hidden_size(CUDA, "bf16", gib * 2**30) == hidden
    assert hidden_size(CPU, "fp32", gib * 2**30) == (512 if gib > 1 else 128)
