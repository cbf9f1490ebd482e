"""A stage of the model under DeepSpeed's pipeline engine, which runs micro-batches one forward, one backward (1F1B).

DeepSpeed sees one layer a stage: how many decoder blocks it holds is the plan's to say. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.planning.plan import Plan
from orchestrator.train.stage import Stage


def topology(plan: Plan) -> Any:
    """DeepSpeed's map of the ranks; Plan.coordinates says the same."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(
        num_pp=plan.pipeline_stages, num_mp=plan.tensor_parallel, num_dp=plan.data_parallel
    )


def grid(plan: Plan) -> Any:
    """Process groups of a layout, as DeepSpeed asks for them."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    with contextlib.redirect_stdout(io.StringIO()):
        return PipelineParallelGrid(topology=topology(plan))


def pipeline_module(stage: Stage, plan: Plan, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    """
    Args:
        loss: of (logits, labels) of a micro-batch, called on the last stage.
    """
    from deepspeed.runtime.pipe.module import PipelineModule

    class Pipeline(PipelineModule):
        """DeepSpeed ties layers by building them on both stages; here the embedding is a part of both."""

        def _index_tied_modules(self) -> dict[str, Any]:
            self._tied_group = _tied_group(self._grid, plan) if stage.config.tie_word_embeddings else None
            if stage.tied_copy is not None and stage.last:
                stage.tied_copy.ds_pipe_replicated = True  # type: ignore[attr-defined]  # counted once in the norm
            return {}

        def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
            return [(stage.tied_copy, self._tied_group)] if stage.tied_copy is not None else []

    own = plan.coordinates(dist.get_rank())[0]
    layers = [stage if number == own else nn.Identity() for number in range(plan.pipeline_stages)]
    with contextlib.redirect_stdout(io.StringIO()):
        return Pipeline(layers=layers, topology=topology(plan), loss_fn=loss, partition_method="uniform")


def _tied_group(grid: Any, plan: Plan) -> Any:
    """The group of the first and the last stage of this rank's pipeline. All ranks make all groups."""
    own = None
    for ranks in grid.pipe_groups:
        group = dist.new_group([ranks[0], ranks[-1]])
        if dist.get_rank() in (ranks[0], ranks[-1]):
            own = group
    return own


def train_batch(engine: Any, batches: Iterator[Any], count: int) -> None:
    """One optimizer step over `count` micro-batches, each a pair of inputs and labels of one shape."""
    if engine.micro_batches != count:
        engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
    engine.train_batch(batches)


def eval_batch(engine: Any, batches: Iterator[Any], count: int) -> None:
    """The forward pass of `count` micro-batches."""
    engine.eval_batch(batches, reduce_output=None, bcast_loss=False, num_micro_batches=count)
