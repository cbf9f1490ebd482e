"""What a check for silent corruption costs, in steps of one sequence a rank: the most that it can cost.

pytest tests/benchmarks/bench_integrity.py --override-ini python_files='bench_*.py' -s
"""

from __future__ import annotations

from tests.engine.launching import torchrun


def test_a_check_takes_no_longer_than_the_step_of_a_sequence() -> None:
    (result,) = torchrun("../benchmarks/integrity_cost_rank.py", 1)
    print(f"\nstep of one sequence {result['step_s']:.3f} s, check {result['check_s']:.3f} s")
    assert result["check_s"] < 1.2 * result["step_s"]
