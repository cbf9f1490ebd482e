"""What a worker does before it has a job, so that none of it comes between a failure and the next step.

Nothing here takes memory of a device: the attempt before may still be running on it.
"""

from __future__ import annotations

from typing import Any

from orchestrator.accelerators import Accelerator
from orchestrator.config import Recipe


def warm_up(recipe: Recipe, vocab_size: int, accelerator: Accelerator, rehearse: bool) -> None:
    """Import what training needs, and have DeepSpeed take up the process group.

    Args:
        rehearse: run Ray Data once, too, whose first execution in a process takes longer than the next.
    """
    from orchestrator.train import engine, integrity, models, saver, weights, zero  # noqa: F401

    zero.attach(accelerator.backend)
    models.meta_model(models.model_config(recipe.model, vocab_size, recipe.train.sequence_length))
    if rehearse:
        _run_ray_data()


def _run_ray_data() -> None:
    import ray.data

    from orchestrator.data.tasks import quiet_ray_data

    quiet_ray_data()
    # The run may hold every CPU: a task that asked for one would wait for ever.
    ray.data.from_items([0]).map_batches(_unchanged, num_cpus=0).take_all()


def _unchanged(batch: Any) -> Any:
    return batch
