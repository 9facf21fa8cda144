"""Drawing tokens with the compiled library: greedy or from the nucleus, one pass and no sort."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from serve.engine.native.library import CDraw, library, team

NOT_FINITE = -2
UNDECIDED = -1


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn."""

    uniforms: Sequence[float]
    temperature: float  # 0: greedy
    top_p: float
    banned: int = -1  # a token that must not be chosen


def draw(logits: Tensor, rows: Sequence[Draw]) -> list[tuple[int, float]]:
    """A token for each of the ``(N, V)`` float32 rows, and its log-probability under the logits as they are.

    The token is `UNDECIDED` where no draw fell into the nucleus, `NOT_FINITE` where a logit is NaN or infinite.
    """
    loaded = library()
    assert loaded is not None, "ask is_supported first"
    logits = logits.contiguous()
    attempts = len(rows[0].uniforms)
    numbers = (ctypes.c_double * (attempts * len(rows)))(*(u for row in rows for u in row.uniforms))
    start, stride = ctypes.addressof(numbers), attempts * ctypes.sizeof(ctypes.c_double)
    first, width = logits.data_ptr(), logits.stride(0) * logits.element_size()
    draws = (CDraw * len(rows))()
    for i, (place, row) in enumerate(zip(draws, rows, strict=True)):
        place.logits = first + i * width
        place.uniforms = start + i * stride
        place.greedy = row.temperature == 0
        place.inverse_temperature = 1 / (row.temperature or 1)
        place.top_p, place.banned = row.top_p, row.banned
    loaded.rookery_draw(team(), draws, len(rows), logits.shape[-1], attempts)
    return [(place.token, place.logprob) for place in draws]
