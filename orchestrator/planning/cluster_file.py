"""A cluster file: pools of like nodes in YAML, so that a run can be planned and simulated before it has them.

pools:
  - name: dcu
    accelerator: dcu
    nodes: 512
    devices_per_node: 4
    memory_gib: 16
    tflops: {fp32: 12.0}
    node_link_gb_per_s: 6
    price_per_device_hour: 0.4
    node_mtbf_hours: 6300
    repair_hours: 24

What a reader needs and a pool does not say is asked for by that reader: `required` names it with its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from orchestrator.config_section import Count, Positive, Section
from orchestrator.errors import UserError
from orchestrator.recipe_file import Document, parse, read

Dtype = Literal["fp32", "bf16", "fp16"]
NotNegative = Annotated[float, Field(ge=0)]


class Spot(Section):
    """Nodes that their owner may take back."""

    reclaimed_after_hours: Positive
    """Mean time that a node stays."""
    notice_s: NotNegative = 120.0
    """From being told to the end."""
    back_after_hours: Positive = 1.0
    """Mean time until another node takes the place."""


class Stragglers(Section):
    """Nodes that compute more slowly for a time."""

    mtbf_hours: Positive
    """Mean time between two such times of one node."""
    factor: float = Field(gt=1)
    """How many times as long its steps take then."""
    mean_hours: Positive = 1.0
    """How long it stays so."""


class Pool(Section):
    """Nodes with like devices, between which a plan may stretch."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    accelerator: Literal["cuda", "dcu", "cpu"] = "cuda"
    nodes: Count
    devices_per_node: Count
    """Devices that take one worker each."""
    spare_nodes: int = Field(default=0, ge=0)
    """Held beside `nodes`, to take the place of those that fail."""
    memory_gib: Positive | None = None
    """Of a device; of a CPU worker its share of the node's memory."""
    tflops: dict[Dtype, Positive] = Field(default_factory=dict)
    """10^12 operations a second of a device in dense matrix products, by dtype."""
    efficiency: float = Field(default=0.4, gt=0, le=1)
    """Of that, what training reaches."""
    device_link_gb_per_s: Positive | None = None
    """One way between two devices of a node; None: as between nodes."""
    node_link_gb_per_s: Positive | None = None
    """One way between two nodes, the share of one device."""
    node_link_latency_us: Positive = 20.0
    price_per_device_hour: NotNegative = 0.0
    """In any currency, the same for all pools."""
    node_mtbf_hours: Positive | None = None
    """Mean time between two failures of one node that take it out of the cluster. Without it, no node fails."""
    process_mtbf_hours: Positive | None = None
    """Mean time between two failures on one node that end a worker and leave the node usable."""
    repair_hours: Positive = 24.0
    """Mean time until a failed node, or another in its place, is back."""
    spot: Spot | None = None
    stragglers: Stragglers | None = None

    @property
    def devices(self) -> int:
        """Without those of spare nodes."""
        return self.nodes * self.devices_per_node


class StorageSpeed(Section):
    """Of the storage that checkpoints lie on, as all nodes together see it."""

    write_gb_per_s: Positive
    read_gb_per_s: Positive


class Cluster(Section):
    format: Literal[1] = 1
    pools: tuple[Pool, ...] = Field(min_length=1)
    storage: StorageSpeed | None = None

    @field_validator("pools")
    @classmethod
    def names_differ(cls, pools: tuple[Pool, ...]) -> tuple[Pool, ...]:
        names = [pool.name for pool in pools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two pools are named {twice}")
        return pools


def load_cluster(path: str) -> Cluster:
    """Read a cluster file.

    Raises:
        UserError: with the file, line and dotted name of each wrong value, and the nearest right name for a wrong key.
    """
    document = parse(path, read(path, "cluster file"), "cluster file")
    try:
        return Cluster.model_validate(document.values)
    except ValidationError as error:
        raise _explain(document, error) from None


def required(pool: Pool, key: str, what_for: str) -> Any:
    """A value that a pool may leave out, where it cannot be done without.

    Raises:
        UserError: the pool does not say it.
    """
    value = getattr(pool, key)
    if value is None or value == {}:
        raise UserError(
            f"pool {pool.name} has no {key}, which {what_for} needs", f"add {key} to it in the cluster file"
        )
    return value


_SECTIONS: Mapping[str, type[Section]] = {
    "pools": Pool,
    "spot": Spot,
    "stragglers": Stragglers,
    "storage": StorageSpeed,
}


def _explain(document: Document, error: ValidationError) -> UserError:
    messages, hint = [], ""
    for item in error.errors():
        location = tuple(str(part) for part in item["loc"])
        dotted, place = ".".join(location), document.place_of(location)
        if item["type"] == "extra_forbidden":
            section = next((_SECTIONS[part] for part in reversed(location[:-1]) if part in _SECTIONS), Cluster)
            hint = hint or _nearest(location[-1], list(section.model_fields))
            messages.append(f"{place} {dotted} is not a key of a cluster file")
        elif item["type"] == "missing":
            messages.append(f"{place} {dotted} is missing")
        else:
            text = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], (dict, list)) else f"={item['input']}"
            messages.append(f"{place} {dotted}{value}: {text[0].lower()}{text[1:]}")
    return UserError("\n       ".join(messages), hint)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
