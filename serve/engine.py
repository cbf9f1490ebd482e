"""The engine of a replica: token ids in, token ids out, many sequences in one batch (transformers continuous batching).

Generation runs in one thread of the library. An exception there ends it for every sequence and for good, so whatever
could raise is refused before it gets in; if it ends all the same, `check` raises and Serve replaces the replica.
A sequence has its own temperature, top_p and length. The library has no seed, penalty or stop string of a sequence:
the API refuses what it cannot do, and stop strings are found in the text, outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from serve.args import model_length

logger = logging.getLogger("ray.serve")

LIVENESS_PERIOD_S = 5.0
"""A sequence that gets no token for so long looks whether the engine still runs."""
GREEDY_BELOW = 1e-3
"""Temperatures below are greedy: a division by them could overflow, and they choose the likeliest token anyway."""
CACHE_SHARE = 0.5
"""Of a CPU replica's share of the free memory, what its key-value cache may take; of a GPU's, 0.8."""


class EngineError(RuntimeError):
    """The engine cannot go on with a sequence, mostly because it is dead."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0

    def logits_arguments(self) -> dict[str, float]:
        """Arguments of the library's per-request processors. It divides by the temperature, so greedy is a nucleus of
        one token; the low temperature keeps rounding from letting a second one in when all are about equally likely.
        """
        if self.temperature < GREEDY_BELOW:
            return {"temperature": 0.01, "top_p": 0.0}
        return {"temperature": float(self.temperature), "top_p": float(self.top_p)}


class Engine:
    """A loaded model that generates. `generate` may be called from one event loop only."""

    def __init__(
        self,
        directory: Path,
        *,
        gpus: float = 0.0,
        threads: int = 1,
        memory_share: float = 1.0,
        max_sequences: int = 16,
        max_length: int | None = None,
    ) -> None:
        """Load the model and start generating.

        Args:
            directory: Hugging Face model directory with safetensors weights.
            gpus: share of a GPU this process may use; 0 for the CPU.
            threads: of torch, for generating on the CPU.
            memory_share: of the machine's memory that is this process's, for its cache on the CPU.
            max_sequences: sequences generated at once; more than these wait.
            max_length: tokens of prompt and answer together; the model's positions if None.

        Raises:
            UserError: the model cannot be served as asked.
        """
        import torch

        torch.set_num_threads(threads)
        self._model = load_model(directory, gpus=gpus)
        config = self._model.config.get_text_config()
        self.max_length = model_length(config.to_dict(), max_length)
        self.vocab_size: int = self._model.get_input_embeddings().weight.shape[0]
        self.end_ids = end_ids(self._model.generation_config.eos_token_id)
        self.running = 0
        """Sequences that are generated or wait for it."""
        self._manager = self._start(cache_settings(self._model, gpus, memory_share, max_sequences, self.max_length))

    def check(self) -> None:
        """
        Raises:
            EngineError: the generation thread ended, and nothing will be generated any more.
        """
        status = self._manager.background_thread_status
        if status.can_accept_new_requests() or not self._manager.is_running():  # it is still alive while it fails
            raise EngineError(f"generation has stopped: {status.fatal_error or 'the engine is going down'}")
        while self._manager.get_result(timeout=0):  # last tokens of cancelled sequences: nobody else takes them out
            pass

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=10, hard_stop=True)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[int], None]:
        """New token ids as they come, with the end token if there is one. Closing the generator cancels the sequence.

        Raises:
            ValueError: the prompt or the sampling is not possible with this model.
            EngineError: the engine is dead.
        """
        self._check_possible(prompt, sampling)
        request_id = uuid.uuid4().hex
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        self.running += 1
        finished, seen = False, 0
        try:
            self._submit(request_id, prompt, sampling, outputs)
            while not finished:
                output = await self._next(outputs)
                finished = output.is_finished()
                if output.error:
                    raise EngineError(output.error)
                new = output.generated_tokens[seen:]  # they are cumulative
                seen += len(new)
                if new:
                    yield new
        finally:
            self.running -= 1
            if not finished:
                self._cancel(request_id)

    def _start(self, cache: dict[str, Any]) -> Any:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        # Processors exist only for values that differ from neutral; sequences override these two.
        defaults = GenerationConfig(
            do_sample=True, temperature=0.5, top_p=0.5, top_k=0, eos_token_id=list(self.end_ids) or -1
        )
        settings = ContinuousBatchingConfig(per_request_processors=True, auto_switch_to_flash=False, **cache)
        manager = self._model.init_continuous_batching(generation_config=defaults, continuous_batching_config=settings)
        try:
            manager.warmup()  # makes the cache here, where a lack of memory still has a caller
        except MemoryError as error:
            raise UserError(f"no memory for the key-value cache: {error}", "lower max_model_length") from None
        manager.start()
        return manager

    def _check_possible(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if not prompt or sampling.max_tokens < 1:
            raise ValueError("a prompt and an answer have at least one token")
        if len(prompt) + sampling.max_tokens > self.max_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}:"
                f" together they are more than this model's {self.max_length}"
            )
        if not all(0 <= token_id < self.vocab_size for token_id in prompt):
            raise ValueError(f"the prompt has token ids outside 0..{self.vocab_size - 1}")
        if not (0 <= sampling.temperature <= 100 and 0 <= sampling.top_p <= 1):
            raise ValueError(f"temperature={sampling.temperature} or top_p={sampling.top_p} is out of range")

    def _submit(self, request_id: str, prompt: Sequence[int], sampling: Sampling, outputs: asyncio.Queue[Any]) -> None:
        self._manager.register_result_handler(request_id, outputs.put_nowait)  # first, or early tokens go astray
        accepted = self._manager.add_request(
            list(prompt),
            request_id=request_id,
            max_new_tokens=sampling.max_tokens,
            streaming=True,
            **sampling.logits_arguments(),
        )
        if accepted is None:
            raise EngineError("generation has stopped")

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        while True:
            try:
                async with asyncio.timeout(LIVENESS_PERIOD_S):
                    return await outputs.get()
            except TimeoutError:
                self.check()

    def _cancel(self, request_id: str) -> None:
        self._manager.cancel_request(request_id)
        # No final output comes for it, which is when the library would drop the handler.
        self._manager.output_router.result_handlers.pop(request_id, None)


def load_model(directory: Path, *, gpus: float) -> Any:
    """The model in evaluation mode, on a GPU in the type it was saved in, on a CPU in fp32.

    Raises:
        UserError: transformers cannot load it, or a GPU is asked for and torch sees none.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if gpus and not torch.cuda.is_available():
        raise UserError(
            f"gpus_per_replica={gpus:g} and torch sees no GPU", "install a GPU build of torch, or set it to 0"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto" if gpus else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the model in {directory}: {error}") from error
    return model.to("cuda" if gpus else "cpu").eval()


def end_ids(configured: int | list[int] | None) -> tuple[int, ...]:
    """End-of-sequence token ids of a generation config."""
    if configured is None:
        return ()
    return tuple(configured) if isinstance(configured, list) else (configured,)


def cache_settings(model: Any, gpus: float, memory_share: float, max_sequences: int, max_length: int) -> dict[str, Any]:
    """Sizes of the paged key-value cache and of a batch, as arguments of the library's configuration.

    On a GPU the library sizes the cache by itself, in this replica's share of the memory. On a CPU it would take 60 %
    of the machine for each replica, so the cache gets what all sequences need at full length, or as much as may be
    taken; with less, sequences are put back and their tokens computed again, and the answers stay the same.
    """
    if gpus:
        batch = {"max_requests_per_batch": max_sequences, "max_batch_tokens": max(2048, max_sequences)}
        return batch | {"max_memory_percent": 0.8 * min(1.0, gpus)}
    page_tokens = 32
    page_bytes = page_tokens * cache_bytes_per_token(model.config.get_text_config(), model.dtype.itemsize)
    budget = int(free_memory_bytes() * memory_share * CACHE_SHARE)
    blocks = cache_blocks(max_sequences, math.ceil(max_length / page_tokens), page_bytes, budget)
    logger.info(
        f"key-value cache: {blocks} blocks of {page_tokens} tokens, {blocks * page_bytes / 2**30:.2f} GiB;"
        f" {max_sequences} sequences of {max_length} tokens at once"
    )
    return {
        "page_size": page_tokens,
        "num_blocks": blocks,
        "max_requests_per_batch": max_sequences,
        "max_batch_tokens": max(512, max_sequences),
    }


def cache_blocks(sequences: int, blocks_per_sequence: int, block_bytes: int, budget_bytes: int) -> int:
    """Blocks for all sequences at full length, or as many as the budget holds.

    Raises:
        UserError: the budget does not hold one sequence.
    """
    affordable = budget_bytes // block_bytes
    if affordable < blocks_per_sequence:
        needed, given = blocks_per_sequence * block_bytes / 2**30, budget_bytes / 2**30
        raise UserError(
            f"the cache of one full-length sequence takes {needed:.2f} GiB and this replica may take {given:.2f} GiB",
            "lower max_model_length, or raise cpus_per_replica, by which the memory is shared",
        )
    return min(sequences * blocks_per_sequence, affordable)


def free_memory_bytes() -> int:
    """Of the machine, or of the container where that is less."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    free = int(psutil.virtual_memory().available)
    cgroup = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free


def cache_bytes_per_token(config: Any, itemsize: int) -> int:
    """Bytes of keys and values of one token over all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_size * itemsize)
