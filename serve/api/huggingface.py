"""Hugging Face's text-generation task, as huggingface_hub's InferenceClient and text-generation-inference speak it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from serve.api.access import Caller
from serve.api.body import Body, read_json
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
from serve.errors import InvalidRequest, ModelNotFound
from serve.types import MAX_CHOICES, Delta, GenerationRequest, SamplingOverrides, Scope, TokenInfo

_FINISH = {"stop": "eos_token", "length": "length", "stop_sequence": "stop_sequence"}
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Parameters(Body):
    """text-generation-inference's parameters and bounds, then transformers' and ours.

    What is left out comes from the model's own generation_config.json.
    """

    adapter_id: Annotated[str, Field(max_length=256)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    grammar: Any = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    return_full_text: bool | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    stop: Annotated[list[_StopString], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(gt=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=5)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    truncate: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    watermark: bool | None = None

    num_return_sequences: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    add_bos: bool | None = None

    @property
    def is_greedy(self) -> bool:
        """`do_sample: false` with nothing else that asks for sampling (old clients always send the former)."""
        warpers = (self.temperature, self.top_k, self.top_p, self.typical_p)
        return self.do_sample is False and all(value is None for value in warpers)


class GenerateBody(Body):
    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters | None = None
    stream: bool | None = None
    model: Annotated[str, Field(max_length=256)] | None = None


def router(service: Service) -> APIRouter:
    """/generate, /generate_stream, /, /models/{id} and /info."""
    routes = APIRouter()
    described: dict[str, Any] = {"openapi_extra": takes(GenerateBody), "responses": answers("text/event-stream")}
    described["dependencies"] = service.access.needs(Scope.GENERATE)

    async def answer(request: Request, model: str | None, *, as_list: bool, stream: bool = False) -> Response:
        body = await read_json(request, GenerateBody, service)
        parameters = body.parameters or Parameters()
        model_id = check_model_id(model or parameters.adapter_id or body.model or service.default_base)
        is_stream = stream or bool(body.stream)
        _check(parameters, is_stream, as_list)
        asked = _to_request(
            body.inputs, parameters, model_id, request.state.request_id, service.access.caller(request), is_stream
        )
        run = Run(service, asked, request)
        has_full_text = as_list if parameters.return_full_text is None else parameters.return_full_text
        written = _Answer(run, parameters, body.inputs if has_full_text else "")
        if is_stream:
            return EventStream(run, written.events(), lambda: _headers(run, body.inputs))
        async with run.wanted(request.receive):
            await run.finish()
        whole = written.whole()
        return json_reply(whole if as_list else whole[0], headers=_headers(run, body.inputs, is_complete=True))

    @routes.post("/generate", **described)
    async def generate(request: Request) -> Response:
        return await answer(request, None, as_list=False)

    @routes.post("/generate_stream", **described)
    async def generate_stream(request: Request) -> Response:
        return await answer(request, None, as_list=False, stream=True)

    @routes.post("/", **described)
    async def generate_compat(request: Request) -> Response:
        return await answer(request, None, as_list=True)

    @routes.post("/models/{model:path}", **described)
    async def generate_with(request: Request, model: str) -> Response:
        return await answer(request, model, as_list=True)

    @routes.get("/info", dependencies=service.access.needs(Scope.READ))
    async def info(request: Request) -> Response:
        find = partial(service.access.find_model, service.catalogue, service.default_base, request)
        try:
            base = await anyio.to_thread.run_sync(find)
        except ModelNotFound:  # its name is not the caller's: it is not repeated
            raise ModelNotFound("The model that answers where none is named is not here.", param="model") from None
        return json_reply(
            {
                "model_id": base.model_id,
                "model_sha": base.revision,
                "model_pipeline_tag": "text-generation",
                "max_best_of": MAX_CHOICES,
                "max_stop_sequences": 16,
                "max_input_tokens": (base.context_length or 1024) - 1,
                "max_total_tokens": base.context_length or 1024,
                "max_client_batch_size": service.limits.prompts,
                "router": "rookery",
            }
        )

    return routes


def _check(parameters: Parameters, is_stream: bool, as_list: bool) -> None:
    """What text-generation-inference refuses, and what we cannot do."""
    best_of, num_sequences = parameters.best_of or 1, parameters.num_return_sequences or 1

    def refuse(name: str, why: str) -> InvalidRequest:
        return InvalidRequest(f"'{name}' {why}.", param=f"parameters.{name}")

    if parameters.watermark:
        raise refuse("watermark", "is not supported; leave it out or set it to false")
    if parameters.grammar is not None:
        raise refuse("grammar", "is not supported: the text is not constrained to a form")
    if best_of > 1 and (is_stream or parameters.seed is not None or parameters.is_greedy):
        raise refuse("best_of", "greater than 1 needs sampling, and neither 'stream' nor 'seed'")
    if num_sequences > 1 and (is_stream or best_of > 1 or not as_list):
        raise refuse("num_return_sequences", "greater than 1 needs a list reply, and neither 'stream' nor 'best_of'")
    if parameters.decoder_input_details and is_stream:
        raise refuse("decoder_input_details", "cannot be streamed")
    if parameters.min_new_tokens and parameters.min_new_tokens > (parameters.max_new_tokens or MAX_NEW_TOKENS):
        raise refuse("min_new_tokens", "must not exceed 'max_new_tokens'")


def _to_request(
    inputs: str, parameters: Parameters, model_id: str, request_id: str, caller: Caller, is_stream: bool
) -> GenerationRequest:
    return GenerationRequest(
        model_id=model_id,
        prompts=(inputs,),
        sampling=_sampling(parameters),
        num_choices=max(parameters.best_of or 1, parameters.num_return_sequences or 1),
        seed=pick_seed(parameters.seed),
        top_logprobs=parameters.top_n_tokens or 0,
        prompt_logprobs=bool(parameters.decoder_input_details),
        truncate=parameters.truncate,
        add_bos=bool(parameters.add_bos),
        request_id=request_id,
        is_whole=not is_stream,
        viewer=caller.viewer,
        caller=caller.name,
    )


def _sampling(parameters: Parameters) -> SamplingOverrides:
    sampling: SamplingOverrides = {}
    if parameters.temperature is not None:
        sampling["temperature"] = parameters.temperature
    elif parameters.is_greedy:
        sampling["temperature"] = 0.0
    if parameters.max_new_tokens is not None:
        sampling["max_new_tokens"] = parameters.max_new_tokens
    if parameters.min_new_tokens is not None:
        sampling["min_new_tokens"] = parameters.min_new_tokens
    if parameters.top_k is not None:
        sampling["top_k"] = parameters.top_k
    if parameters.top_p is not None:
        sampling["top_p"] = parameters.top_p
    if parameters.min_p is not None:
        sampling["min_p"] = parameters.min_p
    if parameters.typical_p is not None:
        sampling["typical_p"] = parameters.typical_p
    if parameters.repetition_penalty is not None:
        sampling["repetition_penalty"] = parameters.repetition_penalty
    if parameters.presence_penalty is not None:
        sampling["presence_penalty"] = parameters.presence_penalty
    if parameters.frequency_penalty is not None:
        sampling["frequency_penalty"] = parameters.frequency_penalty
    if parameters.stop:
        sampling["stop"] = tuple(parameters.stop)
    return sampling


class _Answer:
    """One generation on its way out, whole or as a stream. `prefix` is the prompt where it is part of the reply."""

    def __init__(self, run: Run, parameters: Parameters, prefix: str) -> None:
        self._run = run
        self._parameters = parameters
        self._prefix = prefix

    def whole(self) -> list[dict[str, Any]]:
        """One object for each returned sequence; of `best_of`, the best with the others in its details."""
        sequences = self._run.sequences
        if (self._parameters.best_of or 1) == 1:
            return [self._object(sequence) for sequence in sequences]
        best, *others = sorted(sequences, key=lambda sequence: sequence.mean_logprob, reverse=True)
        found = self._object(best)
        if "details" in found:
            found["details"]["best_of_sequences"] = [
                {"generated_text": self._prefix + other.text, **self._details(other)} for other in others
            ]
        return [found]

    def _object(self, sequence: Sequence) -> dict[str, Any]:
        found: dict[str, Any] = {"generated_text": self._prefix + sequence.text, FIELD: self._run.mark}
        if self._parameters.details or self._parameters.decoder_input_details:
            found["details"] = self._details(sequence)
        return found

    def _details(self, sequence: Sequence) -> dict[str, Any]:
        assert sequence.finish_reason is not None
        prefill = sequence.prompt.tokens if sequence.prompt else ()
        details: dict[str, Any] = {
            "finish_reason": _FINISH[sequence.finish_reason],
            "generated_tokens": len(sequence.tokens),
            "seed": self._run.request.seed,
            "prefill": [{"id": t.id, "text": t.text, "logprob": finite(t.logprob)} for t in prefill],
            "tokens": [_token(token, token.text) for token in sequence.tokens],
        }
        if self._parameters.top_n_tokens:
            details["top_tokens"] = [_top(token) for token in sequence.tokens]
        return details

    async def events(self) -> AsyncGenerator[bytes, None]:
        """SSE: one event for each token; the last has the whole text and the details."""
        index = 0
        async with aclosing(self._run.batches()) as batches:
            async for batch in batches:
                events = b""
                for delta in batch:
                    for token, text, is_last in self._spread(delta):
                        index += 1
                        events += b"data:" + to_json(self._event(index, token, text, is_last)) + b"\n\n"
                if events:
                    yield events

    def _spread(self, delta: Delta) -> list[tuple[TokenInfo, str, bool]]:
        """The delta's text over its tokens, such that the tokens' texts in order are exactly the text.

        A token that is a part of a character, or of what may become a stop string, gets no text; a later one
        gets it. Text or an end that comes without a token repeats the last token, marked special.
        """
        is_end = delta.finish_reason is not None
        tokens = list(delta.tokens)
        if not tokens and (delta.text or is_end):
            known = self._run.sequences[delta.index].tokens
            last = known[-1] if known else TokenInfo(0, "", 0.0)
            tokens = [TokenInfo(last.id, "", last.logprob, special=True)]
        spread, rest = [], delta.text
        for i, token in enumerate(tokens):
            is_last = i == len(tokens) - 1
            text = rest if is_last else token.text if not token.special and rest.startswith(token.text) else ""
            rest = rest[len(text) :]
            spread.append((token, text, is_last and is_end))
        return spread

    def _event(self, index: int, token: TokenInfo, text: str, is_last: bool) -> dict[str, Any]:
        sequence = self._run.sequences[0]
        event: dict[str, Any] = {"index": index, "token": _token(token, text)}
        if self._parameters.top_n_tokens:
            event["top_tokens"] = _top(token)
        event["generated_text"] = self._prefix + sequence.text if is_last else None
        event["details"] = None
        if is_last:
            assert sequence.finish_reason is not None
            event[FIELD] = self._run.mark
            event["details"] = {
                "finish_reason": _FINISH[sequence.finish_reason],
                "generated_tokens": len(sequence.tokens),
                "input_length": self._run.num_prompt_tokens,
                "seed": self._run.request.seed,
            }
        return event


def _token(token: TokenInfo, text: str) -> dict[str, Any]:
    return {"id": token.id, "text": text, "logprob": finite(token.logprob), "special": token.special}


def _top(token: TokenInfo) -> list[dict[str, Any]]:
    return [{"id": id, "text": text, "logprob": finite(logprob), "special": False} for id, text, logprob in token.top]


def _headers(run: Run, inputs: str, is_complete: bool = False) -> dict[str, str]:
    """text-generation-inference's headers; those of the whole run only where it is over."""
    headers = {"x-compute-type": "rookery", "x-compute-characters": str(len(inputs)), **timing_headers(run)}
    if is_complete:
        total_s = time.perf_counter() - run.arrived
        queue_s = run.first_prompt.queue_s if run.first_prompt else 0.0
        inference_ms = max(0.0, total_s - queue_s) * 1000
        headers |= {
            "x-compute-time": f"{total_s:.6f}",
            "x-total-time": str(round(total_s * 1000)),
            "x-inference-time": str(round(inference_ms)),
            "x-time-per-token": str(round(inference_ms / max(1, run.num_generated_tokens))),
            "x-generated-tokens": str(run.num_generated_tokens),
        }
    return headers
