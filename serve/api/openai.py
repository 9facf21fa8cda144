"""OpenAI's completions, as the unmodified openai client speaks them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from serve.api.access import Caller
from serve.api.body import Body, expected, read_json
from serve.api.described import answers, takes
from serve.api.generation import (
    MAX_NEW_TOKENS,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_TOKEN_ID,
    MIN_SEED,
    EventStream,
    Run,
    Sequence,
    check_model_id,
    finite,
    pick_seed,
    timing_headers,
)
from serve.api.marking import FIELD
from serve.api.service import Service
from serve.api.status import json_reply, to_json
from serve.errors import InvalidRequest
from serve.types import MAX_CHOICES, Delta, GenerationRequest, SamplingOverrides, Scope, TokenInfo, as_tuple

_TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
_TokenIds = Annotated[list[_TokenId], Field(min_length=1)]
_Prompt = Annotated[
    str
    | Annotated[list[str], Field(min_length=1)]
    | _TokenIds
    | Annotated[list[_TokenIds], Field(min_length=1)]
    | None,
    expected("text, a list of texts, a list of token ids, or a list of such lists"),
]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Stop = Annotated[
    _StopString | Annotated[list[_StopString], Field(max_length=4)] | None,
    expected(f"a text or a list of at most 4 texts, each of 1 to {MAX_STOP_CHARS} characters"),
]
_LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,6}$")], Annotated[float, Field(ge=-100, le=100)]] | None,
    Field(max_length=300),
    expected("an object of at most 300 token ids, each with a number from -100 to 100"),
]


class StreamOptions(Body):
    include_usage: bool | None = None


class CompletionBody(Body):
    """OpenAI's parameters, then ours; what is left out comes from the model's own generation_config.json."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: _Prompt = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: _LogitBias = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    stop: _Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: Any = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None

    top_k: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] | None = None
    add_bos: bool | None = None
    truncate: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None


def router(service: Service) -> APIRouter:
    """/v1/completions."""
    routes = APIRouter(prefix="/v1")

    @routes.post(
        "/completions",
        openapi_extra=takes(CompletionBody),
        responses=answers("text/event-stream"),
        dependencies=service.access.needs(Scope.GENERATE),
    )
    async def create_completion(request: Request) -> Response:
        body = await read_json(request, CompletionBody, service)
        asked = _to_request(body, request.state.request_id, service.access.caller(request))
        run = Run(service, asked, request)
        answer = _Answer(body, run)
        if body.stream:
            return EventStream(run, answer.events(), lambda: timing_headers(run))
        async with run.wanted(request.receive):
            await run.finish()
        return json_reply(answer.whole(), headers=timing_headers(run))

    return routes


def _to_request(body: CompletionBody, request_id: str, caller: Caller) -> GenerationRequest:
    num_choices = body.n or 1
    best_of = body.best_of or num_choices
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("'max_tokens' of 0 is for 'echo': true; ask for at least 1 new token.", param="max_tokens")
    if body.suffix is not None:
        raise InvalidRequest("'suffix' is not supported: these models only write on from a prompt.", param="suffix")
    if best_of < num_choices:
        raise InvalidRequest(f"'best_of' ({best_of}) must not be less than 'n' ({num_choices}).", param="best_of")
    if best_of > num_choices and body.stream:
        raise InvalidRequest("'best_of' greater than 'n' cannot be streamed.", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' is only for 'stream': true.", param="stream_options")
    return GenerationRequest(
        model_id=check_model_id(body.model),
        prompts=_prompts(body.prompt),
        sampling=_sampling(body),
        num_choices=best_of,
        seed=pick_seed(body.seed),
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        truncate=body.truncate,
        add_bos=bool(body.add_bos),
        request_id=request_id,
        is_whole=not body.stream,
        viewer=caller.viewer,
        caller=caller.name,
    )


def _prompts(prompt: str | list[str] | list[int] | list[list[int]] | None) -> tuple[str | tuple[int, ...], ...]:
    if prompt is None:
        return ("",)
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt[0], int):
        return (tuple(token for token in prompt if isinstance(token, int)),)
    return tuple(tuple(item) if isinstance(item, list) else str(item) for item in prompt)


def _sampling(body: CompletionBody) -> SamplingOverrides:
    max_new_tokens = 16 if body.max_tokens is None else body.max_tokens  # the platform's default
    if (body.min_tokens or 0) > max_new_tokens:
        raise InvalidRequest(
            f"'min_tokens' ({body.min_tokens}) must not exceed 'max_tokens' ({max_new_tokens}).", param="min_tokens"
        )
    # A generator writes at least one token; where none was asked for, the answer leaves it out.
    sampling: SamplingOverrides = {"max_new_tokens": max(1, max_new_tokens), "stop": as_tuple(body.stop)}
    if body.temperature is not None:
        sampling["temperature"] = body.temperature
    if body.top_k is not None:
        sampling["top_k"] = body.top_k
    if body.top_p is not None:
        sampling["top_p"] = body.top_p
    if body.min_p is not None:
        sampling["min_p"] = body.min_p
    if body.typical_p is not None:
        sampling["typical_p"] = body.typical_p
    if body.repetition_penalty is not None:
        sampling["repetition_penalty"] = body.repetition_penalty
    if body.presence_penalty is not None:
        sampling["presence_penalty"] = body.presence_penalty
    if body.frequency_penalty is not None:
        sampling["frequency_penalty"] = body.frequency_penalty
    if body.min_tokens is not None:
        sampling["min_new_tokens"] = body.min_tokens
    if body.logit_bias:
        sampling["logit_bias"] = tuple((int(token), bias) for token, bias in body.logit_bias.items())
    return sampling


class _Answer:
    """One completion on its way out, whole or as a stream."""

    def __init__(self, body: CompletionBody, run: Run) -> None:
        self._run = run
        self._model = body.model
        self._n = body.n or 1
        self._echo = bool(body.echo)
        self._is_prompt_only = body.max_tokens == 0
        self._logprobs = body.logprobs
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._id = f"cmpl-{secrets.token_hex(14)}"
        self._created = int(time.time())

    def whole(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        best_of = self._run.request.num_choices
        for start in range(0, len(self._run.sequences), best_of):
            candidates = self._run.sequences[start : start + best_of]
            if best_of > self._n:
                candidates = sorted(candidates, key=lambda sequence: sequence.mean_logprob, reverse=True)[: self._n]
            choices += [self._choice(len(choices) + i, sequence) for i, sequence in enumerate(candidates)]
        return self._envelope(choices, usage=self._usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """SSE: every delta as a chunk, the usage if asked for, and the end mark."""
        offsets = [0] * len(self._run.sequences)
        async with aclosing(self._run.batches()) as batches:
            async for batch in batches:
                if chunks := b"".join(self._chunk(delta, offsets) for delta in batch if _says_something(delta)):
                    yield chunks
        last = _event(self._envelope([], usage=self._usage())) if self._include_usage else b""
        yield last + b"data: [DONE]\n\n"

    def _chunk(self, delta: Delta, offsets: list[int]) -> bytes:
        has_echo = self._echo and delta.prompt is not None
        part = Sequence(delta.text, list(delta.tokens), delta.finish_reason, delta.prompt)
        choice = self._choice(delta.index, part, echo=has_echo, offset=offsets[delta.index])
        # As in the whole reply, by tokens: text lags behind them where a character or a stop string is not complete.
        tokens = [*(delta.prompt.tokens if has_echo and delta.prompt else ()), *delta.tokens]
        offsets[delta.index] += sum(map(_text_length, tokens))
        return _event(self._envelope([choice]))

    def _choice(self, index: int, part: Sequence, echo: bool | None = None, offset: int = 0) -> dict[str, Any]:
        has_echo = self._echo if echo is None else echo
        prompt = part.prompt if has_echo else None
        if self._is_prompt_only:
            part = Sequence(finish_reason=part.finish_reason and "length")
        tokens = [*(prompt.tokens if prompt else ()), *part.tokens]
        return {
            "index": index,
            "text": (prompt.text if prompt else "") + part.text,
            "logprobs": None if self._logprobs is None else _logprobs(tokens, self._logprobs, offset),
            "finish_reason": {"stop": "stop", "stop_sequence": "stop", "length": "length", None: None}[
                part.finish_reason
            ],
        }

    def _envelope(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        envelope: dict[str, Any] = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._run.first_prompt.revision or None if self._run.first_prompt else None,
            "choices": choices,
        }
        if usage is not None:
            envelope["usage"] = usage
        if usage is not None or any(choice["finish_reason"] for choice in choices):  # of a stream: at its end
            envelope[FIELD] = self._run.mark
        return envelope

    def _usage(self) -> dict[str, int]:
        prompt = self._run.num_prompt_tokens
        completion = 0 if self._is_prompt_only else self._run.num_generated_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _says_something(delta: Delta) -> bool:
    return bool(delta.text or delta.tokens or delta.finish_reason or delta.prompt)


def _logprobs(tokens: list[TokenInfo], num_top: int, offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += _text_length(token)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [_top(token, num_top) for token in tokens],
        "text_offset": offsets,
    }


def _text_length(token: TokenInfo) -> int:
    return 0 if token.special else len(token.text)  # <|endoftext|> is a token but not text


def _top(token: TokenInfo, num_top: int) -> dict[str, float | None] | None:
    """The alternatives and, always, the token itself (so up to `num_top` + 1, as OpenAI does)."""
    if token.logprob is None:
        return None
    best: dict[str, float | None] = {}
    for _, text, logprob in token.top[:num_top]:
        best.setdefault(text, finite(logprob))  # parts of characters look alike; the most likely one stays
    best.setdefault(token.text, finite(token.logprob))
    return best


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"
