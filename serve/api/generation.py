"""One generation between HTTP and a Generator: bounds, deadline, the client's leaving, first-token time.

It does not know either wire format.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.marking import HEADERS, mark
from serve.api.quota import allowance
from serve.api.service import Limits, Service
from serve.api.status import body_of, status_of, to_json
from serve.errors import ContextLengthExceeded, DeadlineExceeded, GenerationFailed, InvalidRequest, RookeryError
from serve.logs import get_logger
from serve.types import Delta, FinishReason, GenerationRequest, ModelId, PromptInfo, SamplingParams, TokenInfo

log = get_logger()

MAX_NEW_TOKENS = 2048  # the longest context of any GPT-2 we serve; the model's own limit is checked by the engine
MAX_TOKEN_ID = 299_999
MAX_STOP_CHARS = 64
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
_LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's own floor


@dataclass(slots=True)
class Sequence:
    """What one sequence has become so far."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt: PromptInfo | None = None
    last_token_at: float | None = None

    @property
    def mean_logprob(self) -> float:
        """`best_of` ranks by it. The mean, so that short answers are not preferred."""
        logprobs = [finite(token.logprob) or 0.0 for token in self.tokens]
        return sum(logprobs) / len(logprobs) if logprobs else _LOWEST_LOGPROB

    def add(self, delta: Delta) -> None:
        if delta.error is not None:
            raise GenerationFailed(delta.error)
        self.text += delta.text
        self.tokens.extend(delta.tokens)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.prompt = delta.prompt or self.prompt


class Run:
    """One request to the generator and what came of it: `sequences[prompt * num_choices + choice]`."""

    def __init__(self, service: Service, request: GenerationRequest, sent: Request) -> None:
        """`sent`: by whom and when it was asked for. Raises: InvalidRequest."""
        check_budget(request, service.limits)
        self.request = request
        self.sequences = [Sequence() for _ in range(len(request.prompts) * request.num_choices)]
        self.arrived: float = sent.state.arrived  # by `time.perf_counter()`
        self.first_prompt: PromptInfo | None = None
        self._service = service
        self._allowance = allowance(sent)
        self._has_begun = False

    @property
    def mark(self) -> dict[str, Any]:
        """That its texts are a model's, and which one's."""
        return mark(self.request.model_id, self.first_prompt.revision or None if self.first_prompt else None)

    async def batches(self) -> AsyncGenerator[list[Delta], None]:
        """Deltas as they come, already added to `sequences`. Closing it closes the generator."""
        source = self._service.generator.generate(self.request)
        try:
            async for batch in source:
                for delta in batch:
                    self._take(delta)
                self._count([delta for delta in batch if delta.tokens])
                yield batch
        finally:
            if (close := getattr(source, "aclose", None)) is not None:
                await close()
        if any(sequence.finish_reason is None for sequence in self.sequences):
            raise GenerationFailed("The generation ended before every sequence was complete; please try again.")

    async def finish(self) -> list[Sequence]:
        """All sequences, complete."""
        async with aclosing(self.batches()) as batches:
            async for _ in batches:
                pass
        return self.sequences

    @asynccontextmanager
    async def wanted(self, receive: Receive) -> AsyncIterator[None]:
        """The block in which it is generated: `while_wanted`, as far as its caller may, with a count of how it ended.

        Raises: RateLimited, beside what `while_wanted` raises.
        """
        outcome = "ok"
        try:
            async with (
                self._allowance.generating(self.request, lambda: self.num_prompt_tokens + self.num_generated_tokens),
                while_wanted(receive, self._service.limits.generate_s),
            ):
                yield
        except BaseException as exc:
            outcome = _outcome_of(exc)
            raise
        finally:
            self._service.metrics.generations.labels(outcome).inc()

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt once, however many choices it has."""
        firsts = self.sequences[:: self.request.num_choices]
        return sum(sequence.prompt.num_tokens for sequence in firsts if sequence.prompt)

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(sequence.tokens) for sequence in self.sequences)

    def _take(self, delta: Delta) -> None:
        metrics = self._service.metrics
        self.sequences[delta.index].add(delta)
        if delta.prompt is not None:
            self.first_prompt = self.first_prompt or delta.prompt
            if delta.index % self.request.num_choices == 0:
                metrics.prompt_tokens.inc(delta.prompt.num_tokens)

    def _count(self, fresh: list[Delta]) -> None:
        if not fresh or self.first_prompt is None:
            return
        now, metrics, tier = time.perf_counter(), self._service.metrics, self.first_prompt.tier
        metrics.tokens_generated.inc(sum(len(delta.tokens) for delta in fresh))
        if not self._has_begun:
            self._has_begun = True
            metrics.time_to_first_token.labels(tier).observe(now - self.arrived)
        waited_s, num_tokens = 0.0, 0
        for delta in fresh:
            sequence = self.sequences[delta.index]
            if sequence.last_token_at is not None:
                waited_s += now - sequence.last_token_at
                num_tokens += len(delta.tokens)
            sequence.last_token_at = now
        if num_tokens:  # their mean: an observation for each token would be a dozen a flush
            metrics.inter_token.labels(tier).observe(waited_s / num_tokens)


class EventStream(Response):
    """A stream of server-sent events that ends in the events' own end mark or in an error event.

    The head waits for the first event, so an error before it is an ordinary HTTP error. Everything runs in
    one task: the generator is closed where it was opened, also when the client leaves.
    """

    media_type = "text/event-stream"

    def __init__(self, run: Run, events: AsyncGenerator[bytes, None], head: Callable[[], Mapping[str, str]]) -> None:
        super().__init__()
        self._run = run
        self._events = events
        self._head = head

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False
        try:
            async with self._run.wanted(receive), aclosing(self._events) as events:
                async for event in events:
                    if not is_started:
                        is_started = True
                        await send(self._start())
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ClientDisconnect:
            return
        except Exception as error:
            if not is_started:
                raise
            broken = _to_rookery_error(error)
            scope["state"]["broken"] = status_of(broken, scope["path"])  # the head says 200: for the metrics
            event = _error_event(broken, scope["path"])
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _start(self) -> dict[str, Any]:
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no", **self._head()})
        del self.headers["content-length"]
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}


def _to_rookery_error(error: Exception) -> RookeryError:
    if isinstance(error, RookeryError):
        return error
    log.error("stream_failed", exc_info=error)
    return RookeryError("The server failed in the middle of this answer.")


def _error_event(error: RookeryError, path: str) -> bytes:
    body = body_of(error, path)
    if not isinstance(body["error"], dict):
        body.setdefault("error_type", "incomplete_generation")
    return b"data: " + to_json(body) + b"\n\n"


def _outcome_of(error: BaseException) -> str:
    """`left`: whoever asked did not wait."""
    if isinstance(error, ClientDisconnect) or not isinstance(error, Exception):  # a task that was cancelled
        return "left"
    return error.code if isinstance(error, RookeryError) else RookeryError.code


@asynccontextmanager
async def while_wanted(receive: Receive, deadline_s: float) -> AsyncIterator[None]:
    """Cancels the block when the client leaves or time is up; the request body must have been read.

    Raises: ClientDisconnect, DeadlineExceeded.
    """
    task = asyncio.current_task()
    assert task is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except TimeoutError as exc:
        raise DeadlineExceeded(f"The answer was not complete after {deadline_s:g} s.") from exc
    except asyncio.CancelledError:
        if has_left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


def check_budget(request: GenerationRequest, limits: Limits) -> None:
    """Raises: InvalidRequest when the request as a whole asks for too much."""
    num_prompts, num_sequences = len(request.prompts), len(request.prompts) * request.num_choices
    if not 1 <= num_prompts <= limits.prompts:
        raise InvalidRequest(f"'prompt' must hold 1 to {limits.prompts} prompts, not {num_prompts}.", param="prompt")
    if num_sequences > limits.sequences:
        raise InvalidRequest(
            f"{num_prompts} prompts with {request.num_choices} choices each are {num_sequences} sequences; "
            f"at most {limits.sequences} are generated at once.",
            param="n",
        )
    sizes = [len(prompt.encode()) if isinstance(prompt, str) else len(prompt) for prompt in request.prompts]
    if max(sizes) > limits.prompt_bytes and request.truncate is None:
        raise ContextLengthExceeded(
            f"A prompt of {max(sizes)} bytes fits into no model's context: {limits.prompt_bytes} are more than the "
            "longest holds. Shorten the prompt.",
            param="prompt",
        )
    if sum(sizes) > limits.prompt_bytes:
        raise InvalidRequest(
            f"The prompts have {sum(sizes)} bytes; at most {limits.prompt_bytes} are read.", param="prompt"
        )
    asked = request.sampling.get("max_new_tokens", SamplingParams().max_new_tokens)
    if num_sequences * asked > limits.new_tokens:
        raise InvalidRequest(
            f"{num_sequences} sequences of up to {asked} tokens are {num_sequences * asked} tokens; "
            f"at most {limits.new_tokens} are generated for one request.",
            param="max_tokens",
        )


def check_model_id(model_id: str) -> str:
    """Raises: ModelNotFound when no model can have this name."""
    ModelId.parse(model_id)
    return model_id


def pick_seed(seed: int | None) -> int:
    """The caller's, as 64 unsigned bits; else a random one that a JavaScript number can hold exactly."""
    return secrets.randbits(53) if seed is None else seed & MAX_SEED


def finite(logprob: float | None) -> float | None:
    """A logprob as JSON can carry it."""
    return None if logprob is None else max(logprob, _LOWEST_LOGPROB)


def timing_headers(run: Run) -> dict[str, str]:
    """That a model writes it; what is known once the first delta is here, times in milliseconds as TGI sends them."""
    prompt = run.first_prompt
    if prompt is None:
        return dict(HEADERS)
    return HEADERS | {
        "x-queue-time": _ms(prompt.queue_s),
        "x-model-load-time": _ms(prompt.load_s),
        "x-model-tier": prompt.tier,
        "x-prompt-tokens": str(run.num_prompt_tokens),
    }


def _ms(seconds: float) -> str:
    return str(max(0, round(seconds * 1000)))
