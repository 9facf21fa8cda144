"""Fetches models from a Hugging Face Hub into the store: once per commit and node, only the files a GPT-2 needs.

An id becomes a commit's sha, config.json says whether a GPT-2 is behind it, room is made for the weights, each file is
checked against what the Hub says of it, pickled weights become safetensors in a process of their own, and the result
is published under the sha. What is here is never asked for again; what was fetched in vain is not fetched twice.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from serve.errors import ModelGated, ModelNotFound, ModelUnusable, RookeryError, StoreUnavailable
from serve.hub.claims import Claims
from serve.hub.pace import Deadline
from serve.hub.repository import COMMIT, Repository
from serve.hub.session import TRIES, Session
from serve.hub.transfer import OnProgress, Transfer
from serve.hub.verdicts import Verdicts
from serve.logs import get_logger, ms
from serve.store.budget import IN_USE_S, DiskBudget, Reason
from serve.store.burials import Fence, handles_in_name
from serve.store.disk import translated, write_json
from serve.store.integrity import CONTENT
from serve.store.model_files import PROVENANCE, content_hash, finish_weights
from serve.store.revisions import MAIN, Revision, Standing, Store
from serve.types import ALL_SEEING, ModelId, ModelInfo, PullProgress, Viewer, Visibility

log = get_logger()

PARALLEL_DOWNLOADS = 4  # a line is seldom faster with more

_WITH_FILES = {"blobs": "true"}
_POLL_S = 0.1
_TELL_EVERY_S = 1.0


def _ignore(_: object) -> None:
    pass


class Hub:
    """A Hub as a source of models for `store`. Methods block on network and disk; safe to use from many threads.

    `endpoint` None: huggingface_hub's own. `deadline_s` bounds each fetch, conversion not included; `limit_bytes` what
    may lie here of models from the Hub (0: the disk), `in_use_s` how long each is safe from the others after its use.
    `is_locking` False: processes may fetch the same model at once.
    """

    def __init__(
        self,
        store: Store,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        enabled: bool = True,
        deadline_s: float = 120.0,
        limit_bytes: int = 0,
        in_use_s: float = IN_USE_S,
        is_locking: bool = True,
        open_session: Callable[..., Session] = Session,
        on_evict: Callable[[Reason], None] = _ignore,
    ) -> None:
        self._store = store
        self.enabled = enabled
        self._deadline_s = deadline_s
        address = endpoint or constants.ENDPOINT
        self._session = open_session(address, token)
        self._slots = threading.BoundedSemaphore(PARALLEL_DOWNLOADS)
        folder = store.fetching
        self._claims = Claims(folder, is_locking=is_locking)
        self._verdicts = Verdicts(folder / "unusable.json")
        self._answered = folder / "answered"  # a Hub has given something to this data folder
        self._budget = DiskBudget(
            store,
            limit_bytes,
            in_use_s=in_use_s,
            free_more=lambda: self._claims.sweep(0),
            other_bytes=self._claims.num_bytes,
            on_evict=on_evict,
        )
        self._has_answered = False
        self._is_closed = False

    # --- Finding and fetching --------------------------------------------------------------------------------

    def locate(self, model_id: str, *, viewer: Viewer = ALL_SEEING) -> Revision:
        """The model from this disk, or else from the Hub. What is not from the Hub gets nothing from there unasked.

        Raises: as `fetch`.
        """
        wanted = ModelId.parse(model_id)  # an impossible id is nobody's: not worth a question
        found = self._here(model_id, viewer)
        if found is None:
            if not self.enabled:
                raise self.no_such_model(model_id)
            try:
                found = self._fetch(wanted, viewer=viewer, is_asked_for=False)
            except ModelNotFound as exc:
                if viewer.sees_all:
                    raise
                raise self.no_such_model(model_id) from exc  # in the same words, whatever the reason
        self._budget.touch(found)
        return found

    def fetch(self, model_id: str, *, on_progress: OnProgress = _ignore, viewer: Viewer = ALL_SEEING) -> Revision:
        """Publishes the Hub's revision of `model_id` here. Asks nothing when a full commit sha is named and here.

        Raises: ModelNotFound, ModelGated, ModelUnusable, HubUnreachable, DiskFull, StoreUnavailable.
        """
        wanted = ModelId.parse(model_id)
        if not self.enabled:
            raise ModelNotFound(f"Model {model_id!r} is not here, and the Hub is switched off.", param="model")
        found = self._here(model_id, viewer) if _is_commit(wanted) else None
        return found or self._fetch(wanted, on_progress, viewer=viewer, is_asked_for=True)

    def pull(self, model_id: str, on_progress: OnProgress = _ignore) -> ModelInfo:
        """The Hub's present revision, which then stays here until it is deleted. Raises: as `fetch`."""
        self._verdicts.forget(model_id.partition("@")[0])
        found = self.fetch(model_id, on_progress=on_progress)
        self._store.keep(found.model_id)
        return self._store.get_model(f"{found.model_id}@{found.revision}")

    def close(self) -> None:
        """Fetches under way end with the next bytes that come; the next process goes on with them."""
        self._is_closed = True

    def _clock(self) -> float:
        return math.inf if self._is_closed else time.monotonic()

    def touch(self, found: Revision) -> None:
        """The model is used now: others make room for new ones before it does."""
        self._budget.touch(found)

    def forget(self, model_id: str) -> None:
        """What could not be served may be fetched again; what fetches have left of it goes."""
        self._verdicts.forget(model_id.partition("@")[0])
        self._claims.forget(model_id.partition("@")[0])

    @property
    def is_offline(self) -> bool:
        """Whether a Hub that cannot be reached is no outage: none has ever given anything to this data folder."""
        # Earlier versions left no other trace of the Hub than its models.
        return not (self._has_answered or self._answered.exists() or self._store.is_any_fetched())

    def no_such_model(self, model_id: str) -> ModelNotFound:
        """Said of what is nowhere, and to strangers of what is private."""
        where = "neither here nor on the Hub" if self.enabled else "not here. GET /v1/models lists those that are"
        return ModelNotFound(f"Model {model_id!r} is {where}.", param="model")

    def _here(self, model_id: str, viewer: Viewer = ALL_SEEING) -> Revision | None:
        """Nothing is converted for those who may not know of it."""
        with suppress(ModelNotFound):
            found = self._store.locate(model_id, viewer)
            if not self._store.is_to_be_fetched(found):
                return self._store.resolve(model_id)
        return None

    # --- One fetch ---------------------------------------------------------------------------------------------

    def _fetch(
        self, wanted: ModelId, on_progress: OnProgress = _ignore, *, viewer: Viewer, is_asked_for: bool
    ) -> Revision:
        """Takes its turn on this node, after which what was wanted may be here."""
        deadline = Deadline(self._deadline_s, self._clock)
        with translated(f"fetch '{wanted}'"):
            self._claims.sweep()
            with self._claims.turn(str(wanted), deadline.check, lambda told: on_progress(_read(told))) as tell:
                report = _telling(tell, on_progress)
                self._store.refresh(str(wanted))  # who had the turn before may be another machine
                is_still_wanted = is_asked_for and not _is_commit(wanted)
                if not is_still_wanted and (found := self._here(_spelled(wanted), viewer)):
                    return found
                standing = self._store.standing_of(str(wanted))
                is_known = viewer.may_see(standing.owner, standing.is_private)
                try:
                    self._store.burials.check_fetch(str(wanted), is_asked_for=is_asked_for)
                except RookeryError:
                    if viewer.sees_all or (standing.is_here and is_known):
                        raise
                    is_known = False
                if standing.is_own and not is_asked_for and is_known:
                    return self._store.resolve(_spelled(wanted))  # raises, if it has not just been published
                repository = self._find(wanted, deadline, report, viewer, is_known=is_known)
                self._check_still(wanted, repository, viewer, is_asked_for=is_asked_for)
                try:
                    found = self._bring(wanted, standing, repository, deadline, report)
                except Exception:  # also of what broke off: who was erased meanwhile leaves nothing to the next fetch
                    self._check_still(wanted, repository, viewer, is_asked_for=is_asked_for)
                    raise
        if not viewer.may_see(found.owner, found.is_private):  # it was made so meanwhile
            raise self.no_such_model(_spelled(wanted))
        return found

    def _find(
        self, wanted: ModelId, deadline: Deadline, on_progress: OnProgress, viewer: Viewer, *, is_known: bool
    ) -> Repository:
        """What the Hub has. What the caller may not know of, or that it was, is asked for like what is nowhere."""
        on_progress(PullProgress("resolving"))
        if viewer.sees_all:
            with self._remembered(wanted, wanted.revision or MAIN):
                repository = self._look_up(wanted, deadline)
        else:  # what others have learnt tells of a model before it is known whether it is private
            repository = self._look_up(wanted, deadline)
            if repository.is_private or not is_known:
                raise self.no_such_model(_spelled(wanted))
        if repository.is_disabled:
            raise ModelUnusable(f"'{wanted}' has been disabled by the Hub.")
        return repository

    def _check_still(self, wanted: ModelId, repository: Repository, viewer: Viewer, *, is_asked_for: bool) -> None:
        """Whether it may come under both its names: how it is asked for, and how the Hub calls it.

        What fetches have left of it goes where it may not.
        """
        try:
            for name in (repository.model_id, repository.hub_id):
                self._store.burials.check_fetch(name, is_asked_for=is_asked_for)
        except RookeryError as exc:
            self._claims.forget(repository.model_id)
            if viewer.sees_all:
                raise
            raise self.no_such_model(_spelled(wanted)) from exc

    def _bring(
        self, wanted: ModelId, standing: Standing, repository: Repository, deadline: Deadline, on_progress: OnProgress
    ) -> Revision:
        """The commit as a revision here."""
        alias = repository.alias_for(wanted.revision)
        if found := self._here(f"{repository.model_id}@{repository.sha}"):
            with suppress(ModelNotFound):  # it has just made room for another one
                return self._confirm(found, repository, alias)
        people = handles_in_name(repository.model_id) | handles_in_name(repository.hub_id)
        with self._remembered(wanted, repository.sha), self._slot(deadline, on_progress):
            started = time.monotonic()
            staged = self._download(repository, deadline, on_progress)
            on_progress(PullProgress("publishing"))
            found = self._store.publish(
                repository.model_id,
                staged,
                revision=repository.sha,
                alias=alias,
                visibility=Visibility.PRIVATE if repository.is_private or standing.is_private else Visibility.PUBLIC,
                standing=standing,
                fence=Fence(standing.deletion, (*people,)),
            )
        with suppress(OSError):  # the model is here all the same
            self._answered.touch()
        duration_s = time.monotonic() - started
        log.info("model_fetched", model=str(wanted), revision=repository.sha, duration_ms=ms(duration_s))
        return found

    @contextmanager
    def _slot(self, deadline: Deadline, on_progress: OnProgress) -> Iterator[None]:
        """One of the few downloads at once. Who only asks the Hub, or waits for another process, needs none."""
        if not self._slots.acquire(blocking=False):
            on_progress(PullProgress("waiting"))
            while not self._slots.acquire(timeout=_POLL_S):
                deadline.check()
        try:
            yield
        finally:
            self._slots.release()

    @contextmanager
    def _remembered(self, wanted: ModelId, commit: str) -> Iterator[None]:
        """What cannot be served is not tried again for a while, on all of this node."""
        self._verdicts.check(str(wanted), commit)
        try:
            yield
        except ModelUnusable as exc:
            self._verdicts.add(str(wanted), commit, exc)
            raise

    def _look_up(self, wanted: ModelId, deadline: Deadline) -> Repository:
        repository = Repository.parse(self._ask(str(wanted), wanted.revision, deadline), wanted)
        if repository.hub_id != str(wanted) and not repository.is_complete:
            # It has another name, and on the way there the question for sizes and digests was lost.
            repository = Repository.parse(self._ask(repository.hub_id, repository.sha, deadline), wanted)
        return repository

    def _ask(self, hub_id: str, revision: str | None, deadline: Deadline) -> Any:
        path = f"/api/models/{hub_id}/revision/{revision or MAIN}"
        try:
            # Where no Hub has ever been seen, one that cannot be reached is knocked at once only.
            said = self._session.get_json(path, _WITH_FILES, deadline, knocks=1 if self.is_offline else TRIES)
        except StoreUnavailable:
            raise
        except RookeryError:
            self._has_answered = True
            raise
        self._has_answered = True
        return said

    def _confirm(self, found: Revision, repository: Repository, alias: str | None) -> Revision:
        """The commit is here already."""
        if repository.is_private and not found.is_private:
            self._store.set_visibility(found.model_id, Visibility.PRIVATE)
        if alias:
            self._store.set_alias(found, alias)
        return self._store.resolve(f"{found.model_id}@{found.revision}")

    def _download(self, repository: Repository, deadline: Deadline, on_progress: OnProgress) -> Path:
        """A staged folder with the model's files. What came of a fetch that fails is kept for the next."""
        mine = self._claims.begin(repository.model_id, repository.sha)
        try:
            Transfer(self._session, repository, mine, deadline, self._budget, on_progress).run()
            on_progress(PullProgress("converting"))
            finish_weights(mine)
            write_json(mine / PROVENANCE, repository.provenance | {CONTENT: content_hash(mine)})
            staged = self._store.stage()
            os.rename(mine, staged)  # over the empty one
        except (ModelUnusable, ModelGated, ModelNotFound):
            self._claims.drop(mine)
            raise
        except BaseException:
            self._claims.keep(mine)
            raise
        self._claims.drop(mine)
        return staged


def _telling(tell: Callable[[str], None], on_progress: OnProgress) -> OnProgress:
    """As `on_progress`; who waits for the same model is told too, of each new phase and then once in _TELL_EVERY_S."""
    phase, told_at = "", -math.inf

    def report(progress: PullProgress) -> None:
        nonlocal phase, told_at
        now = time.monotonic()
        if progress.phase != phase or now - told_at >= _TELL_EVERY_S:
            phase, told_at = progress.phase, now
            tell(json.dumps(asdict(progress)))
        on_progress(progress)

    return report


def _read(told: str) -> PullProgress:
    """What `_telling` has told; "waiting" where it is not whole, or nobody has told anything."""
    with suppress(ValueError, TypeError):
        return PullProgress(**json.loads(told))
    return PullProgress("waiting")


def _is_commit(wanted: ModelId) -> bool:
    return COMMIT.fullmatch(wanted.revision or "") is not None


def _spelled(wanted: ModelId) -> str:
    return f"{wanted}@{wanted.revision}" if wanted.revision else str(wanted)
