"""A Hub and its storage over TLS: who sees the token, and what ends before there is an answer."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session

from serve.errors import HubUnreachable, ModelGated, ModelNotFound, RookeryError, StoreUnavailable
from serve.hub.answers import Failure
from serve.hub.breaker import Breaker, Breakers
from serve.hub.pace import Deadline
from tests.hub.asking import ADA, FILE, JSON, TOKEN, open_session, read, takes
from tests.hub.scripted import Server, answer, head, json_answer, scripted, trickle

STORAGE = "cdn-lfs.hf.co"


@pytest.fixture
def ports() -> dict[str, int]:
    """Where the hosts are that are asked at a port of this machine and not at their own."""
    return {}


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ports: dict[str, int]) -> ssl.SSLContext:
    """For servers that are hub.test and the Hub's storage to this process: both names are this machine's."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on the PATH")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = "subjectAltName=DNS:hub.test,DNS:*.hf.co"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hub.test"]
    command += ["-addext", names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    find = socket.getaddrinfo

    def find_here(host: str, port: int, *rest: Any, **more: Any) -> Any:
        return find("127.0.0.1", ports.get(host, port), *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", find_here)
    close_session()  # certificates are read once
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def named(server: Server, host: str) -> str:
    return f"https://{host}:{port_of(server)}"


def port_of(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


def test_large_file_comes_from_the_storage_which_never_sees_the_token(
    tls: ssl.SSLContext, ports: dict[str, int]
) -> None:
    linked = {"X-Linked-Etag": '"digest"', "X-Repo-Commit": "a" * 40}
    with scripted(answer(200, {"ETag": '"of the storage"'}, b"abc"), tls=tls) as storage:
        ports[STORAGE] = port_of(storage)
        location = {"Location": f"https://{STORAGE}/file?signed"}
        with scripted(answer(302, linked | location), tls=tls) as server:
            session = open_session(named(server, "hub.test"))
            with session.stream(FILE, Deadline(20)) as got:
                assert (got.etag, got.commit, b"".join(got.chunks)) == ("digest", "a" * 40, b"abc")
    assert server.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert storage.requests[0].target == "/file?signed" and "authorization" not in storage.requests[0].headers


def test_trouble_of_the_storage_does_not_close_the_hub(tls: ssl.SSLContext, ports: dict[str, int]) -> None:
    breakers = Breakers(lambda host: Breaker(host, failures=1))
    with scripted(answer(503), tls=tls) as storage:
        ports[STORAGE] = port_of(storage)
        location = {"Location": f"https://{STORAGE}/file"}
        with scripted(answer(302, location), tls=tls) as server:
            session = open_session(named(server, "hub.test"), breakers=breakers)
            with pytest.raises(Failure):
                read(session)
            assert breakers.of(named(server, "hub.test")).state == "closed"
            assert breakers.of(location["Location"]).state == "open"


def test_expired_address_of_the_storage_is_asked_for_anew(tls: ssl.SSLContext, ports: dict[str, int]) -> None:
    with scripted(answer(403), answer(200, body=b"abc"), tls=tls) as storage:
        ports[STORAGE] = port_of(storage)
        location = {"Location": f"https://{STORAGE}/file"}
        with scripted(answer(302, location), tls=tls) as server:
            session = open_session(named(server, "hub.test"))
            assert session.retrying(lambda: read(session), Deadline(20)) == b"abc"
    assert len(server.requests) == 2


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX-", head(200, JSON, 10**6)], ids=["headers", "body"])
def test_trickle_through_tls_ends_at_the_deadline(tls: ssl.SSLContext, start: bytes) -> None:
    with scripted(tls=tls) as server:
        server.acts.append(trickle([server], start, every_s=0.1))
        session = open_session(named(server, "hub.test"))
        with takes(0.9, 2), pytest.raises(StoreUnavailable, match="longer than"):
            session.get_json(ADA, {}, Deadline(1))


def test_handshake_that_never_ends_is_bounded(tls: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://hub.test:{silent.getsockname()[1]}"
        with takes(0.4, 4), pytest.raises(StoreUnavailable):
            open_session(url, head_s=0.5, tries=1).get_json(ADA, {}, Deadline(60))


@pytest.mark.parametrize(
    ("message", "kind"),
    [("Repository not found", ModelNotFound), ("Invalid credentials in Authorization header", ModelGated)],
)
def test_strangers_are_told_that_there_is_no_such_model_and_bad_tokens_are_not(
    tls: ssl.SSLContext, message: str, kind: type[RookeryError]
) -> None:
    with scripted(answer(401, {"X-Error-Message": message}), tls=tls) as server, pytest.raises(kind):
        open_session(named(server, "hub.test")).get_json(ADA, {}, Deadline(20))


def test_certificate_of_another_is_no_way_there(tls: ssl.SSLContext) -> None:
    with scripted(json_answer(), tls=tls) as server, pytest.raises(HubUnreachable):
        open_session(named(server, "other.test")).get_json(ADA, {}, Deadline(20))
    assert server.requests == []
