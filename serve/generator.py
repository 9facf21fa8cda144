"""Requests to text in this process: store, pool and engine wired behind the `Generator` protocol.

A request's way: locate the model (disk, else Hub) -> check the request against it, before anything is
loaded -> lease its weights -> its sequences join the engine's running batch -> tokens flow back, coalesced
-> the lease is released when the engine has let go of the last sequence. It knows nothing of HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from serve.account import Account
from serve.engine.device import engine_config
from serve.engine.engine import Engine, Slot, StepStats
from serve.engine.sequence import Output, Sequence
from serve.engine.text import Vocabulary
from serve.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RookeryError,
)
from serve.flush import FlushClock
from serve.hub.opening import open_hub
from serve.hub.session import Session
from serve.loader import EngineLoader, Facts
from serve.locator import Locator
from serve.logs import bound, get_logger
from serve.metrics import Metrics
from serve.pool.loader import Evicted, Loaded, LoadFailed, PoolEvent
from serve.pool.pool import ModelPool
from serve.pool.reloads import Reloads
from serve.pool.working_set import WINDOW_S
from serve.settings import Settings
from serve.store.local_copies import LocalCopies
from serve.store.opening import open_copies, open_store
from serve.store.revisions import Revision
from serve.types import (
    Delta,
    Eviction,
    GenerationRequest,
    PromptInfo,
    ReplicaView,
    Resident,
    SamplingParams,
    Tier,
    TopView,
    UsageSketch,
)
from serve.usage import Usage, top_of

log = get_logger()

_NUM_EVICTIONS = 50  # that are shown
_GAUGES_S = 1.0
_SWEEP_S = 600.0
_MAX_FRESH = 1024  # tokens of some 250 bytes, with five alternatives each; gRPC refuses messages over 4 MiB


class LocalGenerator:
    """A `Generator` in this process; make it inside the event loop that will use it, and `close` it.

    `open_session` makes its ways to the Hub; `on_end` is called in the task of each request when it has ended.
    `working_set_s`: how long ago a model may have been asked for to count in `asked_bytes`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        metrics: Metrics | None = None,
        open_session: Callable[..., Session] = Session,
        on_end: Callable[[Account], None] | None = None,
        working_set_s: float = WINDOW_S,
    ) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics(enabled=False)
        self._loop = asyncio.get_running_loop()
        store = open_store(settings)
        hub = open_hub(settings, store, self._metrics, open_session=open_session)
        self._locator = Locator(store, hub, self._metrics)
        config = engine_config(settings)
        self._engine = Engine(config, on_outputs=self._on_outputs, on_step=self._on_step)
        self._copies = open_copies(settings, store, self._metrics)
        self._loader = EngineLoader(store, self._engine, self._copies)
        self._pool: ModelPool[Facts, Slot] = ModelPool(
            self._loader,
            budget_bytes=config.budget_bytes,
            max_parallel_loads=settings.parallel_loads,
            working_set_s=working_set_s,
            on_event=self._on_pool_event,
        )
        self._metrics.pool_budget_bytes.labels("device").set(config.budget_bytes)
        self._reloads = Reloads()
        self._calls: dict[Sequence, _Call] = {}
        self._evictions: deque[tuple[float, Evicted]] = deque(maxlen=_NUM_EVICTIONS)  # with when; the newest first
        self._started = time.monotonic()
        self._releases: set[asyncio.Task[None]] = set()
        self._flush_clock = FlushClock(settings.flush_interval_s)
        self._on_end = on_end
        self._usage = Usage()
        self._probe = GenerationRequest(settings.base, ("",), {"max_new_tokens": 1, "ignore_eos": True})
        self._closed = False
        self._gauges = asyncio.create_task(self._keep_gauges()) if self._metrics.is_enabled else None
        self._sweeping = asyncio.create_task(self._sweep_copies(self._copies)) if self._copies else None

    # --- The Generator protocol -----------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """Raises: ModelNotFound, ModelUnusable, InvalidRequest, Overloaded, ... before the first delta."""
        account = Account(request)
        try:
            call = await self._find(request, account)
            try:
                async for outputs in call.flushes():
                    deltas = _deltas(call, outputs)
                    account.add(deltas)
                    self._count_waits(call, deltas)
                    yield deltas
            finally:
                self._engine.cancel(call.sequences)
        except BaseException as exc:  # also the caller's leaving
            account.end(exc)
            raise
        finally:
            if request is not self._probe:
                self._settle(account)

    async def replicas(self) -> list[ReplicaView]:
        return [self.view()]

    async def top(self, limit: int) -> TopView:
        return top_of([self.usage()], limit)

    async def forget(self, model_id: str) -> None:
        wanted = model_id.lower()  # ids name the same model in any case
        await self._locator.forget(wanted)
        await self._pool.forget(lambda key: key.partition("@")[0].lower() == wanted)
        if self._copies is not None:  # after what is in memory, which matters more
            await asyncio.to_thread(self._copies.forget, wanted)

    async def check_ready(self) -> None:
        async for deltas in self.generate(self._probe):
            for delta in deltas:
                if delta.error:
                    raise RookeryError(delta.error)

    async def close(self) -> None:
        """End what is running, free every slot, stop the threads."""
        self._closed = True
        for task in (self._gauges, self._sweeping):
            if task is not None:
                task.cancel()
        self._locator.close()
        self._engine.cancel(list(self._calls))
        await asyncio.gather(*self._releases)
        await self._pool.close()
        await asyncio.to_thread(self._engine.close)

    def view(self) -> ReplicaView:
        """This generator as it is now."""
        now, config, pool = time.monotonic(), self._engine.config, self._pool
        num_running = sum(sequence.kv_row >= 0 for sequence in self._calls)
        return ReplicaView(
            name="",
            device=config.device.type,
            dtype=config.weights,
            used_bytes=pool.used_bytes,
            budget_bytes=pool.budget_bytes,
            residents=tuple(
                Resident(*_parts_of(model.key), model.tier, model.num_bytes, model.leases, model.idle_s)
                for model in pool.residents()
            ),
            evictions=tuple(
                Eviction(*_parts_of(event.key), event.reason, event.num_bytes, now - at)
                for at, event in self._evictions
            ),
            num_waiting=pool.num_waiting,
            num_queued=len(self._calls) - num_running,
            num_running=num_running,
            up_s=now - self._started,
        )

    @property
    def asked_bytes(self) -> int:
        """Of the models asked for of late, whether or not there was room for them."""
        return self._pool.asked_bytes

    def usage(self) -> UsageSketch:
        """What has been asked of this generator, to be put together with others'."""
        return self._usage.sketch()

    def check_alive(self) -> None:
        """Raises: RookeryError when no text can ever be written here again."""
        if not self._engine.is_alive:
            raise RookeryError("The engine's thread has ended.")

    async def _find(self, request: GenerationRequest, account: Account) -> _Call:
        """The request's sequences, with the engine, by a model that is here by now."""
        arrived = time.monotonic()
        with bound(request_id=request.request_id):
            revision, fetch_s = await self._locator.locate(request.model_id, sees_private=request.sees_private)
            account.model_id = revision.model_id
            try:
                return await self._admit(request, revision, fetch_s, arrived)
            except ModelNotFound:  # it was here: since then it has made room for another one, or was replaced
                await self._pool.forget(lambda key: key == _key_of(revision))
                revision, again_s = await self._locator.locate(request.model_id, sees_private=request.sees_private)
                return await self._admit(request, revision, fetch_s + again_s, arrived)

    def _settle(self, account: Account) -> None:
        """Nothing that goes wrong here may take the place of how the generation ended."""
        try:
            account.tell()
            if account.is_answered:
                self._usage.add(account.model_id, account.caller, account.num_tokens)
            if self._on_end is not None:
                self._on_end(account)
        except Exception:
            log.exception("account_not_told")

    async def _admit(self, request: GenerationRequest, revision: Revision, fetch_s: float, arrived: float) -> _Call:
        """The request's sequences, with the engine, which took `fetch_s` to bring the revision here."""
        key = _key_of(revision)
        facts = await asyncio.to_thread(self._loader.facts, key)
        plans = await asyncio.to_thread(_plan, request, facts)
        async with AsyncExitStack() as stack:
            lease = await stack.enter_async_context(self._pool.lease(key, timeout_s=self._settings.lease_timeout_s))
            if self._closed:
                raise Overloaded("This generator is shutting down; ask another one.", retry_after_s=1)
            tier: Tier = "hub" if fetch_s else lease.tier
            origin = _Origin(revision.revision, tier, fetch_s + lease.load_s, arrived, facts.vocabulary)
            call = _Call([plan.sequence(request, facts, lease.slot) for plan in plans], origin, request.is_whole)
            self._start(call, lease.slot, stack.pop_all())
        return call

    def _start(self, call: _Call, slot: Slot, lease: AsyncExitStack) -> None:
        """From here on the weights are the engine's: the lease ends with its last output, however slow the reader."""

        async def release() -> None:
            async with lease:
                await call.done.wait()

        self._calls.update(dict.fromkeys(call.sequences, call))
        call.admitted_s = time.monotonic() - call.origin.arrived
        self._engine.submit(slot, call.sequences)
        task = asyncio.create_task(release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    # --- The engine's and the pool's events --------------------------------------------------------------------

    def _on_outputs(self, outputs: list[Output]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, outputs)  # from the engine's thread: one call a step

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            call = self._calls[output.sequence]
            call.take(output)
            if output.is_last:
                del self._calls[output.sequence]
            if call.is_urgent:
                call.wake()
            elif not call.is_whole:
                self._flush_clock.wake_later(call.wake)

    def _on_step(self, stats: StepStats) -> None:
        self._metrics.batch_rows.observe(stats.num_rows)
        self._metrics.batch_models.observe(stats.num_models)
        self._metrics.step_duration.observe(stats.duration_s)

    def _on_pool_event(self, event: PoolEvent) -> None:
        match event:
            case Loaded():
                self._metrics.model_loads.labels(event.tier, "ok").inc()
                self._metrics.model_load_duration.labels(event.tier).observe(event.load_s)
                self._metrics.model_reloads.inc(self._reloads.take(event.key))
            case LoadFailed():
                self._metrics.model_loads.labels("none", "failed").inc()
            case Evicted():
                self._metrics.model_evictions.labels(event.reason).inc()
                self._evictions.appendleft((time.monotonic(), event))
                if event.reason == "budget":
                    self._metrics.age_at_eviction.observe(event.age_s)
                    self._reloads.note(event.key)

    def _count_waits(self, call: _Call, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.prompt is not None:
                self._metrics.queue_wait.observe(max(0.0, delta.prompt.queue_s - call.admitted_s))

    async def _sweep_copies(self, copies: LocalCopies) -> None:
        """What was deleted while this process, or the way to it, was down is not told to it again."""
        while True:
            try:
                await asyncio.to_thread(copies.sweep)
            except Exception:  # whatever it was, what is deleted must go
                log.exception("copies_not_swept")
            await asyncio.sleep(_SWEEP_S)

    async def _keep_gauges(self) -> None:
        """Now and then rather than at each change: whoever scrapes sees them no more often."""
        while True:
            try:
                self._set_gauges()
            except Exception:  # gauges that stand still look like a service that does
                log.exception("gauges_failed")
            await asyncio.sleep(_GAUGES_S)

    def _set_gauges(self) -> None:
        metrics, residents = self._metrics, self._pool.residents()
        metrics.queue_depth.set(sum(sequence.kv_row < 0 for sequence in self._calls))
        metrics.pool_waiting.set(self._pool.num_waiting)
        metrics.pool_bytes.labels("device").set(self._pool.used_bytes)
        metrics.pool_models.labels("resident").set(len(residents))
        metrics.pool_models.labels("leased").set(sum(model.leases > 0 for model in residents))
        metrics.pool_models.labels("pinned").set(sum(model.pinned for model in residents))


def _key_of(revision: Revision) -> str:
    return f"{revision.model_id}@{revision.revision}"


def _parts_of(key: str) -> tuple[str, str]:
    model_id, _, revision = key.partition("@")
    return model_id, revision


@dataclass(frozen=True, slots=True)
class _Origin:
    """Which weights answer a request, and how they came to be in memory."""

    revision: str
    tier: Tier
    load_s: float
    arrived: float
    vocabulary: Vocabulary


class _Call:
    """The sequences of one request, and their outputs until the request's coroutine fetches them."""

    def __init__(self, sequences: list[Sequence], origin: _Origin, is_whole: bool) -> None:
        self.sequences = sequences
        self.is_whole = is_whole
        self.origin = origin
        self.index = {sequence: i for i, sequence in enumerate(sequences)}
        self.num_open = len(sequences)
        self.done = asyncio.Event()
        self.admitted_s = 0.0  # after its arrival: when the engine got it
        self.unseen = set(sequences)  # those of which no delta was sent yet
        self._fresh: list[Output] = []
        self._size = 0  # of them, in tokens
        self._woken = asyncio.Event()

    def take(self, output: Output) -> None:
        """On the event loop, as the engine's outputs come in."""
        self._fresh.append(output)
        self._size += 1 + len(output.prompt_tokens)
        if output.is_last:
            self.num_open -= 1
            if not self.num_open:
                self.done.set()

    @property
    def is_urgent(self) -> bool:
        """The first token and the end are handed out at once, and what grows too long to be one message."""
        return len(self.unseen) == len(self.sequences) or not self.num_open or self._size >= _MAX_FRESH

    def wake(self) -> None:
        """Lets `flushes` hand out what there is."""
        self._woken.set()

    async def flushes(self) -> AsyncIterator[list[Output]]:
        """What came since the last time, each time the call is woken, until its last output."""
        while self.num_open or self._fresh:
            await self._woken.wait()
            self._woken.clear()
            outputs, self._fresh, self._size = self._fresh, [], 0
            if outputs:
                yield outputs


@dataclass(frozen=True, slots=True)
class _Plan:
    """One sequence of a request, checked and ready for a slot."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    index: int

    def sequence(self, request: GenerationRequest, facts: Facts, slot: Slot) -> Sequence:
        return Sequence(
            slot=slot.index,
            prompt_ids=self.prompt_ids,
            params=self.params,
            vocabulary=facts.vocabulary,
            seed=request.seed,
            choice=self.index,
            top_logprobs=request.top_logprobs,
            prompt_logprobs=request.prompt_logprobs,
            caller=request.caller,
        )


def _plan(request: GenerationRequest, facts: Facts) -> list[_Plan]:
    """Check a request against its model and resolve its parameters. Raises: InvalidRequest."""
    for token, _ in request.sampling.get("logit_bias", ()):
        if not 0 <= token < facts.shape.vocab_size:
            message = f"'logit_bias' names token {token}; this model's tokens are 0 to {facts.shape.vocab_size - 1}."
            raise InvalidRequest(message, param="logit_bias")
    plans = []
    for number, prompt in enumerate(request.prompts):
        ids = _encode(prompt, request, facts)
        params = _resolve(request, facts, len(ids))
        plans += [_Plan(ids, params, number * request.num_choices + choice) for choice in range(request.num_choices)]
    return plans


def _encode(prompt: str | tuple[int, ...], request: GenerationRequest, facts: Facts) -> tuple[int, ...]:
    vocabulary, shape = facts.vocabulary, facts.shape
    if isinstance(prompt, str):
        bos = request.add_bos or facts.defaults.prefix == "<|endoftext|>"
        ids = [vocabulary.eos_id] * bos + vocabulary.encode(prompt)
    else:
        ids = list(prompt)
    if not all(0 <= token < shape.vocab_size for token in ids):  # a tokenizer, too, may know more tokens than its model
        message = f"The prompt has a token id outside this model's vocabulary (0 to {shape.vocab_size - 1})."
        raise InvalidRequest(message, param="prompt")
    if request.truncate is not None:
        ids = ids[-request.truncate :]
    return tuple(ids) or (vocabulary.eos_id,)


def _resolve(request: GenerationRequest, facts: Facts, num_prompt_tokens: int) -> SamplingParams:
    """The model's own defaults, then what the request says, within the model's context."""
    defaults, room = facts.defaults, facts.shape.n_positions - num_prompt_tokens
    asked = request.sampling.get("max_new_tokens")
    if room < 1 or (asked is not None and asked > room):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {facts.shape.n_positions} tokens. However, the prompt has "
            f"{num_prompt_tokens} tokens and {1 if asked is None else asked} new tokens were requested. Shorten the "
            "prompt, or ask for fewer tokens.",
            param="prompt",
        )
    values: dict[str, Any] = {"min_new_tokens": max(0, defaults.min_length - num_prompt_tokens)}
    values |= defaults.sampling | request.sampling
    if asked is None:
        longest = values.get("max_new_tokens") or (defaults.max_length or 160) - num_prompt_tokens
        values["max_new_tokens"] = max(1, min(longest, room))
    return replace(SamplingParams(), **values)


def _deltas(call: _Call, outputs: Iterable[Output]) -> list[Delta]:
    """One delta for each sequence that has something new."""
    by_sequence: dict[Sequence, list[Output]] = {}
    for output in outputs:
        by_sequence.setdefault(output.sequence, []).append(output)
    deltas = []
    for sequence, news in by_sequence.items():
        last, prompt = news[-1], None
        if sequence in call.unseen:
            call.unseen.discard(sequence)
            prompt = _prompt_info(sequence, news, call.origin)
        deltas.append(
            Delta(
                index=call.index[sequence],
                text="".join(output.text for output in news),
                tokens=tuple(output.token for output in news if output.token),
                finish_reason=last.finish_reason,
                error="The generation was stopped." if last.cancelled else last.error,
                prompt=prompt,
            )
        )
    return deltas


def _prompt_info(sequence: Sequence, news: list[Output], origin: _Origin) -> PromptInfo:
    return PromptInfo(
        text=origin.vocabulary.decode(sequence.prompt_ids),
        num_tokens=len(sequence.prompt_ids),
        tier=origin.tier,
        queue_s=(sequence.first_step_at or time.monotonic()) - origin.arrived,
        load_s=origin.load_s,
        tokens=tuple(token for output in news for token in output.prompt_tokens),
        revision=origin.revision,
    )
