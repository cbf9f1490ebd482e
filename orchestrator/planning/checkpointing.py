"""How often to save: the interval that loses least, from what a save costs and how often a run fails. Pure.

The interval and its efficiency are those of J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
restart dumps", Future Generation Computer Systems 22 (2006), for failures that come at any time alike.
"""

from __future__ import annotations

import math

NODE_MTBF_S = 16_384 / 8 * 54 * 86_400 / 419
"""Of a node, before anything was seen: 419 unexpected interruptions in 54 days on 16,384 GPUs, eight a node (The Llama
3 Herd of Models, arXiv:2407.21783, section 3.3.4), which is one in 6,300 hours of a node or 50,700 of a GPU."""

MOST_SHARE = 0.05
"""Of the time may go into saves: where failures come so thick that more would pay, the estimate is likelier to be wrong
than the run to get anywhere."""
LONGEST_S = 1800.0
"""Between two saves: somebody may stop the run at any time, and half an hour is what people are ready to lose. Holds
before the share of the time does."""
FIRST_S = 60.0
"""To the first save of all, which measures what one costs; a young run fails more often than any estimate says."""


def interval_s(cost_s: float | None, mtbf_s: float) -> float:
    """Seconds of training between two saves, within the bounds above.

    Args:
        cost_s: of a save; None before one was measured.
    """
    if cost_s is None:
        return FIRST_S
    least_s = cost_s / MOST_SHARE - cost_s
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


def mtbf_s(failures: int, observed_s: float, nodes: int, node_mtbf_s: float = NODE_MTBF_S) -> float:
    """Mean time between the failures of a run on some nodes.

    The failure rate of a node is taken to be the greater of two: what the prior makes of the record (a Gamma
    distribution that counts as one failure in `node_mtbf_s`), which is sane with no failure seen, and the bare record.
    A cluster may fail a hundred times more often than the one that the prior is from, as spot instances do, and a
    single failure should say so: to save too often costs little, and bounded.

    Args:
        observed_s: wall time of the run, on about as many nodes, in which the failures came.
    """
    node_s = nodes * observed_s
    rate = max((1 + failures) / (node_mtbf_s + node_s), failures / node_s if node_s else 0.0)
    return 1 / (nodes * rate)
