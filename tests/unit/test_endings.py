"""Ends of attempts told apart. What Ray, torch and boto3 raise here is raised by them, or written as they write it."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

import pytest

from orchestrator.endings import ALIKE_S, CAUSE_S, LOST_PEER_S, Death, Evidence, judge, patience_s
from orchestrator.errors import (
    CheckpointDamaged,
    LastingStorageError,
    LossSpike,
    NotFinite,
    PeerFailed,
    PlanError,
    RunFailed,
    ShardLost,
    SilentCorruption,
    StorageError,
    UserError,
)

CLOSED = RuntimeError(
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:23956. This is typically caused by a remote worker crashing."
)
DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 12451\n"
    "The actor is dead because its worker process has died. Worker exit type: {kind} Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed"
)


def outcome(*errors: BaseException, **evidence: Any) -> str:
    return judge(Evidence(errors=dict(enumerate(errors)), **evidence)).outcome


def raised(kind: type[BaseException], cause: BaseException) -> BaseException:
    try:
        raise kind("outer") from cause
    except kind as error:
        return error


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# --- what is no failure -----------------------------------------------------------------------------------------------


def test_an_attempt_whose_workers_returned_has_finished_or_made_way() -> None:
    assert judge(Evidence(finished=True)).outcome == "finished"
    verdict = judge(Evidence(finished=True, yielded="2 -> 4 workers"))
    assert (verdict.outcome, verdict.message) == ("yielded", "2 -> 4 workers")


def test_one_that_failed_on_its_way_out_has_failed() -> None:
    assert outcome(CLOSED, yielded="drain", lost_nodes=("a",)) == "node_lost"


# --- user errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ShardLost("m", shard="s"), "shard_lost"),
        (CheckpointDamaged("m", step=3), "checkpoint_damaged"),
        (SilentCorruption("m"), "corruption"),
        (NotFinite("m", step=3), "not_finite"),
        (LossSpike("m", step=3), "spike"),
        (StorageError("m", "h"), "storage"),
        (LastingStorageError("m", "h"), "user_error"),
        (PlanError("m", "h"), "user_error"),
        (RunFailed("m", "h"), "user_error"),
        (UserError("m", "h"), "user_error"),
    ],
)
def test_errors_that_a_user_can_act_on_keep_their_words(error: UserError, expected: str) -> None:
    verdict = judge(Evidence(errors={0: CLOSED, 1: error}, deaths=()))
    assert (verdict.outcome, verdict.message, verdict.ranks) == (expected, "m", (1,))
    assert verdict.cause is error


def test_wrong_input_goes_before_all_else() -> None:
    everything = {"deaths": (Death(rank=2, node_id="a", oom_kills=1),), "lost_nodes": ("b",), "hang": "no step"}
    assert outcome(CLOSED, MemoryError(), UserError("m"), **everything) == "user_error"


@pytest.mark.parametrize("wrapped", ["cause", "_base_exc", "health_check_failure", "controller_failure"])
def test_an_error_is_found_under_its_wrappers(wrapped: str) -> None:
    outer = RuntimeError("outer")
    vars(outer)[wrapped] = raised(RuntimeError, NotFinite("m", step=7))
    assert outcome(outer) == "not_finite"


def test_an_error_of_the_users_is_not_looked_behind() -> None:
    assert judge(Evidence(errors={0: raised(UserError, MemoryError())})).message == "outer"


def test_errors_that_refer_to_each_other_come_to_an_end() -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert outcome(one) == "error"


def test_the_ranks_of_a_collective_load_are_looked_at() -> None:
    """As torch.distributed.checkpoint tells them: (error, traceback) by rank."""
    together = RuntimeError("CheckpointException ranks: [1]")
    vars(together)["failures"] = {1: (os_error(errno.EIO), "traceback")}
    assert outcome(raised(RuntimeError, together)) == "storage"


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
        "HIP out of memory. Tried to allocate 512.00 MiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to get 4 bytes",
        "rank 1: MemoryError: Unable to allocate 4.00 GiB for an array",
    ],
)
def test_a_lack_of_memory_is_known_by_its_words(text: str) -> None:
    verdict = judge(Evidence(errors={0: CLOSED, 1: RuntimeError(text), 2: CLOSED}))
    assert (verdict.outcome, verdict.ranks) == ("out_of_memory", (1,))
    assert verdict.message.startswith("rank 1: out of memory: RuntimeError: ")


@pytest.mark.parametrize("error", [MemoryError(), os_error(errno.ENOMEM)])
def test_a_lack_of_memory_is_known_by_its_class(error: Exception) -> None:
    assert outcome(raised(RuntimeError, error), CLOSED) == "out_of_memory"


def test_torch_runs_out_of_memory_in_these_words() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert outcome(caught.value) == outcome(torch.OutOfMemoryError("any words")) == "out_of_memory"


@pytest.mark.parametrize("signs", [{"oom_kills": 1}, {"node_memory_share": 0.97}])
def test_a_worker_that_was_killed_for_memory_is_told_from_one_that_was_killed(signs: dict[str, Any]) -> None:
    verdict = judge(Evidence(errors={0: CLOSED}, deaths=(Death(rank=1, node_id="a", **signs),)))
    assert (verdict.outcome, verdict.ranks, verdict.node_ids) == ("out_of_memory", (1,), ("a",))
    calm = Death(rank=1, node_id="a", node_memory_share=0.5)
    verdict = judge(Evidence(errors={0: CLOSED}, deaths=(calm,)))
    assert (verdict.outcome, verdict.ranks, verdict.node_ids) == ("worker_lost", (1,), ("a",))


# --- workers, nodes, the network --------------------------------------------------------------------------------------


def test_a_dead_worker_outranks_what_its_peers_say() -> None:
    deaths = tuple(Death(rank=rank, node_id="abc") for rank in (3, 1))
    verdict = judge(Evidence(errors={0: CLOSED, 2: KeyError("x")}, deaths=deaths))
    assert (verdict.outcome, verdict.ranks) == ("worker_lost", (1, 3))
    assert verdict.message == "ranks 1, 3: its process on node abc ended without a word"


def test_a_lost_node_outranks_the_workers_that_it_takes_along() -> None:
    """Ray Train tells of the peers' errors alone then."""
    verdict = judge(Evidence(errors={0: CLOSED}, deaths=(Death(rank=1, node_id="b"),), lost_nodes=("b",)))
    assert (verdict.outcome, verdict.node_ids) == ("node_lost", ("b",))
    assert verdict.message == "node b left the cluster"


@pytest.mark.parametrize(
    "error",
    [
        CLOSED,
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:82] Timed out waiting 1800000ms for recv operation"),
        RuntimeError("[gloo/transport/tcp/pair.cc:144] Read error [10.0.0.2]:4711: Connection reset by peer"),
        RuntimeError("Socket Timeout"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled system error, NCCL version 2.27.3"),
        RuntimeError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("timed out"),
        os_error(errno.EHOSTUNREACH),
        PeerFailed("rank 0 failed to read the data of step 7, which this rank shares"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_lost_connections_with_nobody_gone_are_the_network(error: BaseException) -> None:
    assert outcome(error) == "network"
    assert outcome(error, KeyError("x")) == "error", "a peer that failed closes its connections"
    assert outcome(error, os_error(errno.EIO)) == "storage"


def test_a_hang_is_one_although_its_workers_are_killed_for_it() -> None:
    deaths = (Death(rank=0, node_id="a"),)
    verdict = judge(Evidence(errors={1: CLOSED}, deaths=deaths, hang="no step for 300 s after step 7"))
    assert (verdict.outcome, verdict.message) == ("hang", "no step for 300 s after step 7")
    assert outcome(CLOSED, hang="no step for 300 s", lost_nodes=("a",)) == "node_lost"


def test_an_end_without_a_sign_is_an_error() -> None:
    assert judge(Evidence()).message == "it ended without a word of why"


def test_an_error_that_nothing_explains_is_told_with_its_class() -> None:
    verdict = judge(Evidence(errors={4: CLOSED, 5: raised(RuntimeError, KeyError("x"))}))
    assert (verdict.outcome, verdict.message) == ("error", "rank 5: KeyError: 'x'")
    many = judge(Evidence(errors=dict.fromkeys(range(9), KeyError("x"))))
    assert many.message == "ranks 0, 1, 2, 3 and 5 more: KeyError: 'x'"


# --- storage ----------------------------------------------------------------------------------------------------------


class SaveFailed(Exception):
    """As orchestrator.train.fragment_files has it, which imports torch."""


@pytest.mark.parametrize(
    "error",
    [
        os_error(errno.EIO),
        os_error(errno.ESTALE),
        SaveFailed("rank 0: SomeError: which nobody knows"),
        SaveFailed("rank 1: ClientError: An error occurred (SlowDown) when calling the PutObject operation: Please"),
        SaveFailed('rank 1: EndpointConnectionError: Could not connect to the endpoint URL: "http://10.0.0.1:9000/b"'),
        OSError("When reading information for key 'a' in bucket 'b': AWS Error NETWORK_CONNECTION during HeadObject"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_errors_of_storage_are_known(error: BaseException) -> None:
    assert outcome(error) == outcome(RuntimeError(f"x: {type(error).__name__}: {error}"), error) == "storage"


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/shared/run"),
        SaveFailed("rank 1: ClientError: An error occurred (AccessDenied) when calling the PutObject operation: no"),
        SaveFailed("rank 1: NoCredentialsError: Unable to locate credentials"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_a_storage_that_refuses_is_not_waited_for(error: BaseException) -> None:
    verdict = judge(Evidence(errors={0: CLOSED, 1: error}))
    assert (verdict.outcome, verdict.ranks) == ("error", (1,))
    assert verdict.message.startswith("rank 1: access refused: ")


def test_the_name_of_a_failed_save_is_the_one_that_is_raised() -> None:
    fragment_files = pytest.importorskip("orchestrator.train.fragment_files")
    assert outcome(fragment_files.SaveFailed("rank 0: SomeError: which nobody knows")) == "storage"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:4711", "network"),
        ("MemoryError: ", "out_of_memory"),
        ("OSError: [Errno 12] Cannot allocate memory", "out_of_memory"),
    ],
)
def test_a_save_that_failed_for_another_reason_is_told_by_that(words: str, expected: str) -> None:
    assert outcome(SaveFailed(f"rank 1: {words}")) == expected


@pytest.mark.parametrize(
    "error", [os_error(errno.ENOSPC), SaveFailed("rank 0: OSError: [Errno 28] No space left on device")]
)
def test_a_full_disk_is_called_one(error: BaseException) -> None:
    verdict = judge(Evidence(errors={0: error, 1: CLOSED}))
    assert (verdict.outcome, verdict.ranks) == ("storage", (0,))
    assert verdict.message.startswith("rank 0: the disk is full: ")


def test_errors_of_boto3_are_known_by_their_package() -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    answer = {"Error": {"Code": "InternalError", "Message": "We encountered an internal error"}}
    assert outcome(exceptions.ClientError(answer, "PutObject")) == "storage"
    assert outcome(exceptions.ReadTimeoutError(endpoint_url="http://10.0.0.1:9000")) == "storage"


# --- what Ray says ----------------------------------------------------------------------------------------------------


def actor_died(message: str) -> Any:
    """As Ray makes it of what its control store says of an actor."""
    common_pb2 = pytest.importorskip("ray.core.generated.common_pb2")
    from ray.exceptions import ActorDiedError

    return ActorDiedError(common_pb2.ActorDiedErrorContext(actor_id=b"\0" * 16, error_message=message))


def worker_group_error(failures: Mapping[int, BaseException]) -> Any:
    train = pytest.importorskip("ray.train")
    return train.WorkerGroupError("told", dict(failures))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (DIED.format(kind="SYSTEM_ERROR"), "worker_lost"),
        (DIED.format(kind="NODE_OUT_OF_MEMORY"), "out_of_memory"),
        (
            "1 worker(s) were killed due to the node running low on memory. Memory on the node was 15GB used",
            "out_of_memory",
        ),
        ("The actor died because its node has died. Node Id: 0946\n\tthe actor's node was terminated", "node_lost"),
    ],
)
def test_the_death_of_an_actor_says_what_it_died_of(message: str, expected: str) -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    found = WorkerHealthCheckFailedError("A worker health check failed.", actor_died(message))
    verdict = judge(Evidence(fit_error=worker_group_error({0: CLOSED, 1: found})))
    assert (verdict.outcome, verdict.ranks) == (expected, (1,))


def test_rays_own_errors_are_known_by_their_classes() -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    assert outcome(exceptions.OutOfMemoryError("any words")) == "out_of_memory"
    assert outcome(exceptions.NodeDiedError("any words")) == "node_lost"
    assert outcome(exceptions.WorkerCrashedError()) == "worker_lost"
    assert outcome(exceptions.OutOfDiskError("any words")) == "storage"
    assert outcome(exceptions.GetTimeoutError("any words")) == "network"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NotFinite("m", step=7), "not_finite"),
        (KeyError("x"), "error"),
        (os_error(errno.EIO), "storage"),
    ],
)
def test_an_error_that_crossed_a_task_of_ray_is_the_same_error(error: Exception, expected: str) -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    task = exceptions.RayTaskError("f", "Traceback\nTold", error, proctitle="p", pid=1, ip="10.0.0.1")
    for found in (task, task.as_instanceof_cause()):
        verdict = judge(Evidence(errors={0: found}))
        assert verdict.outcome == expected
        assert not isinstance(error, UserError) or verdict.cause is error


def test_a_train_that_could_not_start_is_a_lost_worker() -> None:
    train = pytest.importorskip("ray.train")
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    verdict = judge(Evidence(fit_error=train.ControllerError(WorkerGroupStartupTimeoutError(2))))
    assert (verdict.outcome, verdict.ranks) == ("worker_lost", ())
    assert judge(Evidence(fit_error=train.ControllerError(actor_died("its node has died")))).outcome == "worker_lost"


def test_what_a_worker_said_itself_goes_before_what_ray_says_of_it() -> None:
    told = worker_group_error({0: actor_died(DIED.format(kind="SYSTEM_ERROR"))})
    assert outcome(NotFinite("m", step=3), fit_error=told) == "not_finite"


# --- when to wait for others ------------------------------------------------------------------------------------------


def test_the_end_is_waited_for_as_long_as_its_cause_may_take() -> None:
    def patience(errors: dict[int, BaseException], **values: Any) -> float:
        return patience_s(Evidence(errors=errors, **values))

    assert patience({0: NotFinite("m"), 1: NotFinite("m")}) == ALIKE_S, "all ranks raise it, some after a save"
    assert patience({0: CheckpointDamaged("m")}) == ALIKE_S
    assert patience({0: CLOSED}) == LOST_PEER_S, "the peer's node may be gone"
    assert patience({0: CLOSED}, lost_nodes=("n",)) == CAUSE_S, "which is known by then"
    assert patience({0: CLOSED}, deaths=(Death(rank=1, node_id="n"),)) == CAUSE_S
    assert patience({0: ShardLost("m")}) == CAUSE_S, "its peers wait for it"
    assert patience({0: NotFinite("m"), 1: CLOSED}) == CAUSE_S
    assert patience({}) == CAUSE_S
