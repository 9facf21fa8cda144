"""Which folder is the home of which model, by the disk alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from serve.errors import ModelNotFound
from serve.types import ModelId

NO_NAMESPACE = "_"  # no id can spell it


class Homes:
    """`<root>/<namespace>/<name>/` for every model; "_" is the namespace of ids without one."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def of(self, wanted: ModelId) -> Path:
        """Where the model of exactly this name lives, or would."""
        return self._root / (wanted.namespace or NO_NAMESPACE) / wanted.name

    def id_of(self, home: Path) -> str:
        namespace = home.parent.name
        return home.name if namespace == NO_NAMESPACE else f"{namespace}/{home.name}"

    def ids(self, lower_namespace: str | None = None) -> Iterator[str]:
        """Of all homes, also of those in which no model lives, in no order. Looks at every one.

        With `lower_namespace` those in the namespaces that are it but for their case.
        """
        for namespace in list(home_names(self._root)):
            if lower_namespace not in (None, namespace.lower()):
                continue
            prefix = "" if namespace == NO_NAMESPACE else f"{namespace}/"
            yield from (prefix + name for name in home_names(self._root / namespace, namespace))


def home_names(folder: Path, namespace: str | None = None) -> Iterator[str]:
    """The subfolders that may be namespaces, or homes of a `namespace`: those of which there can be an id.

    A folder that is not ours to read is as good as empty.
    """
    prefix = "" if namespace in (None, NO_NAMESPACE) else f"{namespace}/"
    suffix = "/x" if namespace is None else ""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_id(prefix + entry.name + suffix, entry.name) and _is_folder(entry):
                    yield entry.name
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to what is not ours to see
        return False


def _is_id(text: str, name: str) -> bool:
    if text == f"{NO_NAMESPACE}/x":
        return True
    try:
        return ModelId.parse(text).revision is None and not name.startswith(".")
    except ModelNotFound:
        return False
