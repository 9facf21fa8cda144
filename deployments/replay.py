"""Continues a generation on another replica: what the caller has already is compared and left out.

The second replica starts from the beginning with the same seed, so it normally writes the same tokens. It need not:
in bfloat16 the shape of the batch decides the last bits, and so, now and then, a close draw.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from serve.errors import StoreUnavailable
from serve.types import Delta, TokenInfo


@dataclass(slots=True)
class _Sequence:
    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    has_prompt: bool = False
    is_over: bool = False

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.has_prompt |= delta.prompt is not None
        self.is_over |= delta.finish_reason is not None or delta.error is not None


class Transcript:
    """What the caller of one request has, and how far the replica at work has come."""

    def __init__(self) -> None:
        self._sent: defaultdict[int, _Sequence] = defaultdict(_Sequence)
        self._again: defaultdict[int, _Sequence] = defaultdict(_Sequence)
        self._is_replay = False

    def restart(self) -> None:
        """A replica begins anew."""
        self._again.clear()
        self._is_replay = bool(self._sent)

    def news(self, deltas: list[Delta]) -> list[Delta]:
        """Of the replica's next deltas, what the caller lacks. Raises: StoreUnavailable when the text is another."""
        fresh = [new for delta in deltas if (new := self._news(delta))] if self._is_replay else deltas
        for delta in fresh:
            self._sent[delta.index].add(delta)
        return fresh

    def _news(self, delta: Delta) -> Delta | None:
        sent, again = self._sent[delta.index], self._again[delta.index]
        again.add(delta)
        if not _agree(sent, again):
            raise StoreUnavailable(
                "The generator that was writing this text has stopped, and another one would go on differently; "
                "ask for it again.",
                retry_after_s=1.0,
            )
        if sent.is_over:
            return None
        new = replace(
            delta,
            text=again.text[len(sent.text) :],
            tokens=tuple(again.tokens[len(sent.tokens) :]),
            prompt=None if sent.has_prompt else delta.prompt,
        )
        return new if new.text or new.tokens or new.prompt or again.is_over else None


def _agree(sent: _Sequence, again: _Sequence) -> bool:
    """Is one the beginning of the other? Where a sequence is over in both, they are the same."""
    num_tokens, num_chars = min(len(sent.tokens), len(again.tokens)), min(len(sent.text), len(again.text))
    return (
        all(one.id == other.id for one, other in zip(sent.tokens[:num_tokens], again.tokens, strict=False))
        and sent.text[:num_chars] == again.text[:num_chars]
        and not (again.is_over and (len(again.tokens) < len(sent.tokens) or len(again.text) < len(sent.text)))
    )
