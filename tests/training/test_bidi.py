"""Characters of both directions stand in the order of the Unicode bidirectional algorithm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.training.picture.bidi import find_direction, order, resolve_levels


def visual(text: str, direction: int | None = None) -> str:
    levels = resolve_levels(text, (find_direction(text) or 0) if direction is None else direction)
    return "".join(text[index] for index in order(levels))


@pytest.mark.parametrize(
    ("text", "direction", "seen"),
    [
        ("abc", 0, "abc"),
        ("אבג", 1, "גבא"),
        ("abc אבג def", 0, "abc גבא def"),
        ("אבג abc דהו", 1, "והד abc גבא"),
        ("אבג 123 דהו", 1, "והד 123 גבא"),  # numbers run from left to right in any text
        ("אבג 12-15 דה", 1, "הד 12-15 גבא"),
        ("אב 50% גד", 1, "דג 50% בא"),
        ("سلام ١٢٣", 1, "١٢٣ مالس"),
        ("عربي 12-15", 1, "15-12 يبرع"),  # European digits become Arabic ones after Arabic letters
        ("אב (abc) גד", 1, "דג )abc( בא"),  # brackets are turned around when they are drawn
        ("a (אב) b", 0, "a (בא) b"),
        ("אב!", 1, "!בא"),
        ("אב!", 0, "בא!"),
        ("My dream is אב ג!", 1, "!ג בא My dream is"),
        ("\U0001f600 אב", 1, "בא \U0001f600"),
        ("", 1, ""),
    ],
)
def test_text_is_seen_in_the_algorithms_order(text: str, direction: int, seen: str) -> None:
    assert visual(text, direction) == seen


def test_first_letter_decides_on_the_direction() -> None:
    assert find_direction("12 (אב) abc") == 1 and find_direction("😀 abc אב") == 0 and find_direction("123 !") is None


def test_many_open_brackets_take_no_time_and_stay_neutral() -> None:
    assert visual("(" * 2000 + "אב", 1) == "בא" + "(" * 2000


@given(st.text(alphabet="abאבعر 1٢()[].,:+-$%!\u05b0😀#\u200d", max_size=30), st.sampled_from((0, 1)))
def test_every_character_is_seen_once_and_left_to_right_text_stays(text: str, direction: int) -> None:
    levels = resolve_levels(text, direction)
    assert sorted(order(levels)) == list(range(len(text)))
    assert all(level in (direction, direction + 1, 2) for level in levels)
    if not any(find_direction(char) == 1 or char == "٢" for char in text):
        assert visual(text, 0) == text
