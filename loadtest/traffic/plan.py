"""What a load test asks of a server, and when: the nouns of a plan, as TOML spells them.

A plan has one or more flows, each with its own arrivals, models and requests, and maybe training jobs beside them. The
same plan with the same seed gives the same calls. It knows neither HTTP nor the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Process = Literal["poisson", "constant", "bursts", "diurnal", "trace", "closed"]
"""How requests arrive. All but `closed` are open-loop: an arrival does not wait for the answers before it.

`closed`: so many clients, each asking again when it has its answer; for measuring capacity alone.
"""

Popularity = Literal["identical", "zipf", "uniform", "distinct", "churning"]
"""Which model a request asks for.

`identical`: always the first. `zipf`: rank r with weight r**-exponent. `uniform`: all alike. `distinct`: each in turn,
so that none comes again before all others did. `churning`: Zipf over a set of favourites that moves on.
"""

Api = Literal["openai", "chat", "tgi"]
"""`openai`: /v1/completions; `chat`: /v1/chat/completions; `tgi`: text-generation-inference's /generate_stream."""


class BadPlan(ValueError):
    """A plan that cannot be played; the message names the place, the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """`rate` is the mean, in requests a second; `times_capacity` gives it as a multiple of what the server can do."""

    process: Process = "poisson"
    rate: float = 1.0
    times_capacity: float | None = None  # measured before the run by a short closed loop; then `rate` is not used
    burst_every_s: float = 10.0
    burst_s: float = 1.0
    burst_factor: float = 5.0  # the rate within a burst over the mean rate outside of bursts
    period_s: float = 60.0  # of a "day"
    trough: float = 0.2  # the lowest rate of a day over the highest
    trace: Path | None = None  # JSONL, a line a request: at_s, and maybe model (an index), prompt_tokens, output_tokens
    speed: float = 1.0  # of a trace: 2 plays it in half its time
    clients: int = 16  # of a closed loop


@dataclass(frozen=True, slots=True)
class Models:
    """How many models are asked for; `times_fit` gives it as a multiple of what the server can hold in memory."""

    first: int = 0  # how many of the models to pass over, so that flows can have their own
    count: int = 1
    times_fit: float | None = None  # learnt from the server before the run; then `count` is not used
    popularity: Popularity = "zipf"
    exponent: float = 1.0
    churn_s: float = 10.0  # how long the favourites stay
    favourites: int = 4


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: of real tweets' distribution, or evenly between two bounds (equal ones: always the same)."""

    like_tweets: bool = True
    least: int = 0
    most: int = 0


@dataclass(frozen=True, slots=True)
class Requests:
    """What a single request looks like. Shares are between 0 and 1."""

    api: Api = "openai"
    streaming: float = 1.0  # share that reads along
    choices: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})  # n -> weight
    prompt_tokens: Lengths = Lengths()
    output_tokens: Lengths = Lengths()
    ends_freely: bool = False  # the model may end its text before; else exactly so many tokens are written
    cancelled: float = 0.0  # share whose client hangs up before the end
    patience_s: float = 0.5  # how long such a client waits on average (exponential)
    temperature: float = 1.0
    top_p: float = 0.95


@dataclass(frozen=True, slots=True)
class Flow:
    """Requests of one kind, from one caller."""

    name: str
    arrivals: Arrivals = Arrivals()
    models: Models = Models()
    requests: Requests = Requests()
    begins_s: float = 0.0
    ends_s: float | None = None  # None: with the plan
    key: str = ""  # the API key it sends; "": that of the run


@dataclass(frozen=True, slots=True)
class Training:
    """Jobs that are started beside the requests."""

    jobs: int = 0
    every_s: float = 30.0
    epochs: int = 1
    posts: int = 200  # of the archive that each job trains on


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests begin for `warmup_s` + `duration_s` seconds; those of the warm-up are not counted."""

    name: str
    about: str
    flows: tuple[Flow, ...]
    seed: int = 1
    duration_s: float = 30.0
    warmup_s: float = 2.0
    timeout_s: float = 60.0  # a request that takes longer has failed
    training: Training = Training()

    @property
    def ends_s(self) -> float:
        return self.warmup_s + self.duration_s

    @property
    def num_models(self) -> int:
        """How many models must be there."""
        return max(flow.models.first + flow.models.count for flow in self.flows)

    @property
    def needs_capacity(self) -> bool:
        """Whether what the server can do must be measured before."""
        return any(flow.arrivals.times_capacity is not None for flow in self.flows)

    @property
    def needs_fit(self) -> bool:
        """Whether it must be known how many models the server can hold."""
        return any(flow.models.times_fit is not None for flow in self.flows)


@dataclass(frozen=True, slots=True)
class Call:
    """One request of the schedule."""

    number: int
    flow: str
    at_s: float  # when it is to be sent, from the start of the run; latencies count from here
    model: str
    prompt: str
    num_tokens: int
    num_choices: int = 1
    is_streaming: bool = True
    seed: int = 0
    leaves_after_s: float | None = None  # its client hangs up so long after `at_s`; None: it stays
