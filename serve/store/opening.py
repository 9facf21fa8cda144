"""The store that the settings name, with the base model that ships inside the project."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from serve.metrics import Metrics
from serve.settings import Settings
from serve.store.local_copies import LocalCopies
from serve.store.revisions import Store

EMBEDDED: Mapping[str, Path] = {"fledgling": Path(__file__).parent / "embedded" / "fledgling"}


def open_store(settings: Settings) -> Store:
    """The models under the data folder, and the embedded ones."""
    return Store(settings.data, embedded=EMBEDDED, cache=cache_of(settings))


def open_copies(settings: Settings, store: Store, metrics: Metrics) -> LocalCopies | None:
    """The copies of the weights in `store` that this machine keeps; None where the settings name no place for them."""
    cache = cache_of(settings)
    if cache is None:
        return None
    return LocalCopies(
        cache / "weights",
        store.models,
        settings.cache_bytes,
        in_use_s=settings.lease_timeout_s + 60,  # who waits for a place in memory has looked at the copy before
        on_evict=metrics.disk_evictions.labels("copy").inc,
    )


def cache_of(settings: Settings) -> Path | None:
    """What this machine keeps of the data folder that the settings name: of another one it is in another folder."""
    if not settings.cache:
        return None
    return Path(settings.cache).absolute() / hashlib.sha256(bytes(settings.data.resolve())).hexdigest()[:16]
