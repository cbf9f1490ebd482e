"""How often to save: the interval that loses least, from what a save costs and how often a run fails. Pure.

The interval and its efficiency are those of J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
restart dumps", Future Generation Computer Systems 22 (2006), for failures that come at any time alike.
"""

from __future__ import annotations

import math

MOST_SHARE = 0.05
"""Of the time may go into saves: where failures come so thick that more would pay, the estimate is likelier to be wrong
than the run to get anywhere."""
LONGEST_S = 1800.0
"""Between two saves: somebody may stop the run at any time, and half an hour is what people are ready to lose. Holds
before the share of the time does."""
SHORTEST_S = 10.0
"""Between two saves: every commit is a few requests to storage and an event, whatever training notices of it."""
FIRST_S = 60.0
"""To the first save of all, which measures what one costs."""


def interval_s(cost_s: float | None, mtbf_s: float) -> float:
    """Seconds of training between two saves, within the bounds above.

    Args:
        cost_s: of a save; None before one was measured.
    """
    if cost_s is None:
        return FIRST_S
    least_s = max(cost_s / MOST_SHARE - cost_s, SHORTEST_S)
    return min(max(best_interval_s(cost_s, mtbf_s), least_s), LONGEST_S)


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between two saves that leave the most of the time to training.

    Args:
        cost_s: seconds that training loses to a save.
        mtbf_s: mean time between failures.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    share = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(share) / 3 + share / 9) - cost_s


def efficiency(interval_s: float, cost_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of the time of a long run that is training which stays.

    Args:
        restart_s: from a failure to the first new step.
    """
    attempts = math.exp(restart_s / mtbf_s) * math.expm1((interval_s + cost_s) / mtbf_s)
    return interval_s / (mtbf_s * attempts)


def mtbf_s(failures: int, observed_s: float) -> float:
    """Mean time between the failures of a run, from those it has seen.

    The estimate has Jeffreys' prior for a rate, which counts as half a failure and knows no scale: clusters differ a
    thousandfold. So a run that has not failed yet is expected to go on for twice as long as it has lasted, and its
    saves grow rarer as it shows that it lasts; what the early ones cost is the root of the run's time times their cost,
    a third of a percent of a day for saves of a second.

    Args:
        observed_s: wall time of the run in which the failures came.
    """
    return observed_s / (failures + 0.5)
