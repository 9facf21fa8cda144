"""Deltas come out of the wire as they went in."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from deployments.wire import pack, unpack
from serve.types import Delta, PromptInfo, TokenInfo

alternatives = st.tuples(st.integers(0, 50_256), st.text(), st.floats(allow_nan=False))
tokens = st.builds(
    TokenInfo,
    id=st.integers(0, 50_256),
    text=st.text(),
    logprob=st.none() | st.floats(allow_nan=False),
    special=st.booleans(),
    top=st.lists(alternatives, max_size=5).map(tuple),
)
deltas = st.builds(
    Delta,
    index=st.integers(0, 127),
    text=st.text(),
    tokens=st.lists(tokens, max_size=4).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "stop_sequence"]),
    prompt=st.none() | st.just(PromptInfo("I", 1, "device", 0.5, 0.0, (TokenInfo(1, "I", None),), "abc")),
    error=st.none() | st.text(),
)


@given(st.lists(deltas, max_size=4))
def test_what_was_packed_is_unpacked(sent: list[Delta]) -> None:
    assert unpack(pickle.loads(pickle.dumps(pack(sent)))) == sent
