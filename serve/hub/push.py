"""Pushes a model from a running Rookery to a Hugging Face Hub: one commit of what differs, and a tag of its revision.

Reads the server as the Hub that it also is, so any server will do, on this machine or not. Knows no store. Files
that an interrupted push has fetched lie in a cache folder, and those that the Hub has got are not sent again.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import httpx2  # huggingface_hub's own client: its errors reach us
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo as HubInfo
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from serve.errors import Conflict, StoreUnavailable
from serve.hub.push_cache import claimed
from serve.hub.push_card import is_utf8, rename_in_card
from serve.hub.push_errors import TRIES, pause_before_retry, reading, writing
from serve.hub.push_target import choose_target, log_in
from serve.logs import get_logger
from serve.store.disk import translated
from serve.store.files import find_file, list_files
from serve.store.model_files import MODEL_FILES, OUR_FILES, WEIGHT_FILES
from serve.store.validate import WEIGHTS
from serve.types import ModelId, RepoFile

log = get_logger()

_CARD = "README.md"
# All that a revision may have that is the public's. What else a repository on the Hub has is not touched.
_PUSHED = (*MODEL_FILES, *OUR_FILES, WEIGHTS)
_REPLACED = frozenset((*_PUSHED, *WEIGHT_FILES))
_TAG = "rookery-"
_TAG_DIGITS = 12  # of the revision

Visibility = Literal["private", "public"]


@dataclass(frozen=True, slots=True)
class PushProgress:
    """How far a push is. In phase "sending" huggingface_hub shows its own bars, if it may."""

    phase: Literal["looking", "waiting", "fetching", "uploading", "sending", "committing"]
    file: str = ""
    num_bytes: int = 0
    total_bytes: int = 0  # 0: not known


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a revision is on the Hub. `uploaded_bytes`: of files, as sent.

    `skipped`: it was found there at the start. Where several push at once, huggingface_hub makes no second commit of
    the same files and names the first as its own: more than one may then say that it was not skipped.
    """

    repo: str
    url: str
    commit: str
    tag: str
    uploaded_bytes: int
    skipped: bool


OnProgress = Callable[[PushProgress], None]


def push(
    model_id: str,
    *,
    source: str,
    cache: Path,
    source_key: str = "",
    endpoint: str | None = None,
    token: str | None = None,
    to: str | None = None,
    visibility: Visibility | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Pushed:
    """Puts the revision that `model_id` names at `source` (a Rookery's address) on the Hub at `endpoint`.

    None for `endpoint` and `token`: as huggingface_hub is set up; for `to`: the same id, or the same name under the
    user's own where the user may not write there, and nothing is replaced but what a push has made; for `visibility`:
    a private model becomes a private repository, any other what its owner's settings say.
    Raises: ModelNotFound, ModelGated, InvalidRequest, Conflict, StoreUnavailable.
    """
    wanted = ModelId.parse(model_id)
    rookery = HfApi(endpoint=source.rstrip("/"), token=source_key or False)
    hub = log_in(endpoint, token)
    on_progress(PushProgress("looking"))
    with reading(wanted, rookery.endpoint):
        info = rookery.model_info(str(wanted), revision=wanted.revision or "main", files_metadata=True)
        model = _Model(rookery, info)
    visibility = visibility or ("private" if info.private else None)
    target = choose_target(hub, info.id, to)
    waiting = PushProgress("waiting")
    with translated(f"use {cache}"), claimed(cache, model.key, lambda: on_progress(waiting)) as folder:
        pushed = _Push(hub, target, model, folder, visibility, to is not None, on_progress).run()
    log.info("model_pushed", model=info.id, repo=pushed.repo, commit=pushed.commit)
    return pushed


# --- From where ---------------------------------------------------------------------------------------------


class _Model:
    """One revision at the server that has it."""

    def __init__(self, rookery: HfApi, info: HubInfo) -> None:
        if not info.sha:
            raise ValueError("the answer names no revision")
        self._api = rookery
        self.id, self.revision = info.id, info.sha
        self.files = {file.rfilename: file for file in info.siblings or () if file.rfilename in _PUSHED}
        if WEIGHTS not in self.files:
            raise Conflict(
                f"'{info.id}' at {rookery.endpoint} has no {WEIGHTS}: there is nothing that could be pushed."
            )
        self.tag = f"{_TAG}{info.sha[:_TAG_DIGITS]}"
        self.key = hashlib.sha256(f"{rookery.endpoint} {info.id}@{info.sha}".encode()).hexdigest()[:16]

    def fetch(self, folder: Path, on_progress: OnProgress) -> dict[str, RepoFile]:
        """Its files by name. Those that were fetched whole before are not fetched again."""
        total, done = sum(file.size or 0 for file in self.files.values()), 0
        with reading(ModelId.parse(self.id), self._api.endpoint):
            for name, file in sorted(self.files.items()):
                on_progress(PushProgress("fetching", name, done, total))
                hf_hub_download(
                    *(self.id, name),
                    revision=self.revision,
                    local_dir=folder,
                    endpoint=self._api.endpoint,
                    token=self._api.token,
                )
                done += file.size or 0
            files = {file.name: file for file in list_files(folder, with_digests=True) if file.name in self.files}
        for name, file in self.files.items():
            self._check(files[name], file)
        return files

    def _check(self, here: RepoFile, there: RepoSibling) -> None:
        if not _is_same(here, there):
            here.location.unlink()
            raise StoreUnavailable(
                f"{here.name} of '{self.id}' does not arrive as {self._api.endpoint} describes it; try again.",
                retry_after_s=1,
            )


# --- The push -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Push:
    """One revision on its way to one repository. `is_named`: by the user, whatever is in it."""

    hub: HfApi
    target: str
    model: _Model
    folder: Path
    visibility: Visibility | None
    is_named: bool
    on_progress: OnProgress
    sent: int = 0

    def run(self) -> Pushed:
        """Again from the start where others commit meanwhile, or an answer is lost: what is done is found done."""
        for number in range(1, TRIES + 1):
            with writing(self.target, self.hub.endpoint):
                try:
                    return self._try()
                except (HfHubHTTPError, httpx2.TransportError) as exc:
                    pause_s = pause_before_retry(exc, number)
                    if pause_s is None:
                        raise
            time.sleep(pause_s)
        raise AssertionError("unreachable")

    def _try(self) -> Pushed:
        repo = self._find()
        if repo and (there := self._find_pushed(repo)):
            return self._done(repo, there, skipped=True)
        files = self.model.fetch(self.folder, self.on_progress)
        repo = repo or self._create()
        commit = self._commit(repo, files)
        self.hub.create_tag(repo.id, tag=self.model.tag, revision=commit or repo.sha, exist_ok=True)
        return self._done(repo, commit or str(repo.sha), skipped=commit is None)

    def _done(self, repo: HubInfo, commit: str, *, skipped: bool) -> Pushed:
        url = f"{self.hub.endpoint}/{repo.id}"
        return Pushed(repo.id, url, commit, self.model.tag, self.sent, skipped)

    def _find(self) -> HubInfo | None:
        try:
            return self._check(self.hub.model_info(self.target, files_metadata=True))
        except RepositoryNotFoundError:
            return None

    def _create(self) -> HubInfo:
        private = None if self.visibility is None else self.visibility == "private"
        self.hub.create_repo(self.target, private=private, exist_ok=True)
        return self._check(self.hub.model_info(self.target, files_metadata=True))

    def _check(self, repo: HubInfo) -> HubInfo:
        if self.visibility == "private" and not repo.private:
            raise Conflict(
                f"'{repo.id}' at {self.hub.endpoint} is public, and '{self.model.id}' is to be private: say --public "
                "to publish it, or name another repository with --to."
            )
        return repo

    def _find_pushed(self, repo: HubInfo) -> str | None:
        """The commit that is tagged with this revision, while `main` has its files. The card may have been edited."""
        tags = {ref.name: ref.target_commit for ref in self.hub.list_repo_refs(repo.id).tags}
        commit = tags.get(self.model.tag)
        if commit is None:
            self._check_ours(repo, tags)
        if commit is None or commit == repo.sha:
            return commit
        tagged = self.hub.model_info(repo.id, revision=self.model.tag, files_metadata=True)
        return commit if _digests(tagged) == _digests(repo) else None

    def _check_ours(self, repo: HubInfo, tags: Iterable[str]) -> None:
        """Whether a push made it; one that was interrupted has set no tag, but these weights."""
        there = {file.rfilename: file for file in repo.siblings or () if file.rfilename != ".gitattributes"}
        is_here = WEIGHTS in there and _digest(there[WEIGHTS]) == _digest(self.model.files[WEIGHTS])
        is_ours = is_here or any(tag.startswith(_TAG) for tag in tags)
        if there and not is_ours and not self.is_named:
            raise Conflict(
                f"'{repo.id}' at {self.hub.endpoint} exists and was not pushed from a Rookery: name it with --to to "
                "replace it, or name another repository."
            )

    def _commit(self, repo: HubInfo, files: dict[str, RepoFile]) -> str | None:
        """What differs as one commit upon `repo.sha`; None where nothing does."""
        files = files | self._write_card(files, repo.id)
        there = {file.rfilename: file for file in repo.siblings or ()}
        changed = {name: file for name, file in sorted(files.items()) if not _is_same(file, there.get(name))}
        gone = [CommitOperationDelete(name) for name in sorted(_REPLACED & there.keys() - files.keys())]
        if not changed and not gone:
            return None
        with ExitStack() as opened:
            added = self._open(changed, repo.id, opened)
            committed = self.hub.create_commit(
                repo.id,
                [*gone, *added],
                commit_message=f"Push {self.model.id} at {self.model.revision[:_TAG_DIGITS]}",
                parent_commit=repo.sha,
            )
        self.sent += sum(file.num_bytes for name, file in changed.items() if name != WEIGHTS)
        return str(committed.oid)

    def _write_card(self, files: dict[str, RepoFile], target: str) -> dict[str, RepoFile]:
        """The card where it differs from the one that was fetched."""
        if _CARD not in files:
            return {}
        card = files[_CARD].location.read_bytes()
        if not is_utf8(card):  # huggingface_hub refuses it, in no words of anybody's
            raise Conflict(f"The {_CARD} of '{self.model.id}' is not UTF-8, and the Hub takes no other: save it anew.")
        renamed = rename_in_card(card, self.model.id, target)
        if renamed == card:
            return {}
        folder = self.folder / ".card"
        folder.mkdir(exist_ok=True)
        (folder / _CARD).write_bytes(renamed)
        return {_CARD: find_file(folder, _CARD)}

    def _open(self, changed: dict[str, RepoFile], repo_id: str, opened: ExitStack) -> list[CommitOperationAdd]:
        """Xet where the Hub offers it: it resumes within a file. LFS takes whole files, and lets us watch it read."""
        weights = changed.get(WEIGHTS)
        added = [CommitOperationAdd(name, file.location) for name, file in changed.items() if file is not weights]
        if weights is None:
            self.on_progress(PushProgress("committing"))
        elif _offers_xet(self.hub, repo_id):
            self.on_progress(PushProgress("sending", WEIGHTS, 0, weights.num_bytes))
            self.sent += weights.num_bytes
            added.append(CommitOperationAdd(WEIGHTS, weights.location))
        else:
            watched = opened.enter_context(_Watched(weights.location, self._on_sent))
            added.append(CommitOperationAdd(WEIGHTS, watched))  # reads it once for its digest
            watched.is_sent = True
        return added

    def _on_sent(self, num_bytes: int, position: int, total: int) -> None:
        self.sent += num_bytes
        self.on_progress(PushProgress("committing" if position == total else "uploading", WEIGHTS, position, total))


class _Watched(io.BufferedReader):
    """A file that tells how it is read: huggingface_hub sends open files by LFS, never by Xet."""

    def __init__(self, path: Path, on_read: Callable[[int, int, int], None]) -> None:
        super().__init__(io.FileIO(path))
        self._on_read = on_read
        self._size = path.stat().st_size
        self.is_sent = False

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        if self.is_sent and content:
            self._on_read(len(content), self.tell(), self._size)
        return content


def _offers_xet(hub: HfApi, repo_id: str) -> bool:
    """A Hub of one's own may know nothing of Xet, which huggingface_hub does not ask."""
    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return False
    url = f"{hub.endpoint}/api/models/{repo_id}/xet-write-token/main"
    return bool(get_session().get(url, headers=build_hf_headers(token=hub.token)).is_success)


def _digests(repo: HubInfo) -> dict[str, str | None]:
    """Of all files that a push decides but the card."""
    files = [file for file in repo.siblings or () if file.rfilename in _REPLACED and file.rfilename != _CARD]
    return {file.rfilename: _digest(file) for file in files}


def _digest(file: RepoSibling) -> str | None:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _is_same(here: RepoFile, there: RepoSibling | None) -> bool:
    return there is not None and _digest(there) in (here.sha256, here.blob_id)
