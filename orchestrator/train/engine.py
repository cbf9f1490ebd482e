"""The training engine: a model under DeepSpeed behind one interface (start or load, step, evaluate, save).

ZeRO 0 to 3 with or without offload, tensor parallelism, and pipelines of both. Imports no Ray: it runs in a Ray Train
worker and under torchrun alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.accelerators import Accelerator
from orchestrator.data.schedule import Share
from orchestrator.planning.deepspeed_config import deepspeed_config
from orchestrator.planning.plan import Plan
from orchestrator.train import checkpoints, pipeline, zero
from orchestrator.train.fragments import PARAM, Fragment
from orchestrator.train.memory_copies import Copies
from orchestrator.train.profiling import labelled
from orchestrator.train.saver import Saver, Timing
from orchestrator.train.stage import NOT_A_TARGET, Part, Stage, document_numbers
from orchestrator.train.state_bytes import StateBytes, state_bytes
from orchestrator.train.tensor_parallel import ALONE, TensorGroup
from orchestrator.train.timing import ForwardTimer
from orchestrator.train_config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Accept = Callable[[float, float], bool]
"""Called on every rank with the same (loss, gradient norm) before an update; False drops it."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    """Mean over the targets of the global batch, in nats, before the update."""
    grad_norm: float
    """Of the global gradient, before clipping; infinite where it has none."""
    applied: bool
    """Whether the update was made: it is not where it was not accepted, nor where the gradient is not finite."""
    flag: int
    """The greatest that any rank raised."""
    broken_ranks: tuple[int, ...]
    """Those whose loss is not finite."""
    forward_s: tuple[float, ...]
    """By rank: what a sequence took in the forward passes of its stage; NaN where it was not measured."""
    sample_losses: np.ndarray | None
    """Mean over the targets of each sequence of this rank's share, float32; None on ranks that compute no loss, and on
    all but the first of a tensor-parallel group."""


class Engine:
    """One rank's part of the training state.

    The loss is the sum over target tokens divided by the targets of the *global* batch: the same whatever the layout.

    Args:
        model: configuration of the model, of transformers.
        document_end: token that ends a document, to keep the documents of a sequence apart; None lets them see each
            other.
    """

    def __init__(
        self, model: Any, config: TrainConfig, plan: Plan, accelerator: Accelerator, document_end: int | None = None
    ) -> None:
        self._config = config
        self._plan = plan
        self._device = torch.device(accelerator.torch_device)
        self._document_end = document_end
        self._stage_number, self._data_rank, self._tensor_rank = plan.coordinates(dist.get_rank())
        self._pipelined = plan.pipeline_stages > 1
        zero.attach(accelerator.backend)
        self._build(model)
        self._state.guard(self._judge)
        self._engine.optimizer.step = labelled("optimizer")(self._engine.optimizer.step)

    def _build(self, model: Any) -> None:
        plan = self._plan
        grid = pipeline.grid(plan) if plan.tensor_parallel > 1 else None
        self._stage = stage = Stage(
            model,
            plan.blocks(self._stage_number, model.num_hidden_layers),
            dtype=DTYPES[plan.dtype],
            tensor=TensorGroup(grid.get_slice_parallel_group(), self._tensor_rank, plan.tensor_parallel)
            if grid
            else ALONE,
            recompute=plan.recompute,
            attention=self._config.attention,
        )
        values = deepspeed_config(self._config, plan, sum(math.prod(p.box.lengths) for p, _ in stage.parts()))
        settle = functools.partial(zero.split, config=values, grid=grid) if plan.zero_stage == 3 else None
        stage.materialize(self._device, settle)
        parts = list(stage.parts())
        optimizer = torch.optim.AdamW(
            parameter_groups(parts, self._config.weight_decay), lr=self._config.lr, betas=self._config.betas, fused=True
        )
        self._module = pipeline.pipeline_module(stage, plan, self._pipeline_loss) if self._pipelined else stage
        self._engine = zero.initialize(self._module, optimizer, values, None if self._pipelined else grid)
        self._state = zero.optimizer_state(self._engine, parts, self._config.clip_norm)
        self._timer = ForwardTimer(stage, self._device)

    # --- what integrity.py looks at -----------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def keeps_documents_apart(self) -> bool:
        return self._document_end is not None

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, weights: Any) -> None:
        """Begin from a model's weights (orchestrator.train.weights)."""
        with torch.no_grad():
            for fragment in self._state.fragments():
                fragment.tensors[PARAM].copy_(weights.read(fragment.name, fragment.box))
            self._state.refresh()

    def load(self, directory: str, commit: checkpoints.Commit, copies: Copies | None = None) -> None:
        """Take over the state of a checkpoint that any layout wrote; see checkpoints.load."""
        with torch.no_grad():
            checkpoints.load(directory, commit, self._state.fragments(), copies)
            self._state.set_step(commit.position.updates)
            self._state.refresh()
        if self.loss_scale and commit.position.loss_scale:
            self._state.set_loss_scale(commit.position.loss_scale)

    @property
    def loss_scale(self) -> float | None:
        """That fp16 training multiplies its loss with at present; None in other precisions."""
        return float(self._engine.optimizer.loss_scale) if self._plan.dtype == "fp16" else None

    def save(self, saver: Saver, position: checkpoints.Position, held_out_loss: float | None = None) -> Timing:
        """Begin to commit a checkpoint; see Saver.save."""
        return saver.save(position, self.fragments(), held_out_loss)

    def fragments(self) -> list[Fragment]:
        """What this rank writes of a checkpoint: together the ranks write everything once."""
        others = {part.name for part, parameter in self._state.parts if not self._writes(part, parameter)}
        return [fragment for fragment in self._state.fragments() if fragment.name not in others]

    def _writes(self, part: Part, parameter: torch.nn.Parameter) -> bool:
        if part.box.lengths == part.shape and self._tensor_rank:
            return False  # every rank of the tensor-parallel group holds it
        if self._plan.zero_stage == 0 and self._data_rank:
            return False  # every replica holds it
        return self._stage.first or parameter is not self._stage.tied_copy

    def state_bytes(self) -> StateBytes:
        """What this rank holds of weights, gradients and optimizer states at present."""
        return state_bytes(self._engine)

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(self, share: Share, lr: float, flag: int = 0, accept: Accept | None = None) -> StepResult:
        """One optimizer step on this rank's share of the global batch.

        Args:
            flag: the greatest of all ranks comes back on all, on the collective that sums the loss.
            accept: judges the update before it is made; without it every finite one is.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        count = math.ceil(share.largest / self._plan.micro_batch_size)
        # DeepSpeed averages over replicas, and a pipeline over micro-batches: the loss shall be a sum over targets.
        self._scale = self._plan.data_parallel / share.targets * (count if self._pipelined else 1)
        judgement = self._judgement = _Judgement(share.targets, flag, accept)
        self._timer.restart()
        batches = self._micro_batches(share.tokens, share.counted, count)
        if self._pipelined:
            with labelled("forward-backward"):  # the update is made within
                pipeline.train_batch(self._engine, batches, count)
        else:
            for number, (inputs, labels) in enumerate(batches, 1):
                self._engine.set_gradient_accumulation_boundary(number == count)
                with labelled("forward-backward"):
                    losses = self._losses(self._engine(inputs), labels)
                    self._engine.backward(losses.sum() * self._scale, scale_wrt_gas=False)
                self._engine.step()
        if not judgement.gathered:  # of a gradient that overflows in fp16 DeepSpeed takes no norm
            self._judge(math.inf)
        return StepResult(
            loss=judgement.loss,
            grad_norm=judgement.grad_norm,
            applied=judgement.applied,
            flag=int(max(judgement.flags)),
            broken_ranks=tuple(rank for rank, value in enumerate(judgement.sums) if not math.isfinite(value)),
            forward_s=tuple(judgement.forward_s),
            sample_losses=None if self._tensor_rank else _sample_losses(judgement.losses, share, count),
        )

    def evaluate(self, tokens: np.ndarray | None, counted: np.ndarray | None, sequences: int) -> tuple[float, int]:
        """The sum over the targets of all ranks of the cross entropy, in nats, and their number.

        Args:
            tokens: [at most `sequences`, sequence_length]; None on ranks whose role reads no data.
            counted: bool like tokens: False for those that are no targets. None: all are.
            sequences: of the largest part; the same on every rank.
        """
        count = math.ceil(sequences / self._plan.micro_batch_size)
        judgement = self._judgement = _Judgement(1, 0, None)
        batches = self._micro_batches(tokens, counted, count)
        if self._pipelined:
            pipeline.eval_batch(self._engine, batches, count)
        else:
            self._engine.eval()
            with torch.no_grad():
                for inputs, labels in batches:
                    self._losses(self._engine(inputs), labels)
            self._engine.train()
        targets = 0 if tokens is None or not judgement.losses else _targets(tokens, counted).sum()
        sums, numbers = self.gathered(self._loss_sum(), float(targets) if self._tensor_rank == 0 else 0.0)
        return sum(sums), int(sum(numbers))

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = self._stage.losses(logits, labels)
        self._judgement.losses.append(losses.detach())
        return losses

    def _pipeline_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = self._losses(logits, labels)
        return losses.sum() * self._scale if torch.is_grad_enabled() else losses.sum()

    def _judge(self, norm: float) -> bool:
        """Before the update: exchange the losses of all ranks, then decide, on all alike."""
        judgement = self._judgement
        own = self._loss_sum(), float(judgement.flag), self._timer.seconds_a_sequence()
        judgement.sums, judgement.flags, judgement.forward_s = self.gathered(*own)
        judgement.loss, judgement.grad_norm = sum(judgement.sums) / judgement.targets, norm
        finite = math.isfinite(judgement.loss) and math.isfinite(norm)
        accepted = judgement.accept is None or judgement.accept(judgement.loss, norm)
        judgement.applied = finite and accepted
        return judgement.applied

    def _loss_sum(self) -> torch.Tensor | float:
        """Of this rank's micro-batches; the first of a tensor-parallel group speaks for it."""
        losses = self._judgement.losses
        return torch.cat(losses).sum(dtype=torch.float64) if losses and self._tensor_rank == 0 else 0.0

    def gathered(self, *values: torch.Tensor | float) -> list[list[float]]:
        """Each value of every rank, by rank."""
        own = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self._device) for v in values])
        world = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(world, own)
        return torch.stack(world).T.tolist()

    def _micro_batches(
        self, tokens: np.ndarray | None, counted: np.ndarray | None, count: int
    ) -> Iterator[tuple[Any, torch.Tensor]]:
        """(inputs, labels) of micro-batches, on the device."""
        rows = self._plan.micro_batch_size if self._pipelined else 1
        for batch, labels in micro_batches(tokens, counted, count, rows):
            inputs = batch.to(self._device)
            documents = None if self._document_end is None else document_numbers(inputs, self._document_end)
            yield inputs if documents is None else (inputs, documents), labels.to(self._device)


@dataclass
class _Judgement:
    """What becomes known in the course of a step."""

    targets: int
    flag: int
    accept: Accept | None
    losses: list[torch.Tensor] = field(default_factory=list)
    """Sums over the targets of every sequence, by micro-batch."""
    sums: list[float] = field(default_factory=list)
    """Of the losses, by rank."""
    flags: list[float] = field(default_factory=list)
    forward_s: list[float] = field(default_factory=list)
    """A sequence, by rank."""
    loss: float = math.nan
    grad_norm: float = math.nan
    applied: bool = False

    @property
    def gathered(self) -> bool:
        return bool(self.sums)


def micro_batches(
    tokens: np.ndarray | None, counted: np.ndarray | None, count: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels) int64 of a share in as many parts as every other rank's share has.

    The parts differ by one sequence at most, and are filled up to `rows` with sequences that count for nothing: each
    part is a collective that all ranks take part in.
    """
    assert tokens is not None, "the role reads data"
    masks = [None] * count if counted is None else np.array_split(counted, count)
    for part, mask in zip(np.array_split(tokens, count), masks, strict=True):
        size = max(len(part), rows)
        batch = torch.zeros((size, tokens.shape[1]), dtype=torch.int64)
        labels = torch.full_like(batch, NOT_A_TARGET)
        batch[: len(part)] = torch.from_numpy(part.astype(np.int64))
        labels[: len(part)] = batch[: len(part)]
        if mask is not None:
            labels[: len(part)][torch.from_numpy(~mask)] = NOT_A_TARGET
        yield batch, labels


def _sample_losses(losses: list[torch.Tensor], share: Share, count: int) -> np.ndarray | None:
    if not losses or share.tokens is None:
        return None
    sizes = [len(part) for part in np.array_split(share.tokens, count)]
    sums = torch.cat([sums[:size] for sums, size in zip(losses, sizes, strict=True)]).cpu().numpy()
    means: np.ndarray = sums / np.maximum(_targets(share.tokens, share.counted), 1)
    return means.astype(np.float32)


def _targets(tokens: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    """Number of targets of each sequence: its first token is none."""
    if counted is None:
        return np.full(len(tokens), tokens.shape[1] - 1)
    return np.asarray(counted[:, 1:].sum(1))


def parameter_groups(parts: zero.Parts, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms and biases) do not."""
    groups = [
        {"params": [p for part, p in parts if len(part.shape) >= 2], "weight_decay": weight_decay},
        {"params": [p for part, p in parts if len(part.shape) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
