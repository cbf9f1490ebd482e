"""Ray Train's elastic mode as its documentation has it, on a model and a batch of the size that Terrane is measured on.

python elastic_train.py '{"address": ..., "folder": ..., "steps": ..., "kills": [steps at which rank 1 kills itself]}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer

VOCAB, LENGTH, BATCH, CHECKPOINT_EVERY = 400, 128, 16, 10


def loop(settings: dict[str, Any]) -> None:
    import torch
    from ray.train.torch import prepare_model
    from transformers import OPTConfig, OPTForCausalLM

    torch.set_num_threads(1)
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=192, num_hidden_layers=4, num_attention_heads=4, ffn_dim=768, dropout=0.0
    )
    torch.manual_seed(0)
    model = prepare_model(OPTForCausalLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 1
    checkpoint = train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"))
        getattr(model, "module", model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    for step in range(first, settings["steps"] + 1):
        tokens = torch.randint(0, VOCAB, (BATCH // world, LENGTH))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            with Path(settings["folder"], "metrics", "attempt-001.jsonl").open("a") as out:
                out.write(json.dumps({"step": step, "time": time.time(), "workers": world}) + "\n")
        if step in settings["kills"] and rank == world - 1:
            die_once(Path(settings["folder"], f"killed-{step}"))
        if step % CHECKPOINT_EVERY == 0:
            save(rank, step, getattr(model, "module", model), optimizer)


def save(rank: int, step: int, model: Any, optimizer: Any) -> None:
    import torch

    if rank != 0:
        train.report({"step": step})
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, Path(folder, "state.pt"))
        train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(folder))


def die_once(marker: Path) -> None:
    try:
        with marker.open("x") as out:
            out.write(str(time.time()))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    ray.init(wanted["address"], logging_level="ERROR", log_to_driver=False)
    TorchTrainer(
        loop,
        train_loop_config=wanted,
        scaling_config=train.ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1}),
        run_config=train.RunConfig(
            name="elastic",
            storage_path=wanted["folder"],
            failure_config=train.FailureConfig(max_failures=-1),
        ),
    ).fit()
