"""What was fetched and cannot be served: known for a while to all processes of a node, so that none tries again."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from serve.errors import ModelUnusable
from serve.store.disk import locked

TTL_S = 15 * 60.0
MAX_VERDICTS = 500
_MAX_CHARACTERS = 300  # of a reason: as many verdicts as there may be are far shorter than what is read
_MAX_BYTES = 2_000_000


class Verdicts:
    """A small JSON file `path`: "id@commit" -> until when, and why. Ids are compared in any case.

    A file that is damaged or lost is an empty one: at worst a model is fetched once more.
    """

    def __init__(self, path: Path, *, ttl_s: float = TTL_S, clock: Callable[[], float] = time.time) -> None:
        self._path, self._ttl_s, self._clock = path, ttl_s, clock

    def check(self, model_id: str, commit: str) -> None:
        """Raises: ModelUnusable, as then."""
        if entry := self._read().get(_key(model_id, commit)):
            raise ModelUnusable(entry[1])

    def add(self, model_id: str, commit: str, reason: ModelUnusable) -> None:
        """The commit cannot be served. The oldest verdict makes room for it."""

        def with_one_more(verdicts: dict[str, tuple[float, str]]) -> dict[str, tuple[float, str]]:
            key = _key(model_id, commit)
            others = sorted((item for item in verdicts.items() if item[0] != key), key=lambda item: item[1][0])
            verdict = (self._clock() + self._ttl_s, reason.message[:_MAX_CHARACTERS])
            return dict([*others[-(MAX_VERDICTS - 1) :], (key, verdict)])

        self._change(with_one_more)

    def forget(self, model_id: str) -> None:
        """Of no commit of the model anything is known any more."""
        prefix = _key(model_id, "")
        if any(key.startswith(prefix) for key in self._read()):
            self._change(lambda verdicts: {key: v for key, v in verdicts.items() if not key.startswith(prefix)})

    def _change(self, change: Callable[[dict[str, tuple[float, str]]], Mapping[str, tuple[float, str]]]) -> None:
        with suppress(OSError):  # a full disk: then there is no verdict
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._path.with_suffix(".lock")):
                descriptor, name = tempfile.mkstemp(prefix=self._path.stem, suffix=".new", dir=self._path.parent)
                try:
                    # Half a surrogate pair has no UTF-8, but JSON has a way to write it.
                    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                        json.dump(change(self._read()), file, ensure_ascii=False)
                    os.replace(name, self._path)
                finally:
                    Path(name).unlink(missing_ok=True)

    def _read(self) -> dict[str, tuple[float, str]]:
        """Those that still hold."""
        try:
            with self._path.open("rb") as file:
                said: Any = json.loads(file.read(_MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        entries = said.items() if isinstance(said, dict) else ()
        return {key: (entry[0], entry[1]) for key, entry in entries if _is_entry(entry) and entry[0] > self._clock()}


def _key(model_id: str, commit: str) -> str:
    return f"{model_id}@{commit}".lower()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [float, str]
