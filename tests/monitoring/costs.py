"""Counting and logging by themselves: microseconds of what is done for a step, and for a request.

    python -m tests.monitoring.costs FOLDER

The same calls as in `serve.generator` and `serve.api`, into shared files and a log under FOLDER.
Ends with one JSON line.
"""

from __future__ import annotations

import json
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

from serve.exposition import open_metrics
from serve.logs import bound, configure, get_logger, ms
from serve.metrics import Metrics
from serve.settings import Settings
from serve.usage import Usage

_TIMES = 2_000
_REPEATS = 5
_TOKENS = 32

log = get_logger()


def count_step(metrics: Metrics) -> None:
    metrics.batch_rows.observe(8)
    metrics.batch_models.observe(1)
    metrics.step_duration.observe(0.012)


def count_request(metrics: Metrics, usage: Usage) -> None:
    """A stream of 32 tokens in as many deltas, which is more than any of ours has."""
    metrics.requests_in_progress.inc()
    metrics.queue_wait.observe(0.001)
    metrics.prompt_tokens.inc(3)
    metrics.time_to_first_token.labels("device").observe(0.02)
    inter_token = metrics.inter_token.labels("device")
    for _ in range(_TOKENS):
        metrics.tokens_generated.inc(1)
        inter_token.observe(0.012)
    metrics.requests.labels("/v1/completions", "200").inc()
    metrics.request_duration.labels("/v1/completions").observe(0.4)
    metrics.requests_in_progress.dec()
    usage.add("tweets/bot-1", "key-0123456789ab", _TOKENS)
    with bound(request_id="req-0123456789abcdef0123456789abcdef"):
        log.info("generated", model="tweets/bot-1", outcome="ok", tier="device", tokens=_TOKENS, duration_ms=ms(0.4))
        log.info("request", method="POST", route="/v1/completions", status=200, duration_ms=ms(0.4))


def main() -> None:
    folder = Path(sys.argv[1])
    metrics, usage = open_metrics(folder), Usage()
    configure(Settings(log_file=str(folder / "log.jsonl")), part="generator", replica="one")
    costs = {
        "step_us": _time_us(lambda: count_step(metrics)),
        "request_us": _time_us(lambda: count_request(metrics, usage)),
    }
    print(json.dumps(costs))


def _time_us(act: Callable[[], None]) -> float:
    """Of one; the least of several tries: whatever else runs only adds."""
    return min(timeit.repeat(act, number=_TIMES, repeat=_REPEATS)) / _TIMES * 1e6


if __name__ == "__main__":
    main()
