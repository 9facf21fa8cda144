"""What a request for a training job may say, as JSON or as a form, and the JobRequest that it means.

It checks the form; whether the files can be learned from, and whether trackers are there, is decided by Jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field, Json

from serve.api.access import Caller
from serve.api.body import Body, expected
from serve.api.generation import check_model_id
from serve.errors import InvalidRequest, ModelNotFound
from serve.types import (
    MAX_ARCHIVES,
    MAX_BATCH_SIZE,
    Hyperparameters,
    Integration,
    JobRequest,
    ModelId,
    Priority,
    TrainingFile,
    Visibility,
    check_idempotency_key,
)

IDEMPOTENCY_HEADER = "idempotency-key"
PRIORITIES: dict[Priority, str] = {-1: "low", 0: "normal", 1: "high"}

_Auto = Literal["auto"]
_FileId = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]
_Handle = Annotated[
    str,
    Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x20\x7f]+$"),
    expected("the name of an account, of 1 to 256 characters without spaces"),
]
_Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
_MetadataKey = Annotated[str, Field(max_length=64, pattern=r"^[^\x00]*$")]  # no database keeps a NUL
_MetadataValue = Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")]
_Metadata = Annotated[
    dict[_MetadataKey, _MetadataValue] | None,
    Field(max_length=16),
    expected("an object of at most 16 texts; keys up to 64 characters, values up to 512"),
]
_Method = Annotated[
    Literal["supervised"],
    expected("'supervised', the only method here: a bot learns to write on from what it is given"),
]


class HyperparametersBody(Body):
    n_epochs: Annotated[
        Annotated[int, Field(ge=1, le=50)] | _Auto | None, expected("'auto' or a whole number from 1 to 50")
    ] = None
    batch_size: Annotated[
        Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | _Auto | None,
        expected(f"'auto' or a whole number from 1 to {MAX_BATCH_SIZE}"),
    ] = None
    learning_rate_multiplier: Annotated[
        Annotated[float, Field(ge=0.001, le=100)] | _Auto | None, expected("'auto' or a number from 0.001 to 100")
    ] = None


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody | None = None


class MethodBody(Body):
    type: _Method
    supervised: SupervisedBody | None = None


class TrackerBody(Body):
    project: _Name | None = None
    entity: _Name | None = None
    name: _Name | None = None
    tags: Annotated[list[_Name], Field(max_length=16)] | None = None


class IntegrationBody(Body):
    """OpenAI's, for Weights & Biases; the other tracker is ours."""

    type: Literal["wandb", "trackio"]
    wandb: TrackerBody | None = None
    trackio: TrackerBody | None = None


class Wishes(Body):
    """What can be asked of a job in either form. `priority` and `visibility` are ours."""

    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None  # OpenAI's bounds for training
    metadata: _Metadata = None
    integrations: Annotated[list[IntegrationBody], Field(max_length=2)] | None = None
    priority: Literal["low", "normal", "high"] | None = None
    visibility: Annotated[Visibility, Field(strict=False)] | None = None


class TrainingFileBody(Body):
    file_id: _FileId
    handle: _Handle | None = None


class JobBody(Wishes):
    """OpenAI's fields; `training_files` and `handle` are ours, for bots that learn from several archives."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: _FileId | None = None
    training_files: Annotated[list[TrainingFileBody], Field(min_length=1, max_length=MAX_ARCHIVES)] | None = None
    validation_file: _FileId | None = None
    handle: _Handle | None = None
    hyperparameters: HyperparametersBody | None = None
    method: MethodBody | None = None


class BotForm(Wishes, HyperparametersBody):
    """The small fields of POST /v1/bots: text, as forms have it; validate it so that "3" is a number."""

    base_model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    handle: Annotated[list[_Handle], expected("names of accounts, of 1 to 256 characters without spaces")]
    integrations: Json[Annotated[list[IntegrationBody], Field(max_length=2)]] | None = None


def from_body(body: JobBody, caller: Caller) -> JobRequest:
    """Raises: InvalidRequest, ModelNotFound."""
    supervised = body.method.supervised if body.method else None
    chosen = (supervised.hyperparameters if supervised else None) or body.hyperparameters or HyperparametersBody()
    return _request(
        body, chosen, base_model=body.model, files=_training_files(body), validation=body.validation_file, caller=caller
    )


def from_form(
    form: BotForm, file_ids: Sequence[str], *, validation: str | None, default_base: str, caller: Caller
) -> JobRequest:
    """`file_ids`: of the archives, in their order. Raises: InvalidRequest, ModelNotFound."""
    handles = [bare(handle) for handle in form.handle] + [None] * (len(file_ids) - len(form.handle))
    files = tuple(map(TrainingFile, file_ids, handles))
    base_model = form.base_model or default_base
    return _request(form, form, base_model=base_model, files=files, validation=validation, caller=caller)


def bare(handle: str | None) -> str | None:
    """ "@ada" -> "ada"."""
    return handle.strip().removeprefix("@") or None if handle is not None else None


def read_idempotency_key(request: Request) -> str | None:
    """Whatever the caller calls this request, however often it is sent. Raises: InvalidRequest."""
    key = request.headers.get(IDEMPOTENCY_HEADER)
    return None if key is None else check_idempotency_key(key)


def read_metadata_filter(request: Request) -> dict[str, str] | None:
    """`metadata[k]=v`, as often as wanted; `metadata=null`, as {}, for jobs without any. Raises: InvalidRequest."""
    found = {
        key.removeprefix("metadata[").removesuffix("]"): value
        for key, value in request.query_params.multi_items()
        if key.startswith("metadata[") and key.endswith("]")
    }
    whole = request.query_params.get("metadata")
    if whole is not None:
        if whole != "null" or found:
            raise InvalidRequest(
                "Filter by 'metadata[key]=value', or by 'metadata=null' alone for jobs without any.", param="metadata"
            )
        return {}
    has_bad_text = any(len(key) > 64 or len(value) > 512 or "\0" in key + value for key, value in found.items())
    if len(found) > 16 or has_bad_text:
        raise InvalidRequest("'metadata' filters: at most 16; keys up to 64 characters, values 512.", param="metadata")
    return found or None


def _request(
    wishes: Wishes,
    chosen: HyperparametersBody,
    *,
    base_model: str,
    files: tuple[TrainingFile, ...],
    validation: str | None,
    caller: Caller,
) -> JobRequest:
    word = wishes.priority or PRIORITIES[0]
    return JobRequest(
        base_model=check_model_id(base_model),
        files=files,
        hyperparameters=_hyperparameters(chosen),
        suffix=_check_suffix(wishes.suffix),
        seed=wishes.seed,
        metadata=wishes.metadata or {},
        validation_file=validation,
        integrations=_integrations(wishes.integrations or []),
        priority=next(priority for priority, name in PRIORITIES.items() if name == word),
        owner=caller.name,
        viewer=caller.viewer,
        visibility=wishes.visibility or Visibility.PUBLIC,
    )


def _hyperparameters(chosen: HyperparametersBody) -> Hyperparameters:
    def given(value: Any) -> Any:
        return None if value == "auto" else value

    return Hyperparameters(given(chosen.n_epochs), given(chosen.batch_size), given(chosen.learning_rate_multiplier))


def _integrations(bodies: Sequence[IntegrationBody]) -> tuple[Integration, ...]:
    if len({body.type for body in bodies}) < len(bodies):
        raise InvalidRequest("'integrations' names the same tracker twice; name each once.", param="integrations")
    return tuple(_integration(body) for body in bodies)


def _integration(body: IntegrationBody) -> Integration:
    told = (body.wandb if body.type == "wandb" else body.trackio) or TrackerBody()
    return Integration(body.type, told.project, told.entity, told.name, tuple(told.tags or ()))


def _training_files(body: JobBody) -> tuple[TrainingFile, ...]:
    if body.training_file is not None and body.training_files is not None:
        raise InvalidRequest("Give 'training_file' or 'training_files', not both.", param="training_files")
    if body.training_files is not None:
        return tuple(TrainingFile(file.file_id, bare(file.handle)) for file in body.training_files)
    if body.training_file is None:
        raise InvalidRequest("'training_file' is missing: the id of an uploaded archive.", param="training_file")
    handle = body.handle or (body.metadata or {}).get("handle") or None
    return (TrainingFile(body.training_file, bare(handle)),)


def _check_suffix(suffix: str | None) -> str | None:
    if suffix is not None:
        try:
            ModelId.parse(f"huggingtweets/{suffix}")
        except ModelNotFound as exc:
            raise InvalidRequest(
                "'suffix' names the new model: ASCII letters, digits, '.', '_' and '-', starting with a letter or "
                "digit, without '..' or '--'.",
                param="suffix",
            ) from exc
    return suffix
