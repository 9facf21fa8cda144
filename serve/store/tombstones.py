"""What is not to be here: models that were deleted, people that were erased, models that are disabled.

    <root>/<hash of the name>     JSON: why, when, by which key, and a word that no other burial of the name has

A name is a model's id or, for a person, "@handle", in any case. It stands nowhere in the file: who is gone must not be
found by the list of those who are. A tombstone stays until somebody lifts it. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from serve.store.disk import replace_file, sync

Why: TypeAlias = Literal["deleted", "disabled", "erased"]
"""deleted: comes back when somebody asks for just that; disabled: here, but not for use; erased: not to come back."""

_RANK: dict[str, int] = {"deleted": 0, "disabled": 1, "erased": 2}


@dataclass(frozen=True, slots=True)
class Tombstone:
    """One burial. `by`: the id of the key that asked for it; `reason`: in the words of who did.

    `person`: the hash of whom a model was erased with.
    """

    why: Why
    word: str
    at: int  # Unix seconds
    by: str = ""
    reason: str = ""
    person: str = ""


class Tombstones:
    """The folder `root`, which need not be there. A look costs one attempt to open a file."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: str) -> Tombstone | None:
        """Raises: OSError where the disk does not tell. One that cannot be read counts as that of a deletion."""
        return _read(self._path(name))

    def bury(self, name: str, why: Why, *, by: str = "", reason: str = "", person: str = "") -> Tombstone:
        """On the disk itself when it returns. What weighs more already stays, with a new word. Raises: OSError.

        `person`: "@handle", with whom a model is erased, and lifted; said once, it stays.
        """
        new = Tombstone(why, secrets.token_hex(8), int(time.time()), by, reason, person and self._path(person).name)
        old = self.find(name)
        if old is not None and _RANK[old.why] > _RANK[why]:
            new = replace(old, word=new.word)
        elif old is not None and not person:
            new = replace(new, person=old.person)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(self._path(name), json.dumps(asdict(new)).encode() + b"\n")
        return new

    def lift(self, name: str) -> bool:
        """Whether there was one. With a person's go those of the models erased with them. Raises: OSError."""
        own = self._path(name)
        if not own.exists():
            return False
        for path in self.root.iterdir() if name.startswith("@") else ():
            if not path.suffix and (found := _read(path)) and found.person == own.name:
                path.unlink(missing_ok=True)
        own.unlink(missing_ok=True)  # last: what is cut off here is done again
        sync(self.root)
        return True

    def _path(self, name: str) -> Path:
        return self.root / hashlib.sha256(name.lower().encode()).hexdigest()[:32]


def _read(path: Path) -> Tombstone | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    with suppress(ValueError, TypeError):
        found = Tombstone(**json.loads(text))
        if found.why in _RANK:
            return found
    return Tombstone("deleted", hashlib.sha256(text.encode()).hexdigest()[:16], 0)
