"""One rank of a plain DeepSpeed ZeRO-2 engine that saves, trains and loads by Terrane's checkpoints and by DeepSpeed's.

torchrun --nproc-per-node 2 checkpoint_rank.py save FOLDER ROUNDS
torchrun --nproc-per-node N checkpoint_rank.py load FOLDER ROUNDS
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import accelerators

accelerators.prepare_process(accelerators.CPU)

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from orchestrator.model_config import ModelConfig  # noqa: E402
from orchestrator.train import checkpoints, zero  # noqa: E402
from orchestrator.train.checkpoints import Position, Retention  # noqa: E402
from orchestrator.train.fragments import Box  # noqa: E402
from orchestrator.train.models import build_model, token_losses  # noqa: E402
from orchestrator.train.saver import Saver  # noqa: E402
from orchestrator.train.stage import Part  # noqa: E402

MODEL = ModelConfig(layers=12, hidden_size=768, heads=12)
VOCAB, POSITIONS, LENGTH, MICRO_BATCH = 50_000, 128, 32, 1
STEPS = 10
"""Between two checkpoints."""
WAYS = ("none", "terrane", "deepspeed")


def build(seed: int, universal: bool = False) -> Any:
    model = build_model(MODEL, vocab_size=VOCAB, sequence_length=POSITIONS, seed=seed, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def state_of(engine: Any) -> zero.ZeroState:
    parts = [
        (Part(name, tuple(parameter.shape), Box.whole(parameter.shape)), parameter)
        for name, parameter in engine.module.named_parameters()
    ]
    return zero.optimizer_state(engine, parts, clip_norm=0.0)


def tokens(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (MICRO_BATCH, LENGTH), generator=generator)


def step(engine: Any, number: int) -> None:
    engine.backward(token_losses(engine, tokens(1000 * dist.get_rank() + number)).mean())
    engine.step()


def loss(engine: Any) -> float:
    with torch.no_grad():
        return float(token_losses(engine, tokens(0)).mean())


def seconds(work: Callable[[], object]) -> float:
    """Of the slowest rank."""
    dist.barrier()
    before = time.perf_counter()
    work()
    taken = torch.tensor(time.perf_counter() - before)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


# --- save -------------------------------------------------------------------------------------------------------------


class Savers:
    """Both ways to save, to new places each time."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._ours = Saver(str(folder / "terrane"), 1, Retention(last=1), lambda commit, timing: None)
        self._step = 0

    def begin(self, way: str) -> None:
        """What training waits for."""
        self._step += 1
        if way == "terrane":
            position = Position(step=self._step, updates=self._step, past={})
            self._ours.save(position, state_of(self._engine).fragments())
        elif way == "deepspeed":
            self._engine.save_checkpoint(str(self._folder / "deepspeed"), tag=f"step-{self._step}")

    def finish(self) -> None:
        self._ours.wait()

    def keep_one(self) -> None:
        """Delete the older checkpoints of DeepSpeed's; Terrane has deleted its own."""
        dist.barrier()
        if dist.get_rank() == 0:
            for old in sorted((self._folder / "deepspeed").glob("step-*"), key=os.path.getmtime)[:-1]:
                shutil.rmtree(old)
        dist.barrier()


def save(folder: Path, rounds: int) -> dict[str, Any]:
    engine = build(seed=1)
    savers = Savers(engine, folder)
    step(engine, 0)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in engine.module.parameters())}
    blocked: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    written: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    for _ in range(rounds + 1):
        for way in WAYS[1:]:
            before = time.perf_counter()
            blocked[way].append(seconds(lambda way=way: savers.begin(way)))
            savers.finish()
            written[way].append(time.perf_counter() - before)
            savers.keep_one()
    found |= {"blocked_s": blocked, "written_s": written}
    trained: dict[str, list[float]] = {way: [] for way in WAYS}
    number = 0
    for round_ in range(rounds):
        for way in WAYS[round_ % 3 :] + WAYS[: round_ % 3]:
            trained[way].append(seconds(lambda way=way, number=number: train(engine, savers, way, number)))
            savers.keep_one()
            number += STEPS
    for way in WAYS[1:]:
        savers.begin(way)
        savers.finish()
    savers.keep_one()
    return found | {"trained_s": trained, "loss": loss(engine)}


def train(engine: Any, savers: Savers, way: str, first: int) -> None:
    """A checkpoint, and the steps after it until there is another to make."""
    savers.begin(way)
    for number in range(first, first + STEPS):
        step(engine, number)
    savers.finish()


# --- load -------------------------------------------------------------------------------------------------------------


def load(folder: Path, rounds: int) -> dict[str, Any]:
    """Each load is into an engine of other weights."""
    losses: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    loaded: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    converted: list[float] = []
    ours, theirs = build(seed=2), build(seed=3, universal=True)
    for _ in range(rounds):
        loaded["terrane"].append(seconds(lambda: load_ours(ours, str(folder / "terrane"))))
        losses["terrane"].append(loss(ours))
        converted.append(seconds(lambda: convert(folder)))
        loaded["deepspeed"].append(seconds(lambda: theirs.load_checkpoint(str(folder), tag="universal")))
        losses["deepspeed"].append(loss(theirs))
    return {"loaded_s": loaded, "converted_s": converted, "losses": losses}


def load_ours(engine: Any, uri: str) -> None:
    commit = checkpoints.newest(uri)
    assert commit is not None
    state = state_of(engine)
    with torch.no_grad():
        checkpoints.load(uri, commit, state.fragments())
        state.set_step(commit.position.updates)
        state.refresh()


def convert(folder: Path) -> None:
    """As `ds_to_universal.py` does, with as many processes as there are cores."""
    from deepspeed.checkpoint import ds_to_universal

    if dist.get_rank() == 0:
        (source,) = (folder / "deepspeed").glob("step-*")
        shutil.rmtree(folder / "universal", ignore_errors=True)
        arguments = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(folder / "universal"),
            num_extract_workers=os.cpu_count(),
            num_merge_workers=os.cpu_count(),
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with contextlib.redirect_stdout(sys.stderr):
            ds_to_universal.main(arguments)
    dist.barrier()


def main() -> None:
    what, folder, rounds = sys.argv[1:]
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    found = {"save": save, "load": load}[what](Path(folder), int(rounds))
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps([found]), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
