"""How long a step takes on the pools of a cluster file: what the planner says of each number of nodes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from orchestrator.accelerators import ACCELERATORS, Node, NodePool, Speeds
from orchestrator.config import Recipe
from orchestrator.data.tokenizer import planned_vocabulary
from orchestrator.errors import PlanError, UserError
from orchestrator.planning import search
from orchestrator.planning.cluster_file import Pool, required
from orchestrator.planning.platform import device
from orchestrator.planning.shape import ModelShape, model_shape
from orchestrator.simulation.scenario import StepTime
from orchestrator.train_config import Workers

_GIB = 2**30


def recipe_shape(recipe: Recipe) -> ModelShape:
    """The model of a recipe whose corpus need not exist yet."""
    return model_shape(recipe, planned_vocabulary(recipe))


def planned_step_s(recipe: Recipe, pool: Pool) -> StepTime:
    """Step times of the plans that the supervisor would make for a pool of so many nodes.

    Raises:
        UserError: on the first call for a number of nodes on which there is no plan.
    """
    shape, whole = recipe_shape(recipe), node_pool(pool)

    @cache
    def step_s(nodes: int) -> float:
        part = replace(whole, nodes=whole.nodes[:nodes])
        devices = part.devices(recipe.train.cpus_per_worker)
        most = min(devices, recipe.train.workers.max, recipe.train.global_batch_size * recipe.train.layout.devices)
        most -= most % recipe.train.layout.devices
        workers = Workers(min=max(most, 1), max=max(most, 1))  # one number: the search is over layouts alone
        exact = recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": workers})})
        try:
            return search.plan(exact, shape, [part]).step_time_s
        except PlanError as error:
            hint = f"{error.hint}; or say what a step takes (--step-time-s)"
            raise UserError(f"pool {pool.name}, {nodes} of its nodes: {error.message}", hint) from None

    return step_s


def node_pool(pool: Pool) -> NodePool:
    """The nodes that a cluster file describes, as those of a live cluster."""
    memory_bytes = int(required(pool, "memory_gib", "planning") * _GIB)
    on_cpu = ACCELERATORS[pool.accelerator].ray_resource == "CPU"
    counted = pool.efficiency / device(pool.accelerator).efficiency  # the planner applies its own
    speeds = Speeds(
        flops={dtype: 1e12 * tflops * counted for dtype, tflops in pool.tflops.items()},
        link_bytes_per_s=1e9 * pool.node_link_gb_per_s if pool.node_link_gb_per_s else None,
        link_latency_s=1e-6 * pool.node_link_latency_us if pool.node_link_gb_per_s else None,
    )
    nodes = tuple(
        Node(
            id=f"{pool.name}-{number}",
            address="",
            cpus=float(pool.devices_per_node),
            gpus=0.0 if on_cpu else float(pool.devices_per_node),
            memory_bytes=memory_bytes * pool.devices_per_node,
            speeds=speeds if pool.tflops else None,
        )
        for number in range(1, pool.nodes + 1)
    )
    return NodePool(accelerator=pool.accelerator, nodes=nodes, device_memory_bytes=memory_bytes)
