"""The card of a model that goes elsewhere: bytes, of which none changes but those of its id in code."""

from __future__ import annotations

import re

_FENCE = re.compile(rb"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def rename_in_card(card: bytes, old_id: str, new_id: str) -> bytes:
    """The card with `new_id` where code in it names `old_id` as a string; prose and headings stay as they are."""
    quoted = re.compile(rb"(['\"])" + re.escape(old_id.encode()) + rb"\1")
    return _FENCE.sub(lambda block: quoted.sub(lambda found: found[1] + new_id.encode() + found[1], block[0]), card)


def is_utf8(card: bytes) -> bool:
    """Whether a Hub takes it."""
    try:
        card.decode()
    except UnicodeDecodeError:
        return False
    return True
