"""Requests to text in this process: store, pool and engine wired behind the `Generator` protocol.

A request's way: locate the model (disk, else Hub) -> check the request against it, before anything is
loaded -> lease its weights -> its sequences join the engine's running batch -> tokens flow back, coalesced
-> the lease is released when the engine has let go of the last sequence. It knows nothing of HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from serve.account import Account
from serve.admission import Admission, cost
from serve.currency import keep_current
from serve.engine.device import engine_config
from serve.engine.engine import Engine, Slot, StepStats
from serve.engine.sequence import Output, Sequence
from serve.engine.text import Vocabulary
from serve.errors import GenerationFailed, ModelNotFound, OutOfMemory, Overloaded, RookeryError
from serve.flush import FlushClock
from serve.hub.opening import open_hub
from serve.hub.session import Session
from serve.loader import EngineLoader, Facts
from serve.locator import Locator
from serve.logs import bound, get_logger
from serve.metrics import Metrics
from serve.planning import plan
from serve.pool.loader import Evicted, Loaded, LoadFailed, PoolEvent
from serve.pool.pool import ModelPool
from serve.pool.reloads import Reloads
from serve.pool.watchdog import ThreadPerCall, Watchdog
from serve.pool.working_set import WINDOW_S
from serve.quarantine import QUARANTINE_S, Quarantine
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
    Tier,
    TopView,
    UsageSketch,
)
from serve.usage import Usage, top_of

log = get_logger()

_STOPPED = "The generation was stopped."
_NUM_EVICTIONS = 50  # that are shown
_STOPS_KEPT_S = 86_400.0  # longer than a request waits, by far
_GAUGES_S = 1.0
_SWEEP_S = 600.0
# Without a step, or a sign that it could, an engine is given up. A step of GPT-2 small takes 0.1 s at most on two
# cores, and the largest model has 13 times its weights.
_STALLED_S = 12.0
_RELIEF_S = 1.0  # that a step waits for models to go
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
        self._store = store = open_store(settings)
        hub = open_hub(settings, store, self._metrics, open_session=open_session)
        self._locator = Locator(store, hub, self._metrics)
        config = engine_config(settings)
        self._admission = Admission(
            max_running=settings.max_sequences,
            max_waiting=settings.max_waiting or settings.max_sequences,
            deadline_s=settings.deadline_s,
        )
        self._engine = Engine(
            config, on_outputs=self._on_outputs, on_step=self._on_step, on_low_memory=self._on_low_memory
        )
        self._copies = open_copies(settings, store, self._metrics)
        self._loader = EngineLoader(store, self._engine, self._copies)
        self._pool: ModelPool[Facts, Slot] = ModelPool(
            self._loader,
            budget_bytes=config.budget_bytes,
            max_parallel_loads=settings.parallel_loads,
            working_set_s=working_set_s,
            limit_s=settings.lease_timeout_s,
            on_event=self._on_pool_event,
        )
        self._metrics.pool_budget_bytes.labels("device").set(config.budget_bytes)
        self._reloads = Reloads()
        self._quarantine = Quarantine()
        self._reading = Watchdog(ThreadPerCall(), settings.lease_timeout_s)
        self._readings: dict[str, asyncio.Task[Facts]] = {}
        self._sign: asyncio.Future[None] | None = None  # of life, asked of the engine
        self._sign_asked = 0.0
        self._calls: dict[Sequence, _Call] = {}
        self._stopped: dict[str, tuple[float, RookeryError]] = {}  # id in lower case -> when, why
        self._evictions: deque[tuple[float, Evicted]] = deque(maxlen=_NUM_EVICTIONS)  # with when; the newest first
        self._started = time.monotonic()
        self._releases: set[asyncio.Task[None]] = set()
        self._flush_clock = FlushClock(settings.flush_interval_s)
        self._on_end = on_end
        self._usage = Usage()
        self._probe = GenerationRequest(settings.base, ("",), {"max_new_tokens": 1, "ignore_eos": True})
        self._closed = False
        self._gauges = asyncio.create_task(self._keep_gauges()) if self._metrics.is_enabled else None
        self._keeping_current = asyncio.create_task(keep_current(self._pool, store))
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

    async def forget(self, model_id: str, *, at_once: bool = False) -> None:
        wanted = model_id.lower()  # ids name the same model in any case
        await asyncio.to_thread(self._store.forget, wanted)
        if at_once:
            await self._stop_texts(wanted)
        await self._locator.forget(wanted)

        def is_its(key: str) -> bool:
            return key.partition("@")[0].lower() == wanted

        self._loader.forget(is_its)
        await self._pool.forget(is_its)
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
        for task in (self._gauges, self._keeping_current, self._sweeping):
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

    async def check_health(self) -> None:
        """Raises: RookeryError when the engine's thread has ended or come to nothing, or its device cannot compute."""
        if not self._engine.is_alive:
            raise RookeryError("The engine's thread has ended.")
        if self._sign is None:
            self._sign, self._sign_asked = asyncio.wrap_future(self._engine.probe()), time.monotonic()
        await asyncio.wait({self._sign}, timeout=1.0)
        if self._sign.done():
            sign, self._sign = self._sign, None
            if (error := sign.exception()) is not None:
                raise RookeryError(f"The engine's device does not compute: {type(error).__name__}.") from error
        elif (stalled_s := time.monotonic() - self._sign_asked) >= _STALLED_S:
            raise RookeryError(f"The engine has come to nothing for {stalled_s:.0f} s.")

    async def _find(self, request: GenerationRequest, account: Account) -> _Call:
        """The request's sequences, with the engine, by a model that is here by now."""
        arrived = time.monotonic()
        with bound(request_id=request.request_id):
            if self._is_new(request):  # first of all: under overload most is refused, and each costs what it is let do
                self._admission.check_queue(request.caller, self._calls)
            revision, fetch_s = await self._locator.locate(request.model_id, viewer=request.viewer)
            account.model_id = revision.model_id
            try:
                return await self._admit(request, revision, fetch_s, arrived)
            except ModelNotFound:  # it was here: since then it has made room for another one, or was replaced
                await self._pool.forget(lambda key: key == _key_of(revision))
                revision, again_s = await self._locator.locate(request.model_id, viewer=request.viewer)
                return await self._admit(request, revision, fetch_s + again_s, arrived)

    async def _stop_texts(self, wanted: str) -> None:
        """Those by a model that was deleted or disabled, also of requests that wait for its weights."""
        error = await asyncio.to_thread(self._store.why_stopped, wanted)
        now = time.monotonic()
        self._stopped = {one: stop for one, stop in self._stopped.items() if now - stop[0] < _STOPS_KEPT_S}
        self._stopped[wanted] = now, error
        for call in {call for call in self._calls.values() if call.origin.model_id.lower() == wanted}:
            call.stop(error)
            self._engine.cancel(call.sequences)

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
        facts = self._loader.known(key) or await self._read_facts(key)
        plans = await asyncio.to_thread(plan, request, facts)
        costs = [cost(len(one.prompt_ids), one.params.max_new_tokens) for one in plans]
        if self._is_new(request):
            self._admission.check(request.caller, costs, self._calls)
        async with AsyncExitStack() as stack:
            with self._admission.unbegun(request.caller, costs):  # nothing is awaited from its end to their beginning
                lease = await stack.enter_async_context(self._pool.lease(key, timeout_s=self._settings.lease_timeout_s))
            if self._closed:
                raise Overloaded("This generator is shutting down; ask another one.", retry_after_s=1)
            tier: Tier = "hub" if fetch_s else lease.tier
            stopped_at, stopped = self._stopped.get(revision.model_id.lower(), (arrived, None))
            if stopped is not None and arrived < stopped_at:
                raise copy.copy(stopped)
            load_s = fetch_s + lease.load_s
            origin = _Origin(revision.model_id, revision.revision, tier, load_s, arrived, facts.vocabulary)
            sequences = {one.sequence(request, facts, lease.slot): one.index for one in plans}
            call = _Call(sequences, origin, request.is_whole)
            self._start(call, lease.slot, stack.pop_all())
        return call

    def _is_new(self, request: GenerationRequest) -> bool:
        """And may be refused. What was begun elsewhere goes on here, come what may."""
        return not request.written and request is not self._probe

    async def _read_facts(self, key: str) -> Facts:
        """By one thread however many wait: a disk that hangs would take all of them."""
        if key not in self._readings:
            self._reading.check(key)
            task = asyncio.create_task(self._reading.call(key, self._loader.facts, key))
            self._readings[key] = task
            task.add_done_callback(lambda _: self._readings.pop(key))
        try:
            return await asyncio.shield(self._readings[key])
        except RookeryError as exc:
            raise copy.copy(exc) from exc  # each who waits has an error of its own

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
            if output.error is not None:
                self._note_failure(call, output.error)
            if call.is_urgent:
                call.wake()
            elif not call.is_whole:
                self._flush_clock.wake_later(call.wake)

    def _note_failure(self, call: _Call, error: RookeryError) -> None:
        if isinstance(error, OutOfMemory):
            call.stop(error)
        elif isinstance(error, GenerationFailed) and not call.has_failed:
            call.has_failed = True  # one request is one failure, however many texts it asked for
            key = f"{call.origin.model_id}@{call.origin.revision}"
            if (reason := self._quarantine.note(key)) is not None:
                log.error("model_quarantined", model=key, for_s=QUARANTINE_S)
                self._metrics.quarantines.inc()
                self._pool.refuse(key, reason, QUARANTINE_S)

    def _on_low_memory(self) -> None:
        """From the engine's thread, whose step waits for it."""
        relief = asyncio.run_coroutine_threadsafe(self._pool.relieve(), self._loop)
        with suppress(TimeoutError):
            relief.result(_RELIEF_S)

    def _on_step(self, stats: StepStats) -> None:
        self._admission.note_step(stats.num_rows, stats.num_models, stats.duration_s)
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

    model_id: str
    revision: str
    tier: Tier
    load_s: float
    arrived: float
    vocabulary: Vocabulary


class _Call:
    """The sequences of one request, and their outputs until the request's coroutine fetches them."""

    def __init__(self, index: dict[Sequence, int], origin: _Origin, is_whole: bool) -> None:
        """`index`: which of the request's each is."""
        self.sequences = sequences = list(index)
        self.is_whole = is_whole
        self.origin = origin
        self.index = index
        self.num_open = len(sequences)
        self.done = asyncio.Event()
        self.has_failed = False
        self.admitted_s = 0.0  # after its arrival: when the engine got it
        self.unseen = set(sequences)  # those of which no delta was sent yet
        self._fresh: list[Output] = []
        self._size = 0  # of them, in tokens
        self._woken = asyncio.Event()
        self._error: RookeryError | None = None

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

    def stop(self, error: RookeryError) -> None:
        """`flushes` hands out nothing more, and raises it."""
        self._error = error
        self.wake()

    async def flushes(self) -> AsyncIterator[list[Output]]:
        """What came since the last time, each time the call is woken, until its last output."""
        while self.num_open or self._fresh:
            await self._woken.wait()
            self._woken.clear()
            if self._error is not None:
                raise copy.copy(self._error)
            outputs, self._fresh, self._size = self._fresh, [], 0
            if outputs:
                yield outputs


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
                error=_STOPPED if last.cancelled else last.error.message if last.error else None,
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
