"""`terrane simulate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.cli_arguments import AsJson, Overrides, RecipePath


def simulate(
    recipe: RecipePath,
    cluster: Annotated[str, typer.Option(metavar="FILE", help="YAML file of its pools")],
    overrides: Overrides = None,
    mtbf_hours: Annotated[float | None, typer.Option(min=1e-6, max=1e9, help="between two failures of a node")] = None,
    step_time_s: Annotated[float | None, typer.Option(min=1e-9, max=1e9, help="on all nodes; else planned")] = None,
    checkpoint_s: Annotated[float | None, typer.Option(min=0, help="that a save stops training for")] = None,
    restart_s: Annotated[float | None, typer.Option(min=0, help="from a decision to the next step")] = None,
    detection_s: Annotated[float | None, typer.Option(min=0, help="until a failure is noticed")] = None,
    exchange_s: Annotated[float, typer.Option(min=0, help="that a step takes longer where several pools train")] = 0.0,
    like: Annotated[str | None, typer.Option(metavar="RUN", help="take the costs that a run has measured")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=10**9, help="default: train.steps")] = None,
    spares: Annotated[int | None, typer.Option(min=0, max=100_000, help="spare nodes of each pool")] = None,
    play_faults: Annotated[bool, typer.Option("--faults", help="play the recipe's faults, too")] = False,
    replications: Annotated[int, typer.Option(min=2, max=10_000)] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """What becomes of a long run among failures: goodput, the best checkpoint interval, spare nodes, cost."""
    from orchestrator.config import load_recipe
    from orchestrator.planning.cluster_file import load_cluster
    from orchestrator.simulation import command

    options = command.Options(
        mtbf_hours=mtbf_hours,
        step_time_s=step_time_s,
        checkpoint_s=checkpoint_s,
        restart_s=restart_s,
        detection_s=detection_s,
        exchange_s=exchange_s,
        like=like,
        steps=steps,
        spares=spares,
        faults=play_faults,
        replications=replications,
        seed=seed,
    )
    found = command.answer(load_recipe(recipe, overrides or []), load_cluster(cluster), options)
    typer.echo(json.dumps(command.as_json(found), indent=2) if as_json else command.describe(found))
