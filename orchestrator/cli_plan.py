"""`terrane plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli_arguments import AsJson, Overrides
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config import Recipe
    from orchestrator.planning.devices import Devices
    from orchestrator.planning.shape import ModelShape

Flag = typer.Option


def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="YAML file; or give --model")] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, Flag(metavar="FILE", help="YAML file of its pools; default: the live cluster")
    ] = None,
    model: Annotated[
        str | None, Flag(metavar="DIR_OR_PRESET", help="instead of a recipe; config.json is enough")
    ] = None,
    sequence_length: Annotated[int | None, Flag(help="tokens; as train.sequence_length=N")] = None,
    batch_size: Annotated[int | None, Flag(help="sequences a step; as train.global_batch_size=N")] = None,
    steps: Annotated[int | None, Flag(help="as train.steps=N")] = None,
    dtype: Annotated[str | None, Flag(help="as train.dtype=bf16")] = None,
    validate: Annotated[str | None, Flag(metavar="LAYOUT.json", help="judge this layout instead of searching")] = None,
    address: Annotated[str | None, Flag(help="of the live cluster; without it one is started on this machine")] = None,
    as_json: AsJson = False,
) -> None:
    """The fastest layout that fits a cluster, what it takes and costs, and why others lost."""
    given = {"sequence_length": sequence_length, "global_batch_size": batch_size, "steps": steps, "dtype": dtype}
    flags = [f"train.{key}={value}" for key, value in given.items() if value is not None]
    loaded, alone = _recipe(recipe, model, [*(overrides or []), *flags])
    if cluster is None and not alone and validate is None:
        _on_live_cluster(loaded, address, as_json)
        return
    from orchestrator.plan_command import answer, shape_for
    from orchestrator.plan_report import as_json as values_of
    from orchestrator.plan_report import describe

    shape = shape_for(loaded, alone)
    if validate is not None:
        _judge(validate, loaded, shape, cluster, address, as_json)
        return
    found = answer(loaded, shape, _pools(loaded, cluster, address))
    typer.echo(json.dumps(values_of(found), indent=2) if as_json else describe(found))


def _recipe(recipe: str | None, model: str | None, overrides: Sequence[str]) -> tuple[Recipe, bool]:
    """(the recipe, whether there is a model alone)."""
    from orchestrator.config import load_recipe
    from orchestrator.plan_command import recipe_for_model

    if model is None:
        if recipe is None:
            raise UserError("nothing to plan", "terrane plan RECIPE, or terrane plan --model DIR_OR_PRESET")
        return load_recipe(recipe, list(overrides)), False
    if recipe is not None and "=" not in recipe:
        raise UserError(f"--model {model} stands beside the recipe {recipe}", "give one of them")
    first = [recipe] if recipe is not None else []  # without a recipe the first override takes its place
    return recipe_for_model(model, [*first, *overrides]), True


def _pools(recipe: Recipe, cluster: str | None, address: str | None) -> list[Devices]:
    from orchestrator.planning.cluster_file import load_cluster
    from orchestrator.planning.devices import of_live, of_pool

    if cluster is not None:
        return [of_pool(pool) for pool in load_cluster(cluster).pools]
    from orchestrator import cluster as live

    with live.connection(address):
        return [of_live(pool, recipe.train.cpus_per_worker) for pool in live.node_pools()]


def _judge(
    path: str, recipe: Recipe, shape: ModelShape, cluster: str | None, address: str | None, as_json: bool
) -> None:
    """On every pool; the best verdict counts."""
    from orchestrator.planning.layout_file import check_layout, judge, load_layout

    given = load_layout(path)
    check_layout(path, given, shape)
    verdicts = [judge(path, given, shape, devices) for devices in _pools(recipe, cluster, address)]
    best = min(verdicts, key=lambda verdict: (not verdict.fits, verdict.prediction.step.total))
    if as_json:
        typer.echo(json.dumps(best.values, indent=2))
        return
    found = best.prediction
    typer.echo(f"on {best.devices}: {best.reason}")
    typer.echo(f"{found.step.total:.4g} s a step, {found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}")


def _on_live_cluster(recipe: Recipe, address: str | None, as_json: bool) -> None:
    """The layout that a run would take there as it is now."""
    from dataclasses import asdict

    from orchestrator import cluster
    from orchestrator.capacity import make_plan, trained_shape
    from orchestrator.hub import pinned
    from orchestrator.nodes import with_speeds
    from orchestrator.plan_command import answer
    from orchestrator.plan_report import as_json as values_of
    from orchestrator.plan_report import describe
    from orchestrator.planning.devices import of_live
    from orchestrator.runs import run_of
    from orchestrator.stages import check_inputs

    loaded = pinned(recipe)
    check_inputs(loaded)
    run = run_of(loaded)
    with cluster.connection(address):
        plan = make_plan(run, loaded)
        pools = [of_live(pool, loaded.train.cpus_per_worker) for pool in with_speeds(run, cluster.node_pools())]
    found = answer(loaded, trained_shape(run, loaded), pools, plan)
    if as_json:
        typer.echo(json.dumps({**values_of(found), "plan": asdict(plan)}, indent=2))
        return
    typer.echo(f"a run here takes {plan}: {plan.reason}\n\n{describe(found)}")
