"""Traces: what a generator adds to its span, and, live, that a request is one trace from the caller to the model."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.tracing import annotate
from serve.account import Account
from serve.types import Delta, GenerationRequest, PromptInfo, TokenInfo
from tests.deployments.conftest import BASE, import_tiny_model, start_service, stop_service, wait_until
from tests.fakes.logs import read_lines

CANARY = "CANARYPROMPT"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def an_account() -> Account:
    account = Account(GenerationRequest("ada", (CANARY,), request_id="req-1"))
    prompt = PromptInfo(CANARY, 7, "disk", queue_s=0.25, load_s=0.2, revision="abc")
    account.add([Delta(0, CANARY, (TokenInfo(1, CANARY, -1.0),), finish_reason="stop", prompt=prompt)])
    return account


def test_a_generation_that_is_traced_tells_its_model_tier_and_tokens_and_no_text() -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with provider.get_tracer("test").start_as_current_span("generate"):
        annotate(an_account())
    [span] = spans.get_finished_spans()
    assert dict(span.attributes or {}) == {
        "gen_ai.request.model": "ada",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 1,
        "rookery.revision": "abc",
        "rookery.outcome": "ok",
        "rookery.tier": "disk",
        "rookery.choices": 1,
        "rookery.queue_ms": 250.0,
        "rookery.load_ms": 200.0,
    }


def test_a_generation_that_is_not_traced_costs_no_look_at_its_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Account, "facts", lambda self: pytest.fail("looked at"))
    annotate(an_account())


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.bodies: list[bytes] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def spans(self) -> list[Any]:
        found = []
        for body in list(self.bodies):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found += scope.spans
        return found


class _Take(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        is_zipped = self.headers.get("content-encoding") == "gzip"
        self.server.bodies.append(gzip.decompress(body) if is_zipped else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def attributes_of(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_live_one_trace_leads_from_the_caller_to_the_model(tmp_path: Path, collector: Collector) -> None:
    import_tiny_model(tmp_path, BASE)
    service = start_service(
        tmp_path,
        RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH="deployments.tracing:export_spans",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
    )
    try:
        headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "x-request-id": "traced-1"}
        body = {"model": BASE, "prompt": CANARY, "max_tokens": 3}
        answer = httpx.post(f"{service.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200 and answer.headers["x-request-id"] == "traced-1"

        def ours() -> list[Any]:
            return [span for span in collector.spans if span.trace_id.hex() == TRACE_ID]

        wait_until(lambda: any("gen_ai.request.model" in attributes_of(span) for span in ours()), 20)
        wait_until(lambda: any(span.parent_span_id.hex() == "b7ad6b7169203331" for span in ours()), 20)
    finally:
        stop_service(service)
    spans = {span.span_id: span for span in ours()}
    [generator] = [span for span in spans.values() if "gen_ai.request.model" in attributes_of(span)]
    told = attributes_of(generator)
    assert (told["gen_ai.request.model"], told["gen_ai.usage.output_tokens"], told["request_id"]) == (
        BASE,
        3,
        "traced-1",
    )
    way = [generator]
    while way[-1].parent_span_id in spans:
        way.append(spans[way[-1].parent_span_id])
    names = [span.name for span in way]
    assert way[-1].parent_span_id.hex() == "b7ad6b7169203331" and names[-1] == "POST /v1/completions", names
    deployments = {attributes_of(span).get("deployment") for span in spans.values()}
    assert deployments >= {"gateway", "generator"}, names
    assert not any(CANARY.encode() in body for body in collector.bodies)
    lines = [line for line in read_lines(tmp_path / "log.jsonl") if line.get("request_id") == "traced-1"]
    assert {line["event"] for line in lines} >= {"request", "generated"}
    assert CANARY not in (tmp_path / "log.jsonl").read_text()
