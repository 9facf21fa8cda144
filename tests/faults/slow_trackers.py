"""How much longer a training takes that a tracker is to be told of, which is away.

Two supervisors in turn, each training the same job: one whose service tells W&B, one that tells nobody. The tracker
hangs, refuses the key, or is no server at all. Compared are the trainings' own times, pair by pair.
"""

from __future__ import annotations

import dataclasses
import random
import socket
import statistics
from pathlib import Path
from typing import Any

from tests.faults.supervisors import supervisors, wait_for_end
from tests.training.making import Training
from tests.training.wandb_server import API_KEY, WandbServer

NUM_EPOCHS = 12
MOODS = ("hangs", "refuses", "absent")
_DRAWS = 10_000


def run(pairs: int, folder: Path) -> dict[str, Any]:
    """So many pairs for each of MOODS. `interval`: 95 %, of the mean ratio less one, by bootstrap."""
    told, untold = (_training(folder, name, trackers) for name, trackers in (("told", "wandb"), ("untold", "")))
    ratios, durations_s, statuses = list[float](), list[float](), list[str]()
    try:
        for mood in MOODS:
            server = None if mood == "absent" else WandbServer(mood)  # type: ignore[arg-type]
            environment = {"WANDB_BASE_URL": server.url if server else _nobody(), "WANDB_API_KEY": API_KEY}
            try:
                with supervisors(told, environment), supervisors(untold, environment):
                    for number in range(pairs):
                        order = (told, untold) if number % 2 else (untold, told)
                        took = {id(one): _train(one, f"{mood}{number}", statuses) for one in order}
                        ratios.append(took[id(told)] / took[id(untold)])
                        durations_s.append(took[id(untold)])
            finally:
                if server:
                    server.close()
    finally:
        told.close()
        untold.close()
    means = _bootstrap(ratios)
    return {
        "pairs": len(ratios),
        "jobs": len(statuses),
        "succeeded": statuses.count("succeeded"),
        "slower": statistics.fmean(ratios) - 1,
        "interval": [means[round(0.025 * _DRAWS)] - 1, means[round(0.975 * _DRAWS)] - 1],
        "trained_s": statistics.median(durations_s),
    }


def _training(folder: Path, name: str, trackers: str) -> Training:
    (folder / name).mkdir()
    training = Training(folder / name)
    training.options = dataclasses.replace(training.options, trackers=trackers)
    return training


def _train(training: Training, handle: str, statuses: list[str]) -> float:
    """The seconds from the job's first look at its archive to its model."""
    job = training.create_job(handle, n_epochs=NUM_EPOCHS)
    statuses.append(wait_for_end(training, job.id, lambda: None))
    return float(sum(training.jobs.get_job(job.id).result["phases_s"].values()))


def _bootstrap(values: list[float]) -> list[float]:
    draw = random.Random(0)
    return sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(_DRAWS))


def _nobody() -> str:
    """Where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
