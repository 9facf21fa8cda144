from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import uvloop

from loadtest.client import noop
from loadtest.client.capacity import measure_capacity
from loadtest.client.run import Interrupted, run_plan
from loadtest.client.sender import Clock
from loadtest.client.target import Target
from loadtest.results.record import STOPPED, Header, Record, Run
from loadtest.traffic.plan import Arrivals, BadPlan, Call, Flow, Lengths, Models, Plan, Requests, Training
from loadtest.traffic.schedule import schedule
from tests.loadtest.client_server import Asked, scripted, whole

SHORT = Requests(prompt_tokens=Lengths(False, 3, 3), output_tokens=Lengths(False, 4, 4))
MODELS = ("bench/m0", "bench/m1")


def plan_of(
    rate: float = 200.0, duration_s: float = 0.1, *, timeout_s: float = 5.0, training: Training | None = None
) -> Plan:
    flow = Flow("f", Arrivals("constant", rate=rate), Models(count=2, popularity="uniform"), SHORT)
    return Plan(
        "p", "", (flow,), duration_s=duration_s, warmup_s=0.0, timeout_s=timeout_s, training=training or Training()
    )


class Seen:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.headers: list[Header] = []
        self.calls: list[Call] = []
        self.records: list[Record] = []

    def begin(self, header: Header, clock: Clock) -> None:
        self.headers.append(header)

    def sent(self, call: Call) -> None:
        self.calls.append(call)

    def ended(self, record: Record) -> None:
        self.records.append(record)


async def test_every_call_of_the_schedule_is_sent_when_it_is_due() -> None:
    server, url = await noop.start()
    plan, seen = plan_of(), Seen()
    async with server:
        run = await run_plan(plan, Target(url), models=MODELS, watches=[seen])
    due = list(schedule(plan, MODELS))
    assert seen.calls == due
    assert sorted(record.number for record in run.records) == [call.number for call in due]
    assert all(record.outcome == "ok" and record.output_tokens == 4 for record in run.records)
    assert all(record.sent_s >= record.at_s for record in run.records)
    assert seen.records == list(run.records)
    assert seen.headers == [run.header]


async def test_a_server_that_stalls_does_not_stop_arrivals_and_its_stall_is_in_the_latencies() -> None:
    all_sent = asyncio.Event()

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await all_sent.wait()
        writer.write(whole({"choices": [{"text": "a"}]}))

    class Counting(Seen):
        def sent(self, call: Call) -> None:
            super().sent(call)
            if len(self.calls) == 40:
                all_sent.set()

    plan = plan_of(rate=200, duration_s=0.2)
    flow = replace(plan.flows[0], requests=replace(SHORT, streaming=0.0))
    async with scripted(answer) as server:
        run = await run_plan(replace(plan, flows=(flow,)), Target(server.url), models=MODELS, watches=[Counting()])
    assert len(run.records) == 40
    for record in run.records:
        assert record.outcome == "ok"
        assert record.took_s >= 0.195 - record.at_s  # the last call was due then, and who was due early waited longest


async def test_the_header_says_what_was_run_and_never_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "run", "p", "--key", "secret", "--key=secret", "--json"])
    server, url = await noop.start()
    async with server:
        run = await run_plan(plan_of(), Target(url, key="secret"), models=MODELS, facts={"models_that_fit": 3})
    header = run.header
    assert header.plan["name"] == "p"
    assert (header.url, header.target, header.facts) == (url, "rookery", {"models_that_fit": 3})
    assert header.command == "python -m loadtest run p --key … --key=… --json"
    assert "cores" in header.machine and header.versions["aiohttp"]
    assert "secret" not in repr(run)


async def test_a_run_that_is_cancelled_gives_what_there_was() -> None:
    server, url = await noop.start()
    seen = Seen()
    async with server:
        task = asyncio.create_task(run_plan(plan_of(duration_s=60), Target(url), models=MODELS, watches=[seen]))
        while len(seen.records) < 5:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(Interrupted) as caught:
            await task
    assert len(caught.value.run.records) >= 5
    assert 0 < (caught.value.run.stopped_s or 0) < 30


async def test_clients_of_a_closed_loop_ask_again_when_they_have_their_answer() -> None:
    server, url = await noop.start(delay_s=0.02)
    flow = Flow("f", Arrivals("closed", clients=3), Models(count=2), SHORT)
    async with server:
        run = await run_plan(replace(plan_of(), flows=(flow,), duration_s=0.2), Target(url), models=MODELS)
    assert 3 <= len(run.records) <= 33  # at most 11 each
    spans = sorted((record.sent_s, record.ended_s) for record in run.records)
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) <= 3
    assert len({record.number for record in run.records}) == len(run.records)


async def test_too_few_models_are_said_before_anything_is_sent() -> None:
    with pytest.raises(BadPlan, match="2 models"):
        await run_plan(plan_of(), Target("http://127.0.0.1:9"), models=MODELS[:1])


async def test_jobs_of_training_are_followed_to_their_end() -> None:
    looks = iter(["queued", "running", "succeeded", "failed"])

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.path == "/v1/bots":
            writer.write(whole({"id": "job-1", "status": "queued"}, "201 Created"))
        elif asked.path.startswith("/v1/fine_tuning/jobs/"):
            status = next(looks)
            error = {"code": "training_failed"} if status == "failed" else None
            writer.write(whole({"id": "job-1", "status": status, "error": error}))
        else:
            writer.write(whole({"choices": [{"text": "a"}]}))

    training = Training(jobs=3, every_s=0.09, posts=5, epochs=2)  # the third would begin after the end
    async with scripted(answer) as server:
        run = await run_plan(plan_of(rate=20, training=training), Target(server.url), models=MODELS)
    jobs = {record.number: record for record in run.records if record.kind == "train"}
    assert sorted(record.outcome for record in jobs.values()) == ["failed", "ok"]
    assert {record.error for record in jobs.values()} == {"", "training_failed"}
    assert [jobs[0].at_s, jobs[1].at_s] == [0.0, 0.09]
    uploads = [asked for asked in server.asked if asked.path == "/v1/bots"]
    assert len(uploads) == 2
    assert b'name="archive"; filename="loadtest1.txt"' in uploads[0].body
    assert uploads[0].body.count(b"\n") > 5 and b'name="n_epochs"\r\n\r\n2\r\n' in uploads[0].body


@pytest.mark.parametrize("clients", [1, 4])
async def test_capacity_is_what_so_many_clients_get(clients: int) -> None:
    server, url = await noop.start(delay_s=0.02)
    async with server:
        found = await measure_capacity(
            plan_of(), Target(url), models=MODELS, probe_s=0.3, warmup_s=0.05, clients=clients, most_clients=clients
        )
    assert found.clients == clients
    assert clients < found.rps <= 51 * clients  # 50 a client, less what the client itself takes


async def test_capacity_of_a_server_that_refuses_is_nothing() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole({"error": {"code": "rate_limit_exceeded"}}, "429 Too Many Requests", retry_after="1"))

    async with scripted(answer) as server:
        found = await measure_capacity(plan_of(), Target(server.url), models=MODELS, probe_s=0.2, warmup_s=0.0)
    assert found.rps == 0
    assert len(server.asked) < 32 * 6  # it is not hammered


async def test_clients_are_doubled_until_they_get_no_more_answers() -> None:
    at_work = asyncio.Semaphore(4)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        async with at_work:
            await asyncio.sleep(0.02)
        writer.write(whole({"choices": [{"text": "a"}]}))

    flow = replace(plan_of().flows[0], requests=replace(SHORT, streaming=0.0))
    async with scripted(answer) as server:
        found = await measure_capacity(
            replace(plan_of(), flows=(flow,)),
            Target(server.url),
            models=MODELS,
            probe_s=0.3,
            warmup_s=0.05,
            clients=1,
        )
    assert 4 <= found.clients <= 32  # on a machine that others use, too, one doubling more may look worth it
    assert found.rps > 60  # one client gets 50 at most


async def test_who_hangs_up_before_anything_came_was_not_answered() -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    leaving = replace(SHORT, cancelled=1.0, patience_s=0.01)
    plan = replace(plan_of(), flows=(replace(plan_of().flows[0], requests=leaving),))
    async with scripted(answer) as server:
        found = await measure_capacity(plan, Target(server.url), models=MODELS, probe_s=0.2, warmup_s=0.0, clients=2)
    assert found.rps == 0


async def test_what_is_under_way_when_a_run_is_stopped_is_a_record_and_reaches_the_watches() -> None:
    asked_all = asyncio.Event()

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if len(server.asked) == 3:
            asked_all.set()
        await asyncio.Event().wait()

    seen, plan = Seen(), plan_of(rate=100, duration_s=0.03, training=Training(jobs=1, posts=5))
    plan = replace(plan, flows=(replace(plan.flows[0], arrivals=Arrivals("constant", rate=70.0)),))
    async with scripted(answer) as server:
        task = asyncio.create_task(run_plan(plan, Target(server.url), models=MODELS, watches=[seen]))
        await asyncio.wait_for(asked_all.wait(), 5)
        task.cancel()
        with pytest.raises(Interrupted) as caught:
            await task
    records = caught.value.run.records
    assert sorted(record.kind for record in records) == ["generate", "generate", "train"]
    assert {(record.outcome, record.error) for record in records} == {("timeout", STOPPED)}
    assert seen.records == list(records)


async def test_notes_are_in_the_header() -> None:
    server, url = await noop.start()
    async with server:
        run = await run_plan(plan_of(duration_s=0.01), Target(url), models=MODELS, notes=("It was easier.",))
    assert run.header.notes == ("It was easier.",)


async def test_a_watch_that_cannot_write_ends_the_run_with_its_own_error() -> None:
    class Full(Seen):
        def ended(self, record: Record) -> None:
            raise OSError("no space left")

    server, url = await noop.start()
    async with server:
        with pytest.raises(OSError, match="no space left"):
            await run_plan(plan_of(duration_s=60), Target(url), models=MODELS, watches=[Full()])


@pytest.mark.parametrize("reply", [b"[]", b'"job"', b'{"id": ["x"], "status": {}}', b"{" * 100_000])
async def test_a_job_that_cannot_be_read_has_failed(reply: bytes) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(reply, "201 Created"))

    plan = plan_of(rate=1, duration_s=0.01, training=Training(jobs=1, posts=5))
    async with scripted(answer) as server:
        run = await run_plan(plan, Target(server.url), models=MODELS)
    (job,) = (record for record in run.records if record.kind == "train")
    assert job.outcome == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [0.0, 1.0])
def test_a_core_offers_more_than_a_thousand_requests_a_second(streaming: float) -> None:
    """By the CPU time that they take, so that it does not matter what else the machine does."""
    flow = Flow("f", Arrivals(rate=1000.0), Models(), replace(SHORT, streaming=streaming))
    plan = replace(plan_of(), flows=(flow,), duration_s=4.0, timeout_s=60.0)
    command = [sys.executable, "-m", "loadtest.client.noop", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        target = Target(server.stdout.readline().split()[1])

        async def measure() -> tuple[Run, float]:
            begun = time.process_time()
            run = await run_plan(plan, target, models=MODELS)
            return run, time.process_time() - begun

        run, cpu_s = uvloop.run(measure())
        server.terminate()
    assert all(record.outcome == "ok" for record in run.records)
    assert len(run.records) > 3500
    assert cpu_s / len(run.records) < 0.7e-3
    print(f"{1e6 * cpu_s / len(run.records):.0f} us of CPU a request")
