"""Lengths are those of real posts, and prompts have as many tokens as is said."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer

from loadtest.traffic.plan import Lengths
from loadtest.traffic.streams import stream
from loadtest.traffic.texts import (
    FIRST_WORDS,
    OPENINGS,
    POSTS,
    WORDS,
    Histogram,
    draw_lengths,
    draw_places,
    prompt,
)
from serve.training.archives import read_archive
from serve.training.clean import clean


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> ByteLevelBPETokenizer:
    folder = shared_data / "gpt2-tokenizer"
    return ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def num_tokens(tokenizer: ByteLevelBPETokenizer, texts: Iterable[str]) -> list[int]:
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


@pytest.mark.slow  # 10 s: 40 archives
def test_the_histograms_are_those_of_real_posts(shared_data: Path, gpt2: ByteLevelBPETokenizer) -> None:
    posts, openings = [], []
    for path in sorted((shared_data / "tweets").glob("*.jsonl.gz")):
        kept = list(clean(read_archive(path)).kept)
        posts += num_tokens(gpt2, kept)
        openings += num_tokens(gpt2, (" ".join(text.split()[:3]) for text in kept))
    assert len(posts) == 97_295
    assert list(Histogram.of(posts, width=4, most=160).counts) == list(POSTS.counts)
    assert list(Histogram.of(openings, width=1, most=32).counts) == list(OPENINGS.counts)
    assert sum(length > 160 for length in posts) == 206


def test_every_word_is_one_token_of_gpt2(gpt2: ByteLevelBPETokenizer) -> None:
    assert set(num_tokens(gpt2, (" " + word for word in WORDS))) == {1}
    assert set(num_tokens(gpt2, FIRST_WORDS)) == {1}


def test_a_prompt_has_as_many_tokens_of_gpt2_as_is_said(gpt2: ByteLevelBPETokenizer) -> None:
    rng = stream(1, "flow", "x")
    lengths = [0, 1, 2, 33, 5000, *draw_lengths(Lengths(), OPENINGS, 200, rng).tolist()]
    prompts = [prompt(*pair) for pair in zip(lengths, draw_places(len(lengths), rng).tolist(), strict=True)]
    assert num_tokens(gpt2, prompts) == lengths


def test_prompts_are_short_and_seldom_the_same() -> None:
    rng = stream(1, "flow", "x")
    lengths = draw_lengths(Lengths(), OPENINGS, 1000, rng).tolist()
    prompts = [prompt(*pair) for pair in zip(lengths, draw_places(1000, rng).tolist(), strict=True)]
    assert len(set(prompts)) > 900
    assert max(map(len, prompts)) < 250


@pytest.mark.parametrize(("histogram", "mean", "most"), [(POSTS, 43.7, 160), (OPENINGS, 5.53, 32)])
def test_lengths_are_drawn_as_often_as_they_were_counted(histogram: Histogram, mean: float, most: int) -> None:
    """Each bin within 5 standard deviations: odds at most 6e-7 a bin, 3e-5 in all."""
    drawn = histogram.draw(100_000, stream(1, "flow", "lengths"))
    assert 1 <= drawn.min() <= drawn.max() <= most
    shares = np.array(histogram.counts) / sum(histogram.counts)
    expected, counts = 100_000 * shares, Histogram.of(drawn.tolist(), width=histogram.width, most=most).counts
    assert (np.abs(np.array(counts) - expected) <= 5 * np.sqrt(expected * (1 - shares))).all()
    assert drawn.mean() == pytest.approx(mean, rel=0.02)


def test_lengths_between_bounds_take_both_of_them() -> None:
    """Neither of three values is missed in 200 draws: odds 2e-35."""
    drawn = draw_lengths(Lengths(False, 3, 5), POSTS, 200, stream(1, "flow", "lengths"))
    assert set(drawn.tolist()) == {3, 4, 5}
    assert set(draw_lengths(Lengths(False, 7, 7), POSTS, 9, stream(1, "flow", "lengths")).tolist()) == {7}
