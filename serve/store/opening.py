"""The store that the settings name, with the base model that ships inside the project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serve.settings import Settings
from serve.store.revisions import Store

EMBEDDED: Mapping[str, Path] = {"fledgling": Path(__file__).parent / "embedded" / "fledgling"}


def open_store(settings: Settings) -> Store:
    """The models under the data folder, and the embedded ones."""
    return Store(settings.data, embedded=EMBEDDED)
