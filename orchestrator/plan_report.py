"""What `terrane plan` prints of an answer: as JSON and as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from orchestrator.plan_command import Answer
from orchestrator.planning.deepspeed_config import deepspeed_config
from orchestrator.planning.devices import Devices
from orchestrator.planning.islands import Islands
from orchestrator.planning.layout_search import Candidate
from orchestrator.planning.losers import PHASES, Loser, why_too_large
from orchestrator.planning.memory import Memory
from orchestrator.planning.mixed import Mixed
from orchestrator.report_content import duration

_GIB = 2**30
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "base")


def as_json(found: Answer) -> dict[str, Any]:
    best, devices = found.found[0].best[0], found.found[0].devices
    return {
        "model": {"parameters": found.work.shape.parameters, "layers": found.work.shape.layers},
        "work": {
            "sequence_length": found.work.sequence_length,
            "global_batch_size": found.work.global_batch_size,
            "steps": found.work.steps,
            "tokens": found.work.tokens,
        },
        "chosen": {
            "pool": devices.name,
            **_layout(best),
            "fits": True,
            "peak_memory_bytes": found.prediction.peak_memory_bytes,
            "available_bytes": devices.memory_bytes,
            "stages": [_stage(stage) for stage in found.prediction.stages],
            "step_time_s": best.step.total,
            "phases_s": asdict(best.step),
            "tokens_per_second": found.prediction.tokens_per_second,
            "mfu": found.prediction.mfu,
            **_bill(found, devices, best),
            "reason": found.prediction.reason,
        },
        "losers": [_loser(loser) for loser in found.losers],
        "pools": [_pool(found, index) for index in range(len(found.found))],
        "islands": _islands(found, found.islands) if found.islands else None,
        "mixed_pipeline": _mixed(found, found.mixed) if found.mixed else None,
        "overrides": overrides(best),
        "deepspeed": deepspeed(found),
        "platform": _platform(devices, best),
        "searched": {"layouts": found.found[0].layouts, "judged_one_by_one": found.found[0].tried},
    }


def deepspeed(found: Answer) -> dict[str, Any]:
    """The configuration that the engine would start with on the stage that has the most parameters."""
    best, shape = found.found[0].best[0], found.work.shape
    layout, last = best.layout, best.layout.pipeline_stages - 1
    held = [
        shape.rank_parameters(blocks, first=n == 0, last=n == last, tensor_parallel=layout.tensor_parallel)
        for n, blocks in enumerate(layout.layers_per_stage)
    ]
    return deepspeed_config(found.recipe.train, best, max(held))


def overrides(best: Candidate) -> list[str]:
    """What makes `terrane run` take the layout."""
    layout = best.layout
    told = [f"train.layout.tensor_parallel={layout.tensor_parallel}"]
    told += [f"train.layout.pipeline_stages={layout.pipeline_stages}"]
    told += [
        f"train.layout.{key}={str(getattr(layout, key)).lower()}" for key in ("zero_stage", "offload", "recompute")
    ]
    return [*told, f"train.dtype={best.dtype}", f"train.workers={best.workers}"]


def _layout(candidate: Candidate) -> dict[str, Any]:
    layout = candidate.layout
    return {
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_stages": layout.pipeline_stages,
        "data_parallel": candidate.data_parallel,
        "devices": candidate.workers,
        "layers_per_stage": list(layout.layers_per_stage),
        "zero_stage": layout.zero_stage,
        "offload": layout.offload,
        "recompute": layout.recompute,
        "micro_batch_size": candidate.micro_batch_size,
        "accumulation": candidate.accumulation,
        "dtype": candidate.dtype,
    }


def _stage(memory: Memory) -> dict[str, Any]:
    return {**{f"{part}_bytes": getattr(memory, part) for part in _PARTS}, "total_bytes": memory.total}


def _bill(found: Answer, devices: Devices, candidate: Candidate) -> dict[str, Any]:
    """Of all steps, if nothing fails."""
    total_s = found.work.steps * candidate.step.total
    hours = total_s * candidate.workers / 3600
    price = devices.price_per_device_hour
    return {"total_s": total_s, "device_hours": hours, "cost": hours * price if price else None}


def _loser(loser: Loser) -> dict[str, Any]:
    return {
        **_layout(loser.candidate),
        "change": loser.change or None,
        "fits": loser.fits,
        "peak_memory_bytes": loser.candidate.memory.total,
        "step_time_s": loser.candidate.step.total,
        "why": loser.why,
    }


def _pool(found: Answer, index: int) -> dict[str, Any]:
    one = found.found[index]
    told = {"name": one.devices.name, "accelerator": one.devices.accelerator, "devices": one.devices.count}
    if not one.best:
        return {**told, "fits": False, "why": _why_pool(found, index)}
    best = one.best[0]
    figures = {"step_time_s": best.step.total, **_layout(best), **_bill(found, one.devices, best)}
    return {**told, "devices_used": best.workers, "fits": True, **figures, "why": _why_pool(found, index)}


def _why_pool(found: Answer, index: int) -> str:
    one, chosen = found.found[index], found.found[0].best[0]
    if index == 0:
        return "chosen"
    if one.best:
        return f"{one.best[0].step.total / chosen.step.total - 1:.1%} slower"
    if one.rejected:
        return f"nothing fits: the nearest {why_too_large(one.rejected[0].memory, one.devices.memory_bytes)}"
    return "nothing that the recipe allows can be laid over it"


def _islands(found: Answer, islands: Islands) -> dict[str, Any]:
    tokens = found.work.step_tokens
    return {
        "step_time_s": islands.step_time_s,
        "exchange_s": islands.exchange_s,
        "tokens_per_second": tokens / islands.step_time_s,
        "islands": [
            {"pool": one.devices.name, "sequences": one.sequences, "step_time_s": one.candidate.step.total}
            | _layout(one.candidate)
            for one in islands.islands
        ],
    }


def _mixed(found: Answer, mixed: Mixed) -> dict[str, Any]:
    return {
        "step_time_s": mixed.step_time_s,
        "tokens_per_second": found.work.step_tokens / mixed.step_time_s,
        "tensor_parallel": mixed.layout.tensor_parallel,
        "data_parallel": mixed.data_parallel,
        "recompute": mixed.layout.recompute,
        "micro_batch_size": mixed.micro_batch_size,
        "accumulation": mixed.accumulation,
        "dtype": mixed.dtype,
        "stages": [
            {"pool": pool.name, "layers": layers, **_stage(memory)}
            for pool, layers, memory in zip(mixed.pools, mixed.layout.layers_per_stage, mixed.stages, strict=True)
        ],
    }


def _platform(devices: Devices, best: Candidate) -> dict[str, Any] | None:
    """The constants that the prediction is made from, with the sources of those that have one."""
    if devices.figures is None:
        return None
    values = devices.figures.model_dump(exclude={"sources"}, exclude_none=True)
    return {"dtype": best.dtype, **values, "sources": dict(devices.figures.sources)}


# --- as text ----------------------------------------------------------------------------------------------------------


def describe(found: Answer) -> str:
    best, devices = found.found[0].best[0], found.found[0].devices
    prediction, work = found.prediction, found.work
    bill = _bill(found, devices, best)
    cost = f", which cost {_amount(bill['cost'])}" if bill["cost"] else ""
    lines = [
        f"{_count(work.shape.parameters)} parameters on {devices}: {work.global_batch_size:,} sequences of "
        f"{work.sequence_length:,} tokens a step",
        f"chosen      {best}, {best.workers} devices, {best.dtype}"
        + (f", {_blocks(best)}" if best.layout.pipeline_stages > 1 else ""),
        f"step        {best.step.total:.4g} s, {prediction.tokens_per_second:,.0f} tokens/s, MFU {prediction.mfu:.1%}",
        f"{f'{work.steps:,} steps':11} {_count(work.tokens)} tokens: {_span(bill['total_s'])}, "
        f"{_amount(bill['device_hours'])} device hours{cost}",
        f"memory      {prediction.reason}",
        "",
        *_stages_table(found),
        "",
        f"{'a step goes into':24} {'s':>10} {'share':>7}",
        *(f"{PHASES[name]:24} {s:10.4g} {s / best.step.total:7.1%}" for name, s in asdict(best.step).items() if s),
        "",
        "what lost, and why",
        *(f"  {line}" for line in _losers_in_words(found)),
    ]
    if len(found.found) > 1:
        lines += ["", "pools", *(f"  {line}" for line in _pools_in_words(found))]
    lines += ["", f"to run it   {' '.join(overrides(best))}"]
    lines += [f"DeepSpeed   {json.dumps(deepspeed(found))}"]
    if platform := _platform(devices, best):
        figures = {key: value for key, value in platform.items() if key != "sources"}
        if devices.figures and devices.figures.source("tflops").startswith("Nominal"):
            lines += [f"beware      {devices.name} tells no speed: these figures rank layouts and promise no times"]
        lines += [f"by figures  {json.dumps(figures)}"]
    return "\n".join(lines)


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:,.4g}{unit}"
    return f"{number:,.0f}"


def _amount(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.2f}"


def _span(seconds: float) -> str:
    return f"{seconds / 86400:.3g} days" if seconds >= 86400 else str(duration(seconds))


def _blocks(candidate: Candidate) -> str:
    """Layers of stages, as in `3 x 5 + 6 layers`."""
    runs: list[list[int]] = []
    for blocks in candidate.layout.layers_per_stage:
        if runs and runs[-1][1] == blocks:
            runs[-1][0] += 1
        else:
            runs.append([1, blocks])
    return " + ".join(f"{count} x {blocks}" if count > 1 else str(blocks) for count, blocks in runs) + " layers"


def _stages_table(found: Answer) -> Iterator[str]:
    """Stages with the same numbers once."""
    names = (*_PARTS, "total")
    yield f"{'GiB a worker, by stage':24}" + "".join(f"{name:>12}" for name in names)
    stages = found.prediction.stages
    first = 0
    while first < len(stages):
        last = first
        while last + 1 < len(stages) and stages[last + 1] == stages[first]:
            last += 1
        label = f"stage {first}" if first == last else f"stages {first} to {last}"
        yield f"{label:24}" + "".join(f"{getattr(stages[first], name) / _GIB:12.2f}" for name in names)
        first = last + 1


def _losers_in_words(found: Answer) -> Iterator[str]:
    for loser in found.losers:
        name = f"with {loser.change}" if loser.change else str(loser.candidate)
        yield f"{name:52} {loser.why}"


def _pools_in_words(found: Answer) -> Iterator[str]:
    for index, one in enumerate(found.found):
        if not one.best:
            yield f"{one.devices.name:16} {_why_pool(found, index)}"
            continue
        best = one.best[0]
        cost = _bill(found, one.devices, best)["cost"]
        paid = f", which cost {_amount(cost)}" if cost else ""
        yield f"{one.devices.name:16} {best.step.total:.4g} s a step, {best}{paid}: {_why_pool(found, index)}"
    if found.islands:
        parts = "; ".join(
            f"{one.devices.name} {one.sequences} sequences, {one.candidate}" for one in found.islands.islands
        )
        yield (
            f"{'as islands':16} {found.islands.step_time_s:.4g} s a step, {found.islands.exchange_s:.2g} s of it for "
            f"their exchange: {parts} (a run takes one pool at present)"
        )
    if found.mixed:
        mixed, layers = found.mixed, found.mixed.layout.layers_per_stage
        stages = ", ".join(f"{count} on {pool.name}" for count, pool in zip(layers, mixed.pools, strict=True))
        yield (
            f"{'as one pipeline':16} {mixed.step_time_s:.4g} s a step, TP{mixed.layout.tensor_parallel} "
            f"DP{mixed.data_parallel}, layers: {stages} (a run takes one pool at present)"
        )
