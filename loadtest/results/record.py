"""What became of one request, and what is known of a whole run: the lines of a result file.

The first line of the file is the header, each further one a record, in the order in which they ended. The last line
says that the run went to its end; without it the run was stopped.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

TIERS = ("device", "host", "disk", "hub")  # where weights are, warmest first
LATE_S = 0.010  # a tester that sends its p99 later than this has a say in what it measures
STOPPED = "stopped"  # the error of a request that had no answer when its run was stopped; its outcome is `timeout`
MOST_GAPS = 1024  # of one record

Outcome = Literal["ok", "refused", "failed", "cancelled", "timeout"]
"""`refused`: 429 or 503, an answer that says when to come back. `cancelled`: the plan's client hung up, as planned.

`failed`: any other status, a broken stream, an answer that cannot be read, no connection. `timeout`: the plan's, or
the end of a run that was stopped, which `STOPPED` tells apart.
"""

Kind = Literal["generate", "train"]


@dataclass(frozen=True, slots=True)
class Record:
    """Times are seconds from the start of the run.

    A run holds all its records: about 0.6 KB each with 40 gaps, so 0.2 GB an hour at 100 requests a second.
    """

    number: int
    flow: str
    model: str
    at_s: float  # intended; a late sender makes a request slow, not invisible (coordinated omission)
    sent_s: float
    ended_s: float
    outcome: Outcome
    status: int = 0  # of HTTP; 0 without an answer
    error: str = ""  # the server's code, or the kind of what went wrong here; never a text
    first_s: float | None = None  # the first token; of an answer that came whole, the end
    tier: str = ""  # where the weights were, of `TIERS`; "" where the server does not say
    load_s: float | None = None  # what the server says it waited for the weights
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_choices: int = 1
    is_streaming: bool = True
    gaps_s: Sequence[float] = ()  # between two pieces of a stream that held text; kept in single precision
    request_id: str = ""
    kind: Kind = "generate"  # train: a job, from its upload to its end

    def __post_init__(self) -> None:
        if self.gaps_s:
            object.__setattr__(self, "gaps_s", array("f", _thinned(self.gaps_s)))

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.at_s

    @property
    def took_s(self) -> float:
        return self.ended_s - self.at_s

    @property
    def lag_s(self) -> float:
        """How late the request was sent: the tester's own fault."""
        return self.sent_s - self.at_s


@dataclass(frozen=True, slots=True)
class Header:
    """What a result is a result of."""

    plan: Mapping[str, Any]  # the plan as it was run, rates and counts resolved; see `loadtest.traffic.plan`
    url: str
    target: str  # who was asked: rookery, or the name of a peer
    command: str
    machine: str
    versions: Mapping[str, str]
    started_at: str  # ISO 8601, UTC
    warmup_s: float
    duration_s: float
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the server: models that fit, replicas, memory
    notes: tuple[str, ...] = ()  # what was known before it began and its reader has to know, such as missing models


@dataclass(frozen=True, slots=True)
class Run:
    """A whole result. Records of the warm-up are among them; `counted` are those that began after it."""

    header: Header
    records: tuple[Record, ...]
    stopped_s: float | None = None  # of a run that did not go to its end: when the last request that is known of ended
    notes: tuple[str, ...] = ()  # what whoever reads its figures has to know of the file

    @property
    def counted(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.at_s >= self.header.warmup_s)

    @property
    def window_s(self) -> tuple[float, float]:
        """The measured window, without the warm-up; requests begin in it, and rates are over it."""
        begin = self.header.warmup_s
        end = begin + self.header.duration_s
        return begin, end if self.stopped_s is None else max(begin, min(end, self.stopped_s))


def _thinned(gaps: Sequence[float]) -> Sequence[float]:
    """Of more than `MOST_GAPS`, as many quantiles: the least, the largest, and evenly spaced ones between them."""
    if len(gaps) <= MOST_GAPS:
        return gaps
    ordered = sorted(gaps)
    return [ordered[rank * (len(ordered) - 1) // (MOST_GAPS - 1)] for rank in range(MOST_GAPS)]
