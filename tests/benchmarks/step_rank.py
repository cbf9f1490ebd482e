"""One rank that trains a model by Terrane's engine and by the shortest DeepSpeed script, a step of each in turn.

torchrun --nproc-per-node 2 step_rank.py ROUNDS
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from orchestrator.data.schedule import Share  # noqa: E402
from orchestrator.model_config import ModelConfig  # noqa: E402
from orchestrator.planning.plan import Plan  # noqa: E402
from orchestrator.train.engine import Engine  # noqa: E402
from orchestrator.train.models import model_config  # noqa: E402
from orchestrator.train_config import TrainConfig  # noqa: E402

VOCAB, LENGTH, MICRO_BATCH, ACCUMULATION = 8192, 256, 2, 2
MODEL = ModelConfig(layers=8, hidden_size=384, heads=6)
TRAIN = TrainConfig(sequence_length=LENGTH, global_batch_size=8, steps=1000, lr=3e-4)


class Bare:
    """What a user of DeepSpeed would write."""

    def __init__(self) -> None:
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=TRAIN.lr, betas=TRAIN.betas, weight_decay=TRAIN.weight_decay, fused=True
        )
        config = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": TRAIN.clip_norm,
            "zero_optimization": {"stage": 2, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def step(self, tokens: torch.Tensor) -> float:
        losses = []
        for batch in tokens.split(MICRO_BATCH):
            loss = self.engine(input_ids=batch, labels=batch).loss
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        return float(mean) / dist.get_world_size()


class Ours:
    def __init__(self, weights: Any) -> None:
        plan = Plan(
            accelerator="cpu",
            node_ids=(),
            workers_by_node=(),
            data_parallel=dist.get_world_size(),
            micro_batch_size=MICRO_BATCH,
            accumulation=ACCUMULATION,
            dtype="fp32",
            parameters=0,
            memory_bytes=0,
            step_time_s=0,
        )
        self.engine = Engine(CONFIG, TRAIN, plan, accelerators.CPU)
        self.engine.start(weights)

    def step(self, tokens: torch.Tensor) -> float:
        sequences = len(tokens)
        share = Share(
            step=1,
            tokens=tokens.numpy().astype(np.uint16),
            counted=None,
            targets=sequences * dist.get_world_size() * (LENGTH - 1),
            largest=sequences,
        )
        return self.engine.step(share, TRAIN.lr).loss


class ModelWeights:
    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def read(self, name: str, box: Any) -> torch.Tensor:
        return self._parameters[name][box.slices]


CONFIG = model_config(MODEL, VOCAB, LENGTH)


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(1)
    bare = Bare()
    ours = Ours(ModelWeights(bare.engine.module))
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in bare.engine.module.parameters())}
    kinds = {"terrane": ours, "deepspeed": bare}
    for key in ("wall_s", "cpu_s", "losses"):
        found[key] = {name: [] for name in kinds}
    for number in range(int(sys.argv[1])):
        generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
        tokens = torch.randint(0, VOCAB, (MICRO_BATCH * ACCUMULATION, LENGTH), generator=generator)
        for name in list(kinds) if number % 2 else list(kinds)[::-1]:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = kinds[name].step(tokens)
            found["wall_s"][name].append(time.perf_counter() - wall)
            found["cpu_s"][name].append(time.process_time() - cpu)
            found["losses"][name].append(loss)
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps([found]), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
