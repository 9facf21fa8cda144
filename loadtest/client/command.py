"""`python -m loadtest run`: from a plan's name to figures, on a terminal, in files and as one line of JSON."""

from __future__ import annotations

import asyncio
import json
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import uvloop
from rich.console import Console

from loadtest.client.facts import Server, Unusable, look_at
from loadtest.client.progress import Progress
from loadtest.client.run import Interrupted, Watch, run_plan
from loadtest.client.sender import Clock
from loadtest.client.settle import Settled, settle, total_rate
from loadtest.client.slo import BadGoal, Goal, Probe, find_rate, least_probe_s, longest_limit_s, read_goals
from loadtest.client.target import Target
from loadtest.results.files import Writer, write
from loadtest.results.record import LATE_S, Header, Record, Run
from loadtest.results.summary import Summary, summarize
from loadtest.results.tables import print_table
from loadtest.traffic.changing import override
from loadtest.traffic.plan import BadPlan, Call, Plan
from loadtest.traffic.reading import read_plan

_SLO_TIMEOUT_S = 10.0  # of a probe's requests, or ten times the longest time that is allowed
_STOPPED = 130  # the exit code, as a shell gives it for Ctrl-C


class BadOption(ValueError):
    """An option that cannot be; the message names it, and says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of `run`."""

    plan: str
    url: str
    key: str = ""
    models: tuple[str, ...] = ()
    rate: float | None = None
    duration_s: float | None = None
    warmup_s: float | None = None
    seed: int | None = None
    slo: tuple[str, ...] = ()
    probe_s: float = 10.0
    price_per_hour: float | None = None
    out: Path | None = None
    html: Path | None = None
    is_json: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What came of the command; the line of JSON is all of it but `run`, which is None where nothing was sent."""

    run: Run | None = None
    summary: Summary = field(default_factory=Summary)
    more: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None  # why there is nothing, or not all
    code: int = 0


def run(options: Options) -> int:
    """The command; its exit code.

    0 where something was answered, 1 where nothing was or a file cannot be written, 2 where it cannot be run, 130
    where it was stopped.
    """
    console = Console(stderr=True, highlight=False)
    result = _result(options, console)
    if result.reason is not None:
        console.print(f"loadtest: {result.reason}", style="red", markup=False, soft_wrap=True)
    _show(result, options)
    if options.html is None or result.run is None:
        return result.code
    try:
        from loadtest.results.html import write_html

        write_html(result.run, options.html, options.price_per_hour)
    except (OSError, ImportError) as exc:
        console.print(f"loadtest: --html {options.html}: {exc}", style="red", markup=False, soft_wrap=True)
        return result.code or 1
    return result.code


def _result(options: Options, console: Console) -> Result:
    try:
        _check(options)
        with _terminated_as_interrupted():
            return uvloop.run(_run(options, console))
    except (BadPlan, BadGoal, BadOption) as exc:
        return Result(reason=str(exc), code=2)
    except (Unusable, OSError) as exc:
        return Result(reason=str(exc), code=1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return Result(reason="stopped before anything was measured", code=_STOPPED)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(options: Options) -> None:
    """What would else be found out after the run.

    Raises: BadOption
    """
    price = options.price_per_hour
    if price is not None and not 0 < price < math.inf:
        raise BadOption(f"--price-per-hour {price}: must be above 0, and finite")
    if not (options.key.isascii() and options.key.isprintable()):
        raise BadOption("--key: a key has no line breaks and no characters beyond ASCII")
    for name, path in (("--out", options.out), ("--html", options.html)):
        if path is not None:
            _check_writable(name, path)


def _check_writable(name: str, path: Path) -> None:
    try:
        is_there = path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if not is_there:
            path.unlink()
    except OSError as exc:
        raise BadOption(f"{name} {path}: {exc.strerror or exc}") from exc


async def _run(options: Options, console: Console) -> Result:
    goals = read_goals(options.slo) if options.slo else ()
    asked = override(
        read_plan(options.plan), duration_s=options.duration_s, warmup_s=options.warmup_s, seed=options.seed
    )
    target = Target(options.url, key=options.key)
    server = await look_at(target, patterns=options.models, is_fit_needed=asked.needs_fit)
    if not server.models:
        raise Unusable(f"{options.url} lists no model" + (f" like {', '.join(options.models)}" * bool(options.models)))
    if asked.needs_capacity:
        console.print("Measuring what the server can do …")
    settled = await settle(asked, target, server, are_models_named=bool(options.models))
    plan = settled.plan
    if options.rate is not None:
        plan = override(plan, rate_scale=options.rate / total_rate(plan))
    if capacity_rps := settled.facts.get("capacity_rps"):
        clients = settled.facts["capacity_clients"]
        offered = f"{total_rate(plan):.1f} will be offered"
        console.print(f"{clients:.0f} clients get {capacity_rps:.1f} answers/s; {offered}")
    for note in settled.notes:
        console.print(note, style="yellow", markup=False)
    playing = _Playing(target, server, settled, options, console)
    if goals:
        return await _find(plan, goals, playing)
    return _ended(await playing.play(plan, out=options.out), options)


def _ended(played: Run, options: Options, more: dict[str, Any] | None = None) -> Result:
    summary = summarize(played, options.price_per_hour)
    if played.stopped_s is not None:
        return Result(played, summary, more or {}, f"stopped after {played.stopped_s:.1f} s", _STOPPED)
    reason = None if summary.answered else "nothing was answered"
    return Result(played, summary, more or {}, reason, 0 if summary.answered else 1)


class _Playing:
    """Plays plans on one server, and shows how it goes."""

    def __init__(self, target: Target, server: Server, settled: Settled, options: Options, console: Console) -> None:
        self._target, self._server, self._notes = target, server, settled.notes
        self._facts = {**server.told, **settled.facts}
        self.options, self.console = options, console

    async def play(self, plan: Plan, *, title: str = "", out: Path | None = None) -> Run:
        """Also what there was of a run that was interrupted."""
        with ExitStack() as stack:
            watches: list[Watch] = [stack.enter_context(Progress(self.console, title))]
            try:
                with ExitStack() as files:
                    if out is not None:
                        watches.append(files.enter_context(_Recording(out)))
                    return await run_plan(
                        plan,
                        self._target,
                        models=self._server.models,
                        watches=watches,
                        facts=self._facts,
                        notes=self._notes,
                    )
            except Interrupted as exc:
                return exc.run


class _Recording:
    """A `Watch` that writes records to a file as they come; a run that breaks off leaves a file that says so."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()

    def begin(self, header: Header, clock: Clock) -> None:
        self._writer = self._stack.enter_context(Writer(self._path, header))

    def sent(self, call: Call) -> None:
        pass

    def ended(self, record: Record) -> None:
        self._writer.append(record)

    def __enter__(self) -> _Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


async def _find(plan: Plan, goals: Sequence[Goal], playing: _Playing) -> Result:
    """The search of `--slo`: the result is that of the last probe, which confirmed the rate."""
    options, console = playing.options, playing.console
    plan = override(plan, timeout_s=min(plan.timeout_s, max(_SLO_TIMEOUT_S, 10 * longest_limit_s(goals))))
    probe_s = max(options.probe_s, least_probe_s(goals))
    probes: list[Probe] = []

    async def play(each: Plan) -> tuple[Run, Summary]:
        played = await playing.play(each, title=f"probe {len(probes) + 1}: {total_rate(each):.3g}/s  ")
        if played.stopped_s is not None:
            raise Interrupted(played)
        return played, summarize(played, options.price_per_hour)

    def told(probe: Probe) -> None:
        probes.append(probe)
        shown = "  ".join(_shown(goal, probe.summary) for goal in goals)
        line = f"{probe.rate:9.3f}/s  {'holds' if probe.held else 'fails'}  {shown}"
        if not probe.kept_up:
            line += "  and its queue grows!"
        if (lag_ms := probe.summary.p99_lag_ms or 0.0) > 1000 * LATE_S:
            line += f"  (the tester itself was late: p99 {lag_ms:.0f} ms)"
        console.print(line, soft_wrap=True)

    def told_of(last: Run, goodput_rps: float | None) -> Result:
        if options.out is not None:
            write(options.out, last)
        more = {
            "slo": [goal.text for goal in goals],
            "probe_s": probe_s,
            "goodput_rps": goodput_rps,
            "probes": [_plain(probe, goals) for probe in probes],
        }
        return _ended(last, options, more)

    console.print(f"Looking for the highest rate with {', '.join(goal.text for goal in goals)}: {probe_s:g} s a probe")
    try:
        found = await find_rate(plan, goals, play, rate=total_rate(plan), probe_s=probe_s, told=told)
    except Interrupted as exc:
        result = told_of(probes[-1].run if probes else exc.run, None)
        reason = f"stopped after {len(probes)} probes, before a rate was found and confirmed"
        return replace(result, reason=reason, code=_STOPPED)
    return told_of((found or probes[-1]).run, round(found.rate, 4) if found else 0.0)


def _plain(probe: Probe, goals: Sequence[Goal]) -> dict[str, Any]:
    values = {goal.text.partition("=")[0]: goal.value(probe.summary) for goal in goals}
    lag = {"p99_lag_ms": probe.summary.p99_lag_ms}
    return {"rate": round(probe.rate, 4), "held": probe.held, "kept_up": probe.kept_up, **values, **lag}


def _shown(goal: Goal, summary: Summary) -> str:
    value = goal.value(summary)
    if value is None:
        return f"{goal.text}: nothing"
    mark = "" if goal.holds(summary) else "!"
    return f"{goal.text}: {100 * value:.2g} %{mark}" if goal.field == "errors" else f"{goal.text}: {value:.0f} ms{mark}"


def _show(result: Result, options: Options) -> None:
    out = Console(highlight=False)
    if options.is_json:
        line = {**result.summary.to_json(), **result.more, "reason": result.reason}
        out.out(json.dumps(line, allow_nan=False), highlight=False)
    elif result.run is not None:
        print_table(result.run, out, options.price_per_hour)
        if goodput_rps := result.more.get("goodput_rps"):
            out.print(f"Goodput: {goodput_rps:.3g} requests a second hold {', '.join(result.more['slo'])}")
        elif goodput_rps == 0:
            out.print(f"Goodput: not even the lowest rate held {', '.join(result.more['slo'])}")
