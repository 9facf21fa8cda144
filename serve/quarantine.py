"""Models that give NaN or Inf: after a few texts they are not asked again for a while.

Weights are finite when they are published, but sums of them need not be. Such a text fails alone; a model that keeps
failing only takes room and time from others.
"""

from __future__ import annotations

from serve.errors import ModelUnusable

MAX_FAILURES = 3  # texts
QUARANTINE_S = 900.0
_MAX_KEYS = 4096


class Quarantine:
    """Counts the texts that failed, by model and revision: a new revision begins at none."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}  # the longest known first

    def note(self, key: str) -> ModelUnusable | None:
        """One more text of `key` has failed. The reason to refuse it for `QUARANTINE_S`, if it was one too many."""
        num_failures = self._failures.pop(key, 0) + 1
        if num_failures >= MAX_FAILURES:
            model_id, _, revision = key.partition("@")
            return ModelUnusable(
                f"Model {model_id!r} in revision {revision[:12]!r} gave NaN or Inf for {num_failures} texts and is "
                f"left alone for {QUARANTINE_S / 60:g} minutes. Train or import it anew.",
                param="model",
            )
        self._failures[key] = num_failures
        if len(self._failures) > _MAX_KEYS:
            del self._failures[next(iter(self._failures))]
        return None
