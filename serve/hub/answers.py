"""What the Hub's answers mean, in our words: the head of one, the refusal behind a status, the pause it asks for.

Knows nothing of how answers are got.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import unquote

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers  # type: ignore[attr-defined]

from serve.errors import HubUnreachable, ModelGated, ModelNotFound, ModelUnusable, RookeryError, StoreUnavailable
from serve.hub.pace import RETRY_AFTER_S

UNLIMITED = 10**9  # no limit of its own
REDIRECTS = (301, 302, 303, 307, 308)

_MAX_RETRY_AFTER_S = 3600.0  # what is asked beyond this is a mistake
_OF_THE_HOST = (408, 429, 502, 503, 504)  # said in front of all repositories alike
_PASSING = (*_OF_THE_HOST, 500)
_PATH = re.compile(
    r"/(?:api/models/)?(?P<repo>[^/]+(?:/[^/]+)??)"
    r"(?:/(?:revision|resolve|tree)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?/?"
)


class Failure(Exception):
    """A try that failed and may be repeated: `error` is what to raise in the end.

    `most` tries may end so; `blames`: whom it speaks against, where "repository" is one that may be the host as well,
    and "nobody" leaves only what came in doubt; `asked_s`: the pause the host asked for.
    """

    def __init__(
        self,
        error: RookeryError,
        *,
        blames: Literal["host", "repository", "nobody"],
        most: int = UNLIMITED,
        asked_s: float | None = None,
    ) -> None:
        super().__init__(error.message)
        self.error, self.blames, self.most, self.asked_s = error, blames, most, asked_s


@dataclass(frozen=True, slots=True)
class Answer:
    """What the Hub answered with status 200, 206 or 416. `etag` is without quotes; `chunks` are the raw bytes."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]
    etag: str | None  # of the file as the Hub itself names it, whoever sends its bytes
    commit: str | None


@dataclass(frozen=True, slots=True)
class Subject:
    """What a path asks for, in words."""

    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def of(cls, path: str) -> Subject:
        match = _PATH.fullmatch(path.partition("?")[0])
        if not match:
            return cls(path[:200], None, None)
        return cls(*(unquote(part) if part else None for part in match.groups()))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.file} of '{self.repo}'" if self.file else f"'{self.repo}'"


@dataclass(slots=True)
class Told:
    """What the Hub itself, not its storage, says of a file on the way to it."""

    etag: str | None = None
    commit: str | None = None

    def read(self, response: httpx2.Response, *, at_home: bool) -> None:
        if not at_home:
            return
        etag = response.headers.get("X-Linked-Etag")
        if etag is None and response.status_code not in REDIRECTS:  # a redirect's own is that of the redirect
            etag = self.etag or response.headers.get("ETag")
        self.etag = etag.removeprefix("W/").strip('"') if etag else self.etag
        self.commit = response.headers.get("X-Repo-Commit", self.commit)


def check_status(response: httpx2.Response, subject: Subject, start: int, *, at_home: bool) -> None:
    """Whether it is an answer to a question for the bytes from `start` on. Raises: Failure, or what the Hub refuses."""
    status = response.status_code
    if status == 200 or (start and status in (206, 416)):
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            error = unavailable(f"The Hub's answer about {subject} is compressed, which was not asked for")
            raise Failure(error, blames="repository")
        return
    if status in _PASSING or status >= 500:
        asked_s = _asked_pause_s(response)
        raise Failure(
            unavailable(f"The Hub answers {status} for {subject}", asked_s),
            blames="host" if status in _OF_THE_HOST else "repository",
            most=UNLIMITED if status in _PASSING else 1,
            asked_s=asked_s,
        )
    if not at_home:  # an address of the storage is good for some minutes only
        raise Failure(unavailable(f"The Hub's storage answers {status} for {subject}"), blames="nobody", most=2)
    raise _refusal(response, subject)


def unavailable(what: str, retry_after_s: float | None = None) -> StoreUnavailable:
    """`what` is a sentence without its full stop."""
    return StoreUnavailable(
        f"{what}; try again later.", retry_after_s=RETRY_AFTER_S if retry_after_s is None else retry_after_s
    )


def no_way(subject: Subject) -> HubUnreachable:
    """The Hub cannot be reached at all."""
    return HubUnreachable(
        f"'{subject.repo}' is not here, and there is no way to the Hub; try again later.", retry_after_s=RETRY_AFTER_S
    )


def _refusal(response: httpx2.Response, subject: Subject) -> RookeryError:
    """What a 4xx of the Hub means, by huggingface_hub's own reading of its headers."""
    # Without the body, which it would read however long that is.
    status = response.status_code
    told = [(name, value) for name, value in response.headers.raw if name.lower().startswith(b"x-error-")]
    bare = httpx2.Response(status, headers=told, request=response.request)
    try:
        hf_raise_for_status(bare)
    except GatedRepoError:
        return _gated(subject)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return _not_found(subject)
    except RemoteEntryNotFoundError:
        return ModelUnusable(f"'{subject.repo}' lists a file that the Hub does not have: {subject.file}.")
    except DisabledRepoError:
        return ModelUnusable(f"'{subject.repo}' has been disabled by the Hub.")
    except HfHubHTTPError:
        if status in (401, 403, 451):
            return _gated(subject)
        if status == 404:
            if subject.file is None:
                return _not_found(subject)
            return ModelUnusable(f"'{subject.repo}' lists a file that the Hub does not have: {subject.file}.")
    return ModelUnusable(f"The Hub refuses {subject} with status {status}.")


def _not_found(subject: Subject) -> ModelNotFound:
    named = subject.revision not in (None, "main")
    what = f"revision {subject.revision!r} of '{subject.repo}'" if named else f"'{subject.repo}'"
    return ModelNotFound(f"There is no {what}, neither here nor on the Hub.", param="model")


def _gated(subject: Subject) -> ModelGated:
    return ModelGated(
        f"The Hub gives '{subject.repo}' only to some: its terms must be accepted there, and the server's Hub token "
        "must belong to who did so."
    )


def _asked_pause_s(response: httpx2.Response) -> float | None:
    """The pause that the Hub asks for: Retry-After, or for 429 when its rate limit begins anew."""
    pauses: list[float] = []
    # Whatever cannot be read is taken as not said: huge numbers, dates that are none.
    with suppress(ValueError, OverflowError):
        limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
        if limit and not limit.remaining:
            pauses.append(float(limit.reset_in_seconds))
    with suppress(ValueError, OverflowError, TypeError):
        header = response.headers.get("Retry-After", "").strip()
        pauses.append(float(header) if re.fullmatch(r"[0-9]+", header) else _seconds_until(header))
    return min(max(pauses), _MAX_RETRY_AFTER_S) if pauses else None


def _seconds_until(http_date: str) -> float:
    at = email.utils.parsedate_to_datetime(http_date)
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
