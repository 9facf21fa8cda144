from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from loadtest.client.sender import Sender, Stopped, open_session
from loadtest.client.target import Target
from loadtest.results.record import STOPPED, Record
from loadtest.traffic.plan import Call, Flow
from tests.loadtest.client_server import (
    STREAM,
    Answer,
    Asked,
    Scripted,
    chunk,
    event,
    head,
    scripted,
    token,
    usage,
    whole,
)

CALL = Call(7, "f", 0.0, "bench/m0", "My dream is", 12, seed=3)
WHOLE = replace(CALL, is_streaming=False)


@asynccontextmanager
async def sending(url: str, *, timeout_s: float = 5.0, late_s: float = 0.0) -> AsyncIterator[Sender]:
    """A sender whose clock begins now; `late_s` seconds have passed already."""
    target = Target(url)
    started = time.perf_counter() - late_s
    async with open_session(target) as session:
        yield Sender(session, target, (Flow("f"),), timeout_s, lambda: time.perf_counter() - started)


async def ask(
    answer: Answer, call: Call = CALL, *, timeout_s: float = 5.0, late_s: float = 0.0
) -> tuple[Record, Scripted]:
    """What becomes of one call where the server does `answer`."""
    async with scripted(answer) as server, sending(server.url, timeout_s=timeout_s, late_s=late_s) as sender:
        return await sender.send(call), server


async def test_a_stream_is_timed_by_its_pieces_and_counted_by_its_usage() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(token() + token()))
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(chunk(token(finish="length") + usage(4, 12)) + chunk(b""))

    record, server = await ask(answer)
    assert (record.outcome, record.status, record.error) == ("ok", 200, "")
    assert (record.prompt_tokens, record.output_tokens) == (4, 12)
    assert record.first_s is not None and record.sent_s < record.first_s < record.ended_s
    (gap,) = record.gaps_s
    assert 0.015 < gap <= record.ended_s - record.first_s + 1e-6  # a gap has single precision
    assert (record.tier, record.load_s) == ("disk", 0.07)
    assert server.asked[0].json == {
        "model": "bench/m0", "prompt": "My dream is", "max_tokens": 12, "min_tokens": 12, "temperature": 1.0,
        "top_p": 0.95, "seed": 3, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def test_a_whole_answer_has_its_first_token_at_its_end() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        counts = {"prompt_tokens": 4, "completion_tokens": 12}
        writer.write(whole({"choices": [{"text": "b"}], "usage": counts}, x_request_id="r-1"))

    record, _ = await ask(answer, WHOLE)
    assert (record.outcome, record.output_tokens, record.gaps_s, record.request_id) == ("ok", 12, (), "r-1")
    assert record.first_s == pytest.approx(record.ended_s, abs=0.2)


async def test_latency_counts_from_when_the_call_was_due() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole({"choices": [{"text": "b"}]}))

    record, _ = await ask(answer, replace(WHOLE, at_s=1.0), late_s=3.0)
    assert record.lag_s == pytest.approx(2.0, abs=1.0)
    assert record.took_s > 2.0
    assert record.ttft_s is not None and record.ttft_s > 2.0


@pytest.mark.parametrize(
    ("status", "outcome"), [("429 Too Many Requests", "refused"), ("503 Busy", "refused"), ("500 Oh", "failed")]
)
async def test_a_refusal_is_told_from_a_failure_and_keeps_the_servers_code(status: str, outcome: str) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        error = {"error": {"message": "My dream is too long", "type": "t", "code": "some_code"}}
        writer.write(whole(error, status, retry_after="1"))

    record, _ = await ask(answer)
    assert (record.outcome, record.status, record.error) == (outcome, int(status[:3]), "some_code")
    assert record.first_s is None


@pytest.mark.parametrize("cut", ["in the body", "between two chunks", "without the end mark"])
async def test_a_stream_that_breaks_off_has_failed(cut: str) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(token()))
        writer.write(
            {"in the body": b"40\r\ndata: {", "between two chunks": b"", "without the end mark": chunk(b"")}[cut]
        )
        await writer.drain()
        writer.close()

    record, _ = await ask(answer)
    assert (record.outcome, record.status, record.error) == ("failed", 200, "cut")
    assert record.first_s is not None


async def test_an_error_in_the_middle_of_a_stream_is_one() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        error = {"error": {"message": "no", "code": "generation_failed"}}
        writer.write(STREAM + chunk(token()) + chunk(event(error)) + chunk(b""))

    record, _ = await ask(answer)
    assert (record.outcome, record.error) == ("failed", "generation_failed")


@pytest.mark.parametrize("call", [CALL, WHOLE])
async def test_an_answer_that_cannot_be_read_has_failed(call: Call) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(b"data: {nonsense\n\n") + chunk(b"") if call.is_streaming else whole(b"{nonsense"))

    record, _ = await ask(answer, call)
    assert (record.outcome, record.error) == ("failed", "unreadable")


async def test_a_connection_that_is_closed_without_an_answer_has_failed() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.close()

    record, _ = await ask(answer)
    assert (record.outcome, record.status, record.error) == ("failed", 0, "disconnected")


async def test_nobody_at_the_address_is_a_failure() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        async with sending(url) as sender:
            record = await sender.send(CALL)
    assert (record.outcome, record.status, record.error) == ("failed", 0, "no_connection")


async def test_a_head_that_does_not_come_is_a_timeout() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    record, server = await ask(answer, timeout_s=0.03)
    assert (record.outcome, record.status) == ("timeout", 0)
    assert 0.025 < record.took_s < 4


async def test_a_call_whose_time_was_over_before_it_could_be_sent_is_a_timeout() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    record, _ = await ask(answer, timeout_s=0.5, late_s=1.0)
    assert record.outcome == "timeout"


async def test_a_client_that_leaves_closes_its_connection() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(token()))
        await asyncio.Event().wait()

    async with scripted(answer) as server, sending(server.url) as sender:
        record = await sender.send(replace(CALL, leaves_after_s=0.3))
        await asyncio.wait_for(server.left.wait(), 2)
    assert (record.outcome, record.status) == ("cancelled", 200)
    assert record.first_s is not None
    assert record.output_tokens == 1


async def test_one_who_would_have_left_later_has_the_whole_answer() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(token() + usage(1, 1)) + chunk(b""))

    record, _ = await ask(answer, replace(CALL, leaves_after_s=3.0))
    assert record.outcome == "ok"


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_stream_ends_with_its_end_mark_whatever_becomes_of_its_connection(is_cut: bool) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(token() + usage(1, 1)))
        await writer.drain()
        if is_cut:
            writer.close()
        else:
            await asyncio.Event().wait()

    record, server = await ask(answer)
    assert (record.outcome, record.error, record.output_tokens) == ("ok", "", 1)
    assert record.took_s < 0.2
    await asyncio.wait_for(server.left.wait(), 2)


async def test_the_end_of_a_chat_is_not_that_of_its_counts() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(event({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]})))
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(chunk(event({"choices": [], "usage": {"completion_tokens": 9}})) + chunk(b""))

    async with scripted(answer) as server:
        target = Target(server.url, api="chat")
        async with open_session(target) as session:
            started = time.perf_counter()
            sender = Sender(session, target, (Flow("f"),), 5.0, lambda: time.perf_counter() - started)
            record = await sender.send(CALL)
    assert (record.outcome, record.output_tokens) == ("ok", 9)


@pytest.mark.parametrize("said", ["inf", "nan", "-1", "", "soon", "1e999"])
async def test_a_load_time_that_is_none_is_not_kept(said: str) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole({"choices": [{"text": "b"}]}, x_model_load_time=said, x_model_tier="a\u00e9"))

    record, _ = await ask(answer, WHOLE)
    assert (record.outcome, record.load_s, record.tier) == ("ok", None, "")


@pytest.mark.parametrize("status", ["200 OK", "500 Oh"])
async def test_a_body_without_end_is_not_read_to_it(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.client.sender._MOST_BODY", 100_000)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(status, transfer_encoding="chunked"))
        while not server.left.is_set():
            writer.write(chunk(b" " * 50_000))
            await writer.drain()

    async with scripted(answer) as server, sending(server.url) as sender:
        record = await sender.send(WHOLE)
        await asyncio.wait_for(server.left.wait(), 2)
    assert (record.outcome, record.error) == ("failed", "too_large")


async def test_a_stream_that_cannot_be_read_is_left_at_once() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(event({"choices": ["x"]})))
        await asyncio.Event().wait()

    record, server = await ask(answer)
    assert (record.outcome, record.error) == ("failed", "unreadable")
    await asyncio.wait_for(server.left.wait(), 2)


async def test_a_call_that_is_cancelled_leaves_its_record() -> None:
    asked_ = asyncio.Event()

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        await writer.drain()
        asked_.set()
        await asyncio.Event().wait()

    async with scripted(answer) as server, sending(server.url) as sender:
        task = asyncio.create_task(sender.send(CALL))
        await asyncio.wait_for(asked_.wait(), 2)
        task.cancel()
        with pytest.raises(Stopped) as caught:
            await task
    record = caught.value.record
    assert (record.number, record.outcome, record.error) == (CALL.number, "timeout", STOPPED)


async def test_connections_are_used_again() -> None:
    ports: set[int] = set()

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        ports.add(writer.get_extra_info("peername")[1])
        writer.write(STREAM + chunk(token() + usage(1, 1)) + chunk(b""))

    async with scripted(answer) as server, sending(server.url) as sender:
        for _ in range(3):
            assert (await sender.send(CALL)).outcome == "ok"
    assert len(ports) == 1


async def test_keys_are_sent_and_a_flows_own_goes_first() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole({"choices": [{"text": "b"}]}))

    async with scripted(answer) as server:
        target = Target(server.url, key="of-the-run")
        flows = (Flow("f"), Flow("own", key="of-the-flow"))
        async with open_session(target) as session:
            sender = Sender(session, target, flows, 5.0, time.perf_counter)
            for name in ("f", "own"):
                await sender.send(replace(WHOLE, flow=name, at_s=time.perf_counter()))
    sent = [asked.headers["authorization"] for asked in server.asked]
    assert sent == ["Bearer of-the-run", "Bearer of-the-flow"]


async def test_no_text_of_an_answer_is_kept() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        said = {"error": {"message": "the secret plan", "code": "the secret plan"}}
        writer.write(head("400 Bad", content_length=str(len(json.dumps(said)))) + json.dumps(said).encode())

    record, _ = await ask(answer)
    assert "secret" not in repr(record)
