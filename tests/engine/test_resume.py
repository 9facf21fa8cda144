"""A sequence that is taken up after any of its tokens, by another engine, writes what it would have written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.engine.engine import EngineConfig
from serve.types import SamplingParams
from tests.engine.harness import Collected, Harness

PROMPT = [1, 2, 3]
NUM_TOKENS = 14
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=NUM_TOKENS, ignore_eos=True)
END = 511
PARTS = "parts of characters"

KINDS: dict[str, SamplingParams] = {
    "greedy": replace(SAMPLED, temperature=0.0),
    "sampled": SAMPLED,
    "filtered": replace(SAMPLED, top_k=20, top_p=0.9, min_p=0.01),
    "penalised": replace(SAMPLED, repetition_penalty=1.8, presence_penalty=0.7, frequency_penalty=0.9),
    "counted": replace(SAMPLED, temperature=0.0, frequency_penalty=30.0),
    "kept from ending": replace(SAMPLED, ignore_eos=False, min_new_tokens=9, logit_bias=((END, 50.0),)),
    PARTS: SAMPLED,
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Harness, Harness]]:
    """Two that have the same models; the second computes prompts in chunks of a few tokens."""
    folder = tmp_path_factory.mktemp("resume")
    first, second = Harness(folder, 2), Harness(folder, 2, EngineConfig(max_step_rows=11))
    yield first, second
    first.engine.close()
    second.engine.close()


def write(harness: Harness, params: SamplingParams, *written: list[int], **extra: Any) -> list[Collected]:
    """Side by side: a sequence for each of `written`."""
    extra = {"seed": 11, "choice": 2, **extra}
    return harness.run([(1, harness.sequence(1, PROMPT, params, written=ids, **extra)) for ids in written])


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_taken_up_after_any_token_is_the_undisturbed_one(engines: tuple[Harness, Harness], kind: str) -> None:
    params = KINDS[kind]
    if kind == PARTS:  # nothing but these two, and so "é" wherever one follows the other
        bias = [
            (token, 100.0) for token in range(END) if engines[0].vocabulary.token_bytes(token) in (b"\xc3", b"\xa9")
        ]
        params = replace(params, logit_bias=tuple(bias))
    (whole,) = write(engines[0], params, [])
    cuts = range(1, len(whole.ids))
    for cut, rest in zip(cuts, write(engines[1], params, *(whole.ids[:cut] for cut in cuts)), strict=True):
        assert whole.ids[:cut] + rest.ids == whole.ids
        assert whole.texts[:cut] + rest.texts == whole.texts
        assert rest.last and whole.last and rest.last.finish_reason == whole.last.finish_reason
    assert len(whole.ids) == (10 if kind == "kept from ending" else NUM_TOKENS)
    assert ("é" in whole.text) == (kind == PARTS)


def test_a_stop_string_that_spans_the_cut_still_ends_the_text(engines: tuple[Harness, Harness]) -> None:
    (free,) = write(engines[0], SAMPLED, [])
    at = next(i for i in range(5, 12) if free.texts[i] and free.texts[i + 1])
    params = replace(SAMPLED, stop=(free.texts[at] + free.texts[at + 1],))
    (whole,) = write(engines[0], params, [])
    assert whole.last and whole.last.finish_reason == "stop_sequence" and len(whole.ids) == at + 2
    assert whole.text == "".join(free.texts[:at])
    cuts = range(1, at + 2)
    for cut, rest in zip(cuts, write(engines[1], params, *(whole.ids[:cut] for cut in cuts)), strict=True):
        assert rest.ids == whole.ids[cut:]
        assert "".join(whole.texts[:cut]) + rest.text == whole.text
        assert rest.last and rest.last.finish_reason == "stop_sequence"


def test_log_probabilities_go_on_and_those_of_the_prompt_do_not_come_again(engines: tuple[Harness, Harness]) -> None:
    (whole,) = write(engines[0], SAMPLED, [], top_logprobs=3, prompt_logprobs=True)
    (rest,) = write(engines[1], SAMPLED, whole.ids[:6], top_logprobs=3, prompt_logprobs=True)
    assert len(whole.prompt) == len(PROMPT) and rest.prompt == []
    for before, after in zip(whole.tokens[6:], rest.tokens, strict=True):
        assert [one[0] for one in before.top] == [one[0] for one in after.top]
        assert after.logprob == pytest.approx(before.logprob, abs=1e-4)


def test_a_sequence_taken_up_twice_and_preempted_in_between_loses_nothing(tmp_path: Path) -> None:
    harness = Harness(tmp_path, 2, EngineConfig(max_sequences=1))
    long = replace(SAMPLED, max_new_tokens=40)
    (whole,) = write(harness, long, [])
    again = harness.submit(1, harness.sequence(1, PROMPT, long, seed=11, choice=2, written=whole.ids[:9]))
    harness.wait_tokens(again, 3)
    other = harness.submit(0, harness.sequence(0, PROMPT, caller="another"))  # takes the only row
    harness.wait([again, other])
    assert again.ids == whole.ids[9:] and again.text == "".join(whole.texts[9:])
    harness.engine.close()
