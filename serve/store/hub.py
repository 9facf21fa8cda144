"""Fetches models from a Hugging Face Hub into the store: once per commit, only the files a GPT-2 needs.

An id becomes a commit's sha, each file is checked against what the Hub says of it (size, sha256 or git blob), pickled
weights become safetensors in a process of their own, and the result is published under the sha. Nothing goes to the
user-wide cache, nothing is fetched for a model that is already here, and the token goes to the endpoint's host only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2  # huggingface_hub's own client: its session speaks for us, its errors reach us
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo as HubInfo
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from serve.errors import (
    DiskFull,
    HubUnreachable,
    ModelGated,
    ModelNotFound,
    ModelUnusable,
    RookeryError,
    StoreUnavailable,
    disk_error,
)
from serve.shape import GPT2Shape
from serve.store.convert import shard_names
from serve.store.model_files import MODEL_FILES, PROVENANCE, WEIGHT_FILES, finish_weights
from serve.store.revisions import MAIN, Revision, Store
from serve.store.validate import MAX_JSON_BYTES, WEIGHTS, read_shape
from serve.types import ModelId

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONNECT_TIMEOUT_S = 5.0  # a Hub that takes longer than this to answer the door is not there
_READ_TIMEOUT_S = 10.0  # silence longer than this is an outage
_FREE_BYTES = 2**28  # left to others on the disk, whatever is fetched
_MAX_REDIRECTS = 5
_STORAGE_DOMAINS = (".hf.co", ".huggingface.co")  # where the Hub keeps large files


class Hub:
    """A Hub as a source of models for `store`. Methods block on network and disk; safe to use from many threads.

    `endpoint` None: huggingface_hub's own. `deadline_s` bounds each fetch, conversion not included.
    """

    def __init__(
        self,
        store: Store,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        enabled: bool = True,
        deadline_s: float = 120.0,
    ) -> None:
        self._store = store
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = token or False  # False: not the one that may lie in the user's home either
        self.enabled = enabled
        self._deadline_s = deadline_s
        self._api = HfApi(endpoint=self._endpoint, token=self._token)

    def locate(self, model_id: str) -> Revision:
        """The model from this disk, or else from the Hub. Raises: as `fetch`."""
        try:
            return self._store.resolve(model_id)
        except ModelNotFound:
            ModelId.parse(model_id)  # an impossible id is nobody's: not worth a question
            if not self.enabled:
                raise
        return self.fetch(model_id)

    def fetch(self, model_id: str) -> Revision:
        """Publishes the Hub's revision of `model_id` here. Asks nothing when a full commit sha is named and here.

        Raises: ModelNotFound, ModelGated, ModelUnusable, HubUnreachable, StoreUnavailable.
        """
        wanted = ModelId.parse(model_id)
        if not self.enabled:
            raise ModelNotFound(f"Model {model_id!r} is not here, and the Hub is switched off.", param="model")
        if wanted.revision and _COMMIT.fullmatch(wanted.revision) and (here := self._here(model_id)):
            return here
        started = time.monotonic()
        deadline = _Deadline(started + self._deadline_s, self._deadline_s)
        with _translated(wanted):
            info, sha = self._look_up(wanted, deadline)
            revision = self._fetch_commit(wanted, info, sha, deadline)
        log.info("model_fetched model_id=%s revision=%s duration_s=%.3f", wanted, sha, time.monotonic() - started)
        return revision

    def _here(self, model_id: str) -> Revision | None:
        try:
            return self._store.resolve(model_id)
        except ModelNotFound:
            return None

    def _look_up(self, wanted: ModelId, deadline: _Deadline) -> tuple[HubInfo, str]:
        timeout: Any = (
            deadline.timeout()
        )  # handed on to the HTTP client, which takes more than the float it is said to be
        try:
            info = self._api.model_info(
                str(wanted), revision=wanted.revision or MAIN, files_metadata=True, timeout=timeout
            )
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, OfflineModeIsEnabled) as exc:
            raise HubUnreachable(
                f"'{wanted}' is not here, and there is no way to the Hub; try again later.", retry_after_s=30
            ) from exc
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise ValueError("the answer names no commit")
        return info, info.sha

    def _fetch_commit(self, wanted: ModelId, info: HubInfo, sha: str, deadline: _Deadline) -> Revision:
        alias = None if wanted.revision == sha else wanted.revision or MAIN
        # The Hub's own spelling, except where it has renamed the model: it stays what it was asked for.
        model_id = info.id if info.id.lower() == str(wanted).lower() else str(wanted)
        if here := self._here(f"{model_id}@{sha}"):
            if alias:
                self._store.set_alias(here, alias)
            return here
        staged = self._store.stage()
        try:
            source = _Source(self._endpoint, self._token, model_id, sha, staged, deadline)
            self._download_all(source, {file.rfilename: file for file in info.siblings or ()})
            finish_weights(staged)
            _write_provenance(staged, info, sha)
        except BaseException:
            self._store.discard(staged)
            raise
        return self._store.publish(model_id, staged, revision=sha, alias=alias)

    def _download_all(self, source: _Source, files: dict[str, RepoSibling]) -> None:
        """Config first: most that is not a GPT-2 is refused after a kilobyte."""
        small = [name for name in MODEL_FILES if name in files]
        weights = next((name for name in WEIGHT_FILES if name in files), None)
        if "config.json" not in small or weights is None:
            raise ModelUnusable(
                f"'{source.repo_id}' on the Hub has no config.json or no PyTorch or safetensors weights."
            )
        source.download(files["config.json"], MAX_JSON_BYTES)
        limit = _weight_limit(read_shape(source.folder))
        for name in small:
            if name != "config.json":
                source.download(files[name], MAX_JSON_BYTES)
        parts = [weights]
        if weights.endswith(".index.json"):
            source.download(files[weights], MAX_JSON_BYTES)
            parts = shard_names(source.folder / weights)
        if missing := [name for name in parts if name not in files]:
            raise ModelUnusable(f"'{source.repo_id}' on the Hub lacks {missing[0]}, which its index names.")
        self._check_space(source.folder, [files[name].size or limit for name in parts], weights)
        for name in parts:
            source.download(files[name], limit)

    def _check_space(self, folder: Path, sizes: list[int], weights: str) -> None:
        needed = sum(sizes) * (1 if weights == WEIGHTS else 2) + _FREE_BYTES
        if shutil.disk_usage(folder).free < needed:
            raise DiskFull(
                f"The disk has less than the {needed / 2**20:.0f} MiB that this model needs; delete a model first.",
                retry_after_s=60,
            )


@dataclass(frozen=True, slots=True)
class _Deadline:
    at: float  # of time.monotonic()
    total_s: float

    def timeout(self) -> httpx2.Timeout:
        """How long the next waits may last. Raises: StoreUnavailable when the time is up."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise StoreUnavailable(f"The Hub took longer than {self.total_s:g} s; try again.", retry_after_s=30)
        return httpx2.Timeout(min(left, _READ_TIMEOUT_S), connect=min(left, _CONNECT_TIMEOUT_S))


@dataclass(frozen=True, slots=True)
class _Source:
    """One commit of one repository, and the folder its files go to."""

    endpoint: str
    token: str | bool
    repo_id: str
    sha: str
    folder: Path
    deadline: _Deadline

    def download(self, file: RepoSibling, limit: int) -> None:
        """Writes one file of at most `limit` bytes, checked. A damaged transfer is repeated once."""
        for attempt in (1, 2):
            try:
                return self._download(file, limit)
            except _Damaged as exc:
                if attempt == 2:
                    raise ModelUnusable(
                        f"{file.rfilename} of '{self.repo_id}' does not arrive as the Hub describes it: {exc}."
                    ) from exc

    def _download(self, file: RepoSibling, limit: int) -> None:
        name, size = file.rfilename, file.size
        if size is not None and size > limit:
            raise ModelUnusable(
                f"{name} of '{self.repo_id}' has {size:,} bytes; for a GPT-2 of its shape {limit:,} are the limit."
            )
        check = _Check(size, limit, *_digest(file))
        with self._open(name) as response, (self.folder / name).open("wb") as out:
            for chunk in response.iter_bytes():
                self.deadline.timeout()
                check.update(chunk)
                out.write(chunk)
        check.finish()

    @contextmanager
    def _open(self, name: str) -> Iterator[httpx2.Response]:
        """Follows redirects itself: only to hosts of the Hub, and with the token only at home."""
        url = hf_hub_url(self.repo_id, name, revision=self.sha, endpoint=self.endpoint)
        for _ in range(_MAX_REDIRECTS):
            headers, timeout = self._headers_for(url), self.deadline.timeout()
            with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False) as response:
                hf_raise_for_status(response)
                if response.headers.get("X-Repo-Commit", self.sha) != self.sha:
                    raise _Damaged("it is another commit's")
                if not response.has_redirect_location:
                    yield response
                    return
                url = urljoin(url, response.headers["Location"])
        raise _Damaged(f"it is behind more than {_MAX_REDIRECTS} redirects")

    def _headers_for(self, url: str) -> dict[str, str]:
        at_home = urlsplit(url)[:2] == urlsplit(self.endpoint)[:2]  # scheme, host and port
        host = urlsplit(url).hostname or ""
        if not at_home and not (host.endswith(_STORAGE_DOMAINS) and url.startswith("https://")):
            raise ModelUnusable(f"'{self.repo_id}' is kept at {host[:100]!r}, which is not a host of the Hub.")
        headers: dict[str, str] = build_hf_headers(token=self.token if at_home else False)
        return headers | {"Accept-Encoding": "identity"}


class _Damaged(Exception):
    """A transfer that did not bring what was promised."""


class _Check:
    """Compares bytes as they pass with the size and digest that were promised, as far as any were."""

    def __init__(self, size: int | None, limit: int, digest: Any, expected: str | None) -> None:
        self._size, self._limit, self._digest, self._expected = size, limit, digest, expected
        self._seen = 0

    def update(self, chunk: bytes) -> None:
        self._seen += len(chunk)
        if self._seen > (self._limit if self._size is None else self._size):
            raise _Damaged("it is longer than it should be")
        self._digest.update(chunk)

    def finish(self) -> None:
        if self._size is not None and self._seen != self._size:
            raise _Damaged(f"it has {self._seen} bytes instead of {self._size}")
        if self._expected and self._digest.hexdigest() != self._expected:
            raise _Damaged("its checksum differs")


def _digest(file: RepoSibling) -> tuple[Any, str | None]:
    """A running digest and its expected value: sha256 of large files, git's blob id of the others."""
    if file.lfs:
        return hashlib.sha256(), file.lfs.sha256
    return hashlib.sha1(
        f"blob {file.size}\0".encode(), usedforsecurity=False
    ), file.blob_id if file.size is not None else None


def _weight_limit(shape: GPT2Shape) -> int:
    """Most bytes a checkpoint may have: float32, an output layer of its own, and the masks old ones carry."""
    numbers = shape.num_parameters + shape.vocab_size * shape.n_embd + shape.n_layer * (shape.n_positions**2 + 1)
    return 4 * numbers + MAX_JSON_BYTES


def _write_provenance(folder: Path, info: HubInfo, sha: str) -> None:
    base_model = getattr(info.card_data, "base_model", None)
    facts = {
        "source": "hub",
        "hub_id": info.id,
        "hub_revision": sha,
        "created_at": int(info.last_modified.timestamp()) if info.last_modified else int(time.time()),
        "base_model": base_model if isinstance(base_model, str) else None,
        "tags": [tag for tag in info.tags or () if isinstance(tag, str)][:50],
    }
    (folder / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _translated(wanted: ModelId) -> Iterator[None]:
    """huggingface_hub's and the network's errors, as ours. The order is that of their inheritance."""
    try:
        yield
    except RookeryError:
        raise
    except GatedRepoError as exc:
        raise _gated(wanted) from exc
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as exc:
        what = f"revision {wanted.revision!r} of '{wanted}'" if wanted.revision else f"'{wanted}'"
        raise ModelNotFound(f"There is no {what}, neither here nor on the Hub.", param="model") from exc
    except DisabledRepoError as exc:
        raise ModelUnusable(f"'{wanted}' has been disabled by the Hub.") from exc
    except HfHubHTTPError as exc:
        raise _by_status(wanted, exc) from exc
    except (httpx2.HTTPError, OfflineModeIsEnabled) as exc:
        raise StoreUnavailable(f"The Hub does not answer for '{wanted}'; try again later.", retry_after_s=30) from exc
    except OSError as exc:
        raise disk_error(f"write '{wanted}'", exc) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise StoreUnavailable(f"The Hub's answer about '{wanted}' is not readable.", retry_after_s=60) from exc


def _by_status(wanted: ModelId, exc: HfHubHTTPError) -> RookeryError:
    status = exc.response.status_code
    if status in (401, 403, 451):
        return _gated(wanted)
    if status == 404:
        return ModelUnusable(f"'{wanted}' lists a file that the Hub does not have.")
    if status in (408, 429) or status >= 500:
        retry_after_s = _retry_after_s(exc.response.headers.get("Retry-After"))
        return StoreUnavailable(
            f"The Hub answers {status} for '{wanted}'; try again later.", retry_after_s=retry_after_s
        )
    return ModelUnusable(f"The Hub refuses '{wanted}' with status {status}.")


def _gated(wanted: ModelId) -> ModelGated:
    return ModelGated(
        f"The Hub gives '{wanted}' only to some: its terms must be accepted there, and the server's Hub token must "
        "belong to who did so."
    )


def _retry_after_s(header: str | None) -> float:
    return float(header) if header and re.fullmatch(r"\d{1,5}", header) else 30.0
