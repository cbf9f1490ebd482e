"""`terrane simulate`: from a recipe and a cluster file to a scenario, and from its simulation to what is printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.config import Recipe
from orchestrator.errors import UserError
from orchestrator.goodput import in_words
from orchestrator.planning.cluster_file import Cluster, Pool
from orchestrator.report_content import duration, words
from orchestrator.runs import find_run
from orchestrator.simulation import experiments
from orchestrator.simulation.experiments import BestInterval, Forecast, Spares
from orchestrator.simulation.fault_script import strikes_of, unplayed
from orchestrator.simulation.replay import inputs_of
from orchestrator.simulation.scenario import (
    HOUR_S,
    Costs,
    Hazard,
    Island,
    Reclaims,
    Restart,
    Scenario,
    Slowdowns,
    StepTime,
    scaled,
)
from orchestrator.simulation.speed import planned_step_s, recipe_shape

COLD = Restart(scheduling_s=9.9, start_up_s=3.6, load_s=0.4)
STANDBY = Restart(scheduling_s=0.1, start_up_s=0.1, load_s=0.2)
"""Seconds of a restart: medians of bench_recovery.py on two cores with a small model. What they are on a cluster, a run
on it tells (--like)."""
STANDBY_START_S = 20.0
"""The same bench: until workers stand by while others train."""
DETECTION_S = {"worker_lost": 0.3, "node_lost": 6.0, "network": 6.0, "driver_lost": 15.0}
"""A lost worker: the same bench. The others are estimates with Ray's health checks as they are; with faster ones a lost
node was noticed within 2 s."""
BYTES_A_PARAMETER = 12
"""Of a checkpoint: weights and both moments, in fp32."""
COPY_BYTES_PER_S = 5e9
"""Of a device's state to host memory, for which training stands still."""
STORAGE_BYTES_PER_S = 2e9
"""Where the cluster file says nothing of the storage."""
TIMES_IDEAL = 20.0
"""As many times the undisturbed run may take before a simulated one is given up."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say; None: as the recipe, the cluster file or a measured run has it."""

    mtbf_hours: float | None = None
    """Of a node."""
    step_time_s: float | None = None
    """On all nodes of all pools."""
    checkpoint_s: float | None = None
    restart_s: float | None = None
    detection_s: float | None = None
    exchange_s: float = 0.0
    """Of a step, between the islands that several pools are."""
    steps: int | None = None
    spares: int | None = None
    like: str | None = None
    """A run to take the costs from."""
    replications: int = 16
    seed: int = 0
    faults: bool = False
    """Play the recipe's faults, too."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    scenario: Scenario
    inputs: dict[str, Any]
    """What went in, by name."""
    forecast: Forecast
    best_interval: BestInterval
    spares: int
    spares_tried: tuple[Spares, ...]
    unplayed: tuple[str, ...]


def answer(recipe: Recipe, cluster: Cluster, options: Options) -> Answer:
    """
    Raises:
        UserError: nothing fails, the planner has no plan for a pool, or the run has more workers than there are.
    """
    scenario = scenario_of(recipe, cluster, options)
    count, seed = options.replications, options.seed
    fewer = max(count // 2, 2)  # what is compared meets the same failures, so that fewer tell
    spares, tried = experiments.worth_sparing(scenario, fewer, seed)
    return Answer(
        scenario=scenario,
        inputs=_inputs(scenario, cluster, options),
        forecast=experiments.forecast(scenario, count, seed),
        best_interval=experiments.best_interval(scenario, fewer, seed),
        spares=spares,
        spares_tried=tried,
        unplayed=unplayed(recipe.faults) if options.faults else (),
    )


# --- the scenario -----------------------------------------------------------------------------------------------------


def scenario_of(recipe: Recipe, cluster: Cluster, options: Options) -> Scenario:
    """Each pool of the cluster is an island, with its share of the recipe's workers."""
    pools = [_as_told(pool, options) for pool in cluster.pools]
    needed, there = recipe.train.workers.min, sum(pool.devices for pool in pools)
    if needed > there:
        message = f"train.workers.min={needed} is more than the {there} devices of the cluster file"
        raise UserError(message, f"ask for {there} or fewer, or add nodes")
    if not options.faults and all(
        not (p.node_mtbf_hours or p.process_mtbf_hours or p.spot or p.stragglers) for p in pools
    ):
        raise UserError("nothing fails in this cluster", "give --mtbf-hours, or node_mtbf_hours of its pools")
    speeds = _speeds(recipe, pools, options)
    islands = tuple(_island(recipe, pool, there, step_s) for pool, step_s in zip(pools, speeds, strict=True))
    devices = sum(island.nodes * island.devices_per_node for island in islands)
    scenario = Scenario(
        islands=islands,
        steps=options.steps or recipe.train.steps,
        costs=_costs(recipe, cluster, options, devices),
        checkpoint_every=recipe.train.checkpoint_every,
        exchange_s=options.exchange_s,
        max_restarts=recipe.train.max_restarts,
        strikes=strikes_of(recipe.faults, islands) if options.faults else (),
    )
    return replace(scenario, longest_s=TIMES_IDEAL * scenario.ideal_s + 30 * 24 * HOUR_S)


def _as_told(pool: Pool, options: Options) -> Pool:
    changes: dict[str, Any] = {}
    if options.mtbf_hours is not None:
        changes["node_mtbf_hours"] = options.mtbf_hours
    if options.spares is not None:
        changes["spare_nodes"] = options.spares
    return pool.model_copy(update=changes)


def _speeds(recipe: Recipe, pools: Sequence[Pool], options: Options) -> list[StepTime]:
    if options.step_time_s is None:
        return [planned_step_s(recipe, pool) for pool in pools]
    there = sum(pool.devices for pool in pools)
    most = [_nodes(recipe.train.workers.max, pool, there) for pool in pools]
    return [scaled(options.step_time_s * there / pool.devices, nodes) for pool, nodes in zip(pools, most, strict=True)]


def _nodes(workers: int | None, pool: Pool, devices: int) -> int:
    """Nodes of a pool that take its share of so many workers; all of them where no number is given.

    Args:
        devices: of all pools.
    """
    share = (devices if workers is None else workers) * pool.devices / devices
    return min(pool.nodes, max(math.ceil(share / pool.devices_per_node - 1e-9), 1))


def _island(recipe: Recipe, pool: Pool, devices: int, step_s: StepTime) -> Island:
    """
    Args:
        devices: of all pools.
    """
    workers, one_replica = recipe.train.workers, recipe.train.layout.devices
    nodes = _nodes(workers.max, pool, devices)
    fewest = max(_nodes(workers.min, pool, devices), min(math.ceil(one_replica / pool.devices_per_node), nodes))
    hazards = []
    if pool.node_mtbf_hours:
        hazards.append(Hazard(outcome="node_lost", mtbf_hours=pool.node_mtbf_hours, takes_node=True))
    if pool.process_mtbf_hours:
        hazards.append(Hazard(outcome="worker_lost", mtbf_hours=pool.process_mtbf_hours))
    return Island(
        name=pool.name,
        nodes=nodes,
        least_nodes=fewest,
        spare_nodes=pool.spare_nodes + pool.nodes - nodes,
        devices_per_node=pool.devices_per_node,
        price_per_device_hour=pool.price_per_device_hour,
        step_s=step_s,
        hazards=tuple(hazards),
        repair_hours=pool.repair_hours,
        reclaims=_reclaims(pool),
        slowdowns=Slowdowns(**pool.stragglers.model_dump()) if pool.stragglers else None,
    )


def _reclaims(pool: Pool) -> Reclaims | None:
    if pool.spot is None:
        return None
    spot = pool.spot
    return Reclaims(mean_hours=spot.reclaimed_after_hours, notice_s=spot.notice_s, back_hours=spot.back_after_hours)


def _costs(recipe: Recipe, cluster: Cluster, options: Options, devices: int) -> Costs:
    if options.like:
        costs = replace(inputs_of(find_run(options.like)).costs, closing_s=0.0)
    else:
        state = BYTES_A_PARAMETER * recipe_shape(recipe).parameters
        storage = cluster.storage
        load_s = COLD.load_s + state / (storage.read_gb_per_s * 1e9 if storage else STORAGE_BYTES_PER_S)
        costs = Costs(
            cold=replace(COLD, load_s=load_s),
            standby=replace(STANDBY, load_s=load_s) if recipe.train.standby else None,
            standby_start_s=STANDBY_START_S,
            checkpoint_s=state / devices / COPY_BYTES_PER_S,
            write_s=state / (storage.write_gb_per_s * 1e9 if storage else STORAGE_BYTES_PER_S),
            detection_s=1.0,
            detection_by_outcome_s={**DETECTION_S, "hang": recipe.train.hang_after_s or 300.0},
        )
    if options.checkpoint_s is not None:
        costs = replace(costs, checkpoint_s=options.checkpoint_s, write_s=0.0)
    if options.restart_s is not None:
        costs = replace(costs, cold=Restart(start_up_s=options.restart_s), standby=None)
    if options.detection_s is not None:
        costs = replace(costs, detection_s=options.detection_s, detection_by_outcome_s={})
    return costs


def _inputs(scenario: Scenario, cluster: Cluster, options: Options) -> dict[str, Any]:
    costs, step_s = scenario.costs, scenario.ideal_s / scenario.steps
    source = f"measured in {options.like}" if options.like else "given" if options.step_time_s else "planned"
    return {
        "steps": scenario.steps,
        "step_time_s": step_s,
        "step_time_from": "given" if options.step_time_s else "planned",
        "costs_from": source if options.like else "the command line and defaults",
        "checkpoint_s": costs.checkpoint_s,
        "write_s": costs.write_s,
        "restart_s": costs.cold.total_s,
        "standby_restart_s": costs.standby.total_s if costs.standby else None,
        "detection_s": {"other": costs.detection_s, **costs.detection_by_outcome_s},
        "checkpoint_every": scenario.checkpoint_every,
        "pools": [
            {
                "name": island.name,
                "nodes": island.nodes,
                "least_nodes": island.least,
                "spare_nodes": island.spare_nodes,
                "devices_per_node": island.devices_per_node,
                "repair_hours": island.repair_hours,
                "mtbf_hours": {hazard.outcome: hazard.mtbf_hours for hazard in island.hazards},
                "reclaimed_after_hours": island.reclaims.mean_hours if island.reclaims else None,
            }
            for island in scenario.islands
        ],
        "replications": options.replications,
        "seed": options.seed,
    }


# --- what is printed --------------------------------------------------------------------------------------------------


def as_json(found: Answer) -> dict[str, Any]:
    forecast = asdict(found.forecast)
    return {
        "inputs": found.inputs,
        **forecast,
        "days": {key: experiments.days(value) for key, value in forecast["wall_s"].items()},
        "best_interval": asdict(found.best_interval),
        "spare_nodes": {"best": found.spares, "tried": [asdict(one) for one in found.spares_tried]},
        "unplayed_faults": list(found.unplayed),
    }


def describe(found: Answer) -> str:
    """For a person."""
    return "\n".join([*_inputs_in_words(found), "", *_forecast_in_words(found), "", *_advice(found)])


def _inputs_in_words(found: Answer) -> list[str]:
    inputs, costs = found.inputs, found.scenario.costs
    lines = [
        f"{island.nodes} node{'s' if island.nodes > 1 else ''} of {island.devices_per_node} in {island.name}"
        + (f", down to {island.least}" if island.least < island.nodes else ", all or none")
        + (f", {island.spare_nodes} spare" if island.spare_nodes else "")
        + "".join(f", one {words(h.outcome)} in {h.mtbf_hours:,.0f} {h.of}-hours" for h in island.hazards)
        + (f", taken back after {island.reclaims.mean_hours:,.0f} hours" if island.reclaims else "")
        for island in found.scenario.islands
    ]
    if len(lines) > 1:
        lines.append(f"islands that share every batch, with an exchange of {found.scenario.exchange_s:.3g} s a step")
    step = f"{inputs['steps']:,} steps of {inputs['step_time_s']:.3g} s ({inputs['step_time_from']})"
    standby = f", {costs.standby.total_s:.3g} s with workers that stand by" if costs.standby else ""
    save = f"a save stops training for {costs.checkpoint_s:.3g} s and is written in {costs.write_s:.3g} s"
    return [*lines, step, f"{save}; a restart takes {costs.cold.total_s:.3g} s{standby} ({inputs['costs_from']})"]


def _forecast_in_words(found: Answer) -> list[str]:
    forecast = found.forecast
    wall, goodput = forecast.wall_s, forecast.goodput
    span = f"{experiments.days(wall.low):.2f} to {experiments.days(wall.high):.2f}"
    lines = [
        f"goodput     {goodput.mean:.2%}  ({goodput.low:.2%} to {goodput.high:.2%}, {forecast.replications} runs)",
        f"wall time   {experiments.days(wall.mean):.2f} days  ({span})",
        f"failures    {forecast.failures.mean:,.1f}  ({_counts(forecast.endings)})",
        f"device time {forecast.device_hours.mean:,.0f} hours",
    ]
    if forecast.cost.mean:
        lines.append(f"cost        {forecast.cost.mean:,.0f}  ({forecast.cost.low:,.0f} to {forecast.cost.high:,.0f})")
    lines += ["", f"{'went into':22} {'time':>14} {'share':>8}"]
    total = sum(forecast.seconds.values())
    for kind, seconds in forecast.seconds.items():
        lines.append(f"{in_words(kind):22} {duration(seconds) or '':>14} {seconds / total:8.2%}")
    if forecast.gave_up:
        lines.append(f"{len(forecast.gave_up)} of {forecast.replications} runs were given up: {forecast.gave_up[0]}")
    return lines


def _counts(endings: dict[str, float]) -> str:
    return ", ".join(f"{count:,.1f} {words(name)}" for name, count in endings.items()) or "none"


def _advice(found: Answer) -> list[str]:
    best = found.best_interval
    longer = "longer than the run, whose end alone is saved"
    every = f"train.checkpoint_every={best.steps}" if best.steps < found.scenario.steps else longer
    lines = [
        f"best checkpoint interval  {duration(best.interval_s)} ({every}): "
        f"goodput {best.goodput:.2%}; the closed form says {duration(best.closed_form_s)}"
    ]
    first = found.scenario.islands[0]
    held = "spare nodes worth holding" + (f" ({first.name})" if len(found.scenario.islands) > 1 else "")
    tried = ", ".join(f"{one.nodes}: {experiments.days(one.wall_s):.2f} days" for one in found.spares_tried)
    lines.append(f"{held}  {found.spares}  ({tried})")
    if found.unplayed:
        lines.append(f"faults that were left out: {', '.join(found.unplayed)}")
    return lines
