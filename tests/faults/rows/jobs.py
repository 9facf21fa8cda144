"""Training jobs: trainers killed, stopped or poisoned, clocks that jump, databases and trackers that are away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults import chaos_jobs, clock_jumps, database_trouble, old_schemas, poison, slow_trackers
from tests.faults.chaos_jobs import KINDS
from tests.faults.row import Measured, row
from tests.postgres import PostgresServer

_PAUSE_S = 4.0  # between two kills: about half of what a job takes on a quiet machine


def _chaos(folder: Path, kills: int, kinds: dict[str, float], seed: int) -> dict[str, Any]:
    return chaos_jobs.run(max(2, kills), "sqlite", seed, folder, None, kinds=kinds, pause_s=_PAUSE_S)


@row(
    "F3",
    did="200 kills at random moments, of trainings and their supervisors, two of which share a queue",
    expected="at most 60 s of work done again; exactly one model a job; none lost",
    minutes=25,
)
def killed(folder: Path, share: float) -> Measured:
    kinds = {kind: KINDS[kind] for kind in ("training", "supervisor")}
    figures = _chaos(folder, round(200 * share), kinds, seed=3)
    return Measured(
        f"{figures['kills']} kills, {figures['jobs']} jobs: {figures['lost']} lost, {figures['doubled']} doubled, at "
        f"most {figures['max_lost_work_s']:.0f} s of work done again",
        figures["lost"] == figures["doubled"] == 0 and figures["max_lost_work_s"] <= 60,
        figures,
    )


@row(
    "F4",
    did="SIGSTOP of a worker for longer than its lease, then SIGCONT: 100 zombies, a quarter as they publish",
    expected="0 models published twice",
    minutes=20,
)
def zombie(folder: Path, share: float) -> Measured:
    figures = _chaos(folder, round(100 * share), {"zombie": 1.0}, seed=4)
    return Measured(
        f"{figures['kills']} zombies, {figures['jobs']} jobs: {figures['doubled']} doubled, {figures['lost']} lost",
        figures["lost"] == figures["doubled"] == 0,
        figures,
    )


@row(
    "F5",
    did="a job whose process is ended by SIGSEGV whenever it runs, and one of somebody else behind it, 10 times",
    expected="failed as poison_job after 3 attempts; the other waits at most 3 leases longer",
    minutes=4,
)
def poisoned(folder: Path, share: float) -> Measured:
    figures = poison.run(max(1, round(10 * share)), folder)
    return Measured(
        f"{figures['poison_jobs']} of {figures['rounds']} failed so, after {figures['attempts']} attempts; the other "
        f"began after {figures['longest_wait_s']:.1f} s at most (a lease is {figures['lease_s']:.0f} s), "
        f"{figures['others_succeeded']} succeeded",
        figures["poison_jobs"] == figures["others_succeeded"] == figures["rounds"]
        and set(figures["attempts"]) == {3}
        and figures["longest_wait_s"] <= 3 * figures["lease_s"],
        figures,
    )


@row(
    "F6",
    did="kill -9 of all supervisors and trainings at once, at 200 random moments, and all started again",
    expected="0 jobs lost, 0 doubled",
    minutes=35,
)
def all_killed(folder: Path, share: float) -> Measured:
    figures = _chaos(folder, round(200 * share), {"everything": 1.0}, seed=6)
    return Measured(
        f"{figures['kills']} kills, {figures['jobs']} jobs: {figures['lost']} lost, {figures['doubled']} doubled",
        figures["lost"] == figures["doubled"] == 0,
        figures,
    )


@row(
    "F22",
    did="clocks of supervisors and trainings set forward and back by up to an hour, together and apart, 100 times "
    "while leases are held",
    expected="0 jobs run twice, 0 leases ended early",
    minutes=18,
    needs="libfaketime",
)
def clock_jumped(folder: Path, share: float) -> Measured:
    figures = clock_jumps.run(max(4, round(100 * share)), folder)
    return Measured(
        f"{figures['jumps']} jumps, {figures['jobs']} jobs: {figures['run_twice']} run twice, {figures['early']} "
        f"leases ended early, {figures['succeeded']} succeeded",
        figures["run_twice"] == figures["early"] == 0 and figures["succeeded"] == figures["jobs"] > 0,
        figures,
    )


@row(
    "F25",
    did="SQLite locked by another program for 20 s, 5 times, while texts and jobs are asked for and one trains",
    expected="0 texts fail; new jobs: 503 with Retry-After; after it all goes on",
    minutes=4,
)
def locked(folder: Path, share: float) -> Measured:
    return _trouble(database_trouble.run(folder, None, max(1, round(5 * share))))


@row(
    "F25b",
    did="PostgreSQL read-only for 20 s, then stopped for 10 s, 5 times, while texts and jobs are asked for",
    expected="0 texts fail; jobs: 503 with Retry-After; after it all goes on",
    minutes=6,
    needs="postgres",
)
def restarted(folder: Path, share: float) -> Measured:
    server = PostgresServer(fsync=True)
    try:
        return _trouble(database_trouble.run(folder, server, max(1, round(5 * share))))
    finally:
        server.close()


def _trouble(figures: dict[str, Any]) -> Measured:
    return Measured(
        f"{figures['failed']} of {figures['requests']:,} texts failed; {figures['refused']} jobs refused with "
        f"Retry-After, {figures['wrong']} answered otherwise; {figures['succeeded']} of {figures['jobs']} succeeded",
        figures["failed"] == figures["wrong"] == 0
        and figures["refused"] > 0
        and figures["succeeded"] == figures["jobs"] > 0,
        figures,
    )


@row(
    "F26",
    did="trainings that W&B is to be told of, 20 each with a server that hangs, one that refuses the key, none at all; "
    "in turn with trainings that no tracker is told of",
    expected="less than 1 % slower",
    minutes=20,
)
def trackers_away(folder: Path, share: float) -> Measured:
    figures = slow_trackers.run(max(2, round(20 * share)), folder)
    low, high = figures["interval"]
    return Measured(
        f"{100 * figures['slower']:+.1f} % (95 %: {100 * low:+.1f} to {100 * high:+.1f} %) of "
        f"{figures['trained_s']:.1f} s, {figures['pairs']} pairs; {figures['jobs'] - figures['succeeded']} failed",
        figures["slower"] < 0.01 and figures["succeeded"] == figures["jobs"],
        figures,
    )


@row(
    "F29",
    did="databases of every released schema, with jobs in them, opened by this release: SQLite, and PostgreSQL where "
    "it is installed",
    expected="all rows are there, jobs that wait are worked off",
    minutes=1,
)
def upgraded(folder: Path, share: float) -> Measured:
    figures = old_schemas.run(folder)
    return Measured(
        f"{figures['upgraded']} of {figures['databases']} ({', '.join(figures['schemas'])})",
        figures["upgraded"] == figures["databases"] > 0,
        figures,
    )
