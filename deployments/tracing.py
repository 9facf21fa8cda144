"""Traces by OpenTelemetry, through Ray Serve's own hook; off unless Ray is told of `export_spans`.

Ray makes spans where the gateway answers a request, while the request is routed, and where the generator writes, each
with the request's id; FastAPI makes one of the route. All continue the caller's `traceparent`. To the generator's we
add the model, where its weights were and how many tokens it wrote, by the names of OpenTelemetry's conventions for
generative AI where there are such. No span has a text in it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from opentelemetry.trace import get_current_span

from serve.account import Account

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_NAMES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "tokens": "gen_ai.usage.output_tokens",
    "revision": "rookery.revision",
    "outcome": "rookery.outcome",
    "tier": "rookery.tier",
    "choices": "rookery.choices",
    "queue_ms": "rookery.queue_ms",
    "load_ms": "rookery.load_ms",
}


def export_spans() -> list[SpanProcessor]:
    """Ray calls it in each process that it traces. Where spans go, and how, is told by the variables `OTEL_*`."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "rookery")
    return [BatchSpanProcessor(OTLPSpanExporter())]


def annotate(account: Account) -> None:
    """Puts what a generation took and gave into the span that it ran in, if it is traced."""
    span = get_current_span()
    if span.is_recording():
        facts = account.facts()
        span.set_attributes({name: value for fact, name in _NAMES.items() if (value := facts[fact]) is not None})
