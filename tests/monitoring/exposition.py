"""What a scrape may be: OpenMetrics, of few series, none of which says who asked, or for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

_ACCEPT = "application/openmetrics-text; version=1.0.0"


def scrape(url: str, key: str) -> str:
    """The exposition as OpenMetrics."""
    reply = httpx.get(f"{url}/metrics", headers={"accept": _ACCEPT, "authorization": f"Bearer {key}"}, timeout=30)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("application/openmetrics-text"), reply.headers["content-type"]
    return reply.text


def series_of(text: str) -> Counter[str]:
    """How many series each family of metrics has. Raises: ValueError of what is not OpenMetrics."""
    return Counter({family.name: len(family.samples) for family in _families(text)})


def leaks(text: str, secrets: Iterable[str]) -> list[str]:
    """Label values that hold one of the `secrets`, in any case: a model, a key, a prompt."""
    lowered = [secret.lower() for secret in secrets]
    samples = (sample for family in _families(text) for sample in family.samples)
    values = {value for sample in samples for value in sample.labels.values()}
    return sorted(value for value in values if any(secret in value.lower() for secret in lowered))


def _families(text: str) -> Iterable[Metric]:
    found: Iterable[Metric] = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return found
