"""What a visitor has a bot write: the form, read and checked, and the texts that come of it.

The same form is read by write.js, which asks /v1/completions for the same and shows each text as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.api.generation import Run, pick_seed
from serve.api.service import Service
from serve.api.status import invalid
from serve.types import PREVIEW_PROMPT, GenerationRequest, SamplingOverrides

MAX_TEXTS = 10
MAX_TOKENS = 1024  # the longest context of a plain GPT-2; the engine checks the model's own
MAX_SEED = 2**53 - 1  # what a JavaScript number holds exactly

_NUM_TEXTS = 5
_NUM_TOKENS = 80


def default_tokens(context_length: int | None) -> int:
    """The longest text where nothing is asked for: a small context has room for its prompt, too."""
    return max(1, min(_NUM_TOKENS, (context_length or MAX_TOKENS) // 2))


def defaults(context_length: int | None) -> Mapping[str, str]:
    """What stands in the form at first. A field that is empty leaves the matter to the model."""
    return {"prompt": PREVIEW_PROMPT, "n": str(_NUM_TEXTS), "max_tokens": str(default_tokens(context_length))}


class Wish(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(allow_inf_nan=False, extra="ignore")

    prompt: Annotated[str, Field(max_length=4000)] = ""
    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] = _NUM_TEXTS
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1000)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None

    @property
    def sampling(self) -> SamplingOverrides:
        """Without what was left to the model."""
        asked: SamplingOverrides = {"max_new_tokens": self.max_tokens}
        if self.temperature is not None:
            asked["temperature"] = self.temperature
        if self.top_p is not None:
            asked["top_p"] = self.top_p
        if self.top_k is not None:
            asked["top_k"] = self.top_k
        if self.repetition_penalty is not None:
            asked["repetition_penalty"] = self.repetition_penalty
        return asked


def read_wish(fields: Mapping[str, str], context_length: int | None) -> Wish:
    """`context_length`: of the model that is asked. Raises: InvalidRequest, which names the field."""
    filled = {name: value for name, value in fields.items() if value or name == "prompt"}
    try:
        return Wish.model_validate({"max_tokens": default_tokens(context_length), **filled})
    except ValidationError as exc:
        raise invalid(exc) from exc


async def write(service: Service, request: Request, model_id: str, wish: Wish) -> tuple[Sequence[str], int]:
    """The texts, each with its prompt, and the seed to have them again. Raises: as Generator.generate."""
    seed, caller = pick_seed(wish.seed), service.access.caller(request)
    asked = GenerationRequest(
        model_id=model_id,
        prompts=(wish.prompt,),
        sampling=wish.sampling,
        num_choices=wish.n,
        seed=seed,
        add_bos=True,
        request_id=request.state.request_id,
        is_whole=True,
        viewer=caller.viewer,
        caller=caller.name,
    )
    run = Run(service, asked, request)
    async with run.wanted(request.receive):
        sequences = await run.finish()
    return [wish.prompt + sequence.text for sequence in sequences], seed
