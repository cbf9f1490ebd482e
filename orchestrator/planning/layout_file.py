"""A layout that somebody gives as JSON, judged: does it fit, and how fast is it."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import Field, ValidationError

from orchestrator.config_section import Count, Section
from orchestrator.errors import UserError
from orchestrator.planning.devices import Devices
from orchestrator.planning.layout import Layout
from orchestrator.planning.platform import Device, Dtype, wrong_figures
from orchestrator.planning.prediction import Prediction, predict
from orchestrator.planning.shape import ModelShape
from orchestrator.recipe_file import read


class LayoutFile(Section):
    tensor_parallel: Count
    pipeline_stages: Count
    data_parallel: Count
    layers_per_stage: tuple[Count, ...]
    """Decoder blocks of each stage; the embedding goes with the first and the head with the last."""
    micro_batch_size: Count
    """Sequences."""
    global_batch_size: Count
    """Sequences."""
    sequence_length: Count
    """Tokens."""
    zero_stage: Literal[0, 1, 2, 3]
    dtype: Dtype
    recompute: bool
    platform: dict[str, Any] = Field(default_factory=dict)
    """Figures of the device that were measured: keys of a platform file."""

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor_parallel=self.tensor_parallel,
            pipeline_stages=self.pipeline_stages,
            layers_per_stage=self.layers_per_stage,
            zero_stage=self.zero_stage,
            offload=False,
            recompute=self.recompute,
        )

    @property
    def workers(self) -> int:
        return self.tensor_parallel * self.pipeline_stages * self.data_parallel


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of a layout on a pool."""

    devices: Devices
    prediction: Prediction
    fits: bool
    reason: str

    @property
    def values(self) -> dict[str, Any]:
        """As they are printed."""
        found = self.prediction
        stages = [{**asdict(stage), "total_bytes": stage.total} for stage in found.stages]
        return {
            "fits": self.fits,
            "peak_memory_bytes": found.peak_memory_bytes,
            "step_time_s": found.step.total,
            "tokens_per_second": found.tokens_per_second,
            "stages": [_in_bytes(stage) for stage in stages],
            "reason": self.reason,
        }


def _in_bytes(stage: dict[str, Any]) -> dict[str, Any]:
    keep = ("fragmentation", "total_bytes")
    return {key if key in keep else f"{key}_bytes": value for key, value in stage.items()}


def load_layout(path: str) -> LayoutFile:
    """
    Raises:
        UserError: it is no JSON, or a key is missing, wrong or unknown.
    """
    text = read(path, "layout")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no layout", f"keys are {', '.join(LayoutFile.model_fields)}")
    try:
        found = LayoutFile.model_validate(values)
    except ValidationError as error:
        raise _explain(path, error) from None
    return found


def _explain(path: str, error: ValidationError) -> UserError:
    messages, hint = [], ""
    for item in error.errors():
        key, value = ".".join(map(str, item["loc"])), item["input"]
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key, LayoutFile.model_fields, n=1, cutoff=0.5)
            hint = hint or (f"did you mean {close[0]}?" if close else f"keys are {', '.join(LayoutFile.model_fields)}")
            messages.append(f"{path} {key} is not a key of a layout")
        elif item["type"] == "missing":
            messages.append(f"{path} {key} is missing")
        else:
            messages.append(f"{path} {key}={json.dumps(value)}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return UserError("\n       ".join(messages), hint)


def check_layout(path: str, given: LayoutFile, shape: ModelShape) -> None:
    """
    Raises:
        UserError: the model cannot be cut like that, or DeepSpeed cannot train it so.
    """
    stages, blocks = given.pipeline_stages, given.layers_per_stage
    if len(blocks) != stages or sum(blocks) != shape.layers:
        raise UserError(
            f"{path} layers_per_stage={list(blocks)} must have one entry for each of the {stages} pipeline stages and "
            f"add up to the model's {shape.layers} layers",
            "count decoder blocks only: the embedding and the head are none",
        )
    cut = math.gcd(*(number for number in (shape.heads, shape.kv_heads, shape.ffn_size) if number))
    if cut % given.tensor_parallel:
        fitting = [size for size in range(1, min(cut, 64) + 1) if cut % size == 0]
        raise UserError(
            f"{path} tensor_parallel={given.tensor_parallel} does not divide the model's heads and features",
            f"use {', '.join(map(str, fitting))}",
        )
    if given.zero_stage >= 2 and stages > 1:
        raise UserError(
            f"{path} zero_stage={given.zero_stage} does not go with pipeline_stages={stages}: a pipeline holds its "
            "gradients and parameters over many micro-batches",
            "use zero_stage 0 or 1",
        )
    if given.global_batch_size < given.data_parallel:
        raise UserError(
            f"{path} global_batch_size={given.global_batch_size} leaves some of the {given.data_parallel} replicas "
            "without a sequence",
            "make it data_parallel or more",
        )


def judge(path: str, given: LayoutFile, shape: ModelShape, devices: Devices) -> Verdict:
    """
    Raises:
        UserError: the platform has wrong figures, or no speed in the dtype.
    """
    devices = _calibrated(path, given, devices)
    if given.dtype not in devices.platforms:
        known = ", ".join(devices.platforms)
        raise UserError(f"{path} dtype={given.dtype}: no speed is known of {devices.name} in it", f"known are {known}")
    prediction = predict(
        shape,
        given.layout,
        devices.platforms[given.dtype],
        available_bytes=devices.memory_bytes,
        dtype=given.dtype,
        data_parallel=given.data_parallel,
        micro_batch_size=given.micro_batch_size,
        global_batch_size=given.global_batch_size,
        sequence_length=given.sequence_length,
        host_memory=devices.host_memory,
    )
    reason, enough = prediction.reason, given.workers <= devices.count
    if not enough:
        reason = f"does not fit: it needs {given.workers} devices, and {devices.count} are there; its memory {reason}"
    return Verdict(devices=devices, prediction=prediction, fits=prediction.fits and enough, reason=reason)


def _calibrated(path: str, given: LayoutFile, devices: Devices) -> Devices:
    """With the figures that the layout brings along."""
    if not given.platform:
        return devices
    if devices.figures is None:
        raise UserError(f"{path} platform is for devices of a cluster file", "give --cluster")
    known = devices.figures.model_dump()
    try:
        figures = Device.model_validate({**known, **given.platform})
    except ValidationError as error:
        hint = f"keys are {', '.join(Device.model_fields)}"
        raise UserError(f"{path} platform: {wrong_figures(error)}", hint) from None
    return replace(
        devices,
        figures=figures,
        memory_bytes=figures.memory_bytes or devices.memory_bytes,
        platforms={dtype: figures.platform(dtype) for dtype in figures.tflops},
    )
