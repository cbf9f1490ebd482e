"""Platform files: what a calibration writes, a plan reads."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.calibration import Calibration, platform_file
from orchestrator.errors import UserError
from orchestrator.model_config import ModelConfig
from orchestrator.planning.cluster_file import load_cluster
from orchestrator.planning.devices import of_pool
from orchestrator.planning.families import config_values
from orchestrator.planning.fitting import Trained, fitted, predicted_step_s
from orchestrator.planning.platform import Device, Dtype, device_file
from orchestrator.planning.prediction import predict
from orchestrator.train.calibration import trained_dtype

TRUE = Device(
    accelerator="cuda",
    tflops={"bf16": 260, "fp32": 19},
    efficiency=0.6,
    memory_gb_per_s=1400,
    layer_overhead_us=700,
    micro_batch_overhead_us=0,
    node_link_gb_per_s=25,
)
"""A device whose training steps follow the formula."""


def trained(hidden: int, layers: int = 4, held_per_parameter: float = 18.0, **values: Any) -> Trained:
    """By the device above, whatever its states, of which a constant part does not grow with the model."""
    model = config_values(ModelConfig(layers=layers, hidden_size=hidden, heads=hidden // 64), 32_000, 2048)
    asked = Trained(
        model=model,
        dtype="bf16",
        zero_stage=2,
        micro_batch_size=2,
        accumulation=2,
        sequence_length=2048,
        step_s=0.0,
        state_bytes=0,
    )
    known = {
        "step_s": predicted_step_s(asked, TRUE.platform("bf16")),
        "state_bytes": int(held_per_parameter * asked.shape.parameters) + 2**25,
    }
    return replace(asked, **(known | values))


FOUND = Calibration(
    name="NVIDIA A100",
    accelerator="cuda",
    devices=4,
    memory_bytes=40 * 2**30,
    flops_by_size={
        "bf16": {"1024": (150e12, 120e12), "8192": (260e12, 240e12)},
        "fp32": {"1024": (18e12, 17e12), "8192": (19e12, 18.5e12)},
    },
    memory_bytes_per_s=1.4e12,
    host_link_bytes_per_s=24e9,
    device_link_bytes_per_s=230e9,
    base_bytes=2**30,
    trained=(trained(2048), trained(4096)),
)


def written(folder: Path, text: str) -> str:
    (folder / "node.toml").write_text(text)
    return str(folder / "node.toml")


def test_what_was_measured_is_what_plans_are_made_with(tmp_path: Path) -> None:
    found = device_file(written(tmp_path, platform_file(FOUND, "2026-11-23")))
    platform = found.platform("bf16")
    assert platform.peak_flops == 260e12
    assert platform.flops == pytest.approx(0.6 * 260e12, rel=1e-3)
    assert platform.layer_overhead_s == pytest.approx(700e-6, rel=1e-3)
    assert platform.micro_batch_overhead_s == 0
    assert platform.memory_bytes_per_s == 1.4e12
    assert platform.host_link_bytes_per_s == 24e9
    assert platform.device_link_bytes_per_s == 230e9
    assert platform.base_bytes == 2**30
    assert (found.devices_per_node, found.memory_bytes) == (4, 40 * 2**30)
    assert found.source("tflops") == "Measured on NVIDIA A100, 2026-11-23"
    assert found.source("node_link_gb_per_s").startswith("Nominal")
    assert found.source("efficiency").startswith("Fitted to training steps of models of 271,")
    assert "in bf16 on NVIDIA A100, 2026-11-23" in found.source("layer_overhead_us")


def test_models_that_were_not_trained_take_the_time_that_the_device_takes_for_them(tmp_path: Path) -> None:
    found = device_file(written(tmp_path, platform_file(FOUND, "2026-11-23"))).platform("bf16")
    for other in (trained(1024, layers=24), trained(5120, layers=7), trained(3072)):
        assert predicted_step_s(other, found) == pytest.approx(other.step_s, rel=0.01)


def test_a_fit_is_within_what_is_possible() -> None:
    small, larger = FOUND.trained
    noise = replace(small, step_s=0.5 * small.step_s)
    fit = fitted(noise, larger, TRUE)
    assert fit.layer_overhead_s == 0, "the small model was faster than the larger one lets expect"
    at = TRUE.model_copy(update={"efficiency": fit.efficiency, "layer_overhead_us": 0.0}).platform("bf16")
    assert predicted_step_s(larger, at) == pytest.approx(larger.step_s)
    slow = fitted(replace(small, step_s=larger.step_s), larger, TRUE)
    assert slow.efficiency == 1, "hardly any time is left for products"
    for fast_s in (0.0, 1e-9):
        fit = fitted(replace(small, step_s=fast_s), replace(larger, step_s=fast_s), TRUE)
        assert (fit.efficiency, fit.layer_overhead_s) == (1, 0)


@pytest.mark.parametrize(("held", "written_down"), [(18.0, None), (18.3, None), (17.5, 17.5), (20.0, 20.0)])
def test_bytes_a_parameter_are_written_where_the_formula_does_not_say_them(
    held: float, written_down: float | None, tmp_path: Path
) -> None:
    """Those that do not grow with the model do not count."""
    models = (trained(2048, held_per_parameter=held), trained(4096, held_per_parameter=held))
    text = platform_file(replace(FOUND, trained=models), "2026-11-23")
    assert f"{held:.4g} bytes a parameter; by the formula 18" in text
    known = device_file(written(tmp_path, text))
    assert known.bytes_per_parameter == written_down
    assert ("ZeRO-2 in bf16" in known.source("bytes_per_parameter")) == (written_down is not None)
    (memory,) = predict(
        models[1].shape,
        models[1].layout,
        known.platform("bf16"),
        available_bytes=0,
        dtype="bf16",
        data_parallel=1,
        micro_batch_size=1,
        global_batch_size=1,
        sequence_length=2048,
    ).stages
    states = memory.weights + memory.gradients + memory.optimizer
    assert states / models[1].shape.parameters == pytest.approx(written_down or 18)


def test_steps_stand_in_the_file_with_their_prediction() -> None:
    text = platform_file(FOUND, "2026-11-23")
    (larger,) = [line for line in text.splitlines() if line.startswith(f"#   {FOUND.trained[1].shape.parameters:,} ")]
    measured, predicted = (float(part.split()[0]) for part in larger.split("parameters")[1].split(","))
    assert measured == pytest.approx(FOUND.trained[1].step_s, rel=2e-3)
    assert predicted == pytest.approx(measured, rel=2e-3)
    assert tomllib.loads(text)["accelerator"] == "cuda"


@pytest.mark.parametrize(
    ("accelerator", "tflops", "expected"),
    [
        ("cpu", {"fp32": 0.1, "bf16": 0.2}, "fp32"),
        ("cuda", {"fp32": 50, "bf16": 780, "fp16": 790}, "bf16"),
        ("cuda", {"fp32": 8, "bf16": 3, "fp16": 60}, "fp16"),
        ("dcu", {"fp32": 14.7, "bf16": 2, "fp16": 14}, "fp16"),
    ],
)
def test_steps_are_taken_in_the_dtype_that_training_would_take(
    accelerator: str, tflops: dict[Dtype, float], expected: str
) -> None:
    rates = {dtype: {"256": (rate / 2, rate / 3), "512": (rate, rate / 2)} for dtype, rate in tflops.items()}
    assert trained_dtype(accelerator, rates) == expected
    assert trained_dtype(accelerator, rates | {"bf16": {}}) == ("fp32" if accelerator == "cpu" else "fp16")


def test_machine_without_a_second_device_keeps_the_nominal_link(tmp_path: Path) -> None:
    alone = replace(FOUND, devices=1, device_link_bytes_per_s=None)
    found = device_file(written(tmp_path, platform_file(alone, "2026-11-23")))
    assert found.source("device_link_gb_per_s").startswith("Nominal")


def test_cluster_file_names_a_platform_file_beside_it(tmp_path: Path) -> None:
    written(tmp_path, platform_file(FOUND, "2026-11-23"))
    (tmp_path / "cluster.yaml").write_text("pools: [{name: a, device: node.toml, nodes: 3, memory_gib: 39}]\n")
    (pool,) = load_cluster(str(tmp_path / "cluster.yaml")).pools
    devices = of_pool(pool)
    assert (devices.count, devices.memory_bytes) == (12, 39 * 2**30), "what the pool says goes before the file"
    assert devices.platforms["bf16"].peak_flops == 260e12


def test_pool_takes_figures_of_a_device_where_it_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("pools: [{name: a, device: h100, nodes: 2, price_per_device_hour: 2.5}]\n")
    (pool,) = load_cluster(str(tmp_path / "cluster.yaml")).pools
    assert (pool.devices_per_node, pool.memory_gib, pool.price_per_device_hour) == (8, 80, 2.5)
    assert pool.figures.layer_overhead_us == 400
    assert of_pool(pool).platforms["bf16"].link_bytes_per_s == 0.7 * 50e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accelerator = ", "is not TOML"),
        ('accelerator = "cuda"\nspeed = 3', "speed"),
        ('accelerator = "cuda"\ntflops = { bf16 = -1 }\nnode_link_gb_per_s = 1', "tflops.bf16"),
    ],
)
def test_bad_platform_files(text: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError, match=message):
        device_file(file)
    with pytest.raises(UserError, match="cannot read the platform file"):
        device_file(str(tmp_path / "none.toml"))
    (tmp_path / "cluster.yaml").write_text("pools:\n  - name: a\n    device: node.toml\n    nodes: 1\n")
    with pytest.raises(UserError, match=r"cluster.yaml:3 pools.0.device"):
        load_cluster(str(tmp_path / "cluster.yaml"))
