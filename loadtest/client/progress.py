"""How a run goes while it goes: one line in a terminal that renews itself, elsewhere a line every few seconds."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadtest.client.sender import Clock
from loadtest.results.record import LATE_S, Header, Record
from loadtest.traffic.plan import Call

_WINDOW_S = 5.0
_RENEW_S = 0.5  # a renewal takes a millisecond, in which nothing is sent
_LINE_S = 5.0


class Progress:
    """A `Watch` that shows the last seconds; use it as a context, inside the loop that runs the plan."""

    def __init__(self, console: Console, title: str = "") -> None:
        self._console = console
        self._title = title
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._timer: asyncio.TimerHandle | None = None
        self._ends_s = 0.0
        self._sent: deque[float] = deque()
        self._ended: deque[Record] = deque()
        self._num_in_flight = 0
        self._outcomes: Counter[str] = Counter()

    def begin(self, header: Header, clock: Clock) -> None:
        self._clock = clock
        self._ends_s = header.warmup_s + header.duration_s
        self._schedule()

    def sent(self, call: Call) -> None:
        self._num_in_flight += 1
        self._sent.append(call.at_s)

    def ended(self, record: Record) -> None:
        self._outcomes[f"job {record.outcome}" if record.kind == "train" else record.outcome] += 1
        if record.kind == "generate":
            self._num_in_flight -= 1
            self._ended.append(record)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._live is not None:
            self._live.stop()

    def line(self) -> Text:
        """What the last seconds were like."""
        now_s = self._clock()
        self._forget(now_s - _WINDOW_S)
        window_s = max(min(now_s, _WINDOW_S), 1e-3)
        good = [record for record in self._ended if record.outcome == "ok"]
        ttft = sorted(record.ttft_s for record in good if record.ttft_s is not None)
        told = [record for record in good if record.tier]
        seconds = (
            f"{now_s:.0f}/{self._ends_s:.0f} s" if now_s < self._ends_s else f"{now_s:.0f} s, waiting for the last"
        )
        parts = [
            self._title + seconds,
            f"offered {len(self._sent) / window_s:.1f}/s",
            f"answered {len(good) / window_s:.1f}/s",
            f"in flight {self._num_in_flight}",
        ]
        if ttft:
            parts.append(f"TTFT p50 {1000 * _rank(ttft, 0.5):.0f} p99 {1000 * _rank(ttft, 0.99):.0f} ms")
        if told:
            parts.append(f"hits {100 * sum(record.tier == 'device' for record in told) / len(told):.0f} %")
        parts += [f"{word} {count}" for word, count in sorted(self._outcomes.items()) if word != "ok"]
        line = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
        if self._ended and (lag_s := _rank(sorted(record.lag_s for record in self._ended), 0.99)) > LATE_S:
            line.append(f"  THE TESTER IS LATE: p99 {1000 * lag_s:.0f} ms", style="bold red")
        return line

    def _schedule(self) -> None:
        pause_s = _LINE_S if self._live is None else _RENEW_S
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._show)

    def _show(self) -> None:
        if self._live is None:
            self._console.print(self.line(), soft_wrap=True)
        else:
            self._live.update(self.line(), refresh=True)
        self._schedule()

    def _forget(self, until_s: float) -> None:
        while self._sent and self._sent[0] < until_s:
            self._sent.popleft()
        while self._ended and self._ended[0].ended_s < until_s:
            self._ended.popleft()


def _rank(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
