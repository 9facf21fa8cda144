"""Private and gated models of a Hub: who may have them fetched, and what others learn of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.errors import (
    HubUnreachable,
    ModelNotFound,
    ModelUnusable,
)
from serve.hub.fetch import Hub
from serve.store.revisions import Store
from serve.types import EVERYBODY, Viewer, Visibility
from tests.fakes.hub import FakeHub
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"


@pytest.mark.parametrize("info", [{"private": True}, {"gated": "manual"}, {"gated": "auto"}], ids=str)
def test_private_and_gated_models_are_private_here_and_nobody_else_has_them_fetched(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path, info: dict[str, Any]
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"), **info)
    with pytest.raises(ModelNotFound) as hidden:
        hub.locate(ADA, viewer=EVERYBODY)
    assert server.num_requests() == 1 and "/api/models/" in server.requests[0].path
    with pytest.raises(ModelNotFound):
        hub.fetch(ADA, viewer=EVERYBODY)

    assert hub.locate(ADA).is_private and store.get_model(ADA).is_private
    num_requests = server.num_requests()
    with pytest.raises(ModelNotFound) as denied:
        hub.locate(ADA, viewer=EVERYBODY)
    assert denied.value.message == hidden.value.message
    assert server.num_requests() == num_requests + 1, "it is to be like a model that is nowhere, in time as well"


def test_model_that_has_become_private_on_the_hub_becomes_so_here_and_not_the_reverse(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    for is_private, expected in ((False, False), (True, True), (False, True)):
        server.add(ADA, repo, private=is_private)
        assert hub.fetch(ADA).is_private == expected == store.get_model(ADA).is_private


def test_what_others_have_learnt_of_a_private_model_is_not_told_to_strangers(
    server: FakeHub, hub: Hub, tmp_path: Path
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"), private=True)
    (tmp_path / "repo/config.json").write_text('{"model_type": "llama"}')
    sha = server.add(ADA, tmp_path / "repo", private=True)
    with pytest.raises(ModelUnusable):
        hub.locate(ADA)
    for name in (ADA, f"{ADA}@{sha}"):
        with pytest.raises(ModelNotFound):
            hub.locate(name, viewer=EVERYBODY)
    assert server.add(ADA, tmp_path / "repo") == sha  # public from now on
    num_files = server.num_requests("/config.json")
    with pytest.raises(ModelUnusable, match="llama"):
        hub.locate(ADA, viewer=EVERYBODY)
    assert server.num_requests("/config.json") == num_files, "a public model's verdict holds for all"


def test_private_model_that_is_here_is_in_an_outage_like_one_that_is_nowhere(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    hub.locate(ADA)
    store.publish("x/trained", write_tiny_gpt2(store.stage()), visibility=Visibility.PRIVATE)
    server.close_door()
    for name in ("x/trained", "x/nobody"):
        with pytest.raises(HubUnreachable):
            hub.locate(name, viewer=EVERYBODY)
    assert hub.locate("x/trained").is_private


def test_a_job_learns_no_more_of_others_models_than_that_they_are_nowhere(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    names = ("x/private", "x/disabled", "x/deleted", "x/nobody")
    for name in names[:3]:
        store.publish(name, write_tiny_gpt2(store.stage()), visibility=Visibility.PRIVATE, viewer=Viewer("ada"))
    store.disable("x/disabled")
    store.delete_model("x/deleted")
    words = set()
    for name in names:
        with pytest.raises(ModelNotFound) as denied:
            hub.locate(name, viewer=Viewer("bob"))
        words.add(denied.value.message.replace(name, "?"))
    assert len(words) == 1

    server.add("x/deleted", write_tiny_gpt2(tmp_path / "repo"))  # the Hub's own of that name does not come by itself
    with pytest.raises(ModelNotFound):
        hub.locate("x/deleted", viewer=Viewer("bob"))
    server.close_door()
    for name in ("x/disabled", "x/deleted"):
        with pytest.raises(HubUnreachable):
            hub.locate(name, viewer=Viewer("bob"))
