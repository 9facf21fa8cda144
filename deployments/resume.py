"""Continues a generation on another replica, from the token at which the first one was lost.

The draws of a text depend on its seed and on positions alone, so the other replica goes on with the very tokens that
would have come. It need not: tokens that were computed one by one are computed together there, which decides the last
bits, and so, now and then, a close draw. What the caller has stays as it is, and nothing comes twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from serve.types import Delta, GenerationRequest, Written

_MAX_DEATHS = 4  # of replicas that had taken the same request
_MAX_AT_ONE_PLACE = 2  # of them at one place of the text: it may be what kills
_MAX_UNTAKEN = 4  # who does not take it was gone before it came; Ray knows of that after some 12 s


@dataclass(slots=True)
class _Sequence:
    token_ids: list[int] = field(default_factory=list)
    is_over: bool = False


class Transcript:
    """What the caller of one request has."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._sequences = [_Sequence() for _ in range(len(request.prompts) * request.num_choices)]
        self._revision = ""

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self._sequences)

    @property
    def is_over(self) -> bool:
        return all(sequence.is_over for sequence in self._sequences)

    def rest(self) -> GenerationRequest:
        """What is left to be asked for; of the very revision that has begun, whatever is served by now."""
        if not self.num_tokens:
            return self.request
        model_id, _, _ = self.request.model_id.partition("@")
        return replace(
            self.request,
            model_id=f"{model_id}@{self._revision}" if self._revision else self.request.model_id,
            written=tuple(Written(tuple(one.token_ids), one.is_over) for one in self._sequences),
        )

    def add(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas as the caller is to see them: told of each prompt once."""
        return [self._add(delta) for delta in deltas]

    def _add(self, delta: Delta) -> Delta:
        sequence = self._sequences[delta.index]
        is_new = not sequence.token_ids
        sequence.token_ids += [token.id for token in delta.tokens]
        sequence.is_over = delta.finish_reason is not None or delta.error is not None
        if delta.prompt is None:
            return delta
        self._revision = delta.prompt.revision
        return delta if is_new else replace(delta, prompt=None)


@dataclass(slots=True)
class Losses:
    """The replicas that were lost with one request in their hands."""

    _num_tokens: int = 0
    _deaths: int = 0
    _at_one_place: int = 0
    _untaken: int = 0

    def add(self, *, was_taken: bool, num_tokens: int) -> None:
        """One more. `num_tokens`: of the text, in all."""
        if was_taken:
            self._deaths += 1
            self._at_one_place = 1 if num_tokens > self._num_tokens else self._at_one_place + 1
        else:
            self._untaken += 1
        self._num_tokens = num_tokens

    @property
    def are_too_many(self) -> bool:
        return self._deaths >= _MAX_DEATHS or self._at_one_place >= _MAX_AT_ONE_PLACE or self._untaken >= _MAX_UNTAKEN
