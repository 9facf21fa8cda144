"""Rookery and what else could serve the same models, one after another, asked the same.

    python -m loadtest peers

Each server in its turn holds all models, of which eight may be in memory. With one, eight and 32 of them it is asked
twice on the same schedule as the others: lightly, by a Poisson process, for latencies, and by clients without a pause,
for tokens a second. Starting is not timed with it, but told. Who cannot be had, crashes or hangs gets null and a
reason. Ends with one line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtest.client.run import run_plan
from loadtest.client.target import Target
from loadtest.models import SHAPES
from loadtest.peers import fleet, programs, standings
from loadtest.peers.fleet import Fleet
from loadtest.peers.llamacpp import build_server
from loadtest.peers.ours import Rookery
from loadtest.peers.peer import Peer, PeerUnavailableError
from loadtest.peers.router import LlamaRouter
from loadtest.peers.standings import Measured, Standing
from loadtest.peers.times import AROUND_S, PATIENCE, RAMP_S, RunTimes, times_of_round
from loadtest.peers.transformers_serve import TransformersServe
from loadtest.results.record import Run
from loadtest.traffic.plan import Arrivals, Flow, Lengths, Models, Plan, Requests

NAMES = ("rookery", "lru", "ray", "llamacpp", "transformers")
TIMEOUT_S = 20.0  # of a request
GRACE_S = 15.0  # after the budget, in which a run that goes on may end

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    names: tuple[str, ...] = NAMES
    counts: tuple[int, ...] = (1, 8, 32)
    memory: int = 8
    rounds: int = 2
    budget_s: float = 560.0
    rate: float = 1.5  # of the light runs, in requests a second: the slowest hold more
    clients: int = 8
    tokens: tuple[int, int] = (8, 24)  # of an answer, evenly between
    cache: Path = Path()
    is_tiny: bool = False


# --- Plans ------------------------------------------------------------------------------------------------------


def light_plan(options: Options, count: int, seed: int, duration_s: float) -> Plan:
    """Requests that come by themselves, few enough that most servers keep up: for latencies."""
    arrivals = Arrivals(process="poisson", rate=options.rate)
    return _plan("light", options, arrivals, count, seed, duration_s=duration_s)


def busy_plan(options: Options, count: int, seed: int, duration_s: float) -> Plan:
    """Clients each asking again when it has its answer: for tokens a second."""
    arrivals = Arrivals(process="closed", clients=options.clients, rate=100.0)
    plan = _plan("busy", options, arrivals, count, seed, duration_s=duration_s)
    return replace(plan, warmup_s=RAMP_S)


def warm_plan(options: Options, count: int) -> Plan:
    """Two tokens of each model that may be in memory: its weights are read, and a step made for the first time."""
    count = min(count, options.memory)
    arrivals = Arrivals(process="constant", rate=50.0)
    plan = _plan("warm", replace(options, tokens=(2, 2)), arrivals, count, 0, duration_s=count / 50)
    (flow,) = plan.flows
    return replace(
        plan, flows=(replace(flow, models=Models(count=count, popularity="distinct")),), timeout_s=2 * TIMEOUT_S
    )


def _plan(name: str, options: Options, arrivals: Arrivals, count: int, seed: int, *, duration_s: float) -> Plan:
    least, most = options.tokens
    requests = Requests(output_tokens=Lengths(like_tweets=False, least=least, most=most))
    flow = Flow(name, arrivals, Models(count=count, popularity="zipf"), requests)
    return Plan(name, "", (flow,), seed=seed, duration_s=duration_s, warmup_s=0.0, timeout_s=TIMEOUT_S)


# --- Turns ------------------------------------------------------------------------------------------------------


def make_peers(options: Options, scratch: Path) -> list[Peer]:
    made: list[Peer] = [
        Rookery(scratch),
        programs.lru(scratch),
        programs.multiplexed(scratch),
        LlamaRouter(scratch, options.cache),
        TransformersServe(scratch),
    ]
    return [peer for peer in made if peer.name in options.names]


class Contest:
    """Rounds in which each server has its turn."""

    def __init__(self, options: Options, models: Fleet, peers: Sequence[Peer]) -> None:
        self._options = options
        self._models = models
        self._pairs = [(peer, Standing(peer.name, peer.about, peer.keeps_limit)) for peer in peers]
        self._deadline = time.monotonic() + options.budget_s
        self._around_s = {peer.name: _around_s(peer, options) for peer in peers}  # of its turn, without the runs
        self.times: list[RunTimes] = []  # by round

    @property
    def standings(self) -> list[Standing]:
        return [standing for _, standing in self._pairs]

    def play(self) -> None:
        num_counts = len(self._options.counts)
        for number in range(self._options.rounds):
            # Who did not start once is not waited for again.
            active = [(peer, standing) for peer, standing in self._pairs if number == 0 or standing.starts_s]
            left_s = self._deadline - time.monotonic()
            around_s = {peer.name: self._around_s[peer.name] for peer, _ in active}
            self.times.append(times_of_round(left_s, self._options.rounds - number, num_counts, around_s))
            # In the other order every second time: who comes late in a round finds another machine.
            for peer, standing in active if number % 2 == 0 else reversed(active):
                self._take_turn(peer, standing, number)

    def _take_turn(self, peer: Peer, standing: Standing, number: int) -> None:
        began = time.monotonic()
        times, before = self.times[number], len(standing.turns)
        planned_s = self._around_s[peer.name] + len(self._options.counts) * times.both_s
        Turn(
            self._options, self._models, peer, standing, number, times,
            ends=min(self._deadline, began + PATIENCE * planned_s), deadline=self._deadline,
        ).take()  # fmt: skip
        took_s = time.monotonic() - began
        self._around_s[peer.name] = max(0.0, took_s - (len(standing.turns) - before) * times.both_s)
        console.print(f"round {number + 1}, {peer.name}: {took_s:.0f} s")


def _around_s(peer: Peer, options: Options) -> float:
    num_starts = len(options.counts) if peer.restarts else 1
    return num_starts * peer.start_s + len(options.counts) * AROUND_S


@dataclass(slots=True)
class Turn:
    """One server's, with each number of models. Whatever it does, the others have theirs."""

    options: Options
    models: Fleet
    peer: Peer
    standing: Standing
    number: int
    times: RunTimes
    ends: float  # of the clock: after it no further number of models is tried
    deadline: float
    _target: Target | None = None

    def take(self) -> None:
        try:
            for count in self.options.counts:
                if time.monotonic() + self.times.both_s > self.ends:
                    self.standing.fail(f"no time for {count} models in round {self.number + 1}")
                elif not self._try(count) and not self.standing.starts_s:
                    return
        finally:
            self._stop()

    def _try(self, count: int) -> bool:
        """A failure is this number's alone: the next finds the server started anew."""
        try:
            self.standing.turns.append(self._measure(count))
            return True
        except Exception as exc:  # whatever a server does
            reason = str(exc) if isinstance(exc, PeerUnavailableError) else f"{type(exc).__name__}: {exc}"
            self.standing.fail(f"{count} models in round {self.number + 1}: {reason[:300]}".rstrip(": "))
            console.print(f"[yellow]{self.peer.name}[/yellow]: {self.standing.reasons[-1]}", soft_wrap=True)
            self._stop()
            return False

    def _measure(self, count: int) -> Measured:
        options, seed = self.options, 1 + self.number  # the same for all, another in each round
        target = self._warmed(count)
        before = self.peer.num_loads()
        light = self._run(light_plan(options, count, seed, self.times.light_s), target)
        num_loads = self.peer.num_loads() - before
        busy = self._run(busy_plan(options, count, seed, self.times.busy_s), target)
        return Measured(count, light, busy, num_loads, self.peer.memory_bytes())

    def _warmed(self, count: int) -> Target:
        """The server, started where it must be, and with as many models in memory as may be."""
        if self._target is None or self.peer.restarts:
            self._stop()
            began = time.monotonic()
            models = self.models.first(count) if self.peer.restarts else self.models
            self._target = self.peer.start(models, self.options.memory)
            self.standing.starts_s.append(time.monotonic() - began)
        warm = self._run(warm_plan(self.options, count), self._target)
        if not any(record.outcome == "ok" for record in warm.records):
            raise PeerUnavailableError(f"it answered none of the first requests: {_what_happened(warm)}")
        return self._target

    def _stop(self) -> None:
        self._target = None
        with contextlib.suppress(OSError):
            self.peer.stop()

    def _run(self, plan: Plan, target: Target) -> Run:
        """Hung servers are left: every request has a timeout, and so has the run."""
        left_s = self.deadline + GRACE_S - time.monotonic()
        limit_s = min(plan.ends_s + plan.timeout_s + 10, left_s)

        async def play() -> Run:
            async with asyncio.timeout(limit_s):
                return await run_plan(plan, target, models=self.models.ids)

        return asyncio.run(play())


def _what_happened(run: Run) -> str:
    kinds = {f"{record.outcome} {record.status or ''} {record.error}".strip() for record in run.records}
    return ", ".join(sorted(kinds))


# --- The run ----------------------------------------------------------------------------------------------------


@contextmanager
def prepared(options: Options) -> Iterator[tuple[Fleet, Path]]:
    """The models, linked for this run and in the page cache, and a folder for logs; neither is timed."""
    shape, num_distinct = (SHAPES["tiny"], 2) if options.is_tiny else (None, fleet.NUM_DISTINCT)
    with console.status("models and llama.cpp, which are made once"):
        kept = fleet.written(options.cache, shape=shape, num_distinct=num_distinct)
        if LlamaRouter.name in options.names:
            with contextlib.suppress(PeerUnavailableError):  # it says so again when it is to start
                build_server(options.cache)
        fleet.cache_in_order(kept)
    scratch = Path(tempfile.mkdtemp(prefix="peers-run-", dir=options.cache))
    try:
        yield fleet.linked(kept, scratch / "data", max(options.counts)), scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compare(options: Options) -> Contest:
    """All turns of all rounds."""
    with prepared(options) as (models, scratch):
        contest = Contest(options, models, make_peers(options, scratch))
        contest.play()
    return contest


def peers(
    models: Annotated[str, typer.Option(help="Numbers of models, with commas between.")] = "1,8,32",
    memory: Annotated[int, typer.Option(min=1, help="Models that may be in memory.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each server has its turn.")] = 2,
    budget_s: Annotated[
        float, typer.Option(min=1, help="Seconds for all but writing the models; more: more requests.")
    ] = 560,
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(NAMES)}, with commas between.")] = "",
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second of the light runs.")] = 1.5,
    clients: Annotated[int, typer.Option(min=1, help="Of the saturating runs.")] = 8,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown, too.")] = False,
    cache: Annotated[Path, typer.Option(help="Where models and built servers are kept.")] = Path(
        "~/.cache/rookery-peers"
    ),
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny models: only whether it runs.")] = False,
) -> None:
    """The same requests to Rookery and to what else could serve them; ends with one JSON line, an object a server."""
    names = tuple(_words(only)) or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        raise typer.BadParameter(f"{', '.join(unknown)}: none of {', '.join(NAMES)}.", param_hint="--only")
    options = Options(
        names=names, counts=_counts(models), memory=memory, rounds=rounds, budget_s=budget_s, rate=rate,
        clients=clients, cache=cache.expanduser().absolute(), is_tiny=tiny,
    )  # fmt: skip
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no server is left behind
    started = time.monotonic()
    contest = compare(options)
    _report(options, contest, time.monotonic() - started, markdown)
    typer.echo(json.dumps(standings.to_json(contest.standings, options.counts)))


def _report(options: Options, contest: Contest, took_s: float, is_markdown: bool) -> None:
    out = Console(width=170, highlight=False)
    found = contest.standings
    runs = ", ".join(f"{times.light_s:.1f} and {times.busy_s:.1f} s" for times in contest.times)
    num_cores, (least, most) = len(os.sched_getaffinity(0)), options.tokens
    out.print(
        f"machine: {num_cores} cores, {platform.machine()}; {took_s:.0f} s in all, {len(contest.times)} rounds; light "
        f"runs at {options.rate:g} requests a second and busy ones with {options.clients} clients, of {runs}; "
        f"answers of {least} to {most} tokens; {options.memory} models may be in memory",
        soft_wrap=True,
    )
    out.print(standings.table(found, options.counts))
    for standing in found:
        start = ", ".join(f"{seconds:.1f}" for seconds in standing.starts_s) or "not"
        out.print(f"{standing.name}: {standing.about}; started in {start} s", soft_wrap=True)
        for reason in standing.reasons:
            out.print(f"without a part of {standing.name}: {reason}", soft_wrap=True, markup=False)
    if is_markdown:
        typer.echo(standings.markdown(found, options.counts))


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(sorted({int(word) for word in _words(text)}))
    except ValueError:
        counts = ()
    if not counts or counts[0] < 1:
        raise typer.BadParameter(f"'{text}' is no list of numbers such as 1,8,32.", param_hint="--models")
    return counts


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
