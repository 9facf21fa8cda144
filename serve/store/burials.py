"""What tombstones mean to models: who may use, fetch or make one that was deleted, disabled or erased.

A tombstone is written before anything is removed, so who makes or fetches a model finds at its publication that it was
deleted meanwhile. Knows no folder of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from serve.errors import Erased, ModelNotFound, model_disabled
from serve.store.tombstones import Tombstone, Tombstones, Why
from serve.types import ModelId

_HUGGINGTWEETS = "huggingtweets"


@dataclass(frozen=True, slots=True)
class Fence:
    """What was known of a model's deletion when somebody began to make it, and of whom it learns.

    Without `handles` the model's name says it.
    """

    word: str | None
    handles: tuple[str, ...] = ()


class Burials:
    """The tombstones in the folder `root`. Methods block on disk, and raise OSError where it does not answer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tombstones = Tombstones(root)

    def of(self, model_id: str) -> Tombstone | None:
        """The model's own."""
        return self._tombstones.find(model_id)

    def bury(self, name: str, why: Why, *, by: str = "", reason: str = "", person: str = "") -> None:
        """A model, or a person's "@handle". What weighs more already stays so. `person`: with whom a model goes."""
        self._tombstones.bury(name, why, by=by, reason=reason, person=person)

    def lift(self, name: str) -> bool:
        """Whether there was anything to lift. With a person their models are lifted."""
        return self._tombstones.lift(name)

    def enable(self, model_id: str) -> bool:
        """Lifts what disabled the model and nothing else; whether anything did."""
        found = self.of(model_id)
        return found is not None and found.why == "disabled" and self.lift(model_id)

    def check_use(self, model_id: str) -> None:
        """Of a model that is here. Raises: ModelDisabled; ModelNotFound where a backup has brought back an erased one.

        What was only deleted is here because somebody put it there again.
        """
        found = self.of(model_id)
        if found is not None and found.why == "disabled":
            raise model_disabled(model_id)
        if found is not None and found.why == "erased":
            raise _erased_one(model_id)

    def check_people(self, model_id: str, read_handles: Callable[[], Collection[str]]) -> None:
        """Of a model that is here: whether one whom it has learnt from is erased. Raises: ModelNotFound.

        Asked only where its name says so: then what it has recorded decides, if that is anything.
        """
        if self._erased_among(handles_in_name(model_id)):
            handles = read_handles()
            if not handles or self._erased_among(handles):
                raise _erased_one(model_id)

    def check_fetch(self, model_id: str, *, is_asked_for: bool) -> None:
        """Whether it may come from a Hub: by a mere request only what was never deleted.

        Raises: ModelNotFound, ModelDisabled; Erased to who asks for it explicitly.
        """
        found = self._erased_among(handles_in_name(model_id)) or self.of(model_id)
        if found is None or (found.why == "deleted" and is_asked_for):
            return
        if found.why == "disabled":
            raise model_disabled(model_id)
        if found.why == "deleted":
            raise ModelNotFound(
                f"Model {model_id!r} was deleted here: pull it to have it again (rookery pull, or POST /v1/models/"
                "{id}/pull).",
                param="model",
            )
        raise _erased(model_id) if is_asked_for else _erased_one(model_id)

    def fence(self, model_id: str, handles: Collection[str] = ()) -> Fence:
        """For who begins to make the model. Raises: Erased, ModelDisabled."""
        found = self.of(model_id)
        fence = Fence(found.word if found else None, tuple(handles))
        self._check(model_id, found, fence)
        return fence

    def check_publish(self, model_id: str, fence: Fence | None) -> None:
        """By who was given `fence` when they began. Raises: ModelNotFound, deleted since; Erased, ModelDisabled."""
        found = self.of(model_id)
        self._check(model_id, found, fence or Fence(None))
        if found is not None and fence is not None and found.word != fence.word:
            raise ModelNotFound(f"Model '{model_id}' was deleted meanwhile.", param="model")

    def _check(self, model_id: str, found: Tombstone | None, fence: Fence) -> None:
        if found is not None and found.why == "disabled":
            raise model_disabled(model_id)
        if found is not None and found.why == "erased":
            raise _erased(model_id)
        for handle in fence.handles or handles_in_name(model_id):
            self.check_person(handle)

    def check_person(self, handle: str) -> None:
        """Whether anything may be learnt from them. Raises: Erased."""
        if self._tombstones.find(f"@{handle}"):
            raise _erased(f"@{handle}")

    def _erased_among(self, handles: Collection[str]) -> Tombstone | None:
        found = (self._tombstones.find(f"@{handle}") for handle in handles)
        return next((one for one in found if one), None)


def handles_in_name(model_id: str) -> set[str]:
    """In lower case, whom huggingtweets' own names say that a model has learnt from; others' names say nothing."""
    wanted = ModelId.parse(model_id)
    name = wanted.name.lower()
    return {name, *name.split("-")} if (wanted.namespace or "").lower() == _HUGGINGTWEETS else set()


def _erased(name: str) -> Erased:
    return Erased(
        f"'{name}' was erased here and is not to come back. Who runs the server can lift that: rookery erase --lift.",
        param="model",
    )


def _erased_one(model_id: str) -> ModelNotFound:
    return ModelNotFound(f"Model {model_id!r} is not here.", param="model")
