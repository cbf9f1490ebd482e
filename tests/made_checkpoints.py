"""Checkpoints of models, written as a rank writes them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.train import checkpoints
from orchestrator.train.checkpoints import Commit, Position
from orchestrator.train.fragment_files import FragmentWriter
from orchestrator.train.fragments import MOMENTS, PARAM, Box, Fragment, fragments_of
from orchestrator.train.planners import FragmentSavePlanner


def fragments(parameters: Mapping[str, torch.Tensor], parts: int = 3) -> list[Fragment]:
    """Each parameter, with moments of zeros, in ranges that end in the middle of rows."""
    found = []
    for name, parameter in parameters.items():
        flat = parameter.detach().float().flatten()
        state = {PARAM: flat, **{kind: torch.zeros_like(flat) for kind in MOMENTS}}
        cuts = [len(flat) * part // parts for part in range(parts + 1)]
        for start, stop in itertools.pairwise(cuts):
            cut = {kind: values[start:stop] for kind, values in state.items()}
            found += fragments_of(name, tuple(parameter.shape), Box.whole(parameter.shape), start, cut)
    return found


def save(directory: str, step: int, parameters: Mapping[str, torch.Tensor], parts: int = 3, attempt: int = 1) -> Commit:
    """Commit a checkpoint, from one process."""
    from torch.distributed import checkpoint as dcp

    commits: list[Commit] = []

    def finish(files: dict[str, int], digest: str) -> None:
        folder = checkpoints.attempt_folder(attempt)
        position = Position(step=step, updates=step, past={})
        named = {f"{folder}/{name}": size for name, size in files.items()}
        made = Commit(attempt=attempt, position=position, files=named, metadata_xxh3=digest)
        commits.append(checkpoints.publish(directory, made))

    uri = f"{checkpoints.step_directory(directory, step)}/{checkpoints.attempt_folder(attempt)}"
    planner: Any = FragmentSavePlanner(fragments(parameters, parts))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({}, storage_writer=FragmentWriter(uri, finish), planner=planner)
    return commits[0]
