"""Models that give NaN or Inf: after a few requests they are not asked again for a while.

Weights are finite when they are published, but sums of them need not be. Such a text fails alone; a model that keeps
failing only takes room and time from others. One that fails now and then is worth keeping.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from serve.errors import ModelUnusable

MAX_FAILURES = 3  # requests, within QUARANTINE_S
QUARANTINE_S = 900.0
_MAX_KEYS = 4096


class Quarantine:
    """Knows when requests failed, by model and revision: a new revision begins at none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[str, list[float]] = {}  # the longest quiet first

    def note(self, key: str) -> ModelUnusable | None:
        """One more request of `key` has failed. The reason to refuse it for `QUARANTINE_S`, if it was one too many."""
        now = self._clock()
        failures = [*(at for at in self._failures.pop(key, ()) if now - at < QUARANTINE_S), now]
        if len(failures) >= MAX_FAILURES:
            model_id, _, revision = key.partition("@")
            return ModelUnusable(
                f"Model {model_id!r} in revision {revision[:12]!r} gave NaN or Inf in {len(failures)} requests and is "
                f"left alone for {QUARANTINE_S / 60:g} minutes. Train or import it anew.",
                param="model",
            )
        self._failures[key] = failures
        if len(self._failures) > _MAX_KEYS:
            del self._failures[next(iter(self._failures))]
        return None
