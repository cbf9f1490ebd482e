"""What goes over the wire: the requests of OpenAI's API that are served, its answers and its errors.

A field that is not supported is refused by its name, never ignored; null means unset, as in OpenAI's own API.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException

from serve.engine import EngineError


class ApiError(Exception):
    """An answer in the shape of OpenAI's errors."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return validation_error(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="unhealthy")
    return ApiError(500, "internal error; see the replica's log")


def validation_error(error: RequestValidationError) -> ApiError:
    """All that is wrong with a request, in one message; `param` is the first field."""
    found = [_describe(item) for item in error.errors()]
    return ApiError(400, "; ".join(message for _, message in found), param=found[0][0])


def _describe(item: dict[str, Any]) -> tuple[str | None, str]:
    """The field that is wrong, and what is wrong with it."""
    parts = [str(part) for part in item["loc"][1:]]
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {item.get('ctx', {}).get('error', message)}"
    if not parts:  # of the request as a whole, or a body that is no JSON object
        return message.partition(":")[0] if item["type"] == "value_error" else None, message
    if item["type"] == "extra_forbidden":
        message = "not supported"
    return parts[0], f"{'.'.join(parts)}: {message[0].lower()}{message[1:]}"


# --- What clients send ------------------------------------------------------------------------------------------------


def only(neutral: float) -> AfterValidator:
    """A field that exists in OpenAI's API and is supported at the value that means nothing."""

    def check(value: float) -> float:
        if value != neutral:
            raise ValueError(f"only {neutral} is supported")
        return value

    return AfterValidator(check)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def null_is_unset(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Schema):
    include_usage: bool = False


class GenerationRequest(Schema):
    """What both endpoints take."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    stop: list[str] = Field(default=[], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: int | None = None
    user: str | None = None
    n: Annotated[int, only(1)] = 1
    presence_penalty: Annotated[float, only(0)] = 0.0
    frequency_penalty: Annotated[float, only(0)] = 0.0

    @field_validator("stop", mode="before")
    @classmethod
    def one_stop_string_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def stop_strings_have_characters(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise ValueError("a stop string is empty")
        return value

    @model_validator(mode="after")
    def seed_needs_greedy(self) -> Self:
        if self.seed is not None and self.temperature > 0:
            raise ValueError("seed: not supported, except with temperature 0, where the answer is the same without it")
        return self


class CompletionRequest(GenerationRequest):
    prompt: list[Text]
    echo: bool = False
    best_of: Annotated[int, only(1)] = 1

    @field_validator("prompt", mode="before")
    @classmethod
    def one_prompt_is_a_list(cls, value: Any) -> Any:
        prompts = [value] if isinstance(value, str) else value
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("give a string or a list of strings")
        if not all(prompts):
            raise ValueError("a prompt is empty")
        return prompts


class TextPart(Schema):
    type: Literal["text"]
    text: str


class Message(Schema):
    role: Literal["system", "user", "assistant"]
    content: Text

    @field_validator("content", mode="before")
    @classmethod
    def parts_are_joined(cls, value: Any) -> Any:
        return "".join(TextPart.model_validate(part).text for part in value) if isinstance(value, list) else value


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Annotated[bool, only(False)] = False


# --- What they get -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prompt:
    ids: list[int]
    echo: str = ""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The next piece of one answer."""

    index: int
    text: str
    tokens: int
    """Generated so far."""
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How an endpoint dresses its answers."""

    prefix: str
    whole: str
    chunk: str
    choice: Callable[[Delta], dict[str, Any]]
    piece: Callable[[Delta, bool], dict[str, Any]]
    """Of a stream; told whether it is the first one."""

    def document(self, model: str) -> dict[str, Any]:
        return {"id": self.prefix + uuid.uuid4().hex, "object": self.whole, "created": int(time.time()), "model": model}


def _text_choice(delta: Delta) -> dict[str, Any]:
    return {"index": delta.index, "text": delta.text, "logprobs": None, "finish_reason": delta.finish_reason}


def _chat_choice(delta: Delta) -> dict[str, Any]:
    message = {"role": "assistant", "content": delta.text}
    return {"index": delta.index, "message": message, "logprobs": None, "finish_reason": delta.finish_reason}


def _text_piece(delta: Delta, _: bool) -> dict[str, Any]:
    return _text_choice(delta)


def _chat_piece(delta: Delta, first: bool) -> dict[str, Any]:
    piece = {"role": "assistant", "content": delta.text} if first else {"content": delta.text}
    return {"index": delta.index, "delta": piece, "logprobs": None, "finish_reason": delta.finish_reason}


COMPLETION = Shape(
    prefix="cmpl-", whole="text_completion", chunk="text_completion", choice=_text_choice, piece=_text_piece
)
CHAT = Shape(
    prefix="chatcmpl-", whole="chat.completion", chunk="chat.completion.chunk", choice=_chat_choice, piece=_chat_piece
)


def usage(prompts: Sequence[Prompt], completion_tokens: int) -> dict[str, int]:
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
