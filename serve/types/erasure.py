"""What is taken away when a person asks to be forgotten, and the receipt of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve.types.keys import Viewer


@dataclass(frozen=True, slots=True)
class Belongings:
    """All that is here of a person: ids. `owners`: the tenants whose they are, "" for what is nobody's."""

    models: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    owners: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.models or self.jobs or self.files)

    def may_be_erased_by(self, viewer: Viewer) -> bool:
        """Who sees everybody's may, and who owns all of it."""
        return viewer.sees_all or (viewer.tenant != "" and self.owners <= {viewer.tenant})

    def __or__(self, other: Belongings) -> Belongings:
        """Both, each id once."""
        return Belongings(
            tuple(dict.fromkeys(self.models + other.models)),
            tuple(dict.fromkeys(self.jobs + other.jobs)),
            tuple(dict.fromkeys(self.files + other.files)),
            self.owners | other.owners,
        )


@dataclass(frozen=True, slots=True)
class Share:
    """What went from one place."""

    count: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Erasure:
    """The receipt. `tiers`: place -> what went from it; `generators`: name -> bytes of their models in its memory.

    `unreached`: what is somewhere else, one sentence each, for somebody to remove there.
    """

    id: str  # "erasure-..."
    person: str  # "@handle"
    status: Literal["running", "done", "failed"]
    started_at: int  # Unix seconds
    finished_at: int | None = None
    models: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    tiers: Mapping[str, Share] = field(default_factory=dict)
    generators: Mapping[str, int] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    message: str = ""  # why it failed


@dataclass(frozen=True, slots=True)
class Removed:
    """What `Eraser.finish` has done."""

    what: Belongings
    tiers: Mapping[str, Share]
    unreached: tuple[str, ...]


class Eraser(Protocol):
    """Erases people from disk and database; who has their models in memory must be told besides. Methods block."""

    def find(self, handle: str) -> Belongings:
        """All that is here of a person, whose name is without '@'. Raises: InvalidRequest, StoreUnavailable."""
        ...

    def begin(self, handle: str, by: str) -> Belongings:
        """From now on nothing of them is made, fetched or used; their open jobs are cancelled. Raises: as `find`."""
        ...

    def finish(self, handle: str, begun: Belongings, by: str) -> Removed:
        """Waits for the jobs to end, then removes everything. Raises: StoreUnavailable."""
        ...

    def lift(self, handle: str) -> bool:
        """They may be learnt from again; whether they were erased. Raises: InvalidRequest, StoreUnavailable."""
        ...

    def save(self, erasure: Erasure) -> None:
        """For whoever asks how far it is, of any gateway. Raises: StoreUnavailable."""
        ...

    def load(self, erasure_id: str) -> Erasure:
        """Raises: NotFound, also a day after its end."""
        ...
