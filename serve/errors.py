"""Every error a caller can meet, as one tree.

    RookeryError
      ModelNotFound           no such model, locally or on the Hub
      ModelGated              the Hub wants a token or an agreement
      ModelDisabled           who runs the server has taken it out of use
      ModelUnusable           it exists, but it is not a GPT-2 we can serve, or it is damaged
      ModelTooLarge           it can never fit the memory budget
      InvalidRequest          a parameter is wrong; `param` names it
        ContextLengthExceeded   prompt plus new tokens do not fit the context
      BadUpload               not an archive, or not one of the formats we read
        TooFewTweets            a real archive with too little text to learn from
      NotFound                no such file or job
      NotOwner                it is another tenant's: to be looked at, not to be changed
      Conflict                the thing is in a state that does not allow this
        Erased                  it was erased for good, and is not to be made or fetched again
      Overloaded              queues are full; come back after `retry_after_s`
        RateLimited             this caller has had what it may have for now; come back after `retry_after_s`
      QuotaExceeded           this caller keeps as much as it may; to come back does not help
      OutOfMemory             the system or the device gave no memory, though all that is idle was given up
      DeadlineExceeded        it took longer than allowed
      GenerationFailed        the model gave no usable numbers (NaN or Inf)
      TrainingFailed          a training job ended without a model
      StoreUnavailable        disk, database or Hub cannot be reached now; come back after `retry_after_s`
        HubUnreachable          there is no way to the Hub from here: no network, no such host, offline mode
        DiskFull                nothing more can be written until somebody makes room

Messages are sentences for people: they name the thing, the value and the limit, and what to do. They
never carry the body of a request. The HTTP status of each is in `serve.api.status`, nowhere else.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar


class RookeryError(Exception):
    """Base of all. `code` is stable and machine-readable; `param` names the offending field, if any."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders (Ray pickles them); keyword arguments would be lost otherwise.
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)


def _rebuild(kind: type[RookeryError], message: str, param: str | None, retry_after_s: float | None) -> RookeryError:
    return kind(message, param=param, retry_after_s=retry_after_s)


class ModelNotFound(RookeryError):
    code = "model_not_found"


class ModelGated(RookeryError):
    code = "model_gated"


class ModelDisabled(RookeryError):
    code = "model_disabled"


class ModelUnusable(RookeryError):
    code = "model_unusable"


class ModelTooLarge(RookeryError):
    code = "model_too_large"


class InvalidRequest(RookeryError):
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class BadUpload(RookeryError):
    code = "bad_upload"


class TooFewTweets(BadUpload):
    code = "too_few_tweets"


class NotFound(RookeryError):
    code = "not_found"


class NotOwner(RookeryError):
    code = "not_owner"


class Conflict(RookeryError):
    code = "conflict"


class Erased(Conflict):
    code = "erased"


class Overloaded(RookeryError):
    code = "overloaded"


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"  # OpenAI's


class QuotaExceeded(RookeryError):
    code = "insufficient_quota"  # OpenAI's


class OutOfMemory(RookeryError):
    code = "out_of_memory"


class DeadlineExceeded(RookeryError):
    code = "deadline_exceeded"


class GenerationFailed(RookeryError):
    code = "generation_failed"


class TrainingFailed(RookeryError):
    code = "training_failed"


class StoreUnavailable(RookeryError):
    code = "store_unavailable"


class HubUnreachable(StoreUnavailable):
    code = "hub_unreachable"


class DiskFull(StoreUnavailable):
    code = "disk_full"


def model_disabled(model_id: str) -> ModelDisabled:
    """What whoever asks for it is told, and nothing of why."""
    return ModelDisabled(f"Model {model_id!r} has been disabled by who runs this server.", param="model")


def disk_error(action: str, exc: OSError) -> StoreUnavailable:
    """What to raise where the system refused to `action`, such as "publish a model"."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"Cannot {action}: the disk is full. Delete what is not needed.", retry_after_s=60)
    reason = exc.strerror or type(exc).__name__
    return StoreUnavailable(f"Cannot {action}: the disk answers '{reason}'.", retry_after_s=5)
