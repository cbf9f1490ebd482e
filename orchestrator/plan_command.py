"""`terrane plan` for devices that a file describes: from a recipe, or a model alone, to the best layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.config import Recipe, recipe_of
from orchestrator.data.tokenizer import planned_vocabulary
from orchestrator.errors import UserError
from orchestrator.hub import model_directory, pinned
from orchestrator.model_config import is_hub_model
from orchestrator.model_files import read_config
from orchestrator.planning import islands as unlike
from orchestrator.planning.devices import Devices
from orchestrator.planning.families import GALACTICA
from orchestrator.planning.layout import layout_of
from orchestrator.planning.layout_search import Found, predicted, search, sized
from orchestrator.planning.losers import Loser, losers
from orchestrator.planning.mixed import Mixed, mixed_pipeline
from orchestrator.planning.plan import Plan
from orchestrator.planning.prediction import Prediction
from orchestrator.planning.request import Space, Work, space_of, work_of
from orchestrator.planning.shape import ModelShape, model_shape, shape_of
from orchestrator.planning.shortage import check_workers
from orchestrator.planning.sufficient import no_plan


@dataclass(frozen=True, kw_only=True)
class Answer:
    recipe: Recipe
    work: Work
    found: tuple[Found, ...]
    """Of every pool, the best first; the first has the chosen layout."""
    prediction: Prediction
    """Of the chosen layout."""
    losers: tuple[Loser, ...]
    islands: unlike.Islands | None
    """All pools together, where there are several."""
    mixed: Mixed | None
    """One pipeline over all pools, where they go together and the recipe leaves the layout open."""


def recipe_for_model(model: str, overrides: Sequence[str]) -> Recipe:
    """What trains a model, where there is no recipe: everything is at its default.

    Args:
        model: a directory with a config.json, a preset, or `org/name@revision` of the hub.

    Raises:
        UserError: it is none of these, or an override is wrong.
    """
    if model in GALACTICA:
        values: dict[str, object] = {"preset": model}
    elif is_hub_model(model) or Path(model).is_dir():
        values = {"path": model}
    else:
        raise UserError(
            f"--model {model} is no directory and no preset", f"presets are {', '.join(GALACTICA)}; org/name@main works"
        )
    nothing = {"sources": [{"name": "none", "path": str(Path.cwd())}]}
    train = {"steps": 1, "lr": 1e-4}
    return recipe_of({"name": "plan", "corpus": nothing, "model": values, "train": train}, overrides)


def shape_for(recipe: Recipe, of_model_alone: bool) -> ModelShape:
    """
    Args:
        of_model_alone: whether there is no tokenizer to look at, so that the model's own vocabulary counts.
    """
    recipe = pinned(recipe)
    if of_model_alone and recipe.model.path:
        values = read_config(model_directory(recipe.model, weights=False))
        positions = values.get("max_position_embeddings")
        if positions and recipe.train.sequence_length > positions and values["model_type"] == "opt":
            message = f"train.sequence_length={recipe.train.sequence_length} is more than the model's {positions}"
            raise UserError(f"{message} positions", f"use {positions} or less")
        return shape_of(values)
    return model_shape(recipe, planned_vocabulary(recipe))


def answer(recipe: Recipe, shape: ModelShape, pools: Sequence[Devices], taken: Plan | None = None) -> Answer:
    """
    Args:
        taken: what a run would take, where that is known: it counts as the chosen layout.

    Raises:
        PlanError: nothing fits any pool; says what would be enough.
        UserError: the recipe asks for what the model or the engine cannot do.
    """
    layout_of(recipe.train, shape, recipe.train.dtype)
    check_workers(recipe.train)
    work, space = work_of(recipe, shape), space_of(recipe.train)
    found = [search(work, devices, space) for devices in pools]
    fitting = sorted((one for one in found if one.best), key=lambda one: one.best[0].rank)
    if not fitting:
        raise no_plan(work, [(one, space) for one in found])
    if taken:
        fitting = [_with_first(work, one, taken) for one in fitting if one.devices.accelerator == taken.accelerator]
    first = fitting[0]
    return Answer(
        recipe=recipe,
        work=work,
        found=(*fitting, *(one for one in found if not one.best)),
        prediction=predicted(work, first.devices, first.best[0]),
        losers=losers(work, first, space),
        islands=_islands(work, space, found),
        mixed=mixed_pipeline(work, pools) if space == Space() else None,
    )


def _with_first(work: Work, found: Found, plan: Plan) -> Found:
    first = sized(work, found.devices, plan.layout, plan.data_parallel, plan.micro_batch_size, plan.dtype)
    return replace(found, best=(first, *(other for other in found.best if other.cut != first.cut)))


def _islands(work: Work, space: Space, found: Sequence[Found]) -> unlike.Islands | None:
    """Where the recipe does not say how many workers there are, since islands would have to share them."""
    if len(found) < 2 or space.most_workers is not None or space.fewest_workers > 1:
        return None
    alone = [one.best[0] if one.best else None for one in found]
    return unlike.islands(work, [(one.devices, space) for one in found], alone)
