"""The outbox and the process that works it off, as it is really started; whatever the tracker does to it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from serve.database.connection import read_clock_ms
from serve.database.tables import DeliveryRow
from serve.training.tracking import deliver as delivering
from serve.training.tracking.deliver import Deliverer
from serve.training.tracking.lineage import record_runs
from serve.training.tracking.outbox import (
    MAX_TRIES,
    claim_delivery,
    deliveries_of,
    has_due,
    reopen_failed,
    return_delivery,
    settle_delivery,
)
from serve.training.tracking.trackers import tracker_environment
from serve.types import Integration, Job
from tests.training.making import Training
from tests.training.tracked import create_job, runs_of
from tests.training.wandb_server import API_KEY, WandbServer


@pytest.fixture
def server() -> Iterator[WandbServer]:
    pytest.importorskip("wandb")
    server = WandbServer()
    yield server
    server.close()


def ended_job(training: Training, trackers: str = "wandb") -> Job:
    """As `JobQueue.finish` leaves it: its runs, and whom to tell of them."""
    job = create_job(training, "ada")
    runs = runs_of(training, job, training.options.data_dir / job.id)
    with training.database.write() as session:
        record_runs(session, job.id, runs)
        for tracker, options in deliveries_of((), trackers).items():
            session.add(DeliveryRow(job_id=job.id, tracker=tracker, status="waiting", options=options))
    return job


def row_of(training: Training, job: Job, tracker: str = "wandb") -> DeliveryRow:
    with training.database.read() as session:
        row = session.get(DeliveryRow, (job.id, tracker))
        assert row is not None
        return row


def environment(**variables: str) -> dict[str, str]:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    return {**quiet, **variables}


def start(training: Training, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    options = training.options
    where = ("--database-url", options.database_url, "--data", str(options.data_dir))
    return subprocess.Popen(
        [sys.executable, "-m", "serve.training.tracking.deliver", *where, *arguments],
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def deliver(training: Training, *arguments: str, **variables: str) -> None:
    assert start(training, *arguments, **variables).wait(400) == 0


def online(server: WandbServer) -> dict[str, str]:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}


def strays(training: Training) -> list[str]:
    """Processes that a tracker's library has left behind."""
    folder = str(training.options.data_dir)
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("WANDB_DIR", "").startswith(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def wait_until_hung(server: WandbServer, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not server.requests["hung"]:
        assert time.monotonic() < deadline, "nobody asked the server"
        time.sleep(0.02)  # the server's threads cannot be awaited from another process's side


# --- The outbox ---------------------------------------------------------------------------------------------


def test_job_is_told_to_the_servers_trackers_and_to_its_own() -> None:
    own = Integration("wandb", project="mine", tags=("a",))
    assert deliveries_of((), "") == {}
    assert deliveries_of((own,), " trackio, wandb").keys() == {"trackio", "wandb"}
    assert deliveries_of((own,), "trackio,wandb")["wandb"]["project"] == "mine"


def test_delivery_is_held_by_one_and_tried_later_and_later_until_it_has_failed(training: Training) -> None:
    ended_job(training)
    delays_min = []
    for tries in range(1, MAX_TRIES + 1):
        with training.database.write() as session:
            delivery = claim_delivery(session, hold_s=60)
            assert delivery is not None and delivery.tries == tries
            assert claim_delivery(session, hold_s=60) is None
            settle_delivery(session, delivery, done=False, outcome="It said no.")
            row = session.query(DeliveryRow).one()
            delays_min.append(round((row.not_before_ms - read_clock_ms(session)) / 60_000, 1))
            row.not_before_ms = 0
    assert delays_min[:8] == [0.5, 1, 2, 4, 8, 16, 32, 60] and set(delays_min[8:-1]) == {60}
    with training.database.read() as session:
        row = session.query(DeliveryRow).one()
        assert (row.status, row.outcome, row.tries) == ("failed", "It said no.", MAX_TRIES)
        assert not has_due(session)
    with training.database.write() as session:
        reopen_failed(session)
        assert has_due(session)


def test_late_word_of_an_earlier_try_changes_nothing(training: Training) -> None:
    job = ended_job(training)
    with training.database.write() as session:
        first = claim_delivery(session, hold_s=60)
        session.query(DeliveryRow).one().not_before_ms = 0
        second = claim_delivery(session, hold_s=60)
        assert first is not None and second is not None
        settle_delivery(session, first, done=False, outcome="late")
        return_delivery(session, first)
        settle_delivery(session, second, done=True, outcome="there")
        settle_delivery(session, first, done=False, outcome="late")
    row = row_of(training, job)
    assert (row.status, row.outcome, row.tries) == ("done", "there", 2)


# --- The process --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_waiting_is_delivered_and_nothing_stays_behind(training: Training, server: WandbServer) -> None:
    pytest.importorskip("trackio")
    jobs = [ended_job(training, "wandb,trackio"), ended_job(training)]
    deliver(training, **online(server))
    assert [row_of(training, job).status for job in jobs] == ["done", "done"]
    assert row_of(training, jobs[0], "trackio").status == "done"
    assert (row_of(training, jobs[0]).outcome or "").startswith(server.url)
    assert len(server.runs) == 4 and strays(training) == []
    with training.database.read() as session:
        assert not has_due(session)


@pytest.mark.timeout(600)  # whoever tells trackers gives way to all else, on a busy machine for minutes
def test_without_a_key_runs_are_written_for_later(training: Training) -> None:
    pytest.importorskip("wandb")
    job = ended_job(training)
    deliver(training)
    assert row_of(training, job).status == "done"
    assert len(list((training.options.data_dir / "trackers" / "wandb").glob("offline-run-*"))) == 2
    assert strays(training) == []


@pytest.mark.timeout(600)  # whoever tells trackers gives way to all else, on a busy machine for minutes
def test_tracker_that_hangs_is_killed_at_the_limit_and_tried_again_later(
    training: Training, server: WandbServer
) -> None:
    server.mood = "hangs"
    for limit in (8, 40, 200):  # a busy machine may take long to come so far as to ask
        job = ended_job(training)
        deliver(training, "--limit", str(limit), **online(server))
        row = row_of(training, job)
        assert (row.status, row.tries, row.outcome) == ("waiting", 1, f"The tracker did not take it within {limit} s.")
        assert strays(training) == []
        if server.requests["hung"]:
            break
        with training.database.write() as session:
            session.delete(row)  # it would be due again while the next one is tried
    assert server.requests["hung"] > 0
    with training.database.read() as session:
        assert not has_due(session)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["refuses", "absent"])
def test_tracker_that_refuses_or_is_absent_is_tried_again_later_with_the_reason_kept(
    training: Training, server: WandbServer, tmp_path: Path, trouble: str
) -> None:
    job = ended_job(training)
    variables = online(server)
    if trouble == "refuses":
        server.mood = "refuses"
    else:
        (tmp_path / "absent").mkdir()
        (tmp_path / "absent" / "wandb.py").write_text("raise ModuleNotFoundError(name='wandb')")
        variables["PYTHONPATH"] = f"{tmp_path / 'absent'}{os.pathsep}{Path(__file__).parents[2]}"
    deliver(training, **variables)
    row = row_of(training, job)
    assert (row.status, row.tries) == ("waiting", 1)
    assert ("'wandb' is not installed" if trouble == "absent" else "CommError") in (row.outcome or "")
    assert strays(training) == []


@pytest.mark.slow
def test_second_process_leaves_the_work_to_the_first(training: Training, server: WandbServer) -> None:
    server.mood = "hangs"
    job = ended_job(training)
    first = start(training, **online(server))
    wait_until_hung(server)
    other = ended_job(training)
    deliver(training, **online(server))
    assert (row_of(training, job).tries, row_of(training, other).tries) == (1, 0)
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 0
    assert (row_of(training, job).tries, row_of(training, job).status) == (0, "waiting")  # as if it had not been tried
    assert strays(training) == []


@pytest.mark.slow
def test_killed_process_takes_the_trackers_with_it(training: Training, server: WandbServer) -> None:
    server.mood = "hangs"
    job = ended_job(training)
    process = start(training, **online(server))
    wait_until_hung(server)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while strays(training) and time.monotonic() < deadline:
        time.sleep(0.05)  # W&B's service looks for its parent now and then
    assert strays(training) == []
    row = row_of(training, job)
    assert (row.status, row.tries) == ("waiting", 1)  # and somebody else's turn comes when the hold has ended


# --- Who starts it ------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_deliverer_delivers_what_waits_and_what_comes(
    training: Training, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in online(server).items():
        monkeypatch.setenv(name, value)
    jobs = [ended_job(training)]
    deliverer = Deliverer(training.options, training.database, poll_s=600)
    running = asyncio.create_task(deliverer.run_forever())
    async with asyncio.timeout(60):
        while row_of(training, jobs[0]).status != "done":
            await asyncio.sleep(0.05)
        jobs.append(await asyncio.to_thread(ended_job, training))
        deliverer.wake()
        while row_of(training, jobs[1]).status != "done":
            await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert strays(training) == []


@pytest.mark.slow
async def test_deliverer_that_is_stopped_leaves_no_process(
    training: Training, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.mood = "hangs"
    for name, value in online(server).items():
        monkeypatch.setenv(name, value)
    job = await asyncio.to_thread(ended_job, training)
    running = asyncio.create_task(Deliverer(training.options, training.database).run_forever())
    await asyncio.to_thread(wait_until_hung, server)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert row_of(training, job).tries == 0 and strays(training) == []


@pytest.mark.slow
async def test_deliverer_kills_a_process_that_does_not_end_with_all_that_it_started(
    training: Training, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.mood = "hangs"
    for name, value in online(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(delivering, "STOP_GRACE_S", 0.1)
    await asyncio.to_thread(ended_job, training)
    running = asyncio.create_task(Deliverer(training.options, training.database).run_forever())
    await asyncio.to_thread(wait_until_hung, server)
    [child] = [one for one in psutil.Process().children() if "serve.training.tracking.deliver" in one.cmdline()]
    [teller] = child.children()
    os.kill(teller.pid, signal.SIGSTOP)
    child.suspend()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [child, teller], 10)
    assert len(gone) == 2


def test_trackers_process_does_not_see_the_servers_own_settings(training: Training) -> None:
    told = tracker_environment(training.options.data_dir, {"ROOKERY_DATABASE_URL": "x", "WANDB_MODE": "disabled"})
    assert "ROOKERY_DATABASE_URL" not in told and told["WANDB_MODE"] == "disabled"
