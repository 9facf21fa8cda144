"""To the Hub and back through the live application: the command as a program, Ray Serve, and a Hub on a local port."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deployments.conftest import BASE, ROOKERY, LiveService, import_tiny_model, start_service, stop_service
from tests.fakes.hub import FakeHub, fake_hub
from tests.fakes.hub_uploads import Uploads, accept_uploads
from tests.fakes.models import write_tiny_gpt2

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

WREN = "lina/wren"


@dataclass
class Live:
    service: LiveService
    hub: FakeHub
    uploads: Uploads
    model: Path
    rookery: Callable[..., Any]  # runs the command; the JSON that it prints


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    data, folder = tmp_path_factory.mktemp("live-push"), tmp_path_factory.mktemp("hub")
    import_tiny_model(data, BASE)
    import_tiny_model(data, WREN, seed=3)
    with fake_hub() as hub, accept_uploads(hub, folder) as uploads:
        settings = {"ROOKERY_HUB_ENABLED": "true", "ROOKERY_HUB_ENDPOINT": hub.endpoint}
        service = start_service(data, **settings)
        variables = {"ROOKERY_URL": service.url, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_lina"}
        variables |= {"XDG_CACHE_HOME": str(folder / "cache")}

        def rookery(*arguments: object) -> Any:
            command = [*ROOKERY, *map(str, arguments), "--json"]
            environment = {**os.environ, **variables}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        yield Live(service, hub, uploads, write_tiny_gpt2(folder / "robin", seed=5), rookery)
        assert stop_service(service) == []


def texts(live: Live) -> list[str]:
    completion = live.rookery("generate", WREN, "My dream is", "-n", 3, "--seed", 7, "--max-tokens", 16)
    return [choice["text"] for choice in completion["choices"]]


def test_a_model_that_went_to_the_hub_and_came_back_writes_the_same_and_then_what_is_new_there(
    live: Live, tmp_path: Path
) -> None:
    before = texts(live)
    pushed = live.rookery("push", WREN)
    assert (pushed["repo"], pushed["skipped"]) == (WREN, False)
    assert live.rookery("push", WREN)["skipped"]
    live.rookery("rm", WREN)
    pulled = live.rookery("pull", WREN)
    assert pulled["revision"] == pushed["commit"]
    assert texts(live) == before
    newer = live.uploads.put(
        WREN, model__safetensors=(write_tiny_gpt2(tmp_path / "newer", seed=4) / "model.safetensors").read_bytes()
    )
    assert texts(live) == before, "nothing is asked of the Hub for what is here"
    assert live.rookery("pull", WREN)["revision"] == newer
    assert texts(live) != before


def test_pulls_are_counted_and_no_series_is_told_twice(live: Live) -> None:
    live.uploads.create("lina/robin")
    live.uploads.put("lina/robin", **{file.name.replace(".", "__"): file.read_bytes() for file in live.model.iterdir()})
    live.rookery("pull", "lina/robin")
    families = list(text_string_to_metric_families(httpx.get(f"{live.service.url}/metrics", timeout=30).text))
    assert len({family.name for family in families}) == len(families)
    samples = [sample for family in families for sample in family.samples]
    pulls = [sample.value for sample in samples if sample.name == "rookery_pull_duration_seconds_count"]
    assert len(pulls) == 1 and pulls[0] >= 1


def test_the_users_token_is_not_sent_to_the_server_that_the_model_is_on(live: Live) -> None:
    url = live.service.url.replace("127.0.0.1", "localhost")
    with pytest.raises(AssertionError, match="name the Hub with --endpoint"):
        live.rookery("push", WREN, "--endpoint", url)
