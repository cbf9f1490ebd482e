"""How long a step takes on the pools of a cluster file: what the planner says of each number of nodes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from orchestrator.config import Recipe
from orchestrator.data.tokenizer import planned_vocabulary
from orchestrator.errors import PlanError, UserError
from orchestrator.planning.cluster_file import Pool
from orchestrator.planning.devices import of_pool
from orchestrator.planning.layout_search import search
from orchestrator.planning.request import space_of, work_of
from orchestrator.planning.shape import ModelShape, model_shape
from orchestrator.planning.sufficient import no_plan
from orchestrator.simulation.scenario import StepTime


def recipe_shape(recipe: Recipe) -> ModelShape:
    """The model of a recipe whose corpus need not exist yet."""
    return model_shape(recipe, planned_vocabulary(recipe))


def planned_step_s(recipe: Recipe, pool: Pool) -> StepTime:
    """Step times of the fastest layouts on so many nodes of a pool. All numbers have the cut of the model that the
    first one has, where it fits, as in the supervisor's plans.

    Raises:
        UserError: on the first call for a number of nodes on which there is no plan.
    """
    work, whole = work_of(recipe, recipe_shape(recipe)), of_pool(pool)
    space = replace(space_of(recipe.train), fewest_workers=1)  # how many there must be, the simulation sees to

    @cache
    def step_s(nodes: int) -> float:
        devices = whole.with_nodes(nodes)
        try:
            found = search(work, devices, spaces[-1], keep=1)
            if not found.best:
                found = search(work, devices, space, keep=1)
            if not found.best:
                raise no_plan(work, [(found, space)])
        except PlanError as error:
            hint = f"{error.hint}; or say what a step takes (--step-time-s)"
            raise UserError(f"pool {pool.name}, {nodes} of its nodes: {error.message}", hint) from None
        size, stages = found.best[0].cut
        if len(spaces) == 1:
            spaces.append(replace(space, tensor_parallel=size, pipeline_stages=stages))
        return found.best[0].step.total

    spaces = [space]
    return step_s
