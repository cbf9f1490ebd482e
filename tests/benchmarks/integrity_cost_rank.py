"""One rank that times steps of one sequence, and checks, of a model of 34 million parameters."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import OPTConfig  # noqa: E402

from orchestrator.data.schedule import Share  # noqa: E402
from orchestrator.train.engine import Engine  # noqa: E402
from orchestrator.train.integrity import Integrity  # noqa: E402
from tests.engine.cases import CONFIG, Case  # noqa: E402
from tests.engine.rank import plan_of  # noqa: E402

LENGTH, VOCAB, WIDTH = 512, 16_000, 512
REPEATS = 7


def median_s(call: Callable[[int], object]) -> float:
    taken = []
    for number in range(REPEATS):
        before = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - before)
    return statistics.median(taken[1:])


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    model = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
        dropout=0.0,
    )
    engine = Engine(model, CONFIG, plan_of(Case(shares=(1,), micro_batch=1)), accelerators.CPU)
    integrity = Integrity(engine, LENGTH)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, LENGTH)).astype(np.uint16)
    share = Share(step=1, tokens=tokens, counted=None, targets=LENGTH - 1, largest=1)
    step_s, check_s = median_s(lambda number: engine.step(share, CONFIG.lr)), median_s(integrity.check)
    print("RESULTS", json.dumps([{"step_s": step_s, "check_s": check_s}]), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
