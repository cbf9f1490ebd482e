"""Platform files: what a calibration writes, a plan reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.calibration import Calibration, platform_file
from orchestrator.errors import UserError
from orchestrator.planning.cluster_file import load_cluster
from orchestrator.planning.devices import of_pool
from orchestrator.planning.platform import device_file

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
)


def written(folder: Path, text: str) -> str:
    (folder / "node.toml").write_text(text)
    return str(folder / "node.toml")


def test_what_was_measured_is_what_plans_are_made_with(tmp_path: Path) -> None:
    found = device_file(written(tmp_path, platform_file(FOUND, "2026-11-23")))
    platform = found.platform("bf16")
    assert platform.peak_flops == 260e12
    assert platform.flops == pytest.approx(240e12, rel=1e-3)
    assert platform.memory_bytes_per_s == 1.4e12
    assert platform.host_link_bytes_per_s == 24e9
    assert platform.device_link_bytes_per_s == 230e9
    assert platform.base_bytes == 2**30
    assert (found.devices_per_node, found.memory_bytes) == (4, 40 * 2**30)
    assert found.source("tflops") == "Measured on NVIDIA A100, 2026-11-23"
    assert found.source("node_link_gb_per_s").startswith("Nominal")


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
