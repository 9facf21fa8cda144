"""The engine: one thread that steps all running sequences of all resident models.

It knows slots, not model ids: whoever submits a sequence keeps its slot leased until the sequence's last
output. Models of one layout share a *lane* (slab, KV cache, scheduler); each turn steps every busy lane once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.batch import Batch, Span
from serve.engine.gpt2 import forward
from serve.engine.kv_cache import KVCache, kv_bytes_per_row
from serve.engine.sampling import sample
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Output, Sequence
from serve.engine.weights import build_slab, weight_bytes
from serve.errors import ModelTooLarge, Overloaded
from serve.shape import GPT2Shape

logger = logging.getLogger(__name__)


MAX_SLOTS = 4096  # of one shape: bounds what each step spends on slots that are not in it


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of the engine. `budget_bytes` is for weights: the pool bounds their sum over all lanes by it."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    budget_bytes: int = 2 << 30
    max_sequences: int = 64  # KV cache rows of a lane; fewer where they would take more than half of the budget
    max_step_rows: int = 128  # a GPT-2 small prompt of 128 tokens takes two CPU cores about 0.1 s


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
    return max(weight_bytes(layout.shape, config.dtype, tied=layout.tied), config.budget_bytes // MAX_SLOTS)


class Lane:
    """Everything of one layout, and its step."""

    def __init__(self, layout: Layout, config: EngineConfig, budget_bytes: int) -> None:
        """`budget_bytes`: what its slots may take. Raises: ModelTooLarge when not one fits."""
        shape, needed = layout.shape, slot_bytes(layout, config)
        if budget_bytes < needed:
            raise ModelTooLarge(
                f"The model needs {needed >> 20} MiB; {budget_bytes >> 20} MiB are left for models of its layout."
            )
        num_rows = config.budget_bytes // 2 // kv_bytes_per_row(shape, config.dtype)
        num_rows = max(1, min(num_rows, config.max_sequences))
        self.num_bytes = budget_bytes // needed * needed
        self.slab = build_slab(shape, budget_bytes // needed, config.dtype, config.device, tied=layout.tied)
        self.cache = KVCache(shape, num_rows, config.dtype, config.device)
        self.scheduler = Scheduler(num_rows=num_rows, max_step_rows=config.max_step_rows)

    def step(self) -> tuple[list[Output], StepStats | None]:
        """Compute one token for everyone who can take one."""
        outputs = [Output(s, cancelled=True) for s in self.scheduler.cancelled()]
        self._retire(outputs)
        chosen = self.scheduler.schedule()
        if not chosen:
            return outputs, None
        started = time.monotonic()
        try:
            produced = self._compute(chosen)
        except Exception:  # NOTE: the worker loop. Whatever broke, every waiting caller gets an answer.
            logger.exception("step_failed sequences=%d", len(chosen))
            produced = [Output(s, error="The engine failed on this batch; try again.") for s, _ in chosen]
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
                sequence = output.sequence
                if sequence.kv_row >= 0 and not self.cache.in_place:  # else nothing beyond a length is read
                    self.cache.clear(sequence.kv_row, sequence.num_tokens)
                self.scheduler.remove(sequence)

    def _compute(self, chosen: list[tuple[Sequence, Span]]) -> list[Output]:
        batch = Batch.of([span for _, span in chosen], self.slab.num_slots, self.slab.device)
        logits = forward(self.slab, self.cache, batch)
        sampling: list[Sequence] = []
        rows: list[int] = []
        row = 0
        for sequence, span in chosen:
            count = len(span.token_ids) if span.wants_all_logits else int(span.wants_logits)
            if span.wants_all_logits:
                _note_prompt_logprobs(sequence, span, logits[row : row + count])
            sequence.computed(len(span.token_ids))
            row += count
            if span.wants_logits:
                sampling.append(sequence)
                rows.append(row - 1)
        if not sampling:
            return []
        wanted = logits if len(rows) == len(logits) else logits[rows]
        sampled = sample(wanted, [s.sampling_row() for s in sampling])
        return [s.append(result) for s, result in zip(sampling, sampled, strict=True)]


def _note_prompt_logprobs(sequence: Sequence, span: Span, logits: Tensor) -> None:
    """Record each prompt token's log-probability given what precedes it; `logits` are the span's rows."""
    if span.past == 0:
        sequence.prompt_infos.append(sequence.token_info(sequence.prompt_ids[0], None))
    following = sequence.prompt_ids[span.past + 1 : span.past + 1 + len(logits)]
    logprobs = torch.log_softmax(logits[: len(following)], -1)
    for position, token in enumerate(following):
        values, ids = logprobs[position].topk(min(sequence.top_logprobs, logprobs.shape[-1]))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        sequence.prompt_infos.append(sequence.token_info(token, float(logprobs[position, token]), top))


class Engine:
    """Lanes and the thread that steps them. `on_outputs` and `on_step` are called from that thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_outputs: Callable[[list[Output]], None],
        on_step: Callable[[StepStats], None] = lambda stats: None,
    ) -> None:
        self.config = config
        self._on_outputs, self._on_step = on_outputs, on_step
        self._lanes: dict[Layout, Lane] = {}
        self._lane_lock = threading.Lock()  # held while a lane is made, which takes long on a device
        self._inbox: list[tuple[Layout, list[Sequence]]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether sequences still get outputs."""
        return self._thread.is_alive()

    def model_bytes(self, layout: Layout) -> int:
        """What a model will take in its slot."""
        return slot_bytes(layout, self.config)

    def load(self, layout: Layout, tensors: Mapping[str, Tensor]) -> Slot:
        """Copy a model into a free slot. Blocks for the copy; other sequences go on. Any thread.

        Raises: ModelTooLarge; Overloaded when all slots of its lane are taken.
        """
        slab = self._lane(layout).slab
        try:
            index = slab.acquire()
        except IndexError as exc:
            raise Overloaded("All places for models of this layout are taken; try again.", retry_after_s=1) from exc
        try:
            slab.write(index, tensors)
        except BaseException:
            slab.clear(index)
            raise
        return Slot(layout, index, self.model_bytes(layout))

    def unload(self, slot: Slot) -> None:
        """Free a slot that no running sequence uses. Any thread."""
        self._lanes[slot.layout].slab.clear(slot.index)

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

    def close(self) -> None:
        """Stop the thread after the step under way; sequences that are left get no further output."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _lane(self, layout: Layout) -> Lane:
        with self._lane_lock:
            if layout not in self._lanes:
                lane = Lane(layout, self.config, self._lane_budget())
                with self._wake:
                    self._lanes[layout] = lane
            return self._lanes[layout]

    def _lane_budget(self) -> int:
        """On a CPU slots cost memory only while they are used; a device lays each lane out once and for all."""
        if self.config.device.type == "cpu":
            return self.config.budget_bytes
        # The first layout is nearly always the one that matters; what it leaves is for odd ones.
        return (self.config.budget_bytes - sum(lane.num_bytes for lane in self._lanes.values())) * 3 // 4

    def _run(self) -> None:
        while lanes := self._take_inbox():
            for lane in lanes:
                outputs, stats = lane.step()
                try:
                    if outputs:
                        self._on_outputs(outputs)
                    if stats:
                        self._on_step(stats)
                except Exception:  # a listener that fails must not stop everybody's texts
                    logger.exception("engine_listener_failed outputs=%d", len(outputs))

    def _take_inbox(self) -> list[Lane]:
        """Wait for work and hand new sequences to their lanes; the busy lanes, none when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._inbox or self._busy())
            for layout, sequences in self._inbox:
                self._lanes[layout].scheduler.add(sequences)
            self._inbox.clear()
            return [] if self._closing else self._busy()

    def _busy(self) -> list[Lane]:
        return [lane for lane in self._lanes.values() if not lane.scheduler.is_idle]
