"""The Hub that the settings name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from serve.hub.fetch import Hub
from serve.hub.session import Session
from serve.metrics import Metrics
from serve.store.revisions import Store


class HubSettings(Protocol):
    """Those of `serve.settings`, or what a training process was told of them."""

    @property
    def hub_enabled(self) -> bool: ...

    @property
    def hub_endpoint(self) -> str | None: ...

    @property
    def hub_token(self) -> str | None: ...

    @property
    def hub_deadline_s(self) -> float: ...

    @property
    def hub_bytes(self) -> int: ...

    @property
    def lease_timeout_s(self) -> float: ...


def open_hub(
    settings: HubSettings,
    store: Store,
    metrics: Metrics | None = None,
    *,
    open_session: Callable[..., Session] = Session,
) -> Hub:
    """The source of models that `store` lacks."""
    metrics = metrics or Metrics(enabled=False)
    return Hub(
        store,
        endpoint=settings.hub_endpoint or None,
        token=settings.hub_token or None,
        enabled=settings.hub_enabled,
        deadline_s=settings.hub_deadline_s,
        limit_bytes=settings.hub_bytes,
        in_use_s=settings.lease_timeout_s + 60,  # who waits for a place in memory has looked at the model before
        open_session=partial(open_session, on_request=lambda outcome: metrics.hub_requests.labels(outcome).inc()),
        on_evict=lambda reason: metrics.disk_evictions.labels(reason).inc(),
    )
