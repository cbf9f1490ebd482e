"""The `train` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config_section import Beta, Count, Positive, Section


class Workers(Section):
    min: int = Field(default=1, ge=1)
    max: int | None = Field(default=None, ge=1)
    """Without it, as many as there are devices."""

    @model_validator(mode="before")
    @classmethod
    def one_number_means_exactly(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class BatchStretch(Section):
    steps: int = Field(ge=1)
    sequences: int = Field(ge=1, le=10**7)
    """A step."""


class LayoutConfig(Section):
    """How the model is laid over the devices. What is left out is the planner's choice: the fastest that fits, by its
    predictions. A checkpoint of one layout goes on in any other."""

    tensor_parallel: Count | None = None
    """Devices of one node that share every layer."""
    pipeline_stages: Count | None = None
    layers_per_stage: tuple[Count, ...] = ()
    """Decoder blocks of each pipeline stage; the embedding goes with the first and the head with the last. Empty splits
    them evenly."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What DeepSpeed ZeRO splits over the replicas: 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload: bool | None = None
    """Keep the optimizer's state in host memory."""
    recompute: bool | None = None
    """Keep only the inputs of decoder blocks for the backward pass, and compute the rest again."""

    @property
    def stages(self) -> int | None:
        return self.pipeline_stages or len(self.layers_per_stage) or None

    @property
    def devices(self) -> int:
        """Of one replica of the model, at least."""
        return (self.tensor_parallel or 1) * (self.stages or 1)


class SpikesConfig(Section):
    """A step whose loss or gradient norm jumps: how it is known, and what becomes of it."""

    action: Literal["record", "skip", "rollback"] = "skip"
    """record: it is noted and named. skip: its update is dropped, too. rollback: training goes back to the last
    checkpoint before it, and passes over the steps around it."""
    threshold: float = Field(default=6.0, gt=0)
    """Robust z-score from which a step is a spike: how far it lies above the steps before it."""
    window: int = Field(default=128, ge=8)
    """Steps that a step is compared with; in the first half of them nothing is a spike."""
    jump: Count = 10
    """Steps that a rollback passes over before the spike, and as many after it."""
    max_rollbacks: int = Field(default=5, ge=0)
    """Of the run; at the next spike it stops."""
    quarantine: int | None = Field(default=None, ge=0)
    """Documents at most that training goes on without after a spike, of samples whose losses stand out; they are left
    out from the next attempt on. null: 3 with rollback, none otherwise."""

    @property
    def most_quarantined(self) -> int:
        if self.quarantine is None:
            return 3 if self.action == "rollback" else 0
        return self.quarantine


_LENGTHS = ("warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens")


class TrainConfig(Section):
    sequence_length: int = Field(default=2048, ge=8)
    """Tokens."""
    global_batch_size: int = Field(default=256, ge=1, le=10**7)
    """Sequences a step, whatever the number of workers."""
    batch_ramp: tuple[BatchStretch, ...] = ()
    """Global batch sizes of the first steps; `global_batch_size` holds after them."""
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """Of the learning rate, after a linear warm-up. wsd (warm-up, stable, decay) stays at `lr` until its decay begins:
    only that depends on the run's end, so that more steps can be given to a run that has not come to it."""
    warmup_steps: int = Field(default=0, ge=0)
    warmup_tokens: Count | None = None
    """The same in tokens. Once a length is given in tokens, the whole schedule goes by tokens; else it goes by steps.
    These differ with a batch ramp."""
    decay_steps: Count | None = None
    """How long the decay of wsd takes, up to the last step; without it and `decay_tokens` a fifth of the run."""
    decay_tokens: Count | None = None
    final_lr_share: float = Field(default=0.1, ge=0, le=1)
    """Share of `lr` at the last step, for every schedule but constant."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto takes bf16 where the device computes it natively, else fp16, and fp32 on a CPU."""
    layout: LayoutConfig = LayoutConfig()
    trials: Count = 1
    """Layouts that are tried on the devices before one is settled on: the best by prediction train for five measured
    steps or more each, one after the other, and the fastest goes on. No step is lost; each takes a checkpoint and a
    restart, which shall not be dear against the run."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """sdpa takes torch's fastest kernel that fits, which is flash attention on recent GPUs."""
    keep_documents_apart: bool = False
    """Tokens attend only to their own document, in sequences that hold several."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    checkpoint_every: Count | Literal["auto"] = 100
    """Steps. auto saves by time, as often as loses least: by what a save turns out to cost and how often the run has
    failed, every half hour at least and for a twentieth of the time at most."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones; and of those that damage, a rollback or a start-over set aside as many, until training is as
    many commits past them. Before a save that would not fit, only the newest one stays."""
    storage_quota_gib: Positive | None = None
    """Of the whole run. A message comes (`notify`) when it, or the file system, has room for fewer than three more
    checkpoints."""
    keep_every: int | None = Field(default=None, ge=1)
    """Steps. Checkpoints of its multiples are kept for good."""
    keep_best: bool = False
    """Keep the checkpoint of the least held-out loss, too."""
    memory_copies: bool | None = None
    """Keep the newest checkpoint in the memory of nodes, too, and read it there after a failure: every node holds what
    its own workers wrote, and those of one other node. That is 24 bytes a parameter over all nodes (12 with one node),
    and up to twice as much during a save; a quarter of a node's memory is the most. What does not fit in is on storage
    only. null: where the storage is S3; a local disk is as fast."""
    evaluate_every: Count | None = None
    """Steps. The loss on the held-out split is taken then and at the last step (`evaluation.held_out_sequences`)."""
    workers: Workers = Workers()
    """A number, or {min, max}. One worker drives one device."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for a worker; on a CPU pool this is what a device is."""
    standby: bool = True
    """Start the workers of the next attempt while the present one trains, so that it begins within seconds. Costs host
    memory: about 0.4 GB a worker, and 0.7 GB where the command runs."""
    max_restarts: int = Field(default=10, ge=0)
    """Attempts after the first before the run is given up. A commit starts the count anew."""
    skip_steps: tuple[tuple[Count, Count], ...] = ()
    """First and last step of ranges to pass over, as in [[1200, 1210]]: their samples are not seen and nothing is
    learned in them. All other steps keep their numbers, samples and learning rates."""
    quarantine: tuple[str, ...] = ()
    """Ids of documents that training goes on without: none of their tokens is seen or counted from now on."""
    max_lost_shards: int = Field(default=0, ge=0)
    """Shards of the corpus that may turn out missing or damaged; training goes on without their samples. With one more
    the run stops at its last checkpoint."""
    spikes: SpikesConfig = SpikesConfig()
    check_every: Count | None = 100
    """Steps. Replicas are compared then, and before every checkpoint, so that a device that computes wrong numbers
    without an error is found; a check takes about as long as one sequence does. null: never."""
    hang_after_s: Positive | None = None
    """Seconds without anything new from any worker, in a step or the wait for its data, after which the attempt counts
    as hanging: the stacks of all workers are kept, and it is restarted. null: ten times the slowest of the recent
    steps, and a minute at least, five where storage is read or written. First times may take half an hour."""
    straggler_ratio: Annotated[float, Field(gt=1)] | None = 1.5
    """A replica whose forward passes take so many times as long as those of the others, for 40 steps, is named as a
    straggler. null: none is looked for."""
    profile: tuple[Count, Count] | None = None
    """First and last step to trace, as in [20, 22]: every rank writes what it did to the attempt's directory."""

    @model_validator(mode="after")
    def something_is_trained(self) -> Self:
        ramp = sum(stretch.steps for stretch in self.batch_ramp)
        if ramp >= self.steps:
            raise ValueError(f"batch_ramp lasts {ramp} steps and must end before steps={self.steps}")
        for first, last in self.skip_steps:
            if not first <= last <= self.steps:
                raise ValueError(f"skip_steps [{first}, {last}] is no range of steps up to steps={self.steps}")
        covered = 0
        for first, last in sorted(self.skip_steps):
            covered = last if first <= covered + 1 <= last else covered
        if covered == self.steps:
            raise ValueError("skip_steps leaves no step")
        return self

    @model_validator(mode="after")
    def steps_go_together(self) -> Self:
        if self.keep_best and not self.evaluate_every:
            raise ValueError("keep_best goes by the held-out loss: give evaluate_every")
        every, evaluate_every = self.checkpoint_every, self.evaluate_every
        if self.keep_best and evaluate_every and every != "auto" and evaluate_every % every:
            raise ValueError(
                "keep_best needs a checkpoint where the held-out loss is taken: "
                f"evaluate_every={evaluate_every} is no multiple of checkpoint_every={every}"
            )
        if self.profile and not self.profile[0] <= self.profile[1] <= self.steps:
            raise ValueError(f"profile {list(self.profile)} is no range of steps up to steps={self.steps}")
        return self

    @model_validator(mode="after")
    def rates_fit_the_run(self) -> Self:
        lengths = {key: getattr(self, key) for key in _LENGTHS if getattr(self, key)}
        by_tokens = [key for key in lengths if key.endswith("_tokens")]
        if by_tokens and len(by_tokens) < len(lengths):
            others = ", ".join(key for key in lengths if key not in by_tokens)
            raise ValueError(f"{by_tokens[0]} beside {others}: a schedule goes by tokens or by steps, not by both")
        for key in ("decay_steps", "decay_tokens"):
            if key in lengths and self.schedule != "wsd":
                raise ValueError(f"{key} is for schedule=wsd, and does nothing with schedule={self.schedule}")
        if self.schedule == "constant" and self.final_lr_share != type(self).model_fields["final_lr_share"].default:
            raise ValueError("final_lr_share does nothing with schedule=constant")
        total, unit = (self.tokens(self.steps), "tokens") if by_tokens else (self.steps, "steps")
        if sum(lengths.values()) > total:
            parts = " and ".join(f"{key}={length}" for key, length in lengths.items())
            raise ValueError(f"{parts}: longer than the run, which has {total} {unit}")
        return self

    @property
    def rates_by_tokens(self) -> bool:
        """Whether the learning rate goes by the tokens that were seen, and not by the steps."""
        return self.warmup_tokens is not None or self.decay_tokens is not None

    def saves_at(self, step: int) -> bool:
        """Whether a step is saved whatever the time: with auto the last one, and those that are kept for themselves."""
        if self.checkpoint_every != "auto":
            return step == self.steps or step % self.checkpoint_every == 0
        kept = (self.keep_every, self.evaluate_every if self.keep_best else None)
        return step == self.steps or any(every and step % every == 0 for every in kept)

    def tokens(self, step: int) -> int:
        """Tokens of the steps up to this one."""
        sequences, before = 0, 0
        for stretch in self.batch_ramp:
            sequences += max(0, min(step - before, stretch.steps)) * stretch.sequences
            before += stretch.steps
        return (sequences + max(0, step - before) * self.global_batch_size) * self.sequence_length
