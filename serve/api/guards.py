"""The headers by which a browser makes nothing more of an answer than it is; every answer has them.

What is shown as a page brings a policy of its own, under which its own files are loaded. HTTPS, and that nothing else
is to be used, is said by whatever ends TLS in front of us.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders

_GUARDS = {
    # Of an answer that is opened as if it were a page nothing is loaded or run, and nobody puts it into a frame.
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",  # the same, for browsers that do not know `frame-ancestors`
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


def guard(headers: MutableHeaders) -> None:
    """Adds those that the answer does not have."""
    for name, value in _GUARDS.items():
        headers.setdefault(name, value)
