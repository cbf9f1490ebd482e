"""Questions that a simulated run answers: how much of the time it trains, how often to save, how many nodes to spare.

What is compared is simulated with the same seeds, so that both sides meet the same failures and the difference between
them is known better than either (common random numbers).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.goodput import KINDS, Kind
from orchestrator.planning import checkpointing
from orchestrator.simulation.estimates import Estimate, estimate
from orchestrator.simulation.run import Result, simulate
from orchestrator.simulation.scenario import HOUR_S, Scenario

SEARCH_FACTOR = 2**0.5
"""Between two intervals that the search tries first."""
SEARCH_STEPS = 3
"""Of them to each side of the closed form's, before the search goes on to the better side."""
MOST_STEPS = 11
"""Of them in all: where hardly anything is lost to failures the rarest saves would win, and the run could never be
stopped."""
NO_WORSE = 0.002
"""Share by which a number of spare nodes may be worse than a larger one and still be chosen."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What becomes of a run, over some replications."""

    goodput: Estimate
    wall_s: Estimate
    cost: Estimate
    device_hours: Estimate
    failures: Estimate
    seconds: dict[Kind, float]
    """The mean ledger, the largest first."""
    endings: dict[str, float]
    """Mean number of attempts by how they ended."""
    steps_repeated: float
    saves: float
    gave_up: tuple[str, ...]
    """Why, of the replications that did not come to the last step."""
    replications: int


def forecast(scenario: Scenario, replications: int, seed: int = 0) -> Forecast:
    return summary(replicate(scenario, replications, seed))


def replicate(scenario: Scenario, replications: int, seed: int = 0) -> list[Result]:
    return [simulate(scenario, seed * 1_000_003 + number) for number in range(replications)]


def summary(results: Sequence[Result]) -> Forecast:
    def mean(value: Callable[[Result], float]) -> float:
        return statistics.fmean(value(result) for result in results)

    seconds = {kind: mean(lambda result, kind=kind: result.seconds.get(kind, 0.0)) for kind in KINDS}  # type: ignore[misc]
    outcomes = sorted({outcome for result in results for outcome in result.endings})
    return Forecast(
        goodput=estimate([result.goodput for result in results]),
        wall_s=estimate([result.wall_s for result in results]),
        cost=estimate([result.cost for result in results]),
        device_hours=estimate([result.device_hours for result in results]),
        failures=estimate([float(result.failures) for result in results]),
        seconds={kind: s for kind, s in sorted(seconds.items(), key=lambda item: -item[1]) if s},
        endings={name: mean(lambda result, name=name: result.endings.get(name, 0)) for name in outcomes},  # type: ignore[misc]
        steps_repeated=mean(lambda result: result.steps_repeated),
        saves=mean(lambda result: result.saves),
        gave_up=tuple(result.gave_up for result in results if result.gave_up),
        replications=len(results),
    )


# --- how often to save ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BestInterval:
    interval_s: float
    steps: int
    """The same, for `train.checkpoint_every`."""
    goodput: float
    closed_form_s: float
    """What Daly's formula says of the mean time between the failures that were met."""
    tried: tuple[tuple[float, float], ...]
    """(seconds, goodput), in order."""


def best_interval(scenario: Scenario, replications: int, seed: int = 0) -> BestInterval:
    """The interval between saves that leaves the most of the time to training.

    The goodput is taken at intervals around the closed form's, and is smooth between them; the maximum of a parabola
    through the best three, in the logarithm of the interval, is tried last.
    """
    start_s = closed_form_s(scenario, replications, seed)
    step_s = scenario.ideal_s / scenario.steps
    tried: dict[float, float] = {}

    def goodput(interval_s: float) -> float:
        if interval_s not in tried:
            results = replicate(replace(scenario, interval_s=interval_s), replications, seed)
            tried[interval_s] = statistics.fmean(result.goodput for result in results)
        return tried[interval_s]

    exponents = list(range(-SEARCH_STEPS, SEARCH_STEPS + 1))
    while True:
        grid = sorted({max(start_s * SEARCH_FACTOR**exponent, step_s) for exponent in exponents})
        place = grid.index(max(grid, key=goodput))
        if 0 < place < len(grid) - 1 or len(exponents) >= MOST_STEPS:
            break
        if grid[place] == step_s:  # no save comes more often than a step
            break
        exponents = [exponents[0] - 1, *exponents] if place == 0 else [*exponents, exponents[-1] + 1]
    if 0 < place < len(grid) - 1:
        goodput(_top([(math.log(at), tried[at]) for at in grid[place - 1 : place + 2]]))
    best_s = max(tried, key=lambda interval_s: tried[interval_s])
    return BestInterval(
        interval_s=best_s,
        steps=max(round(best_s / step_s), 1),
        goodput=tried[best_s],
        closed_form_s=start_s,
        tried=tuple(sorted(tried.items())),
    )


def closed_form_s(scenario: Scenario, replications: int, seed: int = 0) -> float:
    """Daly's interval for the failures that a trial of the scenario meets."""
    results = replicate(scenario, min(replications, 4), seed)
    failures = sum(result.failures for result in results)
    observed_s = sum(result.wall_s - result.seconds.get("waiting", 0.0) for result in results)
    cost_s = scenario.costs.checkpoint_s or scenario.ideal_s / scenario.steps / 100
    return checkpointing.best_interval_s(cost_s, checkpointing.mtbf_s(failures, observed_s))


def _top(points: Sequence[tuple[float, float]]) -> float:
    """Where a parabola through three points has its maximum, as the exponential of its place."""
    (x0, y0), (x1, y1), (x2, y2) = points
    below = (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)
    if not below:
        return math.exp(x1)
    shift = ((x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0)) / (2 * below)
    return math.exp(min(max(x1 - shift, x0), x2))


# --- how many nodes to spare ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Spares:
    nodes: int
    """Of the first island, beside those that train."""
    wall_s: float
    device_hours: float
    cost: float
    gave_up: int
    """Replications that did not come to the end."""


def worth_sparing(scenario: Scenario, replications: int, seed: int = 0) -> tuple[int, tuple[Spares, ...]]:
    """How many spare nodes pay: those with which a run takes the fewest device-hours, those of idle nodes among them.

    Numbers up to twice what is away at a time on average, and some, are tried, and the search ends where the wall time
    no longer gets shorter.

    Returns:
        The number, and what was tried.
    """
    island = scenario.islands[0]
    tried: list[Spares] = []
    for nodes in _numbers(scenario):
        islands = (replace(island, spare_nodes=nodes), *scenario.islands[1:])
        found = summary(replicate(replace(scenario, islands=islands), replications, seed))
        tried.append(
            Spares(
                nodes=nodes,
                wall_s=found.wall_s.mean,
                device_hours=found.device_hours.mean,
                cost=found.cost.mean,
                gave_up=len(found.gave_up),
            )
        )
        if len(tried) > 1 and tried[-1].device_hours > 1.02 * min(one.device_hours for one in tried):
            break
    least = min(one.device_hours for one in tried if one.gave_up == min(each.gave_up for each in tried))
    chosen = next(one for one in tried if one.device_hours <= (1 + NO_WORSE) * least)
    return chosen.nodes, tuple(tried)


def _numbers(scenario: Scenario) -> list[int]:
    away = nodes_away(scenario)
    most = math.ceil(away + 4 * math.sqrt(away) + 2)
    numbers = {0, 1, 2, *(round(most * part / 5) for part in range(6))}
    return sorted(numbers)


def nodes_away(scenario: Scenario) -> float:
    """Mean number of nodes of the first island that are under repair or taken back, by Little's law."""
    island = scenario.islands[0]
    per_hour = sum(1 / hazard.mtbf_hours for hazard in island.hazards if hazard.takes_node and hazard.of == "node")
    away = per_hour * island.repair_hours
    if island.reclaims:
        away += island.reclaims.back_hours / island.reclaims.mean_hours
    return away * island.nodes


def days(seconds: float) -> float:
    return seconds / HOUR_S / 24
