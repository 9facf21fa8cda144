"""Who may do what, where keys are set: a caller without one reads public models and has texts written by them.

All that changes something, or shows somebody's work, takes a key; and without one a private model does not exist.
Where no keys are set everybody may do everything.
"""

from __future__ import annotations

from collections.abc import Collection
from hmac import compare_digest
from urllib.parse import unquote, urlsplit

from fastapi import Request, params
from starlette.datastructures import Headers

from serve.api.status import CrossSite, KeyNeeded
from serve.errors import ModelNotFound
from serve.types import Catalogue, ModelId, ModelInfo

COOKIE = "rookery_key"  # percent-encoded
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
        return not self._keys or self.opens(sent_key(request))

    def opens(self, key: str) -> bool:
        """Whether it is a key of ours."""
        sent = key.encode()
        return sum(compare_digest(sent, own) for own in self._keys) > 0  # not `any`: each is compared, whichever fits

    @property
    def needs_keys(self) -> bool:
        """Whether there are keys at all."""
        return bool(self._keys)

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
    """What stands behind `Authorization: Bearer`, else what a browser got when it signed in; "" where nothing is."""
    header = request.headers.get("authorization", "")
    if header[: len(_SCHEME)].lower() == _SCHEME:
        return header[len(_SCHEME) :].strip()
    return unquote(request.cookies.get(COOKIE, ""))


def check_origin(headers: Headers) -> None:
    """Refuses what a page of another site has a browser send, which brings the cookie, or reaches a loopback address.

    Other clients than browsers send none of these headers. Source: Fetch Metadata (W3C), RFC 6454.
    Raises: CrossSite.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None and origin is not None:
        site = "same-origin" if urlsplit(origin).netloc == headers.get("host") else "cross-site"
    if site not in (None, "none", "same-origin"):
        raise CrossSite("This request comes from a page of another site; send it from this server's own pages.")
