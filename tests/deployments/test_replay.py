"""A replayed generation continues exactly where the caller's copy ends, or is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.replay import Transcript
from serve.errors import StoreUnavailable
from serve.types import Delta, PromptInfo, TokenInfo

PROMPT = PromptInfo("I", 1, "device", 0.0, 0.0)
WORDS = [f"w{i} " for i in range(12)]

cuts = st.lists(st.integers(1, len(WORDS) - 1), unique=True).map(sorted)


def stream(words: list[str], cuts: list[int], index: int = 0) -> list[Delta]:
    """One sequence, a token a word, in deltas that end at `cuts`."""
    bounds = [0, *[cut for cut in cuts if cut < len(words)], len(words)]
    return [
        Delta(
            index,
            "".join(words[start:end]),
            tuple(TokenInfo(hash(word), word, -1.0) for word in words[start:end]),
            "length" if end == len(words) else None,
            PROMPT if start == 0 else None,
        )
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]


@given(cuts, cuts, st.integers(0, 12))
def test_the_caller_gets_every_token_once_however_both_replicas_cut(
    first_cuts: list[int], second_cuts: list[int], num_deltas_before_the_death: int
) -> None:
    first = stream(WORDS, first_cuts)[:num_deltas_before_the_death]
    transcript = Transcript()
    transcript.restart()
    got = transcript.news(first)
    transcript.restart()
    for delta in stream(WORDS, second_cuts):
        got = got + transcript.news([delta])
    assert "".join(delta.text for delta in got) == "".join(WORDS)
    assert [token.text for delta in got for token in delta.tokens] == WORDS
    assert [delta.finish_reason for delta in got if delta.finish_reason] == ["length"]
    assert [delta.prompt for delta in got if delta.prompt] == [PROMPT]


def test_sequences_are_continued_each_for_itself() -> None:
    transcript = Transcript()
    transcript.restart()
    transcript.news([*stream(WORDS[:3], [], index=0), stream(WORDS, [5], index=1)[0]])
    transcript.restart()
    got = transcript.news([*stream(WORDS[:3], [], index=0), *stream(WORDS, [], index=1), *stream(WORDS, [], index=2)])
    assert [(delta.index, len(delta.tokens)) for delta in got] == [(1, 7), (2, 12)]


@pytest.mark.parametrize("other", [["w0 ", "x1 "], ["w0 "], ["w0 ", "w1 "]], ids=["differs", "shorter", "ends early"])
def test_a_text_that_goes_on_differently_is_refused(other: list[str]) -> None:
    transcript = Transcript()
    transcript.restart()
    transcript.news(stream(WORDS, [4])[:1])
    transcript.restart()
    with pytest.raises(StoreUnavailable, match="ask for it again"):
        transcript.news(stream(other, []))
