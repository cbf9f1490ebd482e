"""The Serve application. `serve.app:build` is the import path for a Serve config file, see config.yaml beside this.

One deployment: each replica holds a model, its engine and the HTTP routes, and Ray Serve adds and removes replicas.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from orchestrator import storage
from orchestrator.errors import UserError
from serve.args import ServeArgs, check_model, parse_args
from serve.auth import Keys, load_keys
from serve.engine import Engine
from serve.openai import RETRY_AFTER_S, Service, make_api

HEADROOM = 64
"""Requests that Serve lets through beyond the places, so that probes and refusals pass while all are taken."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application for these arguments (`ServeArgs`). API keys are read here, and only their digests passed on.

    Raises:
        UserError: an argument is wrong, or the model directory or the API keys cannot be used.
    """
    parsed = parse_args(args)
    check_model(parsed)
    return serve.deployment(Replica, name="model", **_options(parsed)).bind(parsed, load_keys())


@serve.ingress()
class Replica:
    def __init__(self, args: ServeArgs, keys: Keys) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._keys = keys
        self._stack = contextlib.ExitStack()
        directory = self._stack.enter_context(storage.local_directory(args.model))
        engine = Engine(
            directory,
            gpus=args.gpus_per_replica,
            threads=max(1, int(args.cpus_per_replica)),
            memory_share=_share_of_node(args.cpus_per_replica),
            max_sequences=args.max_ongoing_requests,
            max_length=args.max_model_length,
        )
        self._stack.callback(engine.stop)
        self._service = Service(
            name=args.model_id,
            engine=engine,
            tokenizer=load_tokenizer(directory, engine.vocab_size),
            max_sequences=args.max_ongoing_requests + args.max_queued_requests,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self._service, self._keys)

    def check_health(self) -> None:
        self._service.engine.check()

    def __del__(self) -> None:
        self._stack.close()


def load_tokenizer(directory: Path, vocab_size: int) -> Any:
    """
    Raises:
        UserError: it makes token ids that the model has no embedding for, which would end the engine when they come.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(f"the tokenizer makes token ids up to {largest} and the model has {vocab_size} embeddings")
    return tokenizer


def _share_of_node(cpus: float) -> float:
    """Of this node's CPUs, and so of its memory, that a replica may take."""
    here = ray.get_runtime_context().get_node_id()
    total = next((node["Resources"].get("CPU", cpus) for node in ray.nodes() if node["NodeID"] == here), cpus)
    return min(1.0, cpus / total)


def _options(args: ServeArgs) -> dict[str, Any]:
    places = args.max_ongoing_requests + args.max_queued_requests
    return {
        "ray_actor_options": {"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica},
        "autoscaling_config": AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.target_ongoing_requests,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
        ),
        # Replicas refuse by themselves what they have no place for, in OpenAI's shape and without holding up probes.
        # A proxy's own queue is for the time when no replica is up: its refusal is plain text, and requests count as
        # queued there for the moment in which a replica is chosen, so a narrow one refuses bursts that have a place.
        "max_ongoing_requests": places + HEADROOM,
        "max_queued_requests": places * args.max_replicas + HEADROOM,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": 60,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 2,
    }
