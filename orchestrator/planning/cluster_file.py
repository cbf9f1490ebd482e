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

`device: a100-40` takes the figures of a device of devices.toml, or of a platform file (`device: my/node.toml`, relative
to the cluster file), for all that the pool itself does not say. What a reader needs and a pool does not say is asked
for by that reader: `required` names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from orchestrator.config_section import Positive, Section
from orchestrator.errors import UserError
from orchestrator.planning.platform import Device, Dtype, device, device_file
from orchestrator.recipe_file import Document, parse, read

NotNegative = Annotated[float, Field(ge=0)]
MOST = 1_000_000
"""Of nodes, and of devices in one: what is more is a slip of the pen."""


_SHARED = (
    "accelerator",
    "devices_per_node",
    "memory_gib",
    "tflops",
    "efficiency",
    "device_link_gb_per_s",
    "node_link_gb_per_s",
    "node_link_latency_us",
    "price_per_device_hour",
    "node_mtbf_hours",
)
"""Keys that a pool and a device have in common."""


def _device(name: str) -> Device:
    return device_file(name) if name.endswith(".toml") else device(name)


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
    device: str | None = None
    """A device of devices.toml by its name, or a platform file (.toml): it says what the pool does not."""
    accelerator: Literal["cuda", "dcu", "cpu"] = "cuda"
    nodes: int = Field(ge=1, le=MOST)
    devices_per_node: int = Field(ge=1, le=MOST)
    """Devices that take one worker each."""
    spare_nodes: int = Field(default=0, ge=0, le=MOST)
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

    @field_validator("device")
    @classmethod
    def device_is_known(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                _device(name)
            except UserError as error:
                raise ValueError(f"{error.message}; {error.hint}") from None
        return name

    @model_validator(mode="before")
    @classmethod
    def device_fills_in(cls, values: Any) -> Any:
        """A device that is not known is left to its own validator."""
        if not isinstance(values, dict) or not isinstance(values.get("device"), str):
            return values
        try:
            known = _device(values["device"])
        except UserError:
            return values
        told = {key: getattr(known, key) for key in _SHARED}
        return {**{key: value for key, value in told.items() if value is not None}, **values}

    @property
    def devices(self) -> int:
        """Without those of spare nodes."""
        return self.nodes * self.devices_per_node

    @property
    def figures(self) -> Device:
        """What its devices do: of `device`, or of the kind where there is none, with what the pool says itself."""
        known = _device(self.device) if self.device else device(self.accelerator)
        told = {key: getattr(self, key) for key in _SHARED if key in self.model_fields_set}
        if "node_link_gb_per_s" in told and not self.device:
            told.setdefault("device_link_gb_per_s", None)
        among = {key: value for key, value in told.items() if key in Device.model_fields}
        values = {key: value for key, value in among.items() if value != getattr(known, key)}
        sources = known.sources | dict.fromkeys(values, "The cluster file")
        return known.model_copy(update={**values, "sources": sources})


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
    _settle_device_files(document.values, Path(path).parent)
    try:
        return Cluster.model_validate(document.values)
    except ValidationError as error:
        raise _explain(document, error) from None


def _settle_device_files(values: dict[str, Any], folder: Path) -> None:
    pools = values.get("pools")
    for pool in pools if isinstance(pools, list) else []:
        name = pool.get("device") if isinstance(pool, dict) else None
        if isinstance(name, str) and name.endswith(".toml"):
            pool["device"] = str(folder / name)


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


_PLAIN = {"too_short": "give one at least", "tuple_type": "give a list", "model_type": "give keys and values"}
"""What pydantic says in the words of Python."""


def _explain(document: Document, error: ValidationError) -> UserError:
    messages, hint = [], ""
    places = {item["loc"] for item in error.errors()}
    for item in error.errors():
        if any(place[: len(item["loc"])] == item["loc"] != place for place in places):
            continue  # what is in it is wrong
        location = tuple(str(part) for part in item["loc"])
        dotted, place = ".".join(location), document.place_of(location)
        if item["type"] == "extra_forbidden":
            section = next((_SECTIONS[part] for part in reversed(location[:-1]) if part in _SECTIONS), Cluster)
            hint = hint or _nearest(location[-1], list(section.model_fields))
            messages.append(f"{place} {dotted} is not a key of a cluster file")
        elif item["type"] == "missing":
            messages.append(f"{place} {dotted} is missing")
        else:
            text = _PLAIN.get(item["type"], item["msg"].removeprefix("Value error, "))
            value = "" if isinstance(item["input"], (dict, list)) else f"={item['input']}"
            messages.append(f"{place} {dotted}{value}: {text[0].lower()}{text[1:]}")
    return UserError("\n       ".join(messages), hint)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
