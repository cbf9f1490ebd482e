"""The errors a user can cause or must act on. Everything else is a bug and keeps its traceback."""

from typing import Any


class UserError(Exception):
    """The user's input is wrong: exit code 2, no traceback.

    Args:
        message: names the value, and the place where it stands where there is one.
        hint: the next step, one line.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["UserError"], tuple[Any, ...]]:
        return type(self), (self.message, self.hint)


class PlanError(UserError):
    """No layout of the model fits the devices; the message says what is short and the hint what would do."""


class CapacityError(PlanError):
    """Only the number of devices is short: a plan could be made if more were there.

    Args:
        missing: what is short, as in "2 more devices: 2 of the 4 that train.workers.min asks for are there".
    """

    def __init__(self, message: str, hint: str = "", missing: str = "") -> None:
        super().__init__(message, hint)
        self.missing = missing

    def __reduce__(self) -> tuple[type["UserError"], tuple[Any, ...]]:
        return type(self), (self.message, self.hint, self.missing)


class StorageError(UserError):
    """A storage URI cannot be read or written as asked."""


class LastingStorageError(StorageError):
    """It stays so however often it is tried: something else is to be asked for."""


class ShardLost(StorageError):
    """A shard of the corpus is missing or damaged, and stays so.

    Args:
        shard: its name in the corpus directory.
    """

    def __init__(self, message: str, hint: str = "", shard: str = "") -> None:
        super().__init__(message, hint)
        self.shard = shard

    def __reduce__(self) -> tuple[type["UserError"], tuple[Any, ...]]:
        return type(self), (self.message, self.hint, self.shard)


class CheckpointDamaged(StorageError):
    """A checkpoint does not hold what was committed.

    Args:
        step: of the checkpoint, where it is known.
    """

    def __init__(self, message: str, hint: str = "", step: int | None = None) -> None:
        super().__init__(message, hint)
        self.step = step

    def __reduce__(self) -> tuple[type["UserError"], tuple[Any, ...]]:
        return type(self), (self.message, self.hint, self.step)


class SilentCorruption(UserError):
    """A device computes wrong numbers: replicas that had the same to compute differ.

    Args:
        step: after which it showed.
        suspects: rank, host, Ray's node_id, and sure: whether a majority stands against it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", step: int = 0, suspects: tuple[dict[str, Any], ...] = ()) -> None:
        super().__init__(message, hint)
        self.step = step
        self.suspects = suspects

    def __reduce__(self) -> tuple[type["UserError"], tuple[Any, ...]]:
        return type(self), (self.message, self.hint, self.step, self.suspects)


class DataOrderError(Exception):
    """Other samples arrived than the schedule says. They are refused; the attempt ends, the next reads them anew."""


class PeerFailed(Exception):
    """Another rank has failed, and says itself why; this one cannot go on without it."""


class RunFailed(UserError):
    """The input was fine and the run still ended without its result: exit code 1."""

    exit_code = 1


class StepFailed(RunFailed):
    """A step of training went wrong by what it computed, on every rank alike.

    Args:
        step: which.
    """

    def __init__(self, message: str, hint: str = "", step: int = 0) -> None:
        super().__init__(message, hint)
        self.step = step

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, int]]:
        return type(self), (self.message, self.hint, self.step)


class NotFinite(StepFailed):
    """The loss or the gradient norm of a step is no number; the message names the ranks that it comes from."""


class LossSpike(StepFailed):
    """The loss jumped, and training is to go back behind the step."""


class Interrupted(RunFailed):
    """The user stopped the run (Ctrl-C or `terrane stop`); the same command goes on."""

    exit_code = 130
