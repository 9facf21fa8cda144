"""The real Hub clients against the live application: through Ray Serve, as people run it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from serve.store.revisions import Store
from serve.types import Visibility
from tests.deployments.conftest import BASE, LiveService, import_tiny_model, start_service, stop_service
from tests.fakes.models import write_tiny_gpt2
from tests.hub.clients import check_clients, pipeline_word_for_word, run_apart

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

WREN = "huggingtweets/wren"
KEY = "key-of-ours"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """A service with a key, and a model as training leaves it."""
    data = tmp_path_factory.mktemp("live-hub")
    import_tiny_model(data, BASE)
    publish(data, seed=1)
    service = start_service(data, ROOKERY_API_KEYS=f"{KEY},another")
    yield service
    assert stop_service(service) == []


def publish(data: Path, *, seed: int) -> str:
    store = Store(data, embedded={})
    staged = store.stage()
    write_tiny_gpt2(staged, seed=seed, n_positions=1024)
    (staged / "README.md").write_text("---\ntags:\n- huggingtweets\n---\n\n# Wren\n")
    (staged / "rookery.json").write_text(json.dumps({"tags": ["huggingtweets"]}))
    (staged / "runs").mkdir()
    (staged / "runs" / "train.json").write_text("{}")
    return store.publish(WREN, staged).revision


def test_the_three_lines_of_a_card_work_word_for_word(service: LiveService) -> None:
    assert pipeline_word_for_word(service.url, WREN)


@pytest.mark.slow
def test_all_calls_of_the_real_clients_work(service: LiveService) -> None:
    passed = check_clients(service.url, WREN, token=KEY)
    assert all(passed.values()), [name for name, has_passed in passed.items() if not has_passed]


def test_a_client_gets_the_version_that_was_published_since(service: LiveService, tmp_path: Path) -> None:
    code = f"from huggingface_hub import snapshot_download as get; print(get('{WREN}'))"
    for seed in (2, 3):
        revision = publish(service.data, seed=seed)
        done = run_apart(["-c", code], service.url, tmp_path)
        assert done.stdout.strip().endswith(revision), done.stderr


def test_a_private_model_writes_for_callers_with_a_key_alone(service: LiveService) -> None:
    secret = "huggingtweets/secret"
    import_tiny_model(service.data, secret, seed=9)
    Store(service.data, embedded={}).set_visibility(secret, Visibility.PRIVATE)
    body = {"model": secret, "prompt": "My dream is", "max_tokens": 3}
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 404
    client = OpenAI(base_url=f"{service.url}/v1", api_key=KEY)
    assert client.completions.create(model=secret, prompt="My dream is", max_tokens=3).choices[0].text
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 404  # now in memory
    assert httpx.get(f"{service.url}/v1/residents").status_code == 401


def test_an_encoded_slash_reaches_the_model(service: LiveService) -> None:
    answer = httpx.get(f"{service.url}/huggingtweets%2Fwren/resolve/main/runs%2Ftrain.json", follow_redirects=True)
    assert answer.json() == {}
    assert httpx.get(f"{service.url}/api/models/huggingtweets%2Fwren").json()["id"] == WREN
