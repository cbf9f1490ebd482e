"""Cluster files: what they say, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.planning.cluster_file import load_cluster, required

GOOD = """\
pools:
  - name: dcu
    accelerator: dcu
    nodes: 512
    devices_per_node: 4
    memory_gib: 16
    tflops: {fp32: 6}
    node_link_gb_per_s: 6
    price_per_device_hour: 0.4
    node_mtbf_hours: 6.3e3
  - name: spot
    nodes: 8
    devices_per_node: 8
    spare_nodes: 1
    spot: {reclaimed_after_hours: 20, notice_s: 30}
storage: {write_gb_per_s: 50, read_gb_per_s: 100}
"""


def written(folder: Path, text: str) -> str:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return str(file)


def test_cluster_file_is_read(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, GOOD))
    dcu, spot = cluster.pools
    assert (dcu.devices, dcu.node_mtbf_hours, dcu.tflops) == (2048, 6300.0, {"fp32": 6.0})
    assert (dcu.spot, dcu.repair_hours) == (None, 24.0)
    assert spot.spot and (spot.spot.notice_s, spot.spot.back_after_hours) == (30.0, 1.0)
    assert cluster.storage and cluster.storage.write_gb_per_s == 50


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("nodes: 512", "node: 512", r"cluster.yaml:4 pools.0.node is not a key of a cluster file", "nodes"),
        ("notice_s: 30", "notice: 30", r"cluster.yaml:15 pools.1.spot.notice is not a key", "notice_s"),
        ("    nodes: 8\n", "", r"pools.1.nodes is missing", ""),
        ("nodes: 512", "nodes: 0", r"cluster.yaml:4 pools.0.nodes=0: input should be greater than or equal to 1", ""),
        ("accelerator: dcu", "accelerator: tpu", r"cluster.yaml:3 pools.0.accelerator=tpu", ""),
        ("node_mtbf_hours: 6.3e3", "node_mtbf_hours: -1", r"cluster.yaml:10 pools.0.node_mtbf_hours=-1", ""),
        ("name: spot", "name: dcu", r"two pools are named dcu", ""),
        ("fp32: 6", "fp33: 6", r"cluster.yaml:7 pools.0.tflops.fp33", ""),
        (GOOD, "pools: [{nodes: 3}]\n", r"name is missing\n.*devices_per_node is missing$", ""),
        ("pools:", "pools: [", r"is not YAML", ""),
        (GOOD, "pools: []\n", r"pools: give one at least", ""),
        (GOOD, "", r"cluster.yaml holds no cluster file", ""),
    ],
)
def test_wrong_values_are_named_with_their_place(tmp_path: Path, old: str, new: str, message: str, hint: str) -> None:
    assert old in GOOD
    with pytest.raises(UserError, match=message) as caught:
        load_cluster(written(tmp_path, GOOD.replace(old, new)))
    assert hint in caught.value.hint


@pytest.mark.parametrize("file", sorted(Path("jobs/clusters").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_cluster_files_are_read(file: Path) -> None:
    assert load_cluster(str(file)).pools


def test_missing_file_is_said_to_be_missing() -> None:
    with pytest.raises(UserError, match=r"no cluster file at nowhere.yaml"):
        load_cluster("nowhere.yaml")


def test_value_that_a_reader_needs_is_asked_for(tmp_path: Path) -> None:
    dcu, spot = load_cluster(written(tmp_path, GOOD)).pools
    assert required(dcu, "memory_gib", "planning") == 16
    with pytest.raises(UserError, match="pool spot has no memory_gib, which planning needs"):
        required(spot, "memory_gib", "planning")
    with pytest.raises(UserError, match="tflops"):
        required(spot, "tflops", "planning")
