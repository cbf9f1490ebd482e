"""The OpenAI-compatible HTTP API of a replica: the service behind it and the routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from orchestrator.data.tokenizer import guard, splits_spans
from serve.auth import Keys
from serve.engine import Engine, EngineError, Sampling
from serve.schemas import (
    CHAT,
    COMPLETION,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Delta,
    GenerationRequest,
    Message,
    Prompt,
    Shape,
    as_api_error,
    usage,
)
from serve.text import Transcript

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as OpenAI's."""
RETRY_AFTER_S = 5
CHARACTERS_PER_TOKEN = 64
"""A longer prompt cannot fit, so it is refused before it is tokenised."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A model with its name, tokenizer and engine; answers the requests that the routes have parsed."""

    name: str
    engine: Engine
    tokenizer: Any
    max_sequences: int
    """Running and waiting together; beyond them a request is refused with 429."""
    created: int = field(default_factory=lambda: int(time.time()))

    async def complete(self, request: CompletionRequest) -> JSONResponse | StreamingResponse:
        self.check_name(request.model)
        prompts = [
            Prompt(ids=self._encode(text, "prompt"), echo=text if request.echo else "") for text in request.prompt
        ]
        return await self._answer(COMPLETION, request, prompts, request.max_tokens or DEFAULT_MAX_TOKENS)

    async def chat(self, request: ChatRequest) -> JSONResponse | StreamingResponse:
        self.check_name(request.model)
        prompt = Prompt(ids=self._encode(self._render(request.messages), "messages", special=False))
        room = max(1, self.engine.max_length - len(prompt.ids))
        return await self._answer(CHAT, request, [prompt], request.max_completion_tokens or request.max_tokens or room)

    def describe(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "terrane",
            "max_model_length": self.engine.max_length,
            "chat": bool(self.tokenizer.chat_template),
        }

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"no model {name!r} here, only {self.name!r}", param="model", code="model_not_found")

    def _encode(self, text: str, param: str, *, special: bool = True) -> list[int]:
        if len(text) > self.engine.max_length * CHARACTERS_PER_TOKEN:
            raise self._too_long(f"a prompt of {len(text)} characters does not fit", param)
        # A sequence of a prompt becomes the tokens that it had in training: one a character.
        guarded = guard(text) if splits_spans(self.tokenizer) else text
        ids: list[int] = self.tokenizer.encode(guarded, add_special_tokens=special)
        if not ids:
            raise ApiError(400, "a prompt has no tokens", param=param)
        return ids

    def _render(self, messages: Sequence[Message]) -> str:
        if not self.tokenizer.chat_template:
            raise ApiError(
                400,
                f"{self.name} has no chat template: it is a base model, use /v1/completions",
                code="no_chat_template",
            )
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                [message.model_dump() for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return text

    def _too_long(self, message: str, param: str) -> ApiError:
        message = f"{message} in this model's {self.engine.max_length} tokens"
        return ApiError(400, message, param=param, code="context_length_exceeded")

    async def _answer(
        self, shape: Shape, request: GenerationRequest, prompts: list[Prompt], max_tokens: int
    ) -> JSONResponse | StreamingResponse:
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest + max_tokens > self.engine.max_length:
            raise self._too_long(f"a prompt of {longest} tokens and max_tokens={max_tokens} do not fit", "max_tokens")
        self._admit(len(prompts))
        sampling = Sampling(max_tokens=max_tokens, temperature=request.temperature, top_p=request.top_p)
        answers = [self._write(i, prompt, sampling, request.stop) for i, prompt in enumerate(prompts)]
        deltas = merge(answers) if len(answers) > 1 else answers[0]
        if not request.stream:
            return JSONResponse(await _collect(shape.document(self.name), shape, deltas, prompts))
        document = shape.document(self.name) | {"object": shape.chunk}
        events = _events(document, shape, deltas, prompts, request.stream_options.include_usage)
        return StreamingResponse(
            await primed(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    def _admit(self, sequences: int) -> None:
        self.engine.check()
        if sequences > self.max_sequences:
            raise ApiError(400, f"{sequences} prompts in a request, at most {self.max_sequences}", param="prompt")
        if self.engine.running + sequences > self.max_sequences:
            raise ApiError(
                429,
                f"all {self.max_sequences} places are taken; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )

    async def _write(
        self, index: int, prompt: Prompt, sampling: Sampling, stops: list[str]
    ) -> AsyncGenerator[Delta, None]:
        transcript = Transcript(self._decode, prompt=prompt.ids, end_ids=self.engine.end_ids, stops=stops)
        if prompt.echo:
            yield Delta(index=index, text=prompt.echo, tokens=0)
        text = ""
        async with contextlib.aclosing(self.engine.generate(prompt.ids, sampling)) as pieces:
            async for ids in pieces:
                text = transcript.push(ids)
                if transcript.finish_reason:
                    break
                if text:
                    yield Delta(index=index, text=text, tokens=transcript.tokens)
                text = ""
        text += transcript.finish()
        yield Delta(index=index, text=text, tokens=transcript.tokens, finish_reason=transcript.finish_reason)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


async def merge(sources: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Items of all sources as they come. The first error ends all; so does closing this one."""
    arrived: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[Delta, None]) -> None:
        try:
            async with contextlib.aclosing(source) as items:
                async for item in items:
                    arrived.put_nowait(item)
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        remaining = len(pumps)
        while remaining:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                remaining -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def primed(events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """The same events, the first one already made: what fails before it is an HTTP status, not a broken stream."""
    first = await anext(events)

    async def rest() -> AsyncGenerator[str, None]:
        async with contextlib.aclosing(events):
            yield first
            async for event in events:
                yield event

    return rest()


async def _collect(
    document: dict[str, Any], shape: Shape, deltas: AsyncGenerator[Delta, None], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    answers = [Delta(index=i, text="", tokens=0) for i in range(len(prompts))]
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            answers[delta.index] = replace(delta, text=answers[delta.index].text + delta.text)
    choices = [shape.choice(answer) for answer in answers]
    return document | {"choices": choices, "usage": usage(prompts, sum(answer.tokens for answer in answers))}


async def _events(
    document: dict[str, Any],
    shape: Shape,
    deltas: AsyncGenerator[Delta, None],
    prompts: Sequence[Prompt],
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    """Server-sent events; an error after the first one is an event too."""
    tokens = dict.fromkeys(range(len(prompts)), 0)
    started = False
    async with contextlib.aclosing(deltas):
        try:
            async for delta in deltas:
                tokens[delta.index] = delta.tokens
                yield _event(document | {"choices": [shape.piece(delta, not started)]})
                started = True
            if include_usage:
                yield _event(document | {"choices": [], "usage": usage(prompts, sum(tokens.values()))})
            yield "data: [DONE]\n\n"
        except EngineError as error:
            if not started:
                raise
            yield _event(ApiError(503, str(error)).body())


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


# --- Routes -----------------------------------------------------------------------------------------------------------


def make_api(service: Service, keys: Keys) -> FastAPI:
    """The routes of one replica. All but /health ask for a key, if there are keys."""
    api = FastAPI(title=f"Terrane: {service.name}")
    api.include_router(_open_routes(service))
    api.include_router(_guarded_routes(service, keys))
    for kind in (ApiError, RequestValidationError, HTTPException, EngineError, Exception):
        api.add_exception_handler(kind, _answer_error)
    return api


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        service.engine.check()
        return {"status": "ok", "model": service.name, "sequences": service.engine.running}

    return router


def _guarded_routes(service: Service, keys: Keys) -> APIRouter:
    async def check_key(request: Request) -> None:
        if not keys.accept(request.headers.get("Authorization")):
            message = "missing or wrong API key; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    router = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return service.describe()

    @router.post("/completions", response_model=None)
    async def completions(body: CompletionRequest) -> JSONResponse | StreamingResponse:
        return await service.complete(body)

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest) -> JSONResponse | StreamingResponse:
        return await service.chat(body)

    return router


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()
