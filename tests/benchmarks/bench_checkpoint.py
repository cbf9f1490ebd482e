"""What checkpoints cost a training run, Terrane's against DeepSpeed's own, on one DeepSpeed engine in one run.

124 million parameters, fp32, ZeRO-2 on 2 ranks: seconds that the training loop stands still, seconds of 10 steps with a
checkpoint and without, and seconds to load on 1 rank, for DeepSpeed with the conversion to its universal checkpoint.
BENCH_ROUNDS sets how often. Writes results/checkpoint.json.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measuring import save
from tests.engine.launching import torchrun

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
SCRIPT = "../benchmarks/checkpoint_rank.py"


@pytest.mark.timeout(7200)
def test_checkpoints(tmp_path: Path) -> None:
    (saved,) = torchrun(SCRIPT, 2, "save", str(tmp_path), str(ROUNDS), deadline_s=3600)
    (loaded,) = torchrun(SCRIPT, 1, "load", str(tmp_path), str(min(ROUNDS, 3)), deadline_s=3600)
    print(f"\n{saved['parameters'] / 1e6:.0f} million parameters, ZeRO-2 on 2 ranks, {ROUNDS} rounds; medians")
    theirs = [sum(pair) for pair in zip(loaded["converted_s"], loaded["loaded_s"]["deepspeed"], strict=True)]
    rows = {
        "training stands still": row(saved["blocked_s"]["terrane"][1:], saved["blocked_s"]["deepspeed"][1:]),
        "until it is on storage": row(saved["written_s"]["terrane"][1:], saved["written_s"]["deepspeed"][1:]),
        "10 steps and a checkpoint": row(saved["trained_s"]["terrane"], saved["trained_s"]["deepspeed"]),
        "load on 1 rank": row(loaded["loaded_s"]["terrane"], theirs),
    }
    print(f"{'seconds':28} {'Terrane':>9} {'DeepSpeed':>10} {'of it':>7}")
    for name, values in rows.items():
        print(f"{name:28} {values['terrane_s']:9.3f} {values['deepspeed_s']:10.3f} {values['ratio']:7.3f}")
    without = statistics.median(saved["trained_s"]["none"])
    added = {way: statistics.median(saved["trained_s"][way]) / without - 1 for way in ("terrane", "deepspeed")}
    print(f"10 steps without a checkpoint: {without:.2f} s; one adds {added['terrane']:.1%}, {added['deepspeed']:.1%}")
    print(f"the first stands still for {saved['blocked_s']['terrane'][0]:.3f} s: its memory is new")
    save("checkpoint", {"rows": rows, "added": added, "saved": saved, "loaded": loaded})
    for losses in loaded["losses"].values():
        assert losses == pytest.approx([saved["loss"]] * len(losses), rel=1e-5), "what is loaded is what was saved"
    assert rows["training stands still"]["ratio"] <= 0.1
    assert rows["load on 1 rank"]["ratio"] <= 0.1


def row(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    one, other = statistics.median(ours), statistics.median(theirs)
    return {
        "terrane_s": one,
        "deepspeed_s": other,
        "ratio": one / other,
        "terrane_range_s": [min(ours), max(ours)],
        "deepspeed_range_s": [min(theirs), max(theirs)],
    }
