"""Strangers' texts made fit to be shown: names from profiles, what models say of themselves. Knows no markup."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # within emoji and some scripts
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn")


def printable(text: str) -> str:
    """Without control, direction-changing and lone-surrogate characters; any space is one plain space."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if c in _JOINERS or unicodedata.category(c) not in _UNSEEN)


def is_visible(text: str) -> bool:
    """Whether there is anything in it that can be seen."""
    return any(unicodedata.category(char)[0] in "LNPS" for char in text)
