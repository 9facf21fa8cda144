"""What one generation took and gave, for the log, the traces and the count of who uses the service."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable

from serve.errors import RookeryError
from serve.logs import get_logger, ms
from serve.types import Delta, GenerationRequest, PromptInfo

log = get_logger()


class Account:
    """Of one request, from its arrival to its end."""

    def __init__(self, request: GenerationRequest) -> None:
        self.model_id = request.model_id
        self.caller = request.caller
        self.num_tokens = 0
        self._outcome = "ok"
        self._request = request
        self._began = time.monotonic()
        self._first: PromptInfo | None = None
        self._num_prompt_tokens = 0
        self._ends: Counter[str] = Counter()

    @property
    def is_answered(self) -> bool:
        """Whether a model has begun to write."""
        return self._first is not None

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            self.num_tokens += len(delta.tokens)
            if delta.prompt is not None:
                self._first = self._first or delta.prompt
                if delta.index % self._request.num_choices == 0:  # each prompt once, however many choices it has
                    self._num_prompt_tokens += delta.prompt.num_tokens
            if delta.error is not None:
                self._ends["error"] += 1
            elif delta.finish_reason is not None:
                self._ends[delta.finish_reason] += 1

    def end(self, error: BaseException) -> None:
        """It did not end by itself. Outcome: the code of an error, or `left`: whoever asked did not wait."""
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            self._outcome = "left"
        else:
            self._outcome = error.code if isinstance(error, RookeryError) else RookeryError.code

    def tell(self) -> None:
        """The line `generated`."""
        log.info("generated", request_id=self._request.request_id, **self.facts(), finish=dict(self._ends) or None)

    def facts(self) -> dict[str, str | int | float | None]:
        """Numbers and names alone; None for what did not come about."""
        first, over = self._first, sum(one.is_over for one in self._request.written)
        num_choices = len(self._request.prompts) * self._request.num_choices - over
        is_whole = self._ends.total() == num_choices  # then nobody has left before the end
        return {
            "model": self.model_id,
            "revision": first.revision if first else None,
            "outcome": "generation_failed" if self._ends["error"] else "ok" if is_whole else self._outcome,
            "tier": first.tier if first else None,
            "choices": num_choices,
            "prompt_tokens": self._num_prompt_tokens,
            "tokens": self.num_tokens,
            "queue_ms": ms(first.queue_s) if first else None,
            "load_ms": ms(first.load_s) if first else None,
            "duration_ms": ms(time.monotonic() - self._began),
        }
