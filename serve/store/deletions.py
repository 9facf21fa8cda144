"""Which deletion of a model was the last: a fetch that takes minutes learns by it that nobody wants the model any more.

    <root>/<hash of the id>     a word that no other deletion of the model has

Ids are compared in any case. What is a day old is forgotten: no fetch takes as long.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from contextlib import suppress
from pathlib import Path

from serve.store.staging import STALE_AFTER_S


class Deletions:
    """The folder `root`, which need not be there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def note(self, model_id: str) -> None:
        """The model is being deleted."""
        with suppress(OSError):  # on a full disk models must go all the same
            self.root.mkdir(exist_ok=True)
            self._path(model_id).write_text(secrets.token_hex(8), encoding="ascii")

    def last(self, model_id: str) -> str | None:
        """The last one's word; None when it is long ago, or never was."""
        try:
            return self._path(model_id).read_text(encoding="ascii")
        except FileNotFoundError:
            return None

    def sweep(self) -> None:
        """Forgets what is long ago."""
        oldest = time.time() - STALE_AFTER_S
        with suppress(FileNotFoundError):
            for path in self.root.iterdir():
                with suppress(FileNotFoundError):  # another sweeper was quicker
                    if path.stat().st_mtime < oldest:
                        path.unlink()

    def _path(self, model_id: str) -> Path:
        return self.root / hashlib.sha256(model_id.lower().encode()).hexdigest()[:32]
