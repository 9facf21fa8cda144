"""huggingtweets' cleaning rules, against the original's own regular expressions."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import TooFewTweets
from serve.training.archives import Archive, Post
from serve.training.clean import Cleaned, clean, clean_text, is_short, require_enough


def _original_clean(text: str) -> str:
    """The rule as huggingtweets states it, slow parts included."""
    for entity, char in (("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    for scheme in ("http:", "https:"):
        for pattern in (f" {scheme}\\S+", f"{scheme}\\S+ ", f"\n{scheme}\\S+ ", f"\n{scheme}\\S+", f"{scheme}\\S+"):
            text = re.sub(pattern, "", text)
    return " ".join(text.split())


_PIECES = st.sampled_from(
    [
        "http:",
        "https:",
        "http",
        "s:",
        "//t.co/a",
        " ",
        "  ",
        "\n",
        "\t",
        "\u00a0",
        "\u3000",
        "(",
        ")",
        "word",
        "&amp;",
        "&lt;",
        "…",
    ]
)


@settings(max_examples=400)
@given(st.lists(_PIECES, max_size=14).map("".join))
def test_the_linear_link_rule_is_the_original_one(text: str) -> None:
    assert clean_text(text) == _original_clean(text)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Tea &amp; cake https://t.co/abc", "Tea & cake"),
        ("https://t.co/abc leads the way", "leads the way"),
        ("a (https://t.co/abc) b", "a (b"),
        ("first\n\nsecond\nhttps://t.co/abc", "first second"),
        ("first\nhttp://t.co/abc\nsecond", "first second"),
        ("&amp;lt; stays one step unescaped", "< stays one step unescaped"),
        ("https://t.co/abc", ""),
        ("https: alone is no link", "https: alone is no link"),
    ],
)
def test_links_and_escapes_come_out_as_in_the_original(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned == _original_clean(text)


def test_text_that_was_never_escaped_is_not_unescaped() -> None:
    assert clean_text("write &amp; for an ampersand", escaped=False) == "write &amp; for an ampersand"


@pytest.mark.parametrize("text", ["https:" * 40_000, "\nhttps:" * 40_000, "x" * 400_000, "(http:a" * 60_000])
def test_cleaning_takes_linear_time_on_hostile_text(text: str) -> None:
    started = time.process_time()
    clean_text(text)
    assert time.process_time() - started < 2.0  # the original takes minutes on the first of them


def test_a_post_of_fewer_than_three_own_words_is_short() -> None:
    assert is_short("two words")
    assert is_short("@a #b HTTP://c one two")
    assert not is_short("@a one two three")
    assert is_short("")


def _archive(*texts: str) -> Archive:
    posts = tuple(Post(str(i), text, text.startswith("RT @"), None) for i, text in enumerate(texts))
    return Archive("ada", None, "text", posts)


def test_every_post_is_counted_once_as_retweet_short_or_kept() -> None:
    cleaned = clean(_archive("RT @b: not mine at all", "short one", "RT_ is how my handle starts", "one two three"))
    assert cleaned.counts == {"downloaded": 4, "retweets": 1, "short": 1, "kept": 2}
    assert cleaned.kept == ("RT_ is how my handle starts", "one two three")


def test_counts_that_do_not_add_up_are_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        Cleaned(kept=("a",), downloaded=3, retweets=1, short=0)


@pytest.mark.parametrize(
    ("num_chars", "status"), [(5_999, "too_few"), (6_000, "warn_few"), (39_999, "warn_few"), (40_000, "ok")]
)
def test_the_status_turns_at_six_and_forty_thousand_characters(num_chars: int, status: str) -> None:
    kept = ("a" * 1_000, "b" * (num_chars - 1_000 - len("<|endoftext|>")))
    cleaned = Cleaned(kept, downloaded=2, retweets=0, short=0)
    assert (cleaned.num_chars, cleaned.status) == (num_chars, status)


def test_too_few_tweets_are_refused_with_found_and_needed_characters() -> None:
    with pytest.raises(TooFewTweets, match=r"'ada' has 13 characters .* at least 6,000") as refused:
        require_enough(clean(_archive("one two three", "RT @b: x")), "ada")
    assert refused.value.code == "too_few_tweets"
    require_enough(Cleaned(("a" * 6_000,), 1, 0, 0), "ada")


def test_the_sum_does_not_depend_on_the_order_of_posts() -> None:
    one, other = (clean(_archive(*texts)) for texts in (("a b c", "d e f"), ("d e f", "a b c")))
    assert one.kept_sorted_sha256 == other.kept_sorted_sha256
