"""The Hub's read API with the real clients, over a real store behind a real server."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import httpx
import pytest

from tests.api.hub_world import KEY, MODEL, Hub
from tests.hub.clients import check_clients, pipeline_word_for_word, run_apart


def test_all_calls_of_the_real_clients_work(hub: Hub) -> None:
    hub.publish(seed=1)
    hub.publish(seed=2)
    passed = check_clients(hub.url, MODEL, token=KEY)
    assert all(passed.values()), [name for name, has_passed in passed.items() if not has_passed]
    assert len(passed) >= 33


@pytest.mark.slow
def test_the_three_lines_of_a_card_work_word_for_word(hub: Hub) -> None:
    hub.publish(n_positions=1024)  # the pipeline writes up to 256 tokens
    assert pipeline_word_for_word(hub.url, MODEL)


def test_a_model_without_a_namespace_works_too(hub: Hub) -> None:
    assert all(check_clients(hub.url, "fledgling", names=("repo_exists", "file_exists", "snapshot_download")).values())


def test_a_client_gets_the_version_that_was_published_since(hub: Hub, tmp_path: Path) -> None:
    names = "from huggingface_hub import hf_hub_download as get; import pathlib; print(pathlib.Path(get('{}', '{}')))"
    code = names.format(MODEL, "model.safetensors")
    paths = []
    for seed in (1, 2):
        revision = hub.publish(seed=seed)
        done = run_apart(["-c", code], hub.url, tmp_path)
        assert revision in done.stdout, done.stderr
        paths.append(Path(done.stdout.strip()).read_bytes())
    assert paths[0] != paths[1]


def test_the_list_is_read_over_several_pages(hub: Hub, tmp_path: Path) -> None:
    hub.publish()
    source = hub.store.resolve(MODEL).path
    for number in range(120):
        home = hub.folder / "data" / "models" / "many" / f"bot{number:03}"
        home.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (home / name).hardlink_to(source / name)
    code = "from huggingface_hub import list_models as ls; print([m.id for m in ls(author='many', full=True)])"
    done = run_apart(["-c", code], hub.url, tmp_path)
    assert eval(done.stdout) == [f"many/bot{number:03}" for number in range(120)], done.stderr


def test_a_download_that_breaks_off_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.publish(n_embd=512)  # 26 MB: the client writes 10 MB at a time
    with Cutter(hub.url, after_bytes=15_000_000) as cutter:
        code = f"from huggingface_hub import hf_hub_download as get; print(get('{MODEL}', 'model.safetensors'))"
        done = run_apart(["-c", code], cutter.url, tmp_path)
    assert done.returncode == 0, done.stderr
    content = (hub.store.resolve(MODEL).path / "model.safetensors").read_bytes()
    assert Path(done.stdout.strip()).read_bytes() == content
    assert cutter.ranges == [f"bytes={10 << 20}-"]


class Cutter:
    """A line that breaks once, in the middle of the first large answer; `ranges`: what was asked for afterwards."""

    def __init__(self, url: str, after_bytes: int) -> None:
        self._target = httpx.URL(url)
        self._after_bytes = after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.ranges: list[str] = []
        self._has_cut = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Cutter:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection((self._target.host, self._target.port or 80))
        self._start(self._carry_up, client, server)
        sent = 0
        while data := server.recv(65536):
            sent += len(data)
            if sent > self._after_bytes and not self._has_cut:
                self._has_cut = True
                break
            client.sendall(data)
        for one in (client, server):
            one.shutdown(socket.SHUT_RDWR) if one.fileno() >= 0 else None
        client.close()

    def _carry_up(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                if self._has_cut:
                    lines = data.decode("latin-1").split("\r\n")
                    self.ranges += [line.split(": ", 1)[1] for line in lines if line.lower().startswith("range:")]
                server.sendall(data)
        except OSError:
            pass
        finally:
            server.close()
