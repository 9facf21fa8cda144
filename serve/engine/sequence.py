"""One text being generated: its tokens so far, its parameters, and when it ends."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from serve.engine.randomness import uniforms
from serve.engine.sampling import Sampled, SamplingRow
from serve.engine.text import TextStream, Vocabulary
from serve.errors import GenerationFailed, RookeryError
from serve.types import FinishReason, SamplingParams, TokenInfo

_NOT_FINITE = "The model gave numbers that are not finite (NaN or Inf) for this text."


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to a sequence. The last one has a `finish_reason`, an `error`, or `cancelled`."""

    sequence: Sequence
    text: str = ""
    token: TokenInfo | None = None
    prompt_tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    error: RookeryError | None = None  # GenerationFailed: the model gave NaN or Inf
    cancelled: bool = False

    @property
    def is_last(self) -> bool:
        return self.cancelled or self.finish_reason is not None or self.error is not None


class Sequence:
    """Made by the caller, then touched by the engine's thread alone, except for `cancelled`.

    `slot` is where its model's weights are, `caller` is who asked for it. The draws of (seed, choice) are the same in
    any batch; the text is too, but where two tokens are so close that rounding, which depends on the batch, decides.
    So a sequence that has `written` tokens already, here or elsewhere, goes on as it would have.
    """

    def __init__(
        self,
        *,
        slot: int,
        prompt_ids: Seq[int],
        params: SamplingParams,
        vocabulary: Vocabulary,
        seed: int = 0,
        choice: int = 0,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        caller: str = "",
        written: Seq[int] = (),
    ) -> None:
        self.slot = slot
        self.caller = caller
        self.prompt_ids = tuple(prompt_ids)
        self.params = params
        self.vocabulary = vocabulary
        self.seed, self.choice = seed, choice
        self.top_logprobs, self.prompt_logprobs = top_logprobs, prompt_logprobs
        self.cancelled = False
        self.kv_row = -1
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.output_ids = list(written)
        self.first_step_at: float | None = None
        self.prompt_infos: list[TokenInfo] = []
        self._counts = collections.Counter(self.output_ids)
        self._stream = TextStream(vocabulary, params.stop)
        for token in written:
            self._stream.push(token)  # its text is with whoever has the tokens

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_left(self) -> int:
        """Tokens that are not in the cache yet; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def is_new(self) -> bool:
        """Whether no token of its own has been chosen yet."""
        return not self.output_ids

    def next_tokens(self, limit: int) -> Seq[int]:
        """Up to `limit` tokens that are not in the cache yet: a chunk of the prompt, or the newest token."""
        if (start := self.num_computed - len(self.prompt_ids)) >= 0:
            return self.output_ids[start : start + limit]
        chunk = self.prompt_ids[self.num_computed : self.num_computed + limit]
        return (*chunk, *self.output_ids[: limit - len(chunk)])  # outputs: of before, or after a `restart`

    def restart(self) -> None:
        """Its keys and values are lost: all its tokens go through a step again, and the text goes on where it was."""
        self.num_computed = 0
        if self.is_new:
            self.prompt_infos = []

    def computed(self, count: int) -> None:
        """`count` more tokens went through a step."""
        if self.first_step_at is None:
            self.first_step_at = time.monotonic()
        self.num_computed += count

    def sampling_row(self) -> SamplingRow:
        """The inputs that choose this sequence's next token."""
        return SamplingRow(
            params=self.params,
            uniforms=uniforms(self.seed, self.choice, len(self.output_ids)),
            prompt_ids=self.prompt_ids,
            generated=self._counts,
            eos_id=self.vocabulary.eos_id,
            num_generated=len(self.output_ids),
            top_logprobs=self.top_logprobs,
        )

    def append(self, sampled: Sampled) -> Output:
        """Take the sampled token in; says what became of the text."""
        prompt_tokens, self.prompt_infos = tuple(self.prompt_infos), []
        if sampled.token_id is None:
            return Output(self, error=GenerationFailed(_NOT_FINITE))
        token = sampled.token_id
        self.output_ids.append(token)
        self._counts[token] += 1
        info = self.token_info(token, sampled.logprob, sampled.top)
        if token == self.vocabulary.eos_id and not self.params.ignore_eos:
            return Output(self, self._stream.finish(), info, prompt_tokens, "stop")
        text = self._stream.push(token)
        if self._stream.stopped:
            return Output(self, text, info, prompt_tokens, "stop_sequence")
        if len(self.output_ids) >= self.params.max_new_tokens:
            text += self._stream.finish()
            reason: FinishReason = "stop_sequence" if self._stream.stopped else "length"
            return Output(self, text, info, prompt_tokens, reason)
        return Output(self, text, info, prompt_tokens)

    def token_info(self, token: int, logprob: float | None, top: Seq[tuple[int, float]] = ()) -> TokenInfo:
        """One token as callers see it."""
        text = self.vocabulary.token_text
        return TokenInfo(
            id=token,
            text=text(token),
            logprob=logprob,
            special=token in self.vocabulary.special_ids,
            top=tuple((other, text(other), value) for other, value in top),
        )
