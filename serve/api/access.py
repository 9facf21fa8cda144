"""Who may do what, where keys are set: a caller without one reads public models and has texts written by them.

All that changes something, or shows somebody's work, takes a key; and without one a private model does not exist.
Where no keys are set everybody may do everything.
"""

from __future__ import annotations

from collections.abc import Collection
from hmac import compare_digest

from fastapi import Request, params

from serve.api.status import KeyNeeded
from serve.errors import ModelNotFound
from serve.types import Catalogue, ModelId, ModelInfo

_SCHEME = "bearer "


class Access:
    """`keys`: any one of them opens all."""

    def __init__(self, keys: Collection[str] = ()) -> None:
        self._keys = tuple(key.encode() for key in keys)

    @classmethod
    def from_setting(cls, keys: str) -> Access:
        """`keys` with commas between."""
        return cls([key for part in keys.split(",") if (key := part.strip())])

    def has_key(self, request: Request) -> bool:
        """Whether the request sends a key of ours, or none is needed."""
        if not self._keys:
            return True
        sent = sent_key(request).encode()
        return sum(compare_digest(sent, key) for key in self._keys) > 0  # not `any`: each is compared, whichever fits

    def demand(self, request: Request) -> None:
        """Raises: KeyNeeded."""
        if not self.has_key(request):
            raise KeyNeeded("This takes one of the server's keys, sent as 'Authorization: Bearer ...'.")

    @property
    def required(self) -> list[params.Depends]:
        """The dependencies of a route, or of all of a router, that takes a key."""

        async def demand_key(request: Request) -> None:  # not `demand` itself: that would go through a thread
            self.demand(request)

        return [params.Depends(demand_key)]

    def find_model(self, catalogue: Catalogue, model_id: str, request: Request) -> ModelInfo:
        """Blocks. Raises: ModelNotFound; to a caller without a key it tells no more than what was asked for."""
        if self.has_key(request):
            return catalogue.get_model(model_id)
        ModelId.parse(model_id)
        try:
            found = catalogue.get_model(model_id)
        except ModelNotFound:
            found = None
        if found is None or found.is_private:
            raise ModelNotFound(f"Model {model_id!r} is not here. GET /v1/models lists those that are.", param="model")
        return found


def sent_key(request: Request) -> str:
    """What stands behind `Authorization: Bearer`; "" where nothing does."""
    header = request.headers.get("authorization", "")
    return header[len(_SCHEME) :].strip() if header[: len(_SCHEME)].lower() == _SCHEME else ""
