"""Copies of folders that somebody put here by hand, with the weights as we read them, made at their first use.

    <root>/<id, its "/" as "--">/<fingerprint>/     no id has a "--" of its own

The folder itself is left as it is. One conversion at a time: it takes a core, and several times the model's memory.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from serve.errors import ModelUnusable
from serve.store.disk import locked, translated
from serve.store.model_files import copy_model, seal
from serve.store.staging import Staging
from serve.store.validate import check_finite, check_folder


class Conversions:
    """The copies under `root`, made in `staging`, put in place under `lock`."""

    def __init__(self, root: Path, staging: Staging, lock: Path) -> None:
        self._root, self._staging, self._lock = root, staging, lock
        self._converting = threading.Lock()
        self._unconvertible: dict[Path, str] = {}  # where its copy would be -> why there is none

    def copy_of(self, model_id: str, fingerprint: str, source: Path) -> Path:
        """Raises: ModelUnusable, StoreUnavailable."""
        copy = self._home_of(model_id) / fingerprint
        if not copy.exists():
            with self._converting:
                self._convert(source, copy)
        return copy

    def forget(self, model_id: str) -> None:
        """Removes the copies of a model that is deleted."""
        self._staging.discard(self._home_of(model_id))

    def _home_of(self, model_id: str) -> Path:
        return self._root / model_id.replace("/", "--")

    def _convert(self, source: Path, copy: Path) -> None:
        if copy in self._unconvertible:
            raise ModelUnusable(self._unconvertible[copy])
        if copy.exists():
            return
        try:
            with translated("convert a model"):
                staged = self._staging.new()
                try:
                    copy_model(source, staged)
                    check_folder(staged)
                    check_finite(staged)
                    seal(staged)
                    self._replace(staged, copy)
                finally:
                    self._staging.discard(staged)
        except ModelUnusable as exc:
            self._unconvertible[copy] = exc.message
            raise

    def _replace(self, staged: Path, copy: Path) -> None:
        with locked(self._lock):
            copy.parent.mkdir(parents=True, exist_ok=True)
            for old in copy.parent.iterdir():
                if old != copy:  # what it was made from is no longer there
                    self._staging.discard(old)
            if not copy.exists():
                os.rename(staged, copy)
