"""What a service is asked to be: `ServeArgs`, and the checks of them and of the model directory before anything starts.

The same fields stand under `args:` in a Serve config file. Imports neither Ray nor torch.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from orchestrator import storage
from orchestrator.config import expand_path
from orchestrator.config_section import Section
from orchestrator.errors import UserError


class ServeArgs(Section):
    model: str = Field(min_length=1)
    """Hugging Face model directory with safetensors weights and a tokenizer: a local path that every node sees, or s3://."""
    name: str | None = Field(default=None, min_length=1)
    """The model id that clients send; the name of the directory unless given."""
    min_replicas: int = Field(default=1, ge=0)
    """0 lets an idle service give back everything; the next request then waits for a replica to load."""
    max_replicas: int = Field(default=1, ge=1)
    cpus_per_replica: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for a replica; also its number of torch threads, rounded down, at least one."""
    gpus_per_replica: float = Field(default=0.0, ge=0)
    """0 generates on the CPU. A fraction shares a GPU, and its memory, between replicas."""
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    """Requests a replica, running or waiting, that the autoscaler aims at."""
    max_ongoing_requests: int = Field(default=16, ge=1)
    """Sequences that a replica generates at once, in one batch."""
    max_queued_requests: int = Field(default=64, ge=0)
    """Sequences that may wait in a replica; beyond them a request is answered with 429."""
    max_model_length: int | None = Field(default=None, ge=2)
    """Tokens of a prompt and its answer together; the model's number of positions unless given."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests={self.target_ongoing_requests:g} is more than"
                f" max_ongoing_requests={self.max_ongoing_requests}: replicas would fill before one is added"
            )
        return self

    @property
    def model_id(self) -> str:
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


def parse_args(args: Mapping[str, Any] | ServeArgs) -> ServeArgs:
    """Arguments with the model's path made absolute.

    Raises:
        UserError: names each wrong argument and, for an unknown one, the nearest right name.
    """
    try:
        parsed = args if isinstance(args, ServeArgs) else ServeArgs.model_validate(dict(args))
    except ValidationError as error:
        raise _explain(error) from None
    return parsed.model_copy(update={"model": storage.absolute(expand_path(parsed.model))})


def check_model(args: ServeArgs) -> None:
    """Look at the model directory, local or on S3, without loading it.

    Raises:
        UserError: it lacks config, tokenizer or safetensors weights, or has fewer positions than `max_model_length`.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise UserError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: torch would run code found in weight files", "unset it to serve"
        )
    files = _list(args.model)
    if not files:
        raise UserError(
            f"no model at {args.model}", "give a local directory or s3://, not the name of a model on a hub"
        )
    if "config.json" not in files:
        raise UserError(f"{args.model} has no config.json", "give the directory of an exported Hugging Face model")
    if not files & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise UserError(
            f"{args.model} has no tokenizer", "put tokenizer.json and tokenizer_config.json beside the weights"
        )
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(
            f"{args.model} has no safetensors weights; other formats can run code when loaded and are not served",
            "convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    model_length(json.loads(storage.read(storage.join(args.model, "config.json"))), args.max_model_length)


def model_length(config: Mapping[str, Any], asked: int | None) -> int:
    """Tokens of a prompt and its answer together that are served.

    Raises:
        UserError: more are asked for than the model has positions.
    """
    positions = config.get("max_position_embeddings")
    if positions is None and asked is None:
        raise UserError("config.json does not tell max_position_embeddings", "set max_model_length")
    if asked and positions and asked > positions:
        raise UserError(f"max_model_length={asked} is more than the model's {positions} positions")
    return int(asked or positions or 0)


def _list(uri: str) -> set[str]:
    try:
        return {name for name in storage.list_files(uri) if "/" not in name}
    except Exception as error:  # boto3 raises a dozen unrelated classes: credentials, endpoint, bucket, permission
        if not storage.is_s3(uri):
            raise
        hint = "check the bucket, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)"
        raise UserError(f"cannot read {uri}: {error}", hint) from None


def _explain(error: ValidationError) -> UserError:
    messages, hint = [], ""
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(field, ServeArgs.model_fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(ServeArgs.model_fields)}"
            messages.append(f"{field} is not an argument of serving")
        elif item["type"] == "missing":
            messages.append(f"{field} is missing")
        else:
            value = f"{field}={item['input']!r}: " if field else ""
            messages.append(value + item["msg"].removeprefix("Value error, "))
    return UserError("; ".join(messages), hint)
