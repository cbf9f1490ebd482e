"""Recipe: the one YAML file a user writes. Read, checked and frozen here, before anything is started.

`load_recipe(path, overrides)` is the only way in. The text under a field is its documentation: it feeds the JSON
schema and the messages.
"""

from __future__ import annotations

import difflib
import json
import re
import sysconfig
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import UserError
from orchestrator.recipe_file import Document, Place, parse, read


def _settled_path(path: str) -> str:
    """Absolute, so that workers and later commands mean the same place.

    `${site_packages}` and s3:// stay as written.
    """
    if "://" in path or path.startswith("${"):
        return path
    try:
        return str(Path(path).expanduser().absolute())
    except (RuntimeError, ValueError) as error:
        raise ValueError(str(error)) from None


_HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*@[\w./-]+")


def is_hub_model(path: str) -> bool:
    """Whether a `model.path` is `org/name@revision`."""
    return _HUB_MODEL.fullmatch(path) is not None


def _settled_model(path: str) -> str:
    return path if is_hub_model(path) else _settled_path(path)


def _settled_tokens(tokens: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(tokens, str):
        return tokens if tokens == "galactica" else _settled_path(tokens)
    if blank := [token for token in tokens if token != token.strip() or "\n" in token]:
        raise ValueError(f"{blank[0]!r} has blanks around it")
    if len(set(tokens)) != len(tokens):
        raise ValueError("a token stands there twice")
    return tokens


ModelPath = Annotated[str, Field(min_length=1), AfterValidator(_settled_model)]
AddedTokens = Annotated[str, Field(min_length=1)] | tuple[Annotated[str, Field(min_length=1)], ...]
InputPath = Annotated[str, Field(min_length=1), AfterValidator(_settled_path)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


SourceFormat = Literal[
    "auto",
    "jsonl",
    "parquet",
    "text",
    "markdown",
    "html",
    "latex",
    "jats",
    "tei",
    "s2orc",
    "pdf",
    "code",
    "docstrings",
    "metadata",
]


class Source(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    path: InputPath
    """File, directory or glob, on a local path or s3://. `${site_packages}` stands for the running Python's."""
    include: tuple[str, ...] = ()
    """File name patterns to take from a directory; empty takes every format that Terrane reads."""
    format: SourceFormat = "auto"
    """auto goes by each file's name, then by its content. docstrings takes the documentation out of Python sources."""
    select: Literal["all", "abstract_introduction_conclusion"] = "all"
    """What of a paper is kept: everything, or what AstroLLaMA was trained on."""
    text_field: str = Field(default="text", min_length=1)
    """Of JSON Lines and Parquet: the field that holds the text, as Markdown or plain."""


class MixtureStage(Section):
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """Share of every batch by source; they are scaled to add up to 1. A source that is not named gets none."""
    tokens: int | None = Field(default=None, ge=1)
    """How long the stage lasts. None, for the last one: to the end."""

    @model_validator(mode="after")
    def something_is_drawn(self) -> Self:
        total = sum(self.weights.values())
        if not total:
            raise ValueError("every weight is 0")
        if small := [name for name, weight in self.weights.items() if 0 < weight < total / 1e4]:
            raise ValueError(f"the weight of {small[0]} is below 1/10000 of the batch")
        return self


class QualityConfig(Section):
    """Documents outside of these limits are dropped, each with its reason; null turns a rule off.

    The defaults let papers, textbooks and technical documentation through, with their tables, code and formulas. Words
    are what stands between blanks; rules on words skip text in scripts that write none, as Chinese.
    """

    min_characters: Count | None = 200
    max_characters: Count | None = None
    min_mean_word_length: Positive | None = 2.5
    """Characters. Broken scans fall below: single letters, specks. Gopher takes 3."""
    max_mean_word_length: Positive | None = 30.0
    """Characters. Encoded data and lists of links lie above; documentation with many links reaches 25, papers 7. Gopher
    takes 10."""
    min_plain_word_share: Share | None = 0.2
    """Of words that are two letters or more and nothing else, punctuation around them aside. Papers have 0.65 and more,
    code 0.3; specks that were read as text, and tables of numbers, have less."""
    min_prose_share: Share | None = 0.04
    """Of words that end a sentence or are function words of a larger language in Latin script. Prose has 0.3, terse
    documentation 0.1, a list of names next to nothing. Text in other scripts passes."""
    max_digit_share: Share | None = 0.4
    """Of the characters that are not blank. Papers have 0.05."""
    max_symbol_word_ratio: Positive | None = 0.2
    """Hashtags and ellipses per word. Gopher takes 0.1."""
    max_short_line_share: Share | None = 0.8
    """Of words that stand in lines of 3 words at most, as in menus and lists of names. Papers have 0.02, reference
    documentation up to 0.5."""
    max_bullet_line_share: Share | None = 0.9
    """Of lines that are list items (Gopher)."""
    max_ellipsis_line_share: Share | None = 0.3
    """Of lines that break off in an ellipsis (Gopher)."""
    max_duplicate_line_share: Share | None = 0.6
    """Of the text's characters, in lines that stood there before. The reference of an API repeats up to 0.6, papers
    0.05; Gopher takes 0.2. A repeated paragraph is repeated lines."""
    max_top_ngram_share: Share | None = 0.3
    """Of the characters of a sample in its commonest sequence of 2, 3 or 4 words. Gopher takes 0.20, 0.18 and 0.16."""
    max_unbroken_share: Share | None = 0.3
    """Of the characters in words of more than 200, such as embedded images and minified code; marked sequences such as
    [START_DNA] are none."""
    max_replacement_share: Share | None = 0.01
    """Of characters that some conversion before could not read (U+FFFD)."""
    max_compression_ratio: Annotated[float, Field(gt=1)] | None = 12.0
    """Bytes of the text per byte of it compressed (zstd level 1): repetition at any distance. Papers have 2.7."""


class CorpusConfig(Section):
    sources: tuple[Source, ...] = Field(min_length=1)
    mixture: tuple[MixtureStage, ...] = ()
    """Stages of training and their shares by source; without it every document is drawn once an epoch."""
    near_duplicates: Annotated[float, Field(ge=0.3, le=1)] | None = 0.8
    """Of documents whose word 5-grams have this Jaccard similarity or more, the first stays; null keeps them all."""
    duplicate_spans: bool = False
    """Cut passages of 100 bytes or more that an earlier document holds too (Galactica, 2022)."""
    decontaminate: InputPath | None = None
    """Directory of evaluation sets. A document that shares a run of 13 words with one of them is dropped."""
    held_out: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of the documents kept out of training for evaluation."""
    languages: tuple[Annotated[str, Field(pattern="^[a-z]{2}$")], ...] = ()
    """ISO 639-1 codes, as in [en, de]; documents that are surely in another language are dropped. Empty keeps all."""
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def names_are_unique(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources share a name: {', '.join(names)}")
        for stage in self.mixture:
            if unknown := sorted(set(stage.weights) - set(names)):
                raise ValueError(f"mixture names {unknown[0]}, which is no source (sources: {', '.join(names)})")
        if any(stage.tokens is None for stage in self.mixture[:-1]):
            raise ValueError("only the last stage of a mixture may leave out its tokens")
        if self.mixture and self.mixture[-1].tokens is not None:
            raise ValueError("the last stage of a mixture lasts to the end: leave out its tokens")
        return self


class TokenizerConfig(Section):
    path: InputPath | None = None
    """A Hugging Face tokenizer directory; without one it is that of `model.path`, or a byte-level BPE trained on the
    corpus."""
    add: Annotated[AddedTokens, AfterValidator(_settled_tokens)] = ()
    """Tokens for the tokenizer of `model.path` to learn: `galactica` for the special tokens of Galactica, a list of
    tokens, or a file with one a line. Their embeddings begin as the mean of all others (Hewitt, 2021)."""
    vocab_size: int = Field(default=50_000, ge=300)
    """Of the trained tokenizer, special tokens included."""
    sample_mib: int = Field(default=64, ge=1)
    """MiB of text that the tokenizer is trained on, a random sample of the training documents."""


class ModelConfig(Section):
    path: ModelPath | None = None
    """A model to adapt, of the families OPT (Galactica), Llama, Qwen2, Qwen3, Mistral and Aquila: a Hugging Face
    directory, on a path that every node has, or `org/name@revision` of the Hugging Face hub or the mirror that
    HF_ENDPOINT names. Without it, a model is made from random weights."""
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    """Of a model of the hub: what its revision meant when the run began. A run finds and keeps it by itself."""
    preset: Literal["galactica-125m", "galactica-1.3b", "galactica-6.7b", "galactica-30b", "galactica-120b"] | None = (
        None
    )
    """A published size of Galactica, in place of the keys below."""
    architecture: Literal["galactica", "llama", "qwen2", "qwen3", "mistral"] = "galactica"
    """Decoder family. Galactica is an OPT with GeLU, no biases and learned positions; the others have rotary positions
    and gated feed-forward networks."""
    layers: int = Field(default=12, ge=1)
    hidden_size: int = Field(default=768, ge=8)
    heads: int = Field(default=12, ge=1)
    kv_heads: Count | None = None
    """Heads of keys and values, each shared by heads/kv_heads of queries; as many as heads unless given."""
    ffn_size: Count | None = None
    """Inner size of the feed-forward networks; 4 x hidden_size unless given, 8/3 of it where they are gated."""
    tied_embeddings: bool = False
    """Whether input and output embeddings are one matrix. Galactica's always are."""

    @model_validator(mode="after")
    def sizes_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden_size={self.hidden_size}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        rotary = self.architecture != "galactica"
        if rotary and self.hidden_size // self.heads % 2:
            raise ValueError(f"rotary positions need heads of an even size, not {self.hidden_size // self.heads}")
        if not rotary and (self.kv_heads or self.tied_embeddings):
            key = "kv_heads" if self.kv_heads else "tied_embeddings"
            raise ValueError(f"{key} is not for galactica: it has as many heads of keys as of queries, and ties")
        if self.commit and not (self.path and is_hub_model(self.path)):
            raise ValueError("commit is for a model.path of the hub, as in org/name@main")
        return self


class Workers(Section):
    min: int = Field(default=1, ge=1)
    max: int = Field(default=1024, ge=1)

    @model_validator(mode="before")
    @classmethod
    def one_number_means_exactly(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class BatchStretch(Section):
    steps: int = Field(ge=1)
    sequences: int = Field(ge=1, le=10**7)
    """A step."""


class LayoutConfig(Section):
    """How the model is laid over the devices. A checkpoint of one layout goes on in any other."""

    tensor_parallel: Count = 1
    """Devices of one node that share every layer."""
    pipeline_stages: Count = 1
    layers_per_stage: tuple[Count, ...] = ()
    """Decoder blocks of each pipeline stage; the embedding goes with the first and the head with the last. Empty splits
    them evenly."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What DeepSpeed ZeRO splits over the replicas: 1 optimizer state, 2 gradients too, 3 parameters too. Without it 2,
    and 1 under tensor or pipeline parallelism."""
    offload: bool = False
    """Keep the optimizer's state in host memory."""
    recompute: bool = False
    """Keep only the inputs of decoder blocks for the backward pass, and compute the rest again."""


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
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """sdpa takes torch's fastest kernel that fits, which is flash attention on recent GPUs."""
    keep_documents_apart: bool = False
    """Tokens attend only to their own document, in sequences that hold several."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones."""
    keep_every: int | None = Field(default=None, ge=1)
    """Steps. Checkpoints of its multiples are kept for good."""
    keep_best: bool = False
    """Keep the checkpoint of the least held-out loss, too."""
    evaluate_every: Count | None = None
    """Steps. The loss on the held-out split is taken then and at the last step (`evaluation.held_out_sequences`)."""
    workers: Workers = Workers()
    """A number, or {min, max}. One worker drives one device."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for a worker; on a CPU pool this is what a device is."""
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
        if self.keep_best and not self.evaluate_every:
            raise ValueError("keep_best goes by the held-out loss: give evaluate_every")
        if self.profile and not self.profile[0] <= self.profile[1] <= self.steps:
            raise ValueError(f"profile {list(self.profile)} is no range of steps up to steps={self.steps}")
        covered = 0
        for first, last in sorted(self.skip_steps):
            covered = last if first <= covered + 1 <= last else covered
        if covered == self.steps:
            raise ValueError("skip_steps leaves no step")
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

    def tokens(self, step: int) -> int:
        """Tokens of the steps up to this one."""
        sequences, before = 0, 0
        for stretch in self.batch_ramp:
            sequences += max(0, min(step - before, stretch.steps)) * stretch.sequences
            before += stretch.steps
        return (sequences + max(0, step - before) * self.global_batch_size) * self.sequence_length


class EvaluationConfig(Section):
    held_out_sequences: int = Field(default=256, ge=1)
    """Held-out sequences that perplexity is taken on."""


class ServingConfig(Section):
    prompts: tuple[str, ...] = ()
    """`terrane run` serves the exported model once, asks these and records the answers."""
    max_tokens: int = Field(default=32, ge=1)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    cpus_per_replica: float = Field(default=1.0, gt=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        return self


class Fault(Section):
    """A failure to inject once, to see the run survive it."""

    kind: Literal["kill_rank"]
    rank: int = Field(ge=0)
    step: int = Field(ge=1)


class Recipe(Section):
    format: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Of the run: it lives in `<storage>/<name>`."""
    storage: str = Field(default="runs", min_length=1)
    """Local directory (shared by all nodes of a cluster) or s3://bucket/prefix."""
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()
    faults: tuple[Fault, ...] = ()

    def digest_of(self, *sections: str) -> str:
        """Hash of the named values (`corpus`, `train.sequence_length`): what a stage's result depends on."""
        import xxhash

        values = flatten(self.model_dump(mode="json"))
        chosen = {k: v for k, v in values.items() if any(k == s or k.startswith(s + ".") for s in sections)}
        return str(xxhash.xxh3_128_hexdigest(json.dumps(chosen, sort_keys=True).encode()))


# Values that may change between two commands on one run: they steer how the run goes on, not what it computes.
MUTABLE = (
    "storage",
    "evaluation",
    "serving",
    "faults",
    "train.workers",
    "train.layout",
    "train.dtype",
    "train.attention",
    "train.cpus_per_worker",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.evaluate_every",
    "train.spikes",
    "train.check_every",
    "train.profile",
    "train.max_restarts",
    "train.max_lost_shards",
    "train.quarantine",
    # What these decided for the steps that are done may not change: `resume.check_past` sees to it.
    "train.steps",
    "train.schedule",
    "train.decay_steps",
    "train.decay_tokens",
    "train.final_lr_share",
    "corpus.mixture",
    "train.global_batch_size",
    "train.batch_ramp",
    "train.skip_steps",
)


SIZES = ("architecture", "layers", "hidden_size", "heads", "kv_heads", "ffn_size", "tied_embeddings")
"""Keys of a model that is made from random weights."""


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides (`train.lr=1e-4`).

    Raises:
        UserError: with the file, line and dotted name of each wrong value, and the nearest right name for a wrong key.
    """
    document = parse(str(path), read(path))
    for override in overrides:
        document.apply(override)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        raise _explain(document, error) from None
    _refuse_idle_keys(document, recipe)
    return recipe


def _refuse_idle_keys(document: Document, recipe: Recipe) -> None:
    """What a given model, preset or tokenizer decides must not stand beside it, where it would do nothing."""
    model, tokenizer = recipe.model, recipe.tokenizer
    given = "model.path" if model.path else "model.preset" if model.preset else None
    read = "model.path" if model.path else "tokenizer.path" if tokenizer.path else None
    idle = [("tokenizer", key, read) for key in ("vocab_size", "sample_mib") if read]
    idle += [("model", key, given) for key in SIZES if given]
    idle += [("model", "preset", "model.path")] if model.path else []
    for section, key, reason in idle:
        if key in (document.values.get(section) or {}):
            place = document.place_of((section, key))
            raise UserError(f"{place} {section}.{key} does nothing beside {reason}", f"delete {section}.{key}")
    if tokenizer.add and (tokenizer.path or not model.path):
        place = document.place_of(("tokenizer", "add"))
        reason = "beside tokenizer.path" if tokenizer.path else "without model.path"
        hint = "it extends the tokenizer of model.path; a tokenizer that is trained has Galactica's tokens anyway"
        raise UserError(f"{place} tokenizer.add does nothing {reason}", hint)


def changed_values(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines such as `train.lr was 0.001, is 0.002` for values that must not change within a run."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key} was {json.dumps(before.get(key))}, is {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == m or key.startswith(m + ".") for m in MUTABLE)
    ]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole, since their order is their meaning."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def expand_path(path: str) -> str:
    """Replace `${site_packages}`."""
    return path.replace("${site_packages}", sysconfig.get_paths()["purelib"])


_PLAIN = {"tuple_type": "give a list, as in [a, b]", "model_type": "give keys and values, as in {key: value}"}
"""What pydantic says in the words of Python."""


def _explain(document: Document, error: ValidationError) -> UserError:
    messages, hint = [], ""
    places = {item["loc"] for item in error.errors()}
    for item in error.errors():
        if item["type"] == "too_short" and any(loc[: len(item["loc"])] == item["loc"] != loc for loc in places):
            continue  # its entries are there, and wrong
        location = tuple(str(part) for part in item["loc"])
        dotted = ".".join(location)
        if item["type"] == "extra_forbidden":
            known = _fields_at(location[:-1])
            close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
            hint = hint or (f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}")
            message = f"{document.place_of(location)} {dotted} is not a key of a recipe"
        elif item["type"] == "missing":
            message = f"{document.place_of(location)} {dotted} is missing"
        else:
            text = _PLAIN.get(item["type"], item["msg"].removeprefix("Value error, "))
            text = text[0].lower() + text[1:]
            value = "" if isinstance(item["input"], (dict, list)) else f"={json.dumps(item['input'], default=str)}"
            message = f"{document.place_of(location)} {dotted}{value}: {text}"
        messages.append(message)
    return UserError("\n       ".join(messages), hint)


def _fields_at(location: Place) -> list[str]:
    """Names of the fields of the section at a place in a recipe."""
    section: Any = Recipe
    for part in location:
        if part.isdigit():
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)
