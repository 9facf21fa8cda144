"""The store and the Hub that the settings name, with the base model that ships inside the project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serve.settings import Settings
from serve.store.hub import Hub
from serve.store.revisions import Store

EMBEDDED: Mapping[str, Path] = {"fledgling": Path(__file__).parent / "embedded" / "fledgling"}


def open_store(settings: Settings) -> Store:
    """The models under the data folder, and the embedded ones."""
    return Store(settings.data, embedded=EMBEDDED)


def open_hub(settings: Settings, store: Store) -> Hub:
    """The source of models that `store` lacks."""
    return Hub(
        store,
        endpoint=settings.hub_endpoint or None,
        token=settings.hub_token or None,
        enabled=settings.hub_enabled,
        deadline_s=settings.hub_deadline_s,
    )
