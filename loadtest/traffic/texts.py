"""How long prompts and answers are, and what prompts say: openings of posts in plain English, of no one's posts.

One token a word in GPT-2's vocabulary; another tokenizer makes more of them (bytes: about five a word). No tokenizer
is needed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from loadtest.traffic.plan import Lengths

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` of the lengths counted were above i * width and at most (i + 1) * width tokens."""

    width: int
    counts: Sequence[int]

    def draw(self, size: int, rng: np.random.Generator) -> Ints:
        """Lengths, evenly within a bin."""
        edges = np.arange(len(self.counts) + 1) * self.width
        return np.ceil(np.interp(1 - rng.random(size), self._cumulative, edges)).astype(np.int64)

    @cached_property
    def _cumulative(self) -> Floats:
        return np.cumsum([0, *self.counts]) / sum(self.counts)

    @classmethod
    def of(cls, lengths: Sequence[int], *, width: int, most: int) -> Histogram:
        """Counts lengths; one above `most` as `most`."""
        bins = (np.minimum(lengths, most) - 1) // width
        return cls(width, np.bincount(bins, minlength=most // width).tolist())


# GPT-2 tokens of the 97,295 posts that huggingtweets' rules keep of 40 public accounts' timelines (2010-2022, most of
# them in English, eight not; mean 43.8): retweets and posts of under three own words left out, links taken out. The 206
# above 160 tokens, where huggingtweets ends a text, count as 160. tests/loadtest/test_traffic_texts.py counts again.
POSTS = Histogram(
    4,
    (
        *(84, 802, 1702, 2980, 4753, 6912, 7906, 7379, 6184, 6203, 6891, 7890, 9131, 9021, 6978, 4407, 2312, 1187),
        *(517, 243, 158, 109, 107, 112, 117, 158, 170, 226, 311, 262, 224, 251, 291, 355, 272, 175, 106, 63, 74, 272),
    ),
)
# GPT-2 tokens of the first three words of the same posts (mean 5.5); those above 32 count as 32.
OPENINGS = Histogram(
    1,
    (
        *(0, 0, 37113, 18918, 8910, 10637, 5475, 3909, 2753, 1709, 1107, 857, 673, 609, 555, 573, 564, 586, 486, 382),
        *(286, 240, 188, 152, 97, 72, 50, 47, 41, 29, 25, 252),
    ),
)

# Each is one token of GPT-2's; the first ones at the start of a text, the others after a blank.
_AT_THE_START = "My I We The This Today It You Our When If What There Every People In"
_AFTER_A_BLANK = """
dream is to see the world with you and we will not stop now that all of it was made for people who love their work in
this great country but no one can say what comes next so let us go home today because time has been good more than
ever before my friends want a better day at school every morning they think about music food water health care jobs
family children law money energy space science history art sports news life hope peace power change new old young big
small right left long short high low first last best early late free open ready happy proud strong real only just
still also again here there then when where why how much many some any other same own most very too read write watch
hear help make take give find keep build start play win lose join meet call talk speak vote fight support protect
remember know feel need use try ask move live grow wait
"""
FIRST_WORDS = tuple(_AT_THE_START.split())
WORDS = tuple(_AFTER_A_BLANK.split())
_REACH = 4096  # places in the babble at which a prompt can begin


def draw_lengths(lengths: Lengths, like: Histogram, size: int, rng: np.random.Generator) -> Ints:
    """Tokens, (size,)."""
    if lengths.like_tweets:
        return like.draw(size, rng)
    return rng.integers(lengths.least, lengths.most + 1, size)


def draw_places(size: int, rng: np.random.Generator) -> Ints:
    """What tells one prompt from another, (size,); see `prompt`."""
    return rng.integers(len(FIRST_WORDS) * _REACH, size=size)


def prompt(num_tokens: int, place: int) -> str:
    """So many words; of one place, longer prompts begin as shorter ones do."""
    if num_tokens == 0:
        return ""
    first, start = divmod(place, _REACH)
    return " ".join((FIRST_WORDS[first], *_babble(-(-num_tokens // _REACH))[start : start + num_tokens - 1]))


@lru_cache(maxsize=8)
def _babble(reaches: int) -> tuple[str, ...]:
    """Words in no order, always the same: enough for `reaches` * `_REACH` of them from any place."""
    return tuple(random.Random(1).choices(WORDS, k=_REACH)) * (reaches + 1)
