"""What is taken away when a person asks to be forgotten, and the receipt of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve.types.keys import ALL_SEEING, Viewer


@dataclass(frozen=True, slots=True)
class Belongings:
    """What is here of a person and is the viewer's to erase: ids."""

    models: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.models or self.jobs or self.files)

    def __or__(self, other: Belongings) -> Belongings:
        """Both, each id once."""
        return Belongings(
            tuple(dict.fromkeys(self.models + other.models)),
            tuple(dict.fromkeys(self.jobs + other.jobs)),
            tuple(dict.fromkeys(self.files + other.files)),
        )


@dataclass(frozen=True, slots=True)
class Share:
    """What went from one place."""

    count: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Erasure:
    """The receipt. `tiers`: place -> what went from it; `generators`: name -> bytes of their models in its memory.

    `unreached`: what is somewhere else, one sentence each, for somebody to remove there. `by` is the key that asked,
    and `viewer` whose eyes look for what there is.
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
    by: str = ""
    viewer: Viewer = ALL_SEEING

    @property
    def found(self) -> Belongings:
        return Belongings(self.models, self.jobs, self.files)


@dataclass(frozen=True, slots=True)
class Removed:
    """What `Eraser.finish` has done."""

    what: Belongings
    tiers: Mapping[str, Share]
    unreached: tuple[str, ...]
    message: str = ""  # why the rest is still there


class Eraser(Protocol):
    """Erases people from disk and database; who has their models in memory must be told besides. Methods block.

    Who sees everybody's erases for the whole server, and anybody else what is their own tenant's: of what others have
    they learn nothing, and take nothing from them.
    """

    def find(self, handle: str, viewer: Viewer) -> Belongings:
        """All that is here of a person and theirs to erase. Raises: InvalidRequest, StoreUnavailable."""
        ...

    def begin(self, handle: str, by: str, viewer: Viewer) -> Belongings:
        """From now on nothing of it is made, fetched or used; its open jobs are cancelled. Raises: as `find`."""
        ...

    def finish(self, handle: str, begun: Belongings, by: str, viewer: Viewer) -> Removed:
        """Waits for the jobs to end, then removes everything. May be done again. Raises: as `find`."""
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

    def beat(self, erasure_id: str) -> None:
        """It is still being worked on. Raises: StoreUnavailable."""
        ...

    def take_up(self) -> Sequence[Erasure]:
        """Those whose gateway has gone silent, for the caller to go on with. Raises: StoreUnavailable."""
        ...
