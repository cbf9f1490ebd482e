"""What a kind of device does in training: the constants that predictions of memory and of time are made from.

devices.toml holds them for common devices, each figure with its source. What is measured on a device goes before it:
`Device.model_validate` reads the same keys from anywhere else, and `model_copy(update=...)` changes some of them.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from orchestrator.config_section import Count, Positive, Section
from orchestrator.errors import UserError

Dtype = Literal["fp32", "bf16", "fp16"]
Share = Annotated[float, Field(gt=0, le=1)]
_GIB, _GB, _US, _TERA = 2**30, 1e9, 1e-6, 1e12


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Of a device that computes in one dtype."""

    flops: float
    """Operations a second that its matrix products sustain in training; where memory_bytes_per_s is infinite, that
    training sustains end to end."""
    peak_flops: float
    """That the data sheet promises: what MFU is a share of."""
    memory_bytes_per_s: float
    """That element-wise operations and the optimizer reach; infinite where flops counts their time already."""
    link_bytes_per_s: float
    """One way between two nodes, the share of one device."""
    link_latency_s: float
    device_link_bytes_per_s: float
    """One way between two devices of a node."""
    device_link_latency_s: float
    host_link_bytes_per_s: float
    """One way between a device and its host's memory."""
    devices_per_node: int
    layer_overhead_s: float
    """Of a layer and micro-batch, forward and backward: what it takes to launch its kernels."""
    micro_batch_overhead_s: float
    base_bytes: int
    """Of a process before the model: runtime, context, libraries, communicators."""
    fragmentation: float
    """What the allocator holds for each byte in use."""
    keeps_attention_scores: bool
    """Whether attention writes a score for each pair of tokens to memory, as kernels that are not fused do."""
    bucket_elements: int
    """Of each buffer that gradients are reduced in; 0 where they are reduced in place."""
    bytes_per_parameter: float | None
    """Weights, gradients and optimizer that the engine holds before ZeRO splits them, where it was measured."""
    gradient_bytes: float | None
    """Of these the gradients, where the engine does not add them up in fp32."""


class Device(Section):
    """A kind of device, as devices.toml or a calibration describes it. Links count one way."""

    accelerator: Literal["cuda", "dcu", "cpu"]
    memory_gib: Positive | None = None
    """None: a share of its node's memory."""
    tflops: dict[Dtype, Positive] = Field(min_length=1)
    """10^12 operations a second in dense matrix products, by dtype."""
    efficiency: Share = 0.5
    """Of that, what training reaches in them."""
    memory_gb_per_s: Positive | None = None
    """None where efficiency covers what waits for memory, too."""
    devices_per_node: Count = 1
    device_link_gb_per_s: Positive | None = None
    """Between two devices of a node; None: as between nodes."""
    node_link_gb_per_s: Positive
    """Between two nodes, the share of one device."""
    link_efficiency: Share = 1.0
    """Of both, what collectives reach."""
    device_link_latency_us: Positive | None = None
    node_link_latency_us: Positive = 20.0
    host_link_gb_per_s: Positive = 10.0
    layer_overhead_us: float = Field(default=0.0, ge=0)
    micro_batch_overhead_us: float = Field(default=1000.0, ge=0)
    base_memory_gib: float = Field(default=1.2, ge=0)
    fragmentation: float = Field(default=1.08, ge=1)
    """What the allocator holds for each byte in use: 1.05 to 1.10 is usual."""
    keeps_attention_scores: bool = False
    bucket_elements: int = Field(default=200_000_000, ge=0)
    """Of each buffer that gradients are reduced in: the engine's own size, unless another engine runs."""
    bytes_per_parameter: Positive | None = None
    gradient_bytes: Positive | None = None
    price_per_device_hour: float | None = Field(default=None, ge=0)
    """In US dollars."""
    node_mtbf_hours: Positive | None = None
    """Mean time between failures that take a node out of the cluster."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where each figure is from, by its key; `*` is for those that it does not name."""

    @model_validator(mode="after")
    def _sources_are_of_figures(self) -> Self:
        if unknown := set(self.sources) - set(type(self).model_fields) - {"*"}:
            raise ValueError(f"sources names {', '.join(sorted(unknown))}, which is no figure of a device")
        return self

    def source(self, figure: str) -> str:
        """Of one figure; empty where nobody has told."""
        return self.sources.get(figure) or self.sources.get("*", "")

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gib is None else int(self.memory_gib * _GIB)

    def platform(self, dtype: Dtype) -> Platform:
        """
        Raises:
            UserError: no speed is known in this dtype.
        """
        if dtype not in self.tflops:
            raise UserError(f"no speed is known of this device in {dtype}", f"use {' or '.join(self.tflops)}")
        peak, reached = self.tflops[dtype] * _TERA, self.link_efficiency * _GB
        node_latency_s = self.node_link_latency_us * _US
        return Platform(
            flops=peak * self.efficiency,
            peak_flops=peak,
            memory_bytes_per_s=self.memory_gb_per_s * _GB if self.memory_gb_per_s else math.inf,
            link_bytes_per_s=self.node_link_gb_per_s * reached,
            link_latency_s=node_latency_s,
            device_link_bytes_per_s=(self.device_link_gb_per_s or self.node_link_gb_per_s) * reached,
            device_link_latency_s=self.device_link_latency_us * _US if self.device_link_latency_us else node_latency_s,
            host_link_bytes_per_s=self.host_link_gb_per_s * _GB,
            devices_per_node=self.devices_per_node,
            layer_overhead_s=self.layer_overhead_us * _US,
            micro_batch_overhead_s=self.micro_batch_overhead_us * _US,
            base_bytes=int(self.base_memory_gib * _GIB),
            fragmentation=self.fragmentation,
            keeps_attention_scores=self.keeps_attention_scores,
            bucket_elements=self.bucket_elements,
            bytes_per_parameter=self.bytes_per_parameter,
            gradient_bytes=self.gradient_bytes,
        )


@cache
def devices() -> Mapping[str, Device]:
    """The devices of devices.toml, by name."""
    text = resources.files("orchestrator.planning").joinpath("devices.toml").read_text(encoding="utf-8")
    return {name: Device.model_validate(values) for name, values in tomllib.loads(text).items()}


def device(name: str) -> Device:
    """
    Raises:
        UserError: devices.toml has none of that name.
    """
    known, lower = devices(), name.lower()
    if lower not in known:
        close = [one for one in known if one.startswith(lower)] or difflib.get_close_matches(lower, known, 1, 0.5)
        raise UserError(
            f"no device is known by the name {name}",
            f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}",
        )
    return known[lower]


@cache
def device_file(path: str) -> Device:
    """A device as a calibration describes it: the keys of `Device` in TOML.

    Raises:
        UserError: it cannot be read, or a key or value is wrong.
    """
    try:
        return Device.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the platform file {path}: {error}", "terrane doctor --calibrate writes one"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}", "terrane doctor --calibrate writes one") from None
    except ValidationError as error:
        raise UserError(f"{path}: {wrong_figures(error)}", f"keys are {', '.join(Device.model_fields)}") from None


def wrong_figures(error: ValidationError) -> str:
    """What pydantic found wrong with figures of a device, in a line."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors())


def nominal(accelerator: str) -> Platform:
    """Of a kind of accelerator of which nothing is known but the kind: any dtype counts alike."""
    found = device(accelerator)
    return found.platform(next(iter(found.tflops)))
