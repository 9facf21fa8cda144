"""Sampling, as distributions and against transformers' own logits processors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from serve.engine.randomness import uniforms
from serve.engine.sampling import SamplingRow, adjust, choose, sample
from serve.types import SamplingParams

VOCAB = 200
EOS = VOCAB - 1


def row(params: SamplingParams, *, seed: int = 0, position: int = 0, prompt: list[int] | None = None,
        generated: list[int] | None = None, top: int = 0) -> SamplingRow:  # fmt: skip
    counts = Counter(generated or [])
    return SamplingRow(params, uniforms(seed, 0, position), prompt or [], counts, EOS, sum(counts.values()), top)


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2.5


def expected_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers: list[Any] = []
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    return torch.softmax(LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits.clone()), -1)[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_p=0.95),
        SamplingParams(top_p=0.3),
        SamplingParams(temperature=1.5, top_p=0.02),  # rejection nearly always runs out of draws
        SamplingParams(top_k=5),
        SamplingParams(top_k=40, top_p=0.8, temperature=0.9),
        SamplingParams(min_p=0.1),
        SamplingParams(typical_p=0.6),
        SamplingParams(top_k=50, top_p=0.9, min_p=0.02, typical_p=0.8, temperature=1.2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "way", [pytest.param("torch", marks=pytest.mark.slow), "as served"]
)  # on a CPU plain rows are served by the compiled library
def test_draws_follow_transformers_distribution(params: SamplingParams, way: str) -> None:
    """A chi-square test over 20,000 draws; with fixed seeds it cannot flake, and a wrong filter fails it at once
    (any draw outside the allowed set fails, and the threshold is the 1 - 1e-6 quantile of the statistic)."""
    draws = 20_000
    logits = logits_of(1)
    expected = expected_distribution(logits, params)
    counts = torch.zeros(VOCAB)
    for start in range(0, draws, 2000):
        rows = [row(params, position=i) for i in range(start, start + 2000)]
        many = logits.expand(2000, -1)
        served = (token.token_id for token in sample(many, rows))
        chosen = (
            choose(many, rows) if way == "torch" else torch.tensor([token for token in served if token is not None])
        )
        assert len(chosen) == 2000
        counts += torch.bincount(chosen, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    big = expected * draws >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    wanted = torch.cat([expected[big], expected[~big].sum()[None]]) * draws
    keep = wanted > 0
    statistic = float((((observed - wanted) ** 2)[keep] / wanted[keep]).sum())
    freedom = max(1, int(keep.sum()) - 1)
    # Wilson-Hilferty approximation of the chi-square quantile at 1 - 1e-6 (z = 4.75).
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit


@settings(max_examples=60)
@given(
    st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0]),
            top_k=st.sampled_from([0, 1, 3, 500]),
            top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
            min_p=st.sampled_from([0.0, 0.2, 1.0]),
            typical_p=st.sampled_from([1.0, 0.5]),
            repetition_penalty=st.sampled_from([1.0, 1.5]),
            presence_penalty=st.sampled_from([0.0, 1.0, -2.0]),
            frequency_penalty=st.sampled_from([0.0, 0.5]),
            min_new_tokens=st.sampled_from([0, 5]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 10_000),
)
def test_a_row_s_choice_does_not_depend_on_its_batch(params: list[SamplingParams], seed: int) -> None:
    logits = torch.cat([logits_of(seed + i) for i in range(len(params))])
    rows = [row(p, seed=seed, position=i, prompt=[1, 2], generated=[3, 3, 4]) for i, p in enumerate(params)]
    together = sample(logits, rows)
    for i, r in enumerate(rows):
        alone = sample(logits[i : i + 1], [r])[0]
        assert (alone.token_id, alone.top) == (together[i].token_id, together[i].top)
        assert alone.logprob == pytest.approx(together[i].logprob, abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-2, 1e-3, 1e-45, 5e-324])
def test_a_temperature_next_to_0_overflows_nothing(temperature: float) -> None:
    """Below 0.01 all is greedy but for rounding: the likeliest by 1.0 loses once in e^100."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 17] = 1.0
    for params in (SamplingParams(temperature=temperature), SamplingParams(temperature=temperature, top_p=0.9)):
        rows = [row(params, position=i) for i in range(50)]
        many = logits.expand(50, -1)
        assert {token.token_id for token in sample(many, rows)} == {17}
        assert set(choose(many, rows).tolist()) == {17}


def test_repetition_penalty_is_transformers_own() -> None:
    logits, seen = logits_of(3), [5, 6, 6, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits.clone())
    edited = adjust(logits, [row(SamplingParams(repetition_penalty=1.3), prompt=[5, 6], generated=[6, 7])])
    torch.testing.assert_close(edited, expected)


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    logits = logits_of(4)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    edited = adjust(logits, [row(params, prompt=[1], generated=[2, 2, 3])])
    difference = (logits - edited)[0]
    assert difference[2] == pytest.approx(1.0, abs=1e-6)
    assert difference[3] == pytest.approx(0.75, abs=1e-6)
    assert int((difference != 0).sum()) == 2


def test_logit_bias_can_force_and_forbid_a_token() -> None:
    logits = logits_of(5)
    forced = choose(adjust(logits, [r := row(SamplingParams(logit_bias=((17, 100.0),)))]), [r])
    assert int(forced) == 17
    best = int(logits.argmax())
    banned = [row(SamplingParams(logit_bias=((best, -100.0),)), position=i) for i in range(500)]
    assert best not in choose(adjust(logits.expand(500, -1), banned), banned)


def test_end_of_text_is_never_chosen_before_min_new_tokens() -> None:
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, EOS] = 5.0
    early = row(SamplingParams(temperature=0, min_new_tokens=3), generated=[1, 2])
    late = row(SamplingParams(temperature=0, min_new_tokens=3), generated=[1, 2, 3])
    assert sample(logits, [early])[0].token_id != EOS
    assert sample(logits, [late])[0].token_id == EOS


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_fails_alone(poison: float) -> None:
    logits = torch.cat([logits_of(i) for i in range(3)])
    clean = sample(logits, [row(SamplingParams(top_p=0.9)) for _ in range(3)])
    logits[1, 7] = poison
    mixed = sample(logits, [row(SamplingParams(top_p=0.9)) for _ in range(3)])
    assert mixed[1].token_id is None
    assert (mixed[0], mixed[2]) == (clean[0], clean[2])


def test_logprobs_are_of_the_model_before_temperature_and_filters() -> None:
    logits = logits_of(6)
    (got,) = sample(logits, [row(SamplingParams(temperature=0.3, top_k=3), top=4)])
    expected = logits[0].log_softmax(-1)
    assert got.logprob == pytest.approx(float(expected[got.token_id]), abs=1e-5)
    assert [token for token, _ in got.top] == expected.topk(4).indices.tolist()
    assert [value for _, value in got.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_uniforms_are_uniform_and_differ_by_seed_choice_and_position() -> None:
    """10,000 x 8 numbers: the mean of 80,000 uniforms is within 0.005 of 1/2 but for odds of about 1e-6."""
    numbers = torch.tensor([uniforms(7, 0, i) for i in range(10_000)])
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.005
    assert len({tuple(uniforms(s, c, p)) for s in (0, 1, 2**64 - 1, -1) for c in (0, 1) for p in (0, 1)}) == 12
    # 2**64 - 1 and -1 are the same 64 bits: four seeds, three distinct.
