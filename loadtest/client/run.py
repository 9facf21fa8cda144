"""Plays a plan: every call is sent when it is due, whatever has become of those before. It knows no wire format."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from loadtest.client.facts import header_of
from loadtest.client.sender import Clock, Sender, Stopped, open_session
from loadtest.client.target import Target
from loadtest.client.training import Trainer
from loadtest.results.record import Header, Record, Run
from loadtest.traffic.plan import Call, Flow, Plan
from loadtest.traffic.schedule import closed_calls, schedule

_PAUSE_S = 0.05  # of a client of a closed loop that was not answered


class Interrupted(Exception):
    """The run was cancelled; `run` is what there was until then, and what was under way."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"stopped after {run.stopped_s or 0:.1f} s")
        self.run = run


class Watch(Protocol):
    """Is told what happens, at once; whoever is slow at it makes calls late."""

    def begin(self, header: Header, clock: Clock) -> None:
        """Before anything is sent. `clock` gives the seconds since."""

    def sent(self, call: Call) -> None:
        """A call is on its way."""

    def ended(self, record: Record) -> None:
        """A call, or a training job, has come to its end."""


async def run_plan(
    plan: Plan,
    target: Target,
    *,
    models: Sequence[str],
    watches: Sequence[Watch] = (),
    facts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Run:
    """Plays a resolved `plan` against `target`, and waits for the last answer. `facts` and `notes`: for the header.

    Raises: BadPlan; Interrupted where it was cancelled; OSError of a watch.
    """
    header = header_of(plan, target, facts or {}, notes)
    async with open_session(target) as session:
        with _few_collections():
            started = time.perf_counter()

            def clock() -> float:
                return time.perf_counter() - started

            for watch in watches:
                watch.begin(header, clock)
            sender = Sender(session, target, plan.flows, plan.timeout_s, clock)
            player = _Player(plan, models, sender, Trainer(session, target, plan, clock), clock, watches)
            try:
                await player.play()
            except asyncio.CancelledError as exc:
                raise Interrupted(Run(header, tuple(player.records), stopped_s=clock())) from exc
            except ExceptionGroup as exc:
                raise exc.exceptions[0] from exc  # of a watch: whatever a server does is in a record
    return Run(header, tuple(player.records))


class _Player:
    """One run as it goes on. Whatever it started has ended when `play` returns or raises."""

    def __init__(
        self,
        plan: Plan,
        models: Sequence[str],
        sender: Sender,
        trainer: Trainer,
        clock: Clock,
        watches: Sequence[Watch],
    ) -> None:
        self.records: list[Record] = []
        self._plan, self._models, self._clock = plan, models, clock
        self._sender, self._trainer, self._watches = sender, trainer, watches

    async def play(self) -> None:
        numbers = itertools.count()
        calls = schedule(self._plan, self._models)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send_when_due(calls, group))
            for flow in self._plan.flows:
                if flow.arrivals.process == "closed":
                    asked = closed_calls(self._plan, flow, self._models, numbers)
                    for _ in range(flow.arrivals.clients):
                        group.create_task(self._ask_again(flow, asked))
            for number in range(self._trainer.num_jobs):
                group.create_task(self._keep(self._trainer.train(number)))

    async def _send_when_due(self, calls: Iterator[Call], group: asyncio.TaskGroup) -> None:
        for call in calls:
            # At least one turn of the loop: a sender that is late must not keep answers from being read.
            await asyncio.sleep(max(0.0, call.at_s - self._clock()))
            while call.at_s > self._clock():  # timers have milliseconds, and may be early by half of one
                await asyncio.sleep(0)
            group.create_task(self._send(call))

    async def _ask_again(self, flow: Flow, calls: Iterator[Call]) -> None:
        ends_s = self._plan.ends_s if flow.ends_s is None else min(flow.ends_s, self._plan.ends_s)
        await asyncio.sleep(flow.begins_s)
        while (now_s := self._clock()) < ends_s:
            record = await self._send(replace(next(calls), at_s=now_s))
            if record.outcome != "ok":
                await asyncio.sleep(_PAUSE_S)  # one that refuses at once is not to be asked 10,000 times a second

    async def _send(self, call: Call) -> Record:
        for watch in self._watches:
            watch.sent(call)
        return await self._keep(self._sender.send(call))

    async def _keep(self, sending: Coroutine[Any, Any, Record]) -> Record:
        try:
            record = await sending
        except Stopped as exc:
            self._note(exc.record)
            raise
        self._note(record)
        return record

    def _note(self, record: Record) -> None:
        self.records.append(record)
        for watch in self._watches:
            watch.ended(record)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Garbage is looked for seldom, and not among what was there before: a full look takes longer than a request."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
