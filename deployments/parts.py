"""What several deployments need: the settings of a replica, and the store and job database they name.

Imports no torch: a gateway and a trainer are then small processes that start fast.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import ray

from serve.database.connection import Database
from serve.exposition import open_metrics as open_shared
from serve.metrics import Metrics
from serve.metrics_port import listen
from serve.settings import Settings
from serve.store.opening import EMBEDDED, cache_of, open_store
from serve.training.jobs.options import RunOptions
from serve.training.jobs.store import JobStore


def read_settings(overrides: Mapping[str, str]) -> Settings:
    """This process's own `ROOKERY_*` variables under `overrides`, also variables.

    Secrets (the Hub token, the password of a database) belong in the environment of the machine: overrides are
    arguments of a deployment, which Ray keeps and shows. Raises: BadSetting.
    """
    return Settings.from_env({**os.environ, **overrides})


def open_metrics(settings: Settings) -> Metrics:
    """This replica's, which add up with those of all others on its node; also at a port where the settings name one.

    Their folder is in that of Ray's session: each node has one, new with each start of the cluster.
    """
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir()) / context.get_session_name() / "rookery-metrics"
    metrics = open_shared(folder, enabled=settings.metrics_enabled)
    if metrics.is_shared and settings.metrics_port:  # one that counts alone would say something else than the others
        listen(metrics, settings.metrics_port, settings.metrics_host)
    return metrics


def open_jobs(settings: Settings) -> JobStore:
    """Files and jobs, in the database that `settings` name."""
    options, database, store = run_options(settings), Database(settings.sql_url), open_store(settings)
    limit = settings.max_jobs_per_key or None
    open_with = partial(
        JobStore, database, options.uploads, check_person=store.burials.check_person, max_jobs_per_key=limit
    )
    if settings.hub_enabled:
        return open_with()  # a base that is not here may be there: the job will ask
    return open_with(check_base=store.resolve)


def run_options(settings: Settings, memory_share: float | None = None) -> RunOptions:
    """What the supervisor tells a training process. `memory_share`: of a GPU, at most; None: what it needs."""
    return RunOptions(
        database_url=settings.sql_url,
        data_dir=settings.data.absolute(),
        embedded=EMBEDDED,
        cache=cache_of(settings),
        hub_enabled=settings.hub_enabled,
        hub_endpoint=settings.hub_endpoint or None,
        hub_token=settings.hub_token or None,
        hub_deadline_s=settings.hub_deadline_s,
        hub_bytes=settings.hub_bytes,
        lease_timeout_s=settings.lease_timeout_s,
        num_threads=settings.trainer_threads or None,
        memory_share=memory_share,
        trackers=settings.trackers,
    )
