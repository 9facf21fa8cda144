"""What another replica is asked for when one is lost, and what of its answer is news."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.resume import Losses, Transcript
from serve.types import Delta, GenerationRequest, PromptInfo, TokenInfo, Written

WORDS = [f"w{i} " for i in range(12)]
REQUEST = GenerationRequest("huggingtweets/ada", ("I",), {"max_new_tokens": len(WORDS)}, num_choices=2, seed=5)

cuts = st.lists(st.integers(1, len(WORDS) - 1), unique=True).map(sorted)


def stream(index: int = 0, cuts: list[int] | None = None, *, after: int = 0, revision: str = "abc") -> list[Delta]:
    """What a replica sends of a sequence that has `after` words: a token a word, in deltas that end at `cuts`."""
    bounds = [after, *[cut for cut in cuts or [] if cut > after], len(WORDS)]
    return [
        Delta(
            index,
            "".join(WORDS[start:end]),
            tuple(TokenInfo(number, WORDS[number], -1.0) for number in range(start, end)),
            "length" if end == len(WORDS) else None,
            PromptInfo("I", 1, "device", 0.0, 0.0, revision=revision) if start == after else None,
        )
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]


@given(cuts, cuts, st.integers(0, 12))
def test_the_caller_gets_every_token_and_the_prompt_once_however_both_replicas_cut(
    first_cuts: list[int], second_cuts: list[int], num_deltas_before_the_death: int
) -> None:
    transcript = Transcript(REQUEST)
    got = transcript.add(stream(0, first_cuts)[:num_deltas_before_the_death])
    rest = transcript.rest()
    written = rest.written[0] if rest.written else Written()
    if not written.is_over:
        got = got + transcript.add(stream(0, second_cuts, after=len(written.token_ids)))
    assert "".join(delta.text for delta in got) == "".join(WORDS)
    assert [token.text for delta in got for token in delta.tokens] == WORDS
    assert [delta.finish_reason for delta in got if delta.finish_reason] == ["length"]
    assert [delta.prompt is not None for delta in got] == [True] + [False] * (len(got) - 1)


def test_what_has_not_begun_is_asked_for_as_at_first() -> None:
    assert Transcript(REQUEST).rest() is REQUEST


def test_each_sequence_goes_on_where_it_was_by_the_revision_that_began_it() -> None:
    transcript = Transcript(REQUEST)
    transcript.add([*stream(0), stream(1, [5])[0]])
    rest = transcript.rest()
    assert rest.model_id == "huggingtweets/ada@abc"
    assert rest.written == (Written(tuple(range(12)), is_over=True), Written(tuple(range(5))))
    assert (rest.prompts, rest.sampling, rest.seed) == (REQUEST.prompts, REQUEST.sampling, REQUEST.seed)
    assert not transcript.is_over
    transcript.add(stream(1, after=5))
    assert transcript.is_over


@pytest.mark.parametrize(("asked", "then"), [("ada@main", "ada@abc"), ("ada@abcdefg", "ada@abc")])
def test_an_alias_that_was_asked_for_is_followed_once(asked: str, then: str) -> None:
    transcript = Transcript(GenerationRequest(asked, ("I",)))
    transcript.add(stream(0, [5])[:1])
    assert transcript.rest().model_id == then


def test_a_model_that_tells_no_revision_is_asked_for_by_its_name() -> None:
    transcript = Transcript(REQUEST)
    transcript.add(stream(0, [5], revision="")[:1])
    assert transcript.rest().model_id == REQUEST.model_id


def losses(*lost: tuple[bool, int]) -> bool:
    """Whether these are too many, and all but the last were not."""
    counted = Losses()
    for was_taken, num_tokens in lost:
        assert not counted.are_too_many
        counted.add(was_taken=was_taken, num_tokens=num_tokens)
    return counted.are_too_many


def test_a_text_that_grows_may_cost_more_replicas_than_one_that_kills_where_it_stands() -> None:
    assert losses((True, 0), (True, 0))
    assert losses((True, 4), (True, 4))
    assert losses((True, 4), (True, 9), (True, 9))
    assert not losses((True, 4), (True, 9), (True, 12))
    assert losses((True, 4), (True, 9), (True, 12), (True, 15))


def test_replicas_that_never_took_it_are_counted_apart() -> None:
    assert not losses((False, 0), (False, 0), (True, 0), (False, 0))
    assert losses((False, 0), (False, 0), (False, 0), (False, 0))
