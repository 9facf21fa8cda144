"""The engine: one thread that steps all running sequences of all resident models.

It knows slots, not model ids: whoever submits a sequence keeps its slot leased until the sequence's last
output. Models of one layout share a *lane* (backend, scheduler); each turn steps every busy lane once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.backend import Backend, Span, kv_bytes_per_row
from serve.engine.memory import drop_caches, is_out_of_memory
from serve.engine.sampling import sample
from serve.engine.scheduler import Chosen, Scheduler
from serve.engine.selection import build_backend
from serve.engine.selection import slot_bytes as bytes_in_slot
from serve.engine.sequence import Output, Sequence
from serve.errors import ModelTooLarge, OutOfMemory, Overloaded, RookeryError
from serve.logs import get_logger
from serve.shape import GPT2Shape
from serve.types import TokenInfo

log = get_logger()


Build = Callable[..., Backend]  # as `build_backend`

MAX_SLOTS = 1024  # of one shape: bounds what each step spends on slots that are not in it


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of the engine. `budget_bytes` is for weights, on a device for KV caches too: the pool bounds the sum of
    `Engine.model_bytes` by it."""

    device: torch.device = torch.device("cpu")
    weights: str = "float32"  # one of `backend.WEIGHT_FORMATS`
    budget_bytes: int = 2 << 30
    max_sequences: int = 64  # KV cache rows of a lane; fewer where they would take most of the budget
    max_step_rows: int = 128  # a GPT-2 small prompt of 128 tokens takes two CPU cores about 0.1 s

    @property
    def lays_out_lazily(self) -> bool:
        """Whether slots and caches take memory only while they are used."""
        return self.device.type == "cpu"


@dataclass(frozen=True, slots=True)
class Layout:
    """What two models must share to be in one lane: shape, and whether the head is tied to the embedding."""

    shape: GPT2Shape
    tied: bool = True


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one model's weights are."""

    layout: Layout
    index: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step, for metrics."""

    num_rows: int
    num_models: int
    num_sampled: int
    num_waiting: int
    duration_s: float


def slot_bytes(layout: Layout, config: EngineConfig) -> int:
    """What a model takes of the budget: its weights, but no less than gives `MAX_SLOTS` slots."""
    needed = bytes_in_slot(layout.shape, config.weights, config.device, tied=layout.tied)
    return max(needed, config.budget_bytes // MAX_SLOTS)


def lane_sizes(layout: Layout, config: EngineConfig, budget_bytes: int) -> tuple[int, int, int]:
    """Slots, KV cache rows and bytes of a lane that may take `budget_bytes`. Raises: ModelTooLarge.

    On a CPU a cache takes memory only as it fills, and the budget is for slots alone. A device lays all of it out.
    """
    needed, row_bytes = slot_bytes(layout, config), kv_bytes_per_row(layout.shape, config.weights)
    most = config.budget_bytes // 2 if config.lays_out_lazily else budget_bytes // 4
    num_rows = max(1, min(most // row_bytes, config.max_sequences))
    cache_bytes = 0 if config.lays_out_lazily else num_rows * row_bytes
    num_slots = (budget_bytes - cache_bytes) // needed
    if num_slots < 1:
        raise ModelTooLarge(
            f"The model needs {(needed + cache_bytes) >> 20} MiB; {budget_bytes >> 20} MiB are left for models of its "
            "layout."
        )
    return num_slots, num_rows, num_slots * needed + cache_bytes


class Lane:
    """Everything of one layout, and its step."""

    def __init__(
        self, layout: Layout, config: EngineConfig, budget_bytes: int, build: Build, relieve: Callable[[], None]
    ) -> None:
        """`budget_bytes`: what it may take. Raises: ModelTooLarge when not one slot fits."""
        self._relieve = relieve
        num_slots, num_rows, self.num_bytes = lane_sizes(layout, config, budget_bytes)
        self.backend = build(layout.shape, num_slots, num_rows, config.weights, config.device, tied=layout.tied)
        self.scheduler = Scheduler(num_rows=num_rows, max_step_rows=config.max_step_rows, forget=self.backend.forget)

    def step(self) -> tuple[list[Output], StepStats | None]:
        """Compute one token for everyone who can take one."""
        outputs = [Output(s, cancelled=True) for s in self.scheduler.cancelled()]
        self._retire(outputs)
        chosen = self.scheduler.schedule()
        if not chosen:
            return outputs, None
        started = time.monotonic()
        produced = self._attempt(chosen)
        if produced is None:
            log.warning("step_out_of_memory", sequences=len(chosen))
            self._relieve()
            middle = len(chosen) // 2
            halves = [half for half in (chosen[:middle], chosen[middle:]) if half]
            produced = [output for half in halves for output in self._attempt(half) or _without_memory(half)]
        self._retire(produced)
        stats = StepStats(
            num_rows=sum(len(span.token_ids) for _, span in chosen),
            num_models=len({span.slot for _, span in chosen}),
            num_sampled=len(produced),
            num_waiting=self.scheduler.num_waiting,
            duration_s=time.monotonic() - started,
        )
        return outputs + produced, stats

    def _retire(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.is_last:
                self.scheduler.remove(output.sequence)

    def _attempt(self, chosen: Chosen) -> list[Output] | None:
        """The outputs of all that were sampled; None when there was no memory, and nothing has changed."""
        try:
            return self._compute(chosen)
        except Exception as exc:  # NOTE: the worker loop. Whatever broke, every waiting caller gets an answer.
            if is_out_of_memory(exc):
                return None
            log.exception("step_failed", sequences=len(chosen))
            return _failed(chosen, RookeryError("The engine failed on this batch; try again."))

    def _compute(self, chosen: Chosen) -> list[Output]:
        """All that can fail comes first: until then no sequence has changed, and the step can be done again."""
        logits = self.backend.forward([span for _, span in chosen])
        sampling: list[Sequence] = []
        rows: list[int] = []
        row = 0
        prompt_infos: list[tuple[Sequence, list[TokenInfo]]] = []
        for sequence, span in chosen:
            count = len(span.token_ids) if span.wants_all_logits else int(span.wants_logits)
            if span.wants_all_logits:
                prompt_infos.append((sequence, _prompt_infos(sequence, span, logits[row : row + count])))
            row += count
            if span.wants_logits:
                sampling.append(sequence)
                rows.append(row - 1)
        wanted = logits if len(rows) == len(logits) else logits[rows]
        sampled = sample(wanted, [s.sampling_row() for s in sampling]) if sampling else []
        for sequence, infos in prompt_infos:
            sequence.prompt_infos += infos
        for sequence, span in chosen:
            sequence.computed(len(span.token_ids))
        return [s.append(result) for s, result in zip(sampling, sampled, strict=True)]


def _failed(chosen: Chosen, error: RookeryError) -> list[Output]:
    return [Output(sequence, error=error) for sequence, _ in chosen]


def _without_memory(chosen: Chosen) -> list[Output]:
    return _failed(chosen, OutOfMemory("There is no memory to go on with this text now; try again.", retry_after_s=5))


def _prompt_infos(sequence: Sequence, span: Span, logits: Tensor) -> list[TokenInfo]:
    """Each prompt token's log-probability given what precedes it; `logits` are the span's rows."""
    infos = [sequence.token_info(sequence.prompt_ids[0], None)] if span.past == 0 else []
    following = sequence.prompt_ids[span.past + 1 : span.past + 1 + len(logits)]
    logprobs = torch.log_softmax(logits[: len(following)], -1)
    for position, token in enumerate(following):
        values, ids = logprobs[position].topk(min(sequence.top_logprobs, logprobs.shape[-1]))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        infos.append(sequence.token_info(token, float(logprobs[position, token]), top))
    return infos


class Engine:
    """Lanes and the thread that steps them. `on_outputs` and `on_step` are called from that thread.

    So is `on_low_memory`, before a step that found none is done again: whoever listens gives up what it can, and
    returns soon. `build`: how to make a backend, where it is not for the device and the weights to decide.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_outputs: Callable[[list[Output]], None],
        on_step: Callable[[StepStats], None] = lambda stats: None,
        on_low_memory: Callable[[], None] = lambda: None,
        build: Build = build_backend,
    ) -> None:
        self.config = config
        self._build = build
        self._on_outputs, self._on_step, self._on_low_memory = on_outputs, on_step, on_low_memory
        self._lanes: dict[Layout, Lane] = {}
        self._lane_lock = threading.Lock()  # held while a lane is made, which takes long on a device
        self._inbox: list[tuple[Layout, list[Sequence]]] = []
        self._probes: list[Future[None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether sequences still get outputs."""
        return self._thread.is_alive()

    def model_bytes(self, layout: Layout) -> int:
        """What a model takes of the budget.

        Where lanes are laid out once, a model takes its slot's part of the whole: full lanes then mean a full budget,
        and so that older models are evicted. Raises: ModelTooLarge.
        """
        if self.config.lays_out_lazily:
            return slot_bytes(layout, self.config)
        return -(-self.config.budget_bytes // self._lane(layout).backend.num_slots)

    def load(self, layout: Layout, tensors: Mapping[str, Tensor]) -> Slot:
        """Copy a model into a free slot. Blocks for the copy; other sequences go on. Any thread.

        Raises: ModelTooLarge; Overloaded when all slots of its lane are taken.
        """
        backend = self._lane(layout).backend
        try:
            index = backend.acquire()
        except IndexError as exc:
            raise Overloaded("All places for models of this layout are taken; try again.", retry_after_s=1) from exc
        try:
            backend.write(index, tensors)
        except BaseException:
            backend.clear(index)
            raise
        return Slot(layout, index, self.model_bytes(layout))

    def unload(self, slot: Slot) -> None:
        """Free a slot that no running sequence uses. Any thread."""
        self._lanes[slot.layout].backend.clear(slot.index)

    def submit(self, slot: Slot, sequences: Iterable[Sequence]) -> None:
        """Start sequences at the next step; their outputs come through `on_outputs`. Any thread."""
        with self._wake:
            self._inbox.append((slot.layout, list(sequences)))
            self._wake.notify()

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Stop sequences before the next step; each that runs still gets a last output. Any thread."""
        with self._wake:
            for sequence in sequences:
                sequence.cancelled = True
            self._wake.notify()

    def probe(self) -> Future[None]:
        """Done when the thread has come by and its device has computed something; fails as that does. Any thread."""
        probe = Future[None]()
        with self._wake:
            self._probes.append(probe)
            self._wake.notify()
        return probe

    def close(self) -> None:
        """Stop the thread after the step under way; sequences that are left get no further output."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _lane(self, layout: Layout) -> Lane:
        with self._lane_lock:
            if layout not in self._lanes:
                lane = Lane(layout, self.config, self._lane_budget(), self._build, self._relieve)
                with self._wake:
                    self._lanes[layout] = lane
            return self._lanes[layout]

    def _lane_budget(self) -> int:
        if self.config.lays_out_lazily:
            return self.config.budget_bytes
        # The first layout is nearly always the one that matters; what it leaves is for odd ones.
        return (self.config.budget_bytes - sum(lane.num_bytes for lane in self._lanes.values())) * 3 // 4

    def _relieve(self) -> None:
        try:
            self._on_low_memory()
        except Exception:  # as of any listener
            log.exception("engine_listener_failed", outputs=0)
        drop_caches(self.config.device)

    def _run(self) -> None:
        while (lanes := self._take_inbox()) is not None:
            for lane in lanes:
                outputs, stats = lane.step()
                try:
                    if outputs:
                        self._on_outputs(outputs)
                    if stats:
                        self._on_step(stats)
                except Exception:  # a listener that fails must not stop everybody's texts
                    log.exception("engine_listener_failed", outputs=len(outputs))

    def _take_inbox(self) -> list[Lane] | None:
        """Wait for work and hand new sequences to their lanes; the busy lanes, None when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._inbox or self._probes or self._busy())
            for layout, sequences in self._inbox:
                self._lanes[layout].scheduler.add(sequences)
            self._inbox.clear()
            probes, self._probes = self._probes, []
            lanes = None if self._closing else self._busy()
        for probe in probes:
            _answer(probe, self.config.device)
        return lanes

    def _busy(self) -> list[Lane]:
        return [lane for lane in self._lanes.values() if not lane.scheduler.is_idle]


def _answer(probe: Future[None], device: torch.device) -> None:
    try:
        torch.ones(8, device=device).sum().item()  # waits for the device
    except Exception as exc:
        probe.set_exception(exc)
    else:
        probe.set_result(None)
