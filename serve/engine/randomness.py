"""Random numbers that depend on nothing but what is drawn: (seed, choice, position).

A keyed hash used as a counter-based generator (Source: Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", 2011): a row's draw is the same in any batch, on any replica, so a text can be taken up elsewhere
from its prompt, seed and tokens so far. One hash gives all draws of a position: about 1 µs a row.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

DRAWS = 8
_UNPACK = struct.Struct(f"<{DRAWS}Q")
_PACK = struct.Struct("<qqq")


def uniforms(seed: int, choice: int, position: int) -> list[float]:
    """`DRAWS` independent numbers in [0, 1), 53 bits each. `seed` is any 64-bit integer, signed or not."""
    key = _PACK.pack((seed + 2**63) % 2**64 - 2**63, choice, position)
    return [(word >> 11) * 2.0**-53 for word in _UNPACK.unpack(blake2b(key, digest_size=8 * DRAWS).digest())]
