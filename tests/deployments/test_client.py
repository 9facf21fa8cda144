"""What the client of a server makes of answers, refusals and keys that are not as they should be."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler

import pytest

from deployments.client import Client, ServerUnreachable
from serve.settings import BadSetting
from tests.deployments.cli_world import HubWorld, Rookery, another_program


def always(status: int, body: str) -> type[BaseHTTPRequestHandler]:
    """A program that answers everything so."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Its log would be in the command's stderr."""

    return Answer


BODIES = (
    *("null", "[]", "{}", '"yes"', '{"status": "ok"}', '{"object": "list", "data": [{"id": "a/b"}]}'),
    *('{"data": [1], "has_more": false}', '{"data": {}, "has_more": false}', "not JSON"),
)
VERBS = ("ls", "versions a/b", "jobs ls", "jobs show j", "generate a/b hi", "status")


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        pytest.param(verb, body, marks=[pytest.mark.slow] if (v + b) % 3 else [])
        for v, verb in enumerate(VERBS)
        for b, body in enumerate(BODIES)
    ],
)
def test_json_of_another_program_is_told_from_ours(rookery: Rookery, verb: str, body: str) -> None:
    with another_program(always(200, body)) as url:
        done = rookery(*verb.split(), "--url", url)
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1), done.err
    assert url in done.err and "another program?" in done.err


def test_a_program_that_takes_any_key_is_no_rookery(rookery: Rookery) -> None:
    with another_program(always(200, '{"object": "list", "data": [], "has_more": false}')) as url:
        assert rookery("keys", "check", "--url", url).code == 5


def test_a_stream_of_another_program_is_told_from_ours() -> None:
    handler, refused = always(200, "data: oh dear\n\n"), pytest.raises(ServerUnreachable, match="another program")
    with another_program(handler) as url, Client(url) as client, refused:
        list(client.stream({}))


@pytest.mark.parametrize("key", ["ключ", "two words", "line\n", "\udcff"])
def test_a_key_that_no_header_can_carry_is_said_so(key: str) -> None:
    with pytest.raises(BadSetting, match="ROOKERY_API_KEY") as refused:
        Client("http://127.0.0.1:9", key)
    assert key not in str(refused.value)


def test_a_refusal_for_want_of_a_key_names_the_variable(
    rookery: Rookery, hub_world: HubWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROOKERY_API_KEY")
    refused = rookery("rm", "lina/wren")
    assert refused.code == 4 and "ROOKERY_API_KEY" in refused.err
    told = rookery("status")
    assert told.code == 0 and "needs a key (ROOKERY_API_KEY)" in told.err
    monkeypatch.setenv("ROOKERY_API_KEY", "sk-wrong")
    assert "does not take the key" in rookery("status").err and "does not take the key" in rookery("keys", "check").err
    monkeypatch.setenv("ROOKERY_API_KEY", "sk-key")
    assert rookery("status").err == ""


def test_the_card_of_a_model_that_is_not_there_is_not_found(
    rookery: Rookery, hub_world: HubWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        done = rookery("card", "lina/nobody")
        assert (done.code, done.out) == (3, "")
        monkeypatch.delenv("ROOKERY_API_KEY", raising=False)


def test_why_a_server_is_not_ready_is_its_own_sentence() -> None:
    handler = always(503, '{"error": {"message": "Not ready: still loading."}}')
    with another_program(handler) as url, Client(url) as client:
        assert (client.why_unready(), client.is_ready()) == ("Not ready: still loading.", False)
    with Client("http://127.0.0.1:9") as client:
        assert client.why_unready() == "no answer (ConnectError)"
