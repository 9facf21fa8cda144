"""Who may do what, and whose things they are.

Each route names the scopes of which it takes one; a key has some, and so has a caller without a key (`anonymous`). What
a tenant has made is its own: others' files, jobs and private models do not exist for it, and others' public models are
there to be read. Where no key was ever made everybody may do everything, but what a page of another site has a browser
do.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import ip_address
from urllib.parse import parse_qs, unquote, urlsplit

from fastapi import Request, params
from starlette.datastructures import Headers
from starlette.types import Scope as ASGIScope

from serve.api.status import CrossSite, KeyInAddress, KeyNeeded, ScopeNeeded, UnknownHost
from serve.errors import ModelNotFound, model_disabled
from serve.metrics import Metrics
from serve.settings import PREFIX, BadSetting
from serve.types import ApiKey, Catalogue, Keys, ModelId, ModelInfo, Scope, Viewer

COOKIE = "rookery_key"  # percent-encoded
_SCHEME = "bearer "
_HOST = re.compile(r"(?P<name>\[[^\[\]]*\]|[^:\[\]]*)(?::\d*)?")  # a name or IPv4; IPv6 in brackets
_MAX_HOST_CHARS = 80  # that are repeated
_NAME_BYTES = 8
_FIELDS_OF_KEYS = {"api_key", "api-key", "apikey", "key", "access_token"}  # of an address, where no key belongs

_USERINFO = re.compile(rb"https?://[^/?#]*@", re.IGNORECASE)

FREE = (Scope.GENERATE, Scope.READ)  # what a caller without a key may be given at most


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what they may do. A server without keys lets everybody do everything."""

    key: ApiKey | None  # None: none was sent, or none is needed
    name: str  # for logs, fairness and counts, from which no key can be told; "": nobody that we know
    tenant: str  # whose the things are that they make; "": nobody's
    scopes: frozenset[Scope]

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    @property
    def viewer(self) -> Viewer:
        return Viewer(self.tenant, sees_all=self.is_admin)

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or self.is_admin

    def may_change(self, model: ModelInfo) -> bool:
        return self.may(Scope.TRAIN) and self.viewer.may_change(model.owner)


class Access:
    """Over the server's keys; None: there are none, and everybody may do everything.

    `hosts`: the names by which the server may be called; none: by any. `anonymous`: what callers without a key may do
    where there are keys.
    """

    def __init__(
        self,
        keys: Keys | None = None,
        hosts: Collection[str] = (),
        metrics: Metrics | None = None,
        *,
        anonymous: Collection[Scope] = FREE,
    ) -> None:
        self._keys = keys
        self._hosts = frozenset(host.lower() for host in hosts)
        self._metrics = metrics or Metrics(enabled=False)
        self._anonymous = frozenset(anonymous)

    @classmethod
    def from_settings(cls, keys: Keys, *, hosts: str, anonymous: str, metrics: Metrics | None = None) -> Access:
        """The settings with commas between. Raises: BadSetting."""
        scopes = _split(anonymous)
        if wrong := [scope for scope in scopes if scope not in FREE]:
            raise BadSetting(
                f"{PREFIX}ANONYMOUS={wrong[0][:80]!r}: callers without a key get no more than {','.join(FREE)}."
            )
        return cls(keys, _split(hosts), metrics, anonymous=[Scope(scope) for scope in scopes])

    @property
    def needs_keys(self) -> bool:
        """Whether there are keys at all."""
        return self._keys is not None and self._keys.are_needed

    def opens(self, key: str) -> bool:
        """Whether it is a key of ours."""
        return self._keys is not None and self._keys.find(key) is not None

    def caller(self, request: Request) -> Caller:
        """Who sent the request. A key that is none of ours is as none."""
        known: Caller | None = getattr(request.state, "caller", None)
        if known is None:
            known = request.state.caller = self._caller_with(sent_key(request))
        return known

    def _caller_with(self, sent: str) -> Caller:
        if not self.needs_keys:  # everybody is called by the key that they send
            name = blake2b(sent.encode(errors="surrogatepass"), digest_size=_NAME_BYTES).hexdigest() if sent else ""
            return Caller(None, name, "", frozenset(Scope))
        assert self._keys is not None
        if (key := self._keys.find(sent)) is None:
            return Caller(None, "", "", self._anonymous)
        return Caller(key, key.id, key.tenant, key.scopes)

    def demand(self, request: Request, *scopes: Scope, with_key: bool = False) -> Caller:
        """The caller, who has one of the scopes, and `with_key` by a key of theirs. Raises: KeyNeeded, ScopeNeeded."""
        caller = self.caller(request)
        is_known = caller.key is not None or not (with_key and self.needs_keys)
        if is_known and any(map(caller.may, scopes)):
            return caller
        if caller.key is not None:
            self._metrics.auth_failures.labels("scope").inc()
            raise ScopeNeeded(scopes, caller.key.scopes)
        self._metrics.auth_failures.labels("wrong" if sent_key(request) else "missing").inc()
        raise KeyNeeded("This takes one of the server's keys, sent as 'Authorization: Bearer ...'.")

    def needs(self, *scopes: Scope, with_key: bool = False) -> list[params.Depends]:
        """The dependencies of a route, or of all of a router, that takes one of these scopes.

        `with_key`: what it is about is somebody's, and who sends no key is nobody.
        """

        async def demand_scope(request: Request) -> None:  # not `demand` itself: that would go through a thread
            self.demand(request, *scopes, with_key=with_key)

        return [params.Depends(demand_scope)]

    def check_address(self, scope: ASGIScope, headers: Headers) -> None:
        """Refuses a key in the address, which logs and browsers keep. Raises: KeyInAddress."""
        if not self.needs_keys:
            return
        fields = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        has_name = "@" in headers.get("host", "") or _USERINFO.match(scope.get("raw_path") or b"")
        if has_name or not _FIELDS_OF_KEYS.isdisjoint(map(str.lower, fields)):
            raise KeyInAddress(
                "A key does not belong into an address, which is logged and remembered on its way: send it in the "
                "header 'Authorization: Bearer ...', and have this one replaced if it was a real one."
            )

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

    def find_model(self, catalogue: Catalogue, model_id: str, request: Request) -> ModelInfo:
        """Blocks. Raises: ModelNotFound, the same for what the caller may not see as for what is not there;
        ModelDisabled.
        """
        viewer = self.caller(request).viewer
        ModelId.parse(model_id)
        try:
            found = catalogue.get_model(model_id, viewer)
        except ModelNotFound:
            if viewer.sees_all:
                raise
            found = None
        if found is None:
            raise ModelNotFound(f"Model {model_id!r} is not here. GET /v1/models lists those that are.", param="model")
        if found.is_disabled:
            raise model_disabled(model_id)
        return found


def sent_key(request: Request) -> str:
    """What stands behind `Authorization: Bearer`, else what a browser got when it signed in; "" where nothing is."""
    header = request.headers.get("authorization", "")
    if header[: len(_SCHEME)].lower() == _SCHEME:
        return header[len(_SCHEME) :].strip()
    return unquote(request.cookies.get(cookie_name(request), ""))


def cookie_name(request: Request) -> str:
    """Under which this server's key is kept: browsers share cookies among all ports of a host."""
    try:
        port = request.url.port
    except ValueError:  # of a Host header that is none
        port = None
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
