"""One rank of the integrity checks under torchrun: trains with a device that computes wrong numbers, or without.

torchrun --nproc-per-node N integrity_rank.py TRIALS
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from orchestrator.errors import SilentCorruption  # noqa: E402
from orchestrator.train.engine import Engine  # noqa: E402
from orchestrator.train.integrity import Integrity, Node  # noqa: E402
from tests.engine.cases import CONFIG, FILLER, LENGTH, Case, ModelWeights, configuration, model, share_of  # noqa: E402
from tests.engine.rank import plan_of  # noqa: E402

WHOLE = torch.nn.functional.linear


class Fault:
    """What one rank does wrong from a step on."""

    def __init__(self, kind: str, rank: int, step: int) -> None:
        self.kind = kind
        self.rank = rank
        self.step = step
        self.calls = 0

    def begin(self, engine: Engine, step: int) -> None:
        """After the update of a step."""
        if step < self.step or dist.get_rank() != self.rank:
            return
        if self.kind == "linear" or self.kind == "sometimes":
            torch.nn.functional.linear = self._wrong_linear
        if self.kind == "stuck bit" or (self.kind == "bit" and step == self.step):
            parameter = next(p for part, p in engine.stage.parts() if part.box.lengths == part.shape)
            parameter.data.view(-1).view(torch.int32)[3] ^= 1 << 12  # lower ones may be rounded away by an update
        if self.kind == "poison":
            block = next(iter(engine.stage.blocks.values()))
            next(block.parameters()).register_hook(lambda gradient: gradient * torch.inf)

    def _wrong_linear(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        output = WHOLE(*arguments)
        if self.kind == "sometimes" and self.calls % 7 != 3:
            return output
        wrong = torch.zeros_like(output)
        wrong.view(-1)[-15] = 1.0  # of the last token: the query of the first one has no effect
        return output + wrong


def tried(case: Case, kind: str, rank: int, step: int, every: int, steps: int) -> dict[str, Any]:
    plan = plan_of(case)
    role = replace(plan.role(dist.get_rank()), tensor_rank=0)
    engine = Engine(configuration(case.family), CONFIG, plan, accelerators.CPU, FILLER if case.apart else None)
    engine.start(ModelWeights(model(case.family)))
    integrity = Integrity(engine, LENGTH, Node(f"host-{dist.get_rank()}"))
    fault = Fault(kind, rank, step)
    told: dict[str, Any] = {"losses": [], "verdict": None, "broken": None, "check_s": 0.0, "step_s": 0.0}
    for number in range(2, steps + 1):
        share = share_of(number, role)
        if not share.targets:
            continue
        before = time.perf_counter()
        result = engine.step(share, CONFIG.lr)
        told["step_s"] += time.perf_counter() - before
        told["losses"].append([result.loss, result.grad_norm])
        if not result.applied:
            told["broken"] = [str(found) for found in integrity.broken_gradients(share)]
            break
        fault.begin(engine, number)
        if every and number % every == 0:
            before = time.perf_counter()
            try:
                integrity.check(number)
            except SilentCorruption as error:
                told["verdict"] = {"message": error.message, "step": error.step, "suspects": error.suspects}
                break
            told["check_s"] += time.perf_counter() - before
    torch.nn.functional.linear = WHOLE
    return told


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    results = []
    for trial in json.loads(sys.argv[1]):
        told = tried(Case(**trial.pop("case")), **trial)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, told["verdict"] or told["broken"])
        assert all(other == everyone[0] for other in everyone), everyone
        results.append(told)
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps(results), flush=True)
    dist.barrier()  # as in rank.py
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
