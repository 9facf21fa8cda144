"""Who may do what, where keys are set: a caller without one reads public models and has texts written by them.

All that changes something, or shows somebody's work, takes a key; and without one a private model does not exist.
Where no keys are set everybody may do everything, but what a page of another site has a browser do.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from hashlib import blake2b, scrypt
from hmac import compare_digest
from ipaddress import ip_address
from urllib.parse import unquote, urlsplit

from fastapi import Request, params
from starlette.datastructures import Headers

from serve.api.status import CrossSite, KeyNeeded, UnknownHost
from serve.errors import ModelNotFound
from serve.metrics import Metrics
from serve.types import Catalogue, ModelId, ModelInfo

COOKIE = "rookery_key"  # percent-encoded
_SCHEME = "bearer "
_HOST = re.compile(r"(?P<name>\[[^\[\]]*\]|[^:\[\]]*)(?::\d*)?")  # a name or IPv4; IPv6 in brackets
_MAX_HOST_CHARS = 80  # that are repeated
_NAME_BYTES = 8


class Access:
    """`keys`: any one of them opens all. `hosts`: the names by which the server may be called; none: by any."""

    def __init__(self, keys: Collection[str] = (), hosts: Collection[str] = (), metrics: Metrics | None = None) -> None:
        self._keys = tuple(key.encode() for key in keys)
        self._hosts = frozenset(host.lower() for host in hosts)
        self._metrics = metrics or Metrics(enabled=False)

    @classmethod
    def from_setting(cls, keys: str, hosts: str = "", metrics: Metrics | None = None) -> Access:
        """Both with commas between."""
        return cls(_split(keys), _split(hosts), metrics)

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

    def caller_of(self, request: Request) -> str:
        """A name for whoever sent this key, from which the key cannot be told; "" where none of ours is sent.

        A server without keys calls everybody by the key that they send.
        """
        key = sent_key(request)
        if not key or not self.has_key(request):
            return ""
        return _name_of(key) if self._keys else blake2b(key.encode(), digest_size=_NAME_BYTES).hexdigest()

    def demand(self, request: Request) -> None:
        """Raises: KeyNeeded."""
        if not self.has_key(request):
            self._metrics.auth_failures.labels("wrong" if sent_key(request) else "missing").inc()
            raise KeyNeeded("This takes one of the server's keys, sent as 'Authorization: Bearer ...'.")

    def check_host(self, headers: Headers) -> None:
        """Refuses what is sent to a name that is not ours: another site may let its own point to this machine.

        Its pages are then of the same origin as ours to a browser (DNS rebinding). An address cannot be made to point
        elsewhere, and whoever names no host is no browser. Raises: UnknownHost.
        """
        host = headers.get("host", "")
        if self._hosts and host and not self._is_ours(host):
            raise UnknownHost(
                f"This server does not go by the name {host[:_MAX_HOST_CHARS]!r}: call it by its address or "
                "'localhost', or have whoever runs it add the name to ROOKERY_HOSTS."
            )

    def _is_ours(self, host: str) -> bool:
        parts = _HOST.fullmatch(host)
        name = parts["name"].lower().removesuffix(".") if parts else ""
        return name == "localhost" or name in self._hosts or _is_address(name.strip("[]"))

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


@cache  # of our own keys alone, which are few
def _name_of(key: str) -> str:
    """Slow on purpose (some 30 ms, once): names are shown and logged, and nobody shall try guesses on one."""
    return scrypt(key.encode(), salt=b"rookery", n=1 << 13, r=8, p=1, dklen=_NAME_BYTES).hex()


def sent_key(request: Request) -> str:
    """What stands behind `Authorization: Bearer`, else what a browser got when it signed in; "" where nothing is."""
    header = request.headers.get("authorization", "")
    if header[: len(_SCHEME)].lower() == _SCHEME:
        return header[len(_SCHEME) :].strip()
    return unquote(request.cookies.get(cookie_name(request), ""))


def cookie_name(request: Request) -> str:
    """Under which this server's key is kept: browsers share cookies among all ports of a host."""
    port = request.url.port
    return f"{COOKIE}_{port}" if port else COOKIE


def check_origin(headers: Headers) -> None:
    """Refuses what a page of another site has a browser send, which brings the cookie, or reaches a loopback address.

    Other clients than browsers send none of these headers. Source: Fetch Metadata (W3C), RFC 6454.
    Raises: CrossSite.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None and origin is not None:
        site = "same-origin" if _is_origin_of(origin, headers.get("host", "")) else "cross-site"
    if site not in (None, "none", "same-origin"):
        raise CrossSite("This request comes from a page of another site; send it from this server's own pages.")


def _is_origin_of(origin: str, host: str) -> bool:
    """Not so for "null", which sandboxed frames send."""
    try:
        return host != "" and urlsplit(origin).netloc == host
    except ValueError:  # "http://["
        return False


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _split(setting: str) -> list[str]:
    return [one for part in setting.split(",") if (one := part.strip())]
