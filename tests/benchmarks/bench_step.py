"""Seconds of a training step, Terrane's engine against the shortest DeepSpeed script: the same model, batches and
optimizer, ZeRO-2 on 2 ranks, a step of each in turn. BENCH_STEPS sets how many. Writes results/step.json.
"""

from __future__ import annotations

import os
import statistics

import pytest

from tests.benchmarks.measuring import save
from tests.engine.launching import torchrun

STEPS = int(os.environ.get("BENCH_STEPS", "40"))
WARM_UP = 3


@pytest.mark.timeout(3600)
def test_step_time() -> None:
    (found,) = torchrun("../benchmarks/step_rank.py", 2, str(WARM_UP + STEPS), deadline_s=3000)
    print(f"\n{found['parameters'] / 1e6:.0f} million parameters, ZeRO-2 on 2 ranks, {STEPS} steps each; medians")
    print(f"{'seconds a step':16} {'Terrane':>9} {'DeepSpeed':>10} {'ratio':>7}")
    ratios = {}
    for key in ("wall_s", "cpu_s"):
        one, other = (statistics.median(found[key][name][WARM_UP:]) for name in ("terrane", "deepspeed"))
        pairs = zip(found[key]["terrane"][WARM_UP:], found[key]["deepspeed"][WARM_UP:], strict=True)
        ratios[key] = statistics.median(ours / theirs for ours, theirs in pairs)
        print(f"{key:16} {one:9.3f} {other:10.3f} {ratios[key]:7.3f}")
    save("step", {**found, "ratios": ratios})
    assert found["losses"]["terrane"] == pytest.approx(found["losses"]["deepspeed"], rel=1e-4)
    assert ratios["cpu_s"] <= 1.03
