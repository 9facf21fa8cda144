"""The Hub that the settings name."""

from __future__ import annotations

from collections.abc import Callable

from serve.hub.fetch import Hub
from serve.hub.session import Session
from serve.metrics import Metrics
from serve.settings import Settings
from serve.store.revisions import Store


def open_hub(
    settings: Settings, store: Store, metrics: Metrics | None = None, *, open_session: Callable[..., Session] = Session
) -> Hub:
    """The source of models that `store` lacks."""
    metrics = metrics or Metrics()
    return Hub(
        store,
        endpoint=settings.hub_endpoint or None,
        token=settings.hub_token or None,
        enabled=settings.hub_enabled,
        deadline_s=settings.hub_deadline_s,
        limit_bytes=settings.hub_bytes,
        in_use_s=settings.lease_timeout_s + 60,  # who waits for a place in memory has looked at the model before
        open_session=open_session,
        on_evict=lambda reason: metrics.disk_evictions.labels(reason).inc(),
    )
