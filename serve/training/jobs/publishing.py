"""From a finished folder to a revision that exists once, whatever dies or is stopped and woken meanwhile.

The job's row first says which staged folder becomes which revision; the next attempt then takes that folder away, so
that the earlier one cannot publish any more, and looks whether it had. Checkpoints need less: nothing names them but
their hash, and the same step of the same job has the same one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.errors import ModelNotFound
from serve.store.burials import Fence
from serve.store.disk import translated
from serve.store.model_files import content_hash
from serve.store.revisions import Revision, Store
from serve.training.jobs.queue import Claim, JobQueue, Publication
from serve.types import Visibility


class Publisher:
    """Publishes for one claim. All methods raise Conflict once the claim is lost."""

    def __init__(self, store: Store, queue: JobQueue, claim: Claim) -> None:
        self._store, self._queue, self._claim = store, queue, claim
        self._viewer = claim.job.request.viewer
        self._fence: Fence | None = None

    def begin(self, model_id: str, handles: Collection[str]) -> None:
        """From now on nothing is published of what is deleted.

        Raises: Erased, ModelDisabled, StoreUnavailable; NotOwner where the name is another tenant's.
        """
        with translated("look up a model"):
            self._fence = self._store.burials.fence(model_id, handles)
            self._store.check_name(model_id, self._viewer)

    def settle(self) -> Revision | None:
        """What the attempt before has published, if it had come that far; it cannot any more."""
        pending = self._claim.pending
        if pending is None:
            return None
        trash = self._store.stage()
        try:
            # In one step: whoever still holds that folder's name can rename it no more, or has already.
            with contextlib.suppress(FileNotFoundError):
                os.rename(pending.stage, trash / "earlier")
        finally:
            self._store.discard(trash)
        # It may be published, but not yet named `main`.
        found = self._store.settle(pending.model_id, pending.revision, main_before=pending.main_before)
        if found is None:
            self._queue.set_publication(self._claim, None)
        return found

    def publish(self, stage: Path, model_id: str, *, visibility: Visibility) -> Revision:
        """Makes the staged folder the model's `main`, of the job's tenant. At most `visibility` meet it from now on."""
        revision = content_hash(stage)
        publication = Publication(stage, model_id, revision, self._store.main_of(model_id))
        # Rejected once another attempt has begun; if not, that attempt will know of this folder.
        self._queue.set_publication(self._claim, publication)
        published = self._store.publish(
            model_id, stage, revision=revision, visibility=visibility, viewer=self._viewer, fence=self._fence
        )
        # From now on whoever moves `main`, even back to where it was, has decided so later.
        self._queue.set_publication(self._claim, replace(publication, main_before=revision))
        return published

    def has_published(self) -> bool:
        """Whether the job's model is there, whatever went wrong afterwards."""
        pending = self._queue.resume(self._claim.job.id, self._claim.fence).pending
        try:
            return pending is not None and bool(self._store.resolve(f"{pending.model_id}@{pending.revision}"))
        except ModelNotFound:
            return False

    def publish_checkpoint(
        self, stage: Path, model_id: str, step: int, metrics: Mapping[str, Any], *, visibility: Visibility
    ) -> None:
        """Makes the staged folder a revision that only its own name leads to."""
        self._queue.check(self._claim)
        found = self._store.publish(
            model_id, stage, alias=None, visibility=visibility, viewer=self._viewer, fence=self._fence
        )
        named = f"{found.model_id}@{found.revision}"
        kept = self._queue.record_checkpoint(self._claim, step=step, model_id=named, metrics=metrics)
        self._store.drop_checkpoints(found.model_id, of_job=self._claim.job.id, keep=_revisions(kept))

    def drop_earlier_checkpoints(self, model_id: str, own: Collection[str], going_on: Collection[str]) -> None:
        """Those of the trainings before, now that there is a newer model.

        `own` name model@revision; `going_on` are jobs, whose own end will do the same for theirs.
        """
        self._store.drop_checkpoints(model_id, keep=_revisions(own), spare=going_on)


def _revisions(named: Collection[str]) -> list[str]:
    return [name.partition("@")[2] for name in named]
