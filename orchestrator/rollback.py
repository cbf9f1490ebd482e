"""What loss spikes cost a run: checkpoints that it goes back behind, steps passed over, documents left out.

An attempt leaves what it found out about a spike in its directory, and the supervisor where the run went back to. Both
count until the run is started over; nothing else keeps them.
"""

from __future__ import annotations

import logging

from orchestrator.config import Recipe
from orchestrator.runs import RunDir
from orchestrator.train import checkpoints, spikes
from orchestrator.train.spikes import Rollback

log = logging.getLogger(__name__)


def roll_back(run: RunDir, recipe: Recipe, attempt: int, step: int) -> Rollback:
    """Go back behind the spike that an attempt ended with: the next one resumes at the checkpoint before it.

    That holds from one write on; `finish` does the rest after a kill.
    """
    train = recipe.train
    found = spikes.rollback(
        attempt=attempt,
        step=step,
        jump=train.spikes.jump,
        committed=checkpoints.committed_steps(run.checkpoints),
        steps=train.steps,
    )
    run.write_json(run.rollback(attempt), vars(found))
    finish(run)
    documents = quarantined_by(run, attempt)
    log.warning(
        "loss spike at step %d: back to step %d; steps %d to %d are passed over", step, found.back_to, *found.passed
    )
    if documents:
        log.warning("loss spike at step %d: goes on without %s", step, ", ".join(documents))
    return found


def finish(run: RunDir) -> None:
    """See that the checkpoints that the run went back behind do not count, and record that it did, where that was not
    done to its end."""
    backs = rollbacks(run)
    recorded = {event["attempt"] for event in run.events() if event["event"] == "rolled_back"} if backs else set()
    for found in backs:
        if found.attempt not in recorded:
            checkpoints.go_back(run.checkpoints, found.attempt, found.back_to)
            run.log_event("rolled_back", **vars(found), quarantined=quarantined_by(run, found.attempt))


def rollbacks(run: RunDir) -> list[Rollback]:
    return [Rollback(**values) for values in run.rollbacks()]


def quarantined(run: RunDir) -> list[str]:
    """Documents that the run goes on without because of spikes."""
    return list(dict.fromkeys(document for spike in run.spikes() for document in spike["quarantined"]))


def quarantined_by(run: RunDir, attempt: int) -> list[str]:
    return [document for spike in run.spikes() if spike["attempt"] == attempt for document in spike["quarantined"]]
