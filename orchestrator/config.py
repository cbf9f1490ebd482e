"""Recipe: the one YAML file a user writes. Read, checked and frozen here, before anything is started.

`load_recipe(path, overrides)` is the only way in. The text under a field is its documentation: it feeds the JSON
schema and the messages.
"""

from __future__ import annotations

import difflib
import json
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from orchestrator.config_section import Section
from orchestrator.corpus_config import CorpusConfig
from orchestrator.errors import UserError
from orchestrator.fault_config import FAULTS, Fault
from orchestrator.model_config import ModelConfig, TokenizerConfig
from orchestrator.notify_config import NotifyConfig
from orchestrator.recipe_file import Document, parse, read
from orchestrator.train_config import TrainConfig


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
    notify: NotifyConfig = NotifyConfig()
    faults: tuple[Fault, ...] = ()
    """Failures to inject, each once."""

    @field_validator("faults")
    @classmethod
    def strike_once_and_in_the_run(cls, faults: tuple[Fault, ...], before: ValidationInfo) -> tuple[Fault, ...]:
        steps = before.data["train"].steps if "train" in before.data else None
        names: set[str] = set()
        for fault in faults:
            if steps is not None and fault.step > steps:
                raise ValueError(f"{fault} at step {fault.step}: the run has {steps} steps")
            if fault.name in names:
                raise ValueError(f"{fault} at step {fault.step} stands twice, and would strike once")
            names.add(fault.name)
        return faults

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
    "notify",
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
    "train.storage_quota_gib",
    "train.memory_copies",
    "train.evaluate_every",
    "train.spikes",
    "train.check_every",
    "train.profile",
    "train.hang_after_s",
    "train.straggler_ratio",
    "train.max_restarts",
    "train.standby",
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
    return _recipe(parse(str(path), read(path)), overrides)


def recipe_of(values: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that stands in no file.

    Raises:
        UserError: as load_recipe does.
    """
    return _recipe(Document("recipe", values, {}), overrides)


def _recipe(document: Document, overrides: Sequence[str]) -> Recipe:
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


_ALTERNATIVE = re.compile(r"constrained-\w+|literal\[.*\]")
_PLAIN = {"tuple_type": "give a list, as in [a, b]", "model_type": "give keys and values, as in {key: value}"}
"""What pydantic says in the words of Python."""


def _explain(document: Document, error: ValidationError) -> UserError:
    messages: list[str] = []
    hint = ""
    places = {item["loc"] for item in error.errors()}
    for item in error.errors():
        if item["type"] == "too_short" and any(loc[: len(item["loc"])] == item["loc"] != loc for loc in places):
            continue  # its entries are there, and wrong
        # pydantic puts the kind of a fault, and the alternatives of a value, in the path
        location = tuple(str(p) for p in item["loc"] if p not in FAULTS and not _ALTERNATIVE.fullmatch(str(p)))
        if item["type"].startswith("union_tag"):
            location = (*location, "kind")
        dotted = ".".join(location)
        if item["type"] == "extra_forbidden":
            hint = hint or _nearest(location[-1], _fields_at(item["loc"][:-1]))
            message = f"{document.place_of(location)} {dotted} is not a key of a recipe"
        elif item["type"] in ("missing", "union_tag_not_found"):
            message = f"{document.place_of(location)} {dotted} is missing"
        elif item["type"] == "union_tag_invalid":
            hint = hint or _nearest(str(item["ctx"]["tag"]), list(FAULTS))
            message = f"{document.place_of(location)} {dotted}={json.dumps(item['ctx']['tag'])} is no kind of fault"
        else:
            text = _PLAIN.get(item["type"], item["msg"].removeprefix("Value error, "))
            text = text[0].lower() + text[1:]
            value = "" if isinstance(item["input"], (dict, list)) else f"={json.dumps(item['input'], default=str)}"
            message = f"{document.place_of(location)} {dotted}{value}: {text}"
            if messages and messages[-1].startswith(message.removesuffix(text)):
                messages[-1] += f", or {text}"
                continue
        messages.append(message)
    return UserError("\n       ".join(messages), hint)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the section at a place in a recipe."""
    section: type[BaseModel] | None = Recipe
    for part in location:
        if part in FAULTS:
            section = FAULTS[str(part)]
        elif section and isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            candidates = [annotation, *get_args(annotation)]
            section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return list(section.model_fields) if section else []
