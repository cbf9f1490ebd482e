"""What is known of devices: every figure has a source, and what is wrong is refused."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from orchestrator.errors import UserError
from orchestrator.planning.platform import Device, device, devices, nominal

COMMON = ("a100-40", "a100-80", "h100", "h200", "gh200", "v100-16", "v100-32", "rtx-3090", "rtx-4090")
OTHERS = ("z100", "k100-ai", "mi250x", "mi300x", "cpu")


@pytest.mark.parametrize("name", [*COMMON, *OTHERS])
def test_common_devices_are_known(name: str) -> None:
    found = device(name)
    assert all(found.platform(dtype).flops > 0 for dtype in found.tflops)
    assert name == "cpu" or found.memory_bytes


@pytest.mark.parametrize("name", devices())
def test_every_figure_says_where_it_is_from(name: str) -> None:
    found = device(name)
    figures = found.model_fields_set - {"accelerator", "sources"}
    assert set(found.sources) <= figures | {"*"}
    assert all(len(found.source(figure).split()) > 1 for figure in figures)


def test_a_device_that_is_not_known_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        device("A100-80G")
    assert caught.value.hint == "did you mean a100-80?"
    with pytest.raises(UserError) as caught:
        device("x")
    assert "a100-40" in caught.value.hint


def test_a_dtype_that_a_device_does_not_compute_in_is_refused() -> None:
    with pytest.raises(UserError, match="in bf16") as caught:
        device("v100-16").platform("bf16")
    assert caught.value.hint == "use fp16 or fp32"


@pytest.mark.parametrize(
    "wrong",
    [{"efficiency": 1.5}, {"fragmentation": 0.9}, {"tflop": 1}, {"tflops": {}}, {"sources": {"speed": "a page"}}],
)
def test_values_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    right = {"accelerator": "cuda", "tflops": {"bf16": 100}, "node_link_gb_per_s": 25}
    assert Device.model_validate(right).platform("bf16").flops == 50e12
    with pytest.raises(ValidationError):
        Device.model_validate({**right, **wrong})


def test_units_are_those_of_the_system() -> None:
    found = device("a100-40").platform("bf16")
    assert found.peak_flops == pytest.approx(312e12)
    assert found.memory_bytes_per_s == pytest.approx(1555e9)
    assert found.link_bytes_per_s == pytest.approx(25e9 * 0.7)
    assert found.layer_overhead_s == pytest.approx(400e-6)
    assert found.base_bytes == int(1.5 * 2**30)


@pytest.mark.parametrize(
    ("accelerator", "flops", "link"), [("cpu", 4e10, 1e9), ("cuda", 1e14, 2.5e10), ("dcu", 6e12, 1e10)]
)
def test_nominal_speeds_are_end_to_end(accelerator: str, flops: float, link: float) -> None:
    found = nominal(accelerator)
    assert (found.flops, found.link_bytes_per_s) == pytest.approx((flops, link))
    assert math.isinf(found.memory_bytes_per_s)
