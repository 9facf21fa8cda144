"""Who uses the service most: nouns for what a bounded sketch can tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    """What one model, or one caller, has asked for. Each count is at most its error too high, and never too low."""

    name: str  # a model's id, or the hash that stands for an API key; "" without one
    requests: int
    tokens: int  # generated
    requests_error: int = 0
    tokens_error: int = 0


@dataclass(frozen=True, slots=True)
class Ranking:
    """The same noun in two orders, the greatest first."""

    by_requests: tuple[Use, ...] = ()
    by_tokens: tuple[Use, ...] = ()


@dataclass(frozen=True, slots=True)
class TopView:
    """The last one to two hours of all replicas together."""

    window_s: float  # how long ago the counting began
    num_requests: int
    num_tokens: int
    models: Ranking
    callers: Ranking


@dataclass(frozen=True, slots=True)
class UsageSketch:
    """What one replica has counted, as it is sent: `serve.usage` reads it."""

    window_s: float
    model_requests: bytes
    model_tokens: bytes
    caller_requests: bytes
    caller_tokens: bytes
