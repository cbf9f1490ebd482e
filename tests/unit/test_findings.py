"""What speaks against a node, and what does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from orchestrator.errors import StorageError
from orchestrator.findings import DeviceResult, Finding, Link, NodeResult, StorageResult, faster, judge

WELL = DeviceResult(device=0, name="X1", flops={"fp32": 1e14, "bf16": 4e14}, bytes_per_s=2e12)
FINE = StorageResult(latency_s=0.01, write_bytes_per_s=1e9)


def node(*devices: DeviceResult, storage: StorageResult = FINE, error: str = "") -> NodeResult:
    return NodeResult(accelerator="cuda", devices=devices, storage=storage, error=error)


def slower(by: float, name: str = "X1") -> DeviceResult:
    return replace(WELL, name=name, flops={dtype: value * by for dtype, value in WELL.flops.items()})


def linked(speeds: Sequence[float]) -> dict[tuple[str, str], Link]:
    """All pairs of nodes; a link is as slow as the slower of its ends."""
    return {
        (str(one), str(other)): Link(latency_s=1e-4, bytes_per_s=min(speeds[one], speeds[other]))
        for one, other in itertools.combinations(range(len(speeds)), 2)
    }


def judged(
    *results: NodeResult, links: dict[tuple[str, str], Link] | None = None, dtype: str = "bf16"
) -> list[Finding]:
    return judge({str(n): result for n, result in enumerate(results)}, links or {}, dtype)


def test_nothing_speaks_against_nodes_that_are_alike() -> None:
    assert judged(*[node(WELL, WELL)] * 4, links=linked([1e9, 2e9, 1e9, 1e9])) == []
    assert judged() == []


def test_one_wrong_number_is_enough() -> None:
    (found,) = judged(node(replace(WELL, wrong=("softmax in fp32 is off by 1e+00",))))
    assert (found.node_id, found.corrupt, found.doubtful) == ("0", True, False)
    assert found.reason == "device 0 (X1) computes wrong numbers: softmax in fp32 is off by 1e+00"


def test_only_the_dtype_of_the_plan_must_be_computed() -> None:
    old = replace(WELL, unfit={"bf16": "no kernel"})
    assert [found.reason for found in judged(node(old))] == ["device 0 (X1) does not compute in bf16: no kernel"]
    assert judged(node(old), dtype="fp32") == []


def test_a_node_or_device_that_cannot_be_examined_is_bad() -> None:
    lost = DeviceResult(device=3, error="CUDA error: device is lost")
    found = judged(node(error="preflight did not answer within 60 s"), node(WELL, lost), node(WELL))
    assert [(f.node_id, f.reason) for f in found] == [
        ("0", "preflight did not answer within 60 s"),
        ("1", "device 3 (cuda) cannot be used: CUDA error: device is lost"),
    ]


@pytest.mark.parametrize(("by", "others", "bad"), [(0.5, 3, True), (0.5, 2, True), (0.5, 1, False), (0.7, 7, False)])
def test_a_clear_outlier_among_three_or_more_is_slow(by: float, others: int, bad: bool) -> None:
    found = judged(node(WELL, slower(by)), *[node(WELL, WELL)] * others)
    assert [f.node_id for f in found] == ["0"] * bad
    assert all(f.doubtful and not f.corrupt for f in found)


def test_a_cpu_with_a_busy_neighbour_is_not_slow() -> None:
    cpus = [replace(node(device), accelerator="cpu") for device in (slower(0.5), WELL, WELL, WELL, slower(0.3))]
    assert [found.node_id for found in judged(*cpus)] == ["4"]


def test_the_reason_has_the_numbers() -> None:
    (found,) = judged(node(slower(0.5)), *[node(WELL)] * 3)
    share = "50% of the 400,000.0 that 4 such nodes have as median"
    assert found.reason == f"X1 computes bf16 at 200,000.0 GFLOP/s, {share}"


def test_another_model_is_not_slow_of_its_kind() -> None:
    assert judged(node(slower(0.3, "X0")), *[node(WELL)] * 5) == []


def test_slow_memory_is_found() -> None:
    (found,) = judged(node(replace(WELL, bytes_per_s=5e11)), *[node(WELL)] * 3)
    assert found.reason.startswith("X1 copies memory at 500.0 GB/s, 25% of the 2,000.0")


def test_a_broken_node_does_not_set_the_pace_for_the_others() -> None:
    broken = replace(slower(100.0), wrong=("all of it",))
    assert {found.node_id for found in judged(node(broken), node(broken), node(WELL), node(WELL))} == {"0", "1"}


def test_the_node_that_all_slow_links_share_is_bad() -> None:
    for speeds in ([1e9, 1e8, 1e9], [1e9, 1e8, 1e9, 1e9, 1e9]):
        (found,) = judged(*[node(WELL)] * len(speeds), links=linked(speeds))
        assert (found.node_id, found.doubtful) == ("1", True)
        assert found.reason == "the fastest link carries 0.100 GB/s, where 1.000 is the median"


def test_a_node_that_no_other_reaches_is_bad_and_says_why() -> None:
    links = {pair: Link(error="timed out") if "2" in pair else link for pair, link in linked([1e9] * 4).items()}
    (found,) = judged(*[node(WELL)] * 4, links=links)
    assert (found.node_id, found.reason[-12:]) == ("2", " (timed out)")


def test_one_slow_link_speaks_against_neither_end() -> None:
    links = linked([1e9] * 4) | {("1", "2"): Link(bytes_per_s=1e6)}
    assert judged(*[node(WELL)] * 4, links=links) == []
    assert judged(*[node(WELL)] * 2, links={("0", "1"): Link(bytes_per_s=1.0)}) == []


def test_where_no_link_carries_anything_it_is_not_the_nodes() -> None:
    links = {pair: Link(error="refused") for pair in linked([1.0] * 4)}
    assert judged(*[node(WELL)] * 4, links=links) == []


def test_a_storage_that_no_node_can_write_is_no_fault_of_theirs() -> None:
    broken = StorageResult(error="cannot write to /x: No space left on device")
    (found,) = judged(node(WELL, storage=broken), node(WELL))
    assert found.reason == "cannot write to /x: No space left on device, while other nodes can"
    with pytest.raises(StorageError, match="No space left"):
        judged(node(WELL, storage=broken), node(WELL, storage=broken))


def test_of_two_looks_the_better_speed_counts_and_the_later_verdict() -> None:
    once, again = node(slower(0.5)), node(replace(slower(0.9), bytes_per_s=1.0, wrong=("x",)))
    both = faster(once, again).devices[0]
    assert (both.flops["bf16"], both.bytes_per_s, both.wrong) == (3.6e14, 2e12, ("x",))


def test_results_survive_json() -> None:
    import json
    from dataclasses import asdict

    for result in (node(WELL, replace(WELL, wrong=("a",), unfit={"fp16": "b"})), NodeResult(accelerator="cpu")):
        assert NodeResult.from_json(json.loads(json.dumps(asdict(result)))) == result
