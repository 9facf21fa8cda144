"""In which order the characters of one line stand when scripts of both directions meet.

The Unicode bidirectional algorithm for one paragraph without explicit marks: callers strip those, since a stranger's
name could turn everything behind it around. Knows no fonts and no shapes.
Source: UAX #9, https://www.unicode.org/reports/tr9/ (rules W1-W7, N0-N2, I1-I2, L1-L2).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_PAIRS = dict(zip("([{（［｛「『【〈《〔", ")]}）］｝」』】〉》〕", strict=True))
_OPENING = {closing: opening for opening, closing in _PAIRS.items()}
_MAX_OPEN = 63  # brackets, as UAX #9 BD16 has it: what more are open stay neutral
_NEUTRAL = {"B", "S", "WS", "ON"}


def find_direction(text: str) -> int | None:
    """0: left to right, 1: right to left, as the first letter says; None where there is no letter."""
    for char in text:
        if (kind := unicodedata.bidirectional(char)) in ("L", "R", "AL"):
            return int(kind != "L")
    return None


def resolve_levels(text: str, direction: int) -> list[int]:
    """The embedding level of each character: odd ones run from right to left."""
    kinds = [unicodedata.bidirectional(char) or "ON" for char in text]
    start = "LR"[direction]
    _resolve_weak(kinds, start)
    _resolve_brackets(text, kinds, start)
    _resolve_neutral(kinds, start)
    odd = {"L": 2, "R": 1, "EN": 2, "AN": 2}
    return [odd[kind] if direction else {"L": 0, "R": 1}.get(kind, 2) for kind in kinds]


def order(levels: Sequence[int]) -> list[int]:
    """The indexes of `levels` from left to right, as they are seen (rule L2)."""
    indexes = list(range(len(levels)))
    for level in range(max(levels, default=0), 0, -1):
        at = 0
        while at < len(indexes):
            end = at
            while end < len(indexes) and levels[indexes[end]] >= level:
                end += 1
            indexes[at:end] = reversed(indexes[at:end])
            at = end + 1
    return indexes


def _resolve_weak(kinds: list[str], start: str) -> None:
    """Marks, numbers and what belongs to numbers (W1-W7); letters of all right-to-left scripts become R."""
    before = start
    for i, kind in enumerate(kinds):  # W1; format characters have no place of their own either
        kinds[i] = before if kind in ("NSM", "BN") else "ON" if kind not in _KNOWN else kind
        before = kinds[i]
    strong = start
    for i, kind in enumerate(kinds):  # W2, W3
        if kind in ("L", "R", "AL"):
            strong = kind
        if kind == "EN" and strong == "AL":
            kinds[i] = "AN"
    kinds[:] = ["R" if kind == "AL" else kind for kind in kinds]
    for i in range(1, len(kinds) - 1):  # W4
        around = kinds[i - 1] if kinds[i - 1] == kinds[i + 1] else ""
        if (kinds[i] == "ES" and around == "EN") or (kinds[i] == "CS" and around in ("EN", "AN")):
            kinds[i] = around
    for indexes in (range(1, len(kinds)), range(len(kinds) - 2, -1, -1)):  # W5: signs after a number, and before one
        step = indexes.step
        for i in indexes:
            if kinds[i] == "ET" and kinds[i - step] == "EN":
                kinds[i] = "EN"
    strong = start
    for i, kind in enumerate(kinds):  # W6, W7
        if kind in ("ES", "ET", "CS"):
            kinds[i] = "ON"
        elif kind in ("L", "R"):
            strong = kind
        elif kind == "EN" and strong == "L":
            kinds[i] = "L"


_KNOWN = {"L", "R", "AL", "EN", "AN", "ES", "ET", "CS", *_NEUTRAL}


def _resolve_brackets(text: str, kinds: list[str], start: str) -> None:
    """A pair of brackets takes the direction of what it holds, or of what stands before it (N0)."""
    for opening, closing in _bracket_pairs(text, kinds):
        inside = {_strong(kind) for kind in kinds[opening + 1 : closing]} - {None}
        if start in inside:
            found = start
        elif inside:
            found = next((side for kind in reversed(kinds[:opening]) if (side := _strong(kind))), start)
        else:
            continue
        kinds[opening] = kinds[closing] = found
        for i in (opening, closing):  # the marks on a bracket go with it
            while i + 1 < len(text) and unicodedata.bidirectional(text[i + 1]) in ("NSM", "BN"):
                i += 1
                kinds[i] = found


def _bracket_pairs(text: str, kinds: Sequence[str]) -> list[tuple[int, int]]:
    pairs, stack = [], list[tuple[str, int]]()
    for i, char in enumerate(text):
        if kinds[i] != "ON":
            continue
        if char in _PAIRS:
            if len(stack) == _MAX_OPEN:
                break
            stack.append((char, i))
        elif char in _OPENING:
            depth = next((d for d in range(len(stack) - 1, -1, -1) if stack[d][0] == _OPENING[char]), None)
            if depth is not None:
                pairs.append((stack[depth][1], i))
                del stack[depth:]
    return sorted(pairs)


def _resolve_neutral(kinds: list[str], start: str) -> None:
    """What has no direction takes that of its sides where they agree, else the paragraph's (N1, N2)."""
    at = 0
    while at < len(kinds):
        end = at
        while end < len(kinds) and kinds[end] in _NEUTRAL:
            end += 1
        if end > at:
            before = (_strong(kinds[at - 1]) if at else None) or start
            after = (_strong(kinds[end]) if end < len(kinds) else None) or start
            kinds[at:end] = [before if before == after else start] * (end - at)
        at = end + 1


def _strong(kind: str) -> str | None:
    """Numbers count as right to left here."""
    return "L" if kind == "L" else "R" if kind in ("R", "EN", "AN") else None
