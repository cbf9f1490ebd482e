"""Independent pieces of work on Ray Data, one task each. A task that fails is named; the others go on."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from orchestrator.errors import RunFailed

log = logging.getLogger(__name__)

CPUS = 1.0
RETRIES = 3
"""Of a task whose worker is lost."""
Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tasks(
    what: str,
    work: Callable[[Item], Result],
    items: Sequence[Item],
    progress: Progress,
    on_crash: Callable[[Item], Result] | None = None,
) -> list[Result]:
    """[work(item) for item in items], on the cluster.

    Ray starts a task again when its worker is lost. One whose worker is lost again and again goes to on_crash, which is
    called in this process.

    Raises:
        Exception: what `work` raised, as it raised it.
        RunFailed: a task's worker is lost every time, and there is no on_crash.
    """
    if not items:
        return []
    progress(what, 0, len(items))
    results = _run(what, work, items, progress)
    for index in sorted(set(range(len(items))) - results.keys()):
        if on_crash is None:
            raise RunFailed(
                f"{what}: task {index} of {len(items)} lost its worker every time",
                "see whether the node is out of memory (`ray status`, `dmesg`)",
            )
        log.warning("%s: task %d of %d lost its worker every time; looking for the cause", what, index, len(items))
        results[index] = on_crash(items[index])
        progress(what, len(results), len(items))
    return [results[index] for index in range(len(items))]


def run_alone(work: Callable[[], Result], retries: int = 0) -> Result | None:
    """work() in a worker process of its own; None where that process is lost."""
    import ray

    try:
        return ray.get(ray.remote(num_cpus=CPUS, max_retries=retries)(work).remote())  # type: ignore[no-any-return]
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
        return None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def quiet_ray_data() -> None:
    """Importing Ray Data sets its loggers up, so they are quietened after that; progress is ours to tell."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _run(what: str, work: Callable[[Item], Result], items: Sequence[Item], progress: Progress) -> dict[int, Result]:
    import ray

    if len(items) == 1:  # not worth a dataset
        alone = run_alone(lambda: (work(items[0]),), RETRIES)
        results: dict[int, Result] = {} if alone is None else {0: alone[0]}
        progress(what, len(results), 1)
        return results
    quiet_ray_data()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    context.max_errored_blocks = -1

    def on_row(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"index": row["index"], "result": pickle.dumps(work(pickle.loads(row["item"]))), "error": b""}
        except Exception as error:  # as a value: Ray Data would bury it under its own
            return {"index": row["index"], "result": b"", "error": pickle.dumps(error)}

    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings(action="ignore"):
        # Without a limit, which has no name of its own in Ray 2.60, a task that kills its worker is started for ever.
        dataset = dataset.map(on_row, num_cpus=CPUS, max_retries=RETRIES)
    results = {}
    for row in dataset.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        results[int(row["index"])] = pickle.loads(row["result"])
        progress(what, len(results), len(items))
    return results
