"""A request against its model, before anything is loaded: prompts as tokens, parameters with the model's defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from serve.engine.engine import Slot
from serve.engine.sequence import Sequence
from serve.errors import ContextLengthExceeded, InvalidRequest
from serve.loader import Facts
from serve.types import GenerationRequest, SamplingParams, Written


@dataclass(frozen=True, slots=True)
class Plan:
    """One sequence of a request, checked and ready for a slot."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    index: int
    written: tuple[int, ...]

    def sequence(self, request: GenerationRequest, facts: Facts, slot: Slot) -> Sequence:
        return Sequence(
            slot=slot.index,
            prompt_ids=self.prompt_ids,
            params=self.params,
            vocabulary=facts.vocabulary,
            seed=request.seed,
            choice=self.index,
            top_logprobs=request.top_logprobs,
            prompt_logprobs=request.prompt_logprobs,
            caller=request.caller,
            written=self.written,
        )


def plan(request: GenerationRequest, facts: Facts) -> list[Plan]:
    """Check a request against its model and resolve its parameters; none for what is over. Raises: InvalidRequest."""
    for token, _ in request.sampling.get("logit_bias", ()):
        if not 0 <= token < facts.shape.vocab_size:
            message = f"'logit_bias' names token {token}; this model's tokens are 0 to {facts.shape.vocab_size - 1}."
            raise InvalidRequest(message, param="logit_bias")
    num_sequences = len(request.prompts) * request.num_choices
    written = request.written or (Written(),) * num_sequences
    if len(written) != num_sequences or all(one.is_over for one in written):
        raise InvalidRequest("'written' tells of other sequences than the request has, or of none that goes on.")
    plans = []
    for number, prompt in enumerate(request.prompts):
        ids = _encode(prompt, request, facts)
        params = _resolve(request, facts, len(ids))
        for index in range(number * request.num_choices, (number + 1) * request.num_choices):
            if not written[index].is_over:
                plans.append(Plan(ids, params, index, _checked(written[index].token_ids, params, facts)))
    return plans


def _checked(written: tuple[int, ...], params: SamplingParams, facts: Facts) -> tuple[int, ...]:
    """What a text that goes on may have. Raises: InvalidRequest."""
    if len(written) >= params.max_new_tokens or not all(0 <= token < facts.shape.vocab_size for token in written):
        raise InvalidRequest(
            f"'written' has more tokens than a text of {params.max_new_tokens} that goes on, or one outside this "
            f"model's vocabulary (0 to {facts.shape.vocab_size - 1})."
        )
    return written


def _encode(prompt: str | tuple[int, ...], request: GenerationRequest, facts: Facts) -> tuple[int, ...]:
    vocabulary, shape = facts.vocabulary, facts.shape
    if isinstance(prompt, str):
        bos = request.add_bos or facts.defaults.prefix == "<|endoftext|>"
        ids = [vocabulary.eos_id] * bos + vocabulary.encode(prompt)
    else:
        ids = list(prompt)
    if not all(0 <= token < shape.vocab_size for token in ids):  # a tokenizer, too, may know more tokens than its model
        message = f"The prompt has a token id outside this model's vocabulary (0 to {shape.vocab_size - 1})."
        raise InvalidRequest(message, param="prompt")
    if request.truncate is not None:
        ids = ids[-request.truncate :]
    return tuple(ids) or (vocabulary.eos_id,)


def _resolve(request: GenerationRequest, facts: Facts, num_prompt_tokens: int) -> SamplingParams:
    """The model's own defaults, then what the request says, within the model's context."""
    defaults, room = facts.defaults, facts.shape.n_positions - num_prompt_tokens
    asked = request.sampling.get("max_new_tokens")
    if room < 1 or (asked is not None and asked > room):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {facts.shape.n_positions} tokens. However, the prompt has "
            f"{num_prompt_tokens} tokens and {1 if asked is None else asked} new tokens were requested. Shorten the "
            "prompt, or ask for fewer tokens.",
            param="prompt",
        )
    values: dict[str, Any] = {"min_new_tokens": max(0, defaults.min_length - num_prompt_tokens)}
    values |= defaults.sampling | request.sampling
    if asked is None:
        most = SamplingParams().max_new_tokens  # it was admitted, and paid for, as one of no more
        longest = values.get("max_new_tokens") or (defaults.max_length or most) - num_prompt_tokens
        values["max_new_tokens"] = max(1, min(longest, room, most))
    return replace(SamplingParams(), **values)
