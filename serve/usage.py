"""Who uses the service most, in bounded memory however many models and callers there are.

Frequent-items sketches (Apache DataSketches) of this hour and of the hour before, one for each noun and weight. A
sketch holds up to 768 names: until there are more, counts are exact; after that each is at most 0.35 % of all that was
counted too high. Knows nothing of who asks for it, nor of HTTP.
Source: Anderson et al., "A High-Performance Algorithm for Identifying Frequent Items in Data Streams", IMC 2017.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from datasketches import (  # type: ignore[import-untyped]
    frequent_items_error_type,
    frequent_strings_sketch,
)

from serve.types import Ranking, TopView, UsageSketch, Use

HOUR_S = 3600.0
_LG_SIZE = 10  # of 1024 places, of which three quarters are used
_ALL = frequent_items_error_type.NO_FALSE_NEGATIVES


def _sketch() -> frequent_strings_sketch:
    return frequent_strings_sketch(_LG_SIZE)


@dataclass(slots=True)
class _Counts:
    """Of one noun: how often each name was asked for, and how many tokens it got."""

    requests: frequent_strings_sketch = field(default_factory=_sketch)
    tokens: frequent_strings_sketch = field(default_factory=_sketch)

    def add(self, name: str, num_tokens: int) -> None:
        name = name.encode("utf-8", "replace").decode()  # the sketch refuses lone surrogates
        self.requests.update(name, 1)
        if num_tokens:
            self.tokens.update(name, num_tokens)

    def merge(self, requests: frequent_strings_sketch, tokens: frequent_strings_sketch) -> None:
        self.requests.merge(requests)
        self.tokens.merge(tokens)

    def ranking(self, limit: int) -> Ranking:
        return Ranking(by_requests=self._greatest(self.requests, limit), by_tokens=self._greatest(self.tokens, limit))

    def _greatest(self, sketch: frequent_strings_sketch, limit: int) -> tuple[Use, ...]:
        found = sorted((-estimate, name) for name, estimate, _, _ in sketch.get_frequent_items(_ALL))
        return tuple(self._use(name) for _, name in found[:limit])

    def _use(self, name: str) -> Use:
        requests, tokens = self.requests.get_upper_bound(name), self.tokens.get_upper_bound(name)
        return Use(
            name=name,
            requests=requests,
            tokens=tokens,
            requests_error=requests - self.requests.get_lower_bound(name),
            tokens_error=tokens - self.tokens.get_lower_bound(name),
        )


@dataclass(slots=True)
class _Hour:
    began: float
    models: _Counts = field(default_factory=_Counts)
    callers: _Counts = field(default_factory=_Counts)

    def merge(self, other: _Hour) -> None:
        self.models.merge(other.models.requests, other.models.tokens)
        self.callers.merge(other.callers.requests, other.callers.tokens)


class Usage:
    """Counts the requests of one process. All its methods belong to one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hour = _Hour(clock())
        self._hour_before: _Hour | None = None

    def add(self, model_id: str, caller: str, num_tokens: int) -> None:
        """One request that a model has answered."""
        self._turn()
        self._hour.models.add(model_id, num_tokens)
        self._hour.callers.add(caller, num_tokens)

    def sketch(self) -> UsageSketch:
        """Both hours as one, to be sent."""
        self._turn()
        whole = _Hour(self._hour.began)
        whole.merge(self._hour)
        if self._hour_before is not None:
            whole.began = self._hour_before.began
            whole.merge(self._hour_before)
        return UsageSketch(
            window_s=self._clock() - whole.began,
            model_requests=whole.models.requests.serialize(),
            model_tokens=whole.models.tokens.serialize(),
            caller_requests=whole.callers.requests.serialize(),
            caller_tokens=whole.callers.tokens.serialize(),
        )

    def _turn(self) -> None:
        passed_s = self._clock() - self._hour.began
        if passed_s >= HOUR_S:
            self._hour_before = self._hour if passed_s < 2 * HOUR_S else None
            self._hour = _Hour(self._clock())


def top_of(sketches: Iterable[UsageSketch], limit: int) -> TopView:
    """What replicas have counted, together: the `limit` greatest of each."""
    window_s, models, callers = 0.0, _Counts(), _Counts()
    read = frequent_strings_sketch.deserialize
    for one in sketches:
        window_s = max(window_s, one.window_s)
        models.merge(read(one.model_requests), read(one.model_tokens))
        callers.merge(read(one.caller_requests), read(one.caller_tokens))
    return TopView(
        window_s=window_s,
        num_requests=models.requests.total_weight,
        num_tokens=models.tokens.total_weight,
        models=models.ranking(limit),
        callers=callers.ranking(limit),
    )
