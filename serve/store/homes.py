"""Which folder is the home of which model: ids in any case to folders, and folders to ids."""

from __future__ import annotations

import os
import time
from itertools import chain
from pathlib import Path

from serve.types import ModelId

NO_NAMESPACE = "_"  # no id can spell it
_CLOCK_GRAIN_S = 2.0  # two changes of a folder within this may show the same time


class Homes:
    """`<root>/<namespace>/<name>/` for every model; "_" is the namespace of ids without one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: dict[Path, tuple[int, dict[str, list[str]]]] = {}

    def of(self, wanted: ModelId) -> Path:
        """Where the model of exactly this name lives, or would."""
        return self._root / (wanted.namespace or NO_NAMESPACE) / wanted.name

    def find(self, wanted: ModelId) -> Path | None:
        """The model's home: by its exact name first, then whatever the case (X handles have none)."""
        exact = self.of(wanted)
        if exact.is_dir():
            return exact
        for namespace in self._names_in(self._root).get((wanted.namespace or NO_NAMESPACE).lower(), ()):
            for name in self._names_in(self._root / namespace).get(wanted.name.lower(), ()):
                return self._root / namespace / name
        return None

    def ids(self) -> set[str]:
        """Of all homes, also of those in which no model lives."""
        ids: set[str] = set()
        for namespace in chain.from_iterable(self._names_in(self._root).values()):
            prefix = "" if namespace == NO_NAMESPACE else f"{namespace}/"
            ids.update(prefix + name for name in chain.from_iterable(self._names_in(self._root / namespace).values()))
        return ids

    def id_of(self, home: Path) -> str:
        namespace = home.parent.name
        return home.name if namespace == NO_NAMESPACE else f"{namespace}/{home.name}"

    def _names_in(self, folder: Path) -> dict[str, list[str]]:
        """Lower-case name -> names of subfolders, lower case first; remembered while the folder does not change."""
        try:
            changed = folder.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        remembered = self._names.get(folder)
        if remembered and remembered[0] == changed:
            return remembered[1]
        with os.scandir(folder) as entries:
            found = sorted((e.name for e in entries if not e.name.startswith(".") and e.is_dir()), reverse=True)
        names: dict[str, list[str]] = {}
        for name in found:
            names.setdefault(name.lower(), []).append(name)
        if time.time() - changed / 1e9 > _CLOCK_GRAIN_S:
            self._names[folder] = changed, names
        return names
