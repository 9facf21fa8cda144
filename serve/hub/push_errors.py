"""What two servers answer to a push, as errors of ours: the one that has the model, and the Hub that is to get it.

Says in each what to do about it, and decides which are worth another try.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2  # huggingface_hub's own client: its errors reach us
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve.errors import Conflict, InvalidRequest, ModelGated, ModelNotFound, RookeryError, StoreUnavailable, disk_error
from serve.types import ModelId

TRIES = 4  # at what huggingface_hub does not repeat itself: the commit and its tag
_PAUSE_S = 1.0  # before the second try, twice that before the third
_MAX_PAUSE_S = 60.0


def pause_before_retry(exc: Exception, number: int) -> float | None:
    """None: it would be the same again, or it has been tried often enough."""
    pause_s = _PAUSE_S * 2 ** (number - 1)
    if number == TRIES:
        return None
    if isinstance(exc, HfHubHTTPError):
        status = exc.response.status_code
        if status not in (408, 409, 412, 429) and status < 500:
            return None
        pause_s = max(pause_s, _retry_after_s(exc) or 0.0)
    return pause_s if pause_s <= _MAX_PAUSE_S else None


def _retry_after_s(exc: HfHubHTTPError) -> float | None:
    header = exc.response.headers.get("Retry-After", "")
    return float(header) if re.fullmatch(r"\d{1,5}", header) else None


@contextmanager
def reading(wanted: ModelId, source: str) -> Iterator[None]:
    """What the server with the model answers, as errors of ours."""
    try:
        yield
    except RookeryError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError) as exc:
        what = f"revision {wanted.revision!r} of '{wanted}'" if wanted.revision else f"'{wanted}'"
        raise ModelNotFound(
            f"There is no {what} at {source}. A private model needs one of the server's keys in ROOKERY_API_KEY.",
            param="model",
        ) from exc
    except LocalEntryNotFoundError as exc:  # neither there nor here: an OSError that says nothing of the disk
        raise StoreUnavailable(f"'{wanted}' cannot be fetched from {source} now; try again.", retry_after_s=5) from exc
    except HfHubHTTPError as exc:
        raise StoreUnavailable(
            f"{source} answers {exc.response.status_code} for '{wanted}'; is it a Rookery, and of this release?"
        ) from exc
    except (httpx2.HTTPError, OfflineModeIsEnabled) as exc:
        raise StoreUnavailable(f"No answer from {source} ({type(exc).__name__}).", retry_after_s=5) from exc
    except OSError as exc:
        raise disk_error(f"fetch '{wanted}' from {source}", exc) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise StoreUnavailable(f"{source} answers something about '{wanted}' that is not readable.") from exc


@contextmanager
def writing(target: str, endpoint: str) -> Iterator[None]:
    """What the Hub answers, as errors of ours."""
    try:
        yield
    except RookeryError:
        raise
    except HFValidationError as exc:
        raise InvalidRequest(f"'{target[:100]}' cannot be the id of a model on the Hub.", param="to") from exc
    except HfHubHTTPError as exc:
        raise _by_status(target, endpoint, exc) from exc
    except OfflineModeIsEnabled as exc:
        raise StoreUnavailable("HF_HUB_OFFLINE is set: nothing can be pushed.") from exc
    except httpx2.HTTPError as exc:
        raise _broke_off(target, endpoint, exc) from exc
    except RuntimeError as exc:  # what huggingface_hub makes of whatever ends the upload of a file
        causes = [cause for cause in (exc.__cause__, exc) if isinstance(cause, HfHubHTTPError)]
        raise (_by_status(target, endpoint, causes[0]) if causes else _broke_off(target, endpoint, exc)) from exc
    except OSError as exc:
        raise disk_error(f"push '{target}'", exc) from exc
    except (ValueError, KeyError, TypeError) as exc:
        said = str(exc) if "README.md" in str(exc) else type(exc).__name__
        raise Conflict(f"{endpoint} does not take '{target}': {said[:300]}") from exc


def _by_status(target: str, endpoint: str, exc: HfHubHTTPError) -> RookeryError:
    status = exc.response.status_code
    if status == 401:
        return ModelGated(f"{endpoint} does not know your token: run 'hf auth login', or set another HF_TOKEN.")
    if status in (402, 403, 404, 451):
        return ModelGated(
            f"{endpoint} does not let you write to '{target}' ({status}): name another repository with --to, or log in "
            "with a token that may write there ('hf auth login')."
        )
    if status in (409, 412):
        return Conflict(f"Others are changing '{target}' on {endpoint} at the same time; push again.")
    if status == 429 or status >= 500:
        wait_s = _retry_after_s(exc)
        when = f" in {wait_s:g} s" if wait_s else " later"
        return StoreUnavailable(
            f"{endpoint} answers {status} for '{target}': push again{when}; it goes on where it was.",
            retry_after_s=wait_s,
        )
    return Conflict(f"{endpoint} refuses the push to '{target}' with status {status}.")


def _broke_off(target: str, endpoint: str, exc: Exception) -> StoreUnavailable:
    return StoreUnavailable(
        f"The push to {endpoint} broke off ({type(exc.__cause__ or exc).__name__}): push '{target}' again; it "
        "goes on where it was.",
        retry_after_s=5,
    )
