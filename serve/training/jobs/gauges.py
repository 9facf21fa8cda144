"""The gauges of jobs, for whoever looks into the database anyway: a trainer, or a gateway while there is none."""

from __future__ import annotations

from collections.abc import Mapping

from serve.metrics import Metrics
from serve.training.jobs.store import JobStore
from serve.types import JobStatus


def count_into(metrics: Metrics, jobs: JobStore) -> Mapping[JobStatus, int]:
    """How many jobs there are of each state, told to `metrics` too. Blocks. Raises: StoreUnavailable."""
    counts = jobs.count_jobs()
    for status in JobStatus:
        metrics.jobs.labels(status).set(counts.get(status, 0))
    return counts
