"""Random numbers of a plan: a stream of its own for every aspect of every flow.

So a change of one aspect (how long texts are, a further flow) leaves what is drawn for all others as it was.
"""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, flow: str, aspect: str) -> np.random.Generator:
    """Always the same numbers for the same three."""
    # crc32, as Python's hash of a string differs from process to process.
    key = (zlib.crc32(flow.encode()), zlib.crc32(aspect.encode()))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
