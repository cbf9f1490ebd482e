"""How an attempt lays a model over devices: the layout, its sizes, and the nodes that its workers stand on."""

from __future__ import annotations

from dataclasses import dataclass, fields

from orchestrator.data.schedule import Role
from orchestrator.planning.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Plan:
    accelerator: str
    node_ids: tuple[str, ...]
    """Nodes that workers stand on, in the order of their ranks."""
    workers_by_node: tuple[int, ...]
    """Of each of `node_ids`."""
    data_parallel: int
    pipeline_stages: int = 1
    tensor_parallel: int = 1
    layers_per_stage: tuple[int, ...] = ()
    """Decoder blocks; the embedding goes with the first and the head with the last. Empty: all in one stage."""
    zero_stage: int = 2
    offload: bool = False
    """Keep the optimizer's state in host memory."""
    recompute: bool = False
    """Keep the inputs of decoder blocks only, and compute the rest again in the backward pass."""
    micro_batch_size: int
    """Sequences."""
    accumulation: int
    """Micro-batches of the largest share of the largest global batch."""
    dtype: str
    parameters: int
    memory_bytes: int
    """Predicted, a worker."""
    available_bytes: int = 0
    """That a worker has."""
    step_time_s: float
    """Predicted."""
    trial: bool = False
    """Whether another layout is tried after some steps."""
    reason: str = ""
    losers: tuple[str, ...] = ()
    """The best of the other layouts, each with why it lost."""

    @property
    def workers(self) -> int:
        return self.data_parallel * self.pipeline_stages * self.tensor_parallel

    @property
    def placement(self) -> tuple[tuple[str, int], ...]:
        """(node id, workers there), in the order of their ranks."""
        return tuple(zip(self.node_ids, self.workers_by_node, strict=True))

    @property
    def in_full(self) -> str:
        """What it runs as and where: two plans with the same words are the same."""
        return f"{self} on {', '.join(f'{node_id[:12]} ({count})' for node_id, count in self.placement)}"

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline stage, data-parallel rank, tensor-parallel rank) of a worker: those of a tensor-parallel group are
        neighbours."""
        replica, tensor_rank = divmod(rank, self.tensor_parallel)
        return *divmod(replica, self.data_parallel), tensor_rank

    def role(self, rank: int) -> Role:
        stage, data_rank, tensor_rank = self.coordinates(rank)
        return Role(data_rank, self.shares, stage, self.pipeline_stages, tensor_rank)

    def blocks(self, stage: int, layers: int) -> range:
        """The decoder blocks of a pipeline stage, of a model with so many."""
        counts = self.layers_per_stage or (layers,)
        first = sum(counts[:stage])
        return range(first, first + counts[stage])

    @property
    def layout(self) -> Layout:
        return Layout(**{field.name: getattr(self, field.name) for field in fields(Layout)})

    @property
    def shares(self) -> tuple[int, ...]:
        """Of the global batch by data-parallel rank, relative to each other: like devices take alike."""
        return (1,) * self.data_parallel

    def __str__(self) -> str:
        return (
            f"{self.workers} {self.accelerator} worker{'s' if self.workers > 1 else ''}, {self.layout}, "
            f"micro-batch {self.micro_batch_size} x accumulation {self.accumulation}, {self.dtype}"
        )
