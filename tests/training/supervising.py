"""A supervisor or a single run of one job, and what they have left on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from serve.metrics import Metrics
from serve.training.jobs.queue import Claim
from serve.training.jobs.run import JobRun
from serve.training.jobs.supervisor import Supervisor
from serve.types import Job
from tests.training.making import Training

MODEL = "huggingtweets/ada"


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """The database and /proc cannot be awaited; they are asked."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


def supervisor_of(training: Training, *, metrics: Metrics | None = None, **times: float) -> Supervisor:
    wanted = {"beat_s": 0.1, "poll_s": 0.05, **times}
    supervisor = Supervisor(training.options, metrics=metrics, **wanted)  # type: ignore[arg-type]
    training.to_close.append(supervisor.close)
    return supervisor


def claim_of(training: Training, lease_s: float) -> Claim:
    claim = training.queue.claim("worker", lease_s)
    assert claim is not None
    return claim


def run_of(training: Training, claim: Claim) -> JobRun:
    return JobRun(training.options, claim.job.id, claim.fence)


def is_training(training: Training, job: Job) -> Callable[[], bool]:
    return lambda: any(message.startswith("Step") for message in training.messages(job.id))


def revisions(training: Training) -> list[str]:
    """Of finished models: neither aliases, data sets nor checkpoints."""
    folder = training.options.data_dir / "models" / "huggingtweets" / "ada"
    return [path.parent.name for path in folder.glob("*/runs") if not path.parent.is_symlink()]


def files_of_model(training: Training) -> list[Path]:
    folder = training.options.data_dir / "models" / "huggingtweets"
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def leftovers(training: Training) -> list[Path]:
    data = training.options.data_dir
    return [*(data / "models" / ".staging").iterdir(), *(data / "training").glob("*")]
