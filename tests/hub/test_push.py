"""Pushing with the real huggingface_hub: from one fake Hub (the server's read side) to another that takes it in."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from serve.errors import Conflict, InvalidRequest, ModelGated, ModelNotFound, StoreUnavailable
from serve.hub import push_cache, push_errors, push_target
from serve.hub.push import Pushed, PushProgress, push
from serve.hub.push_card import rename_in_card
from serve.store.card import CardFacts, build_card
from tests.fakes.hub import Answer, FakeHub, Fault, Request, fake_hub
from tests.fakes.hub_uploads import Uploads, User, accept_uploads
from tests.fakes.models import write_tiny_gpt2

# huggingface_hub's own way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ADA = "huggingtweets/ada"
TOKEN = "hf_lina"

PUSH = """
import sys
from pathlib import Path
from serve.hub.push import push
source, endpoint, cache = sys.argv[1:]
push("huggingtweets/ada", source=source, endpoint=endpoint, token="hf_lina", to="lina/ada", cache=Path(cache))
"""


@dataclass
class World:
    """`rookery` has the models, `hub` takes them in."""

    rookery: FakeHub
    hub: FakeHub
    uploads: Uploads
    folder: Path

    def push(self, model_id: str = ADA, **options: object) -> Pushed:
        given = {"to": "lina/ada", "token": TOKEN, "endpoint": self.hub.endpoint, **options}
        return push(
            model_id,
            source=self.rookery.endpoint,
            cache=self.folder / "cache",
            **given,  # type: ignore[arg-type]
        )

    def head(self, repo_id: str = "lina/ada") -> Path:
        return self.hub.repos[repo_id].head.folder

    def num_commits(self, repo_id: str = "lina/ada") -> int:
        """Beside the one that creates it."""
        return len(self.hub.repos[repo_id].commits) - 1

    @property
    def weights_oid(self) -> str:
        return sha256(self.rookery.repos[ADA].head.folder / "model.safetensors")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_bot(folder: Path, seed: int = 0) -> Path:
    """A model as ours are: with card, picture, runs and provenance."""
    write_tiny_gpt2(folder, seed=seed)
    (folder / "README.md").write_text(build_card(CardFacts(ADA, ("ada",), "gpt2", counts={"ada": {"kept": seed}})))
    (folder / "predictions.png").write_bytes(b"\x89PNG" + bytes(range(256)) * 8)
    (folder / "avatars").mkdir()
    (folder / "avatars/0.webp").write_bytes(b"RIFF" + bytes(range(256)))
    (folder / "rookery.json").write_text(json.dumps({"seed": seed, "base_model": "gpt2"}))
    (folder / "runs").mkdir()
    for run in ("preprocess", "train"):
        (folder / "runs" / f"{run}.json").write_text(json.dumps({"job_type": run}))
    return folder


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(push_errors, "_PAUSE_S", 0.01)
    with fake_hub() as rookery, fake_hub() as hub, accept_uploads(hub, tmp_path / "uploads") as uploads:
        for one in (rookery, hub):
            one.storage = f"http://localhost:{one.port}"  # another host's redirects are not followed by HEAD
        rookery.add(ADA, write_bot(tmp_path / "ada"))
        yield World(rookery, hub, uploads, tmp_path)


# --- What arrives -----------------------------------------------------------------------------------------


def test_a_model_arrives_whole_and_its_commit_has_the_tag_of_its_revision(world: World) -> None:
    pushed = world.push()
    source, target = world.rookery.repos[ADA].head, world.head()
    names = {path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file()}
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == {
        *names,
        ".gitattributes",
    }
    assert all((target / name).read_bytes() == (source.folder / name).read_bytes() for name in names - {"README.md"})
    tag = f"rookery-{source.sha[:12]}"
    assert world.hub.repos["lina/ada"].tags == {tag: pushed.commit}
    assert pushed == Pushed(
        "lina/ada", f"{world.hub.endpoint}/lina/ada", pushed.commit, tag, pushed.uploaded_bytes, False
    )
    assert world.num_commits() == 1 and not list((world.folder / "cache").iterdir())


def test_what_is_pushed_can_be_fetched_with_the_hubs_own_client(world: World, tmp_path: Path) -> None:
    pushed = world.push()
    folder = snapshot_download(
        "lina/ada", revision=pushed.tag, endpoint=world.hub.endpoint, token=TOKEN, local_dir=tmp_path / "back"
    )
    assert sha256(Path(folder) / "model.safetensors") == world.weights_oid


def test_other_files_of_the_server_stay_there(world: World) -> None:
    folder = world.rookery.repos[ADA].head.folder
    (folder / ".datasets").mkdir()
    (folder / ".datasets" / "ada.txt").write_text("private")
    (folder / "notes.txt").write_text("private")
    world.rookery.add(ADA, folder)
    world.push()
    assert not {"notes.txt", ".datasets"} & {path.name for path in world.head().iterdir()}


def test_pushing_again_changes_nothing_and_says_so(world: World) -> None:
    first = world.push()
    seen = len(world.hub.requests)
    second = world.push()
    assert (second.skipped, second.commit, second.uploaded_bytes) == (True, first.commit, 0)
    assert world.num_commits() == 1
    assert {request.method for request in world.hub.requests[seen:]} == {"GET"}
    assert not any("resolve" in request.path for request in world.hub.requests[seen:])


def test_an_edited_card_stays_until_another_revision_comes(world: World, tmp_path: Path) -> None:
    first = world.push()
    world.uploads.put("lina/ada", README__md=b"Mine.")
    again = world.push()
    assert (again.skipped, again.commit) == (True, first.commit)
    assert (world.head() / "README.md").read_bytes() == b"Mine."
    world.rookery.add(ADA, write_bot(tmp_path / "newer", seed=1))
    assert not world.push().skipped
    assert (world.head() / "README.md").read_bytes() != b"Mine."


def test_a_new_revision_is_a_commit_of_what_differs_and_what_it_lacks_goes(world: World, tmp_path: Path) -> None:
    world.push()
    world.uploads.put("lina/ada", pytorch_model__bin=b"old", LICENSE=b"MIT")
    newer = write_bot(tmp_path / "newer", seed=1)
    (newer / "generation_config.json").unlink()
    sha = world.rookery.add(ADA, newer)
    pushed = world.push()
    here = {path.name for path in world.head().iterdir()}
    assert not {"pytorch_model.bin", "generation_config.json"} & here and "LICENSE" in here
    assert sha256(world.head() / "model.safetensors") == sha256(newer / "model.safetensors")
    assert pushed.tag == f"rookery-{sha[:12]}" and len(world.hub.repos["lina/ada"].tags) == 2


def test_going_back_to_an_earlier_revision_makes_it_main_without_sending_its_weights(
    world: World, tmp_path: Path
) -> None:
    revision, oid, first = world.rookery.repos[ADA].head.sha, world.weights_oid, world.push()
    world.rookery.add(ADA, write_bot(tmp_path / "newer", seed=1))
    world.push()
    once = world.uploads.bucket.received[oid]
    back = world.push(f"{ADA}@{revision}")
    assert not back.skipped and back.tag == first.tag
    assert sha256(world.head() / "model.safetensors") == oid
    assert world.uploads.bucket.received[oid] == once


def test_a_checkpoint_is_pushed_only_where_its_revision_is_named(world: World, tmp_path: Path) -> None:
    main = world.rookery.repos[ADA].head.sha
    checkpoint = world.rookery.add(ADA, write_bot(tmp_path / "checkpoint", seed=5), branch="checkpoint")
    assert world.push().tag == f"rookery-{main[:12]}"
    assert world.push(f"{ADA}@{checkpoint}").tag == f"rookery-{checkpoint[:12]}"


def test_progress_is_told_from_looking_to_committing(world: World) -> None:
    told: list[PushProgress] = []
    world.push(on_progress=told.append)
    phases = list(dict.fromkeys(progress.phase for progress in told))
    assert phases == ["looking", "fetching", "uploading", "committing"]
    assert (told[-1].num_bytes, told[-1].total_bytes) == (told[-1].total_bytes, told[-2].total_bytes)


# --- The card ---------------------------------------------------------------------------------------------


def test_the_card_names_the_pushed_id_in_its_code_and_nowhere_else_differs(world: World) -> None:
    world.push()
    before = (world.rookery.repos[ADA].head.folder / "README.md").read_text()
    after = (world.head() / "README.md").read_text()
    assert "pipeline('text-generation', model='lina/ada')" in after
    assert after == before.replace(f"model='{ADA}'", "model='lina/ada'")


def test_only_whole_quoted_ids_in_code_are_renamed() -> None:
    code = f"```python\r\nload('{ADA}', \"{ADA}\", '{ADA}-2', 'x/{ADA}')  # {ADA}\r\n```"
    card = f"# {ADA}\r\n\r\nAfter '{ADA}', \xe9.\r\n\r\n{code}\r\n\r\n'{ADA}'\r\n".encode("latin-1")
    renamed = rename_in_card(card, ADA, "lina/ada")
    assert renamed == card.replace(f"('{ADA}', \"{ADA}\"".encode(), b"('lina/ada', \"lina/ada\"")
    assert rename_in_card(card, ADA, ADA) == card


@pytest.mark.parametrize("card", [b"# Mine\r\n\r\nwith CRLF\r\n", "\ufeff# Café".encode(), b""])
def test_a_card_that_names_no_id_arrives_byte_for_byte(world: World, card: bytes) -> None:
    folder = world.rookery.repos[ADA].head.folder
    (folder / "README.md").write_bytes(card)
    world.rookery.add(ADA, folder)
    world.push()
    assert (world.head() / "README.md").read_bytes() == card


def test_a_card_that_is_no_utf8_is_refused_and_not_rewritten(world: World) -> None:
    folder = world.rookery.repos[ADA].head.folder
    (folder / "README.md").write_bytes(b"# Caf\xe9\n")
    world.rookery.add(ADA, folder)
    with pytest.raises(Conflict, match=r"README.md of 'huggingtweets/ada' is not UTF-8"):
        world.push()


# --- Where to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orgs", "to", "expected"),
    [
        ({}, None, "lina/ada"),
        ({"huggingtweets": "read"}, None, "lina/ada"),
        ({"huggingtweets": "write"}, None, ADA),
        ({"birds": "write"}, "birds/wren", "birds/wren"),
        ({}, "wren", "lina/wren"),
    ],
)
def test_a_model_goes_where_its_pusher_may_write(
    world: World, orgs: dict[str, str], to: str | None, expected: str
) -> None:
    world.uploads.users[TOKEN] = User("lina", orgs)
    assert world.push(to=to).repo == expected
    assert expected in world.hub.repos


def test_a_private_model_becomes_a_private_repository_unless_it_is_to_be_public(world: World) -> None:
    world.rookery.add(ADA, world.rookery.repos[ADA].head.folder, private=True)
    world.push(source_key="hf_secret", to="lina/hidden")
    assert world.hub.repos["lina/hidden"].head.info == {"private": True}
    world.push(source_key="hf_secret", to="lina/shown", visibility="public")
    assert world.hub.repos["lina/shown"].head.info == {}
    with pytest.raises(Conflict, match=r"'lina/shown' .* is public.*--public"):
        world.push(source_key="hf_secret", to="lina/shown")


def add_strangers_model(world: World, repo_id: str = "lina/ada") -> Path:
    """A repository on the Hub that no push has made."""
    folder = write_tiny_gpt2(world.folder / "strange", seed=99)
    (folder / "README.md").write_text("# My other model")
    world.hub.add(repo_id, folder)
    return folder


def test_a_repository_that_no_push_has_made_is_replaced_only_where_it_is_named(world: World) -> None:
    add_strangers_model(world)
    head = world.hub.repos["lina/ada"].head.sha
    with pytest.raises(Conflict, match=r"'lina/ada' .*was not pushed from a Rookery: name it with --to"):
        world.push(to=None)
    assert world.hub.repos["lina/ada"].head.sha == head
    assert not any("resolve" in request.path for request in world.rookery.requests), "asked before anything is fetched"
    assert world.push(to="lina/ada").repo == "lina/ada"
    assert sha256(world.head() / "model.safetensors") == world.weights_oid


def test_what_a_push_has_made_is_pushed_to_again_without_naming_it(world: World, tmp_path: Path) -> None:
    world.uploads.create("lina/ada")
    assert not world.push(to=None).skipped, "a new repository has a file of the Hub's own"
    world.rookery.add(ADA, write_bot(tmp_path / "newer", seed=1))
    assert not world.push(to=None).skipped
    assert world.num_commits() == 2


def test_a_push_that_set_no_tag_is_known_by_its_weights(world: World) -> None:
    world.uploads.refuse("/tag/", 400)
    with pytest.raises(Conflict, match="400"):
        world.push(to=None)
    assert world.push(to=None).tag in world.hub.repos["lina/ada"].tags


# --- The cache --------------------------------------------------------------------------------------------


def break_off(world: World, **options: object) -> list[Path]:
    """A push that fails at its commit. What lies in the cache then."""
    world.uploads.refuse("/commit/main", 400)
    with pytest.raises(Conflict):
        world.push(**options)  # type: ignore[arg-type]
    return list((world.folder / "cache").iterdir())


def test_only_the_user_may_look_into_what_is_fetched(world: World) -> None:
    (world.folder / "cache").mkdir(mode=0o755)
    folders = [world.folder / "cache", *break_off(world)]
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700, 0o700]


def test_what_no_push_has_asked_for_in_a_week_is_removed_unless_it_is_in_use(world: World, tmp_path: Path) -> None:
    [kept] = break_off(world)
    left, used = kept.with_name("left"), kept.with_name("used")
    for folder in (left, used):
        (folder / "runs").mkdir(parents=True)
        os.utime(folder, (0, time.time() - push_cache._KEPT_S - 1))
    handle = os.open(used, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    world.rookery.add("huggingtweets/bo", write_bot(tmp_path / "bo", seed=2))
    world.push("huggingtweets/bo", to="lina/bo")
    assert {kept, used} == set((world.folder / "cache").iterdir())
    os.close(handle)
    os.utime(kept, (0, 0))
    seen = len(world.rookery.requests)
    world.push()
    assert not any("resolve" in request.path for request in world.rookery.requests[seen:]), "its own is asked for now"
    assert not list((world.folder / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_told(world: World) -> None:
    (world.folder / "cache").write_text("a file")
    with pytest.raises(StoreUnavailable, match="cache"):
        world.push()


# --- Interrupted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [None, 2**16])
def test_a_killed_push_goes_on_without_fetching_again(world: World, part_bytes: int | None) -> None:
    world.uploads.part_bytes = part_bytes
    bucket = world.uploads.bucket
    bucket.hold_after = 2**15
    arguments = [world.rookery.endpoint, world.hub.endpoint, str(world.folder / "cache")]
    process = subprocess.Popen([sys.executable, "-c", PUSH, *arguments], env=environment())
    try:
        assert bucket.is_held.wait(60)
    finally:
        process.kill()
        process.wait()
    bucket.hold_after = None
    bucket.received.clear()
    bucket.release.set()
    assert not world.hub.repos["lina/ada"].tags and world.num_commits() == 0
    seen = len(world.rookery.requests)
    pushed = world.push()
    assert not pushed.skipped and world.num_commits() == 1
    assert not any("resolve" in request.path for request in world.rookery.requests[seen:])
    assert sha256(world.head() / "model.safetensors") == world.weights_oid
    assert bucket.received[world.weights_oid] == (world.head() / "model.safetensors").stat().st_size


def test_a_push_that_failed_at_its_commit_does_not_send_finished_files_again(world: World) -> None:
    world.uploads.refuse("/commit/main", 400)
    with pytest.raises(Conflict):
        world.push()
    assert world.uploads.bucket.has(world.weights_oid)
    once = world.uploads.bucket.received[world.weights_oid]
    world.push()
    assert world.uploads.bucket.received[world.weights_oid] == once


def test_a_connection_that_breaks_in_an_upload_is_taken_up_by_itself(world: World) -> None:
    world.uploads.bucket.cut_after = 2**16
    assert not world.push().skipped
    assert sha256(world.head() / "model.safetensors") == world.weights_oid


@pytest.mark.slow
def test_a_fetch_from_the_server_that_broke_off_keeps_the_files_that_are_whole(world: World) -> None:
    world.rookery.fail(ADA, Fault(prefix="/storage/", path="model.safetensors", truncate=True))
    with pytest.raises(StoreUnavailable):
        world.push()
    assert "lina/ada" not in world.hub.repos, "nothing is created for what does not arrive"
    world.rookery.recover()
    seen = len(world.rookery.requests)
    assert not world.push().skipped
    names = [request.path.rpartition("/")[2] for request in world.rookery.requests[seen:] if "resolve" in request.path]
    assert "model.safetensors" in names and "config.json" not in names


@pytest.mark.parametrize("status", [500, 503, 412])
def test_a_commit_that_is_refused_for_now_is_tried_again(world: World, status: int) -> None:
    world.uploads.refuse("/commit/main", status)
    assert not world.push().skipped
    assert world.num_commits() == 1


@pytest.mark.parametrize(
    "fault", [Fault(500, "/commit/main", times=1), Fault(path="/commit/main", reset="before", times=1)]
)
def test_a_commit_whose_answer_is_lost_is_found_and_tagged(world: World, fault: Fault) -> None:
    world.hub.fail("lina/ada", fault)
    pushed = world.push()
    assert world.num_commits() == 1
    assert world.hub.repos["lina/ada"].tags == {pushed.tag: pushed.commit}


def test_a_tag_that_could_not_be_set_is_set_the_next_time(world: World) -> None:
    world.uploads.refuse("/tag/", 400)
    with pytest.raises(Conflict, match="400"):
        world.push()
    assert world.hub.repos["lina/ada"].tags == {} and world.num_commits() == 1
    again = world.push()
    assert again.skipped and again.uploaded_bytes == 0 and world.num_commits() == 1
    assert world.hub.repos["lina/ada"].tags == {again.tag: again.commit}


def test_a_tag_that_cannot_be_set_for_now_is_tried_again(world: World) -> None:
    world.uploads.refuse("/tag/", 503)
    pushed = world.push()
    assert world.num_commits() == 1 and world.hub.repos["lina/ada"].tags == {pushed.tag: pushed.commit}


def test_pushes_at_the_same_time_make_one_commit(world: World) -> None:
    results: list[Pushed | Exception] = []

    def run(cache: str) -> None:
        try:
            done = push(
                *(ADA,),
                source=world.rookery.endpoint,
                endpoint=world.hub.endpoint,
                token=TOKEN,
                to="lina/ada",
                cache=world.folder / cache,
            )
            results.append(done)
        except Exception as exc:
            results.append(exc)

    threads = [threading.Thread(target=run, args=[cache]) for cache in ("here", "here", "there", "elsewhere")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pushed = [one for one in results if isinstance(one, Pushed)]
    assert len(pushed) == 4, results
    assert world.num_commits() == 1 and len({one.commit for one in pushed}) == 1
    assert any(not one.skipped for one in pushed)


def test_a_hub_that_offers_xet_gets_the_weights_in_chunks(world: World) -> None:
    source = world.rookery.repos[ADA].head.folder
    storage = world.uploads.offer_xet(
        source / name for name in ("model.safetensors", "predictions.png", "avatars/0.webp")
    )
    arguments = [world.rookery.endpoint, world.hub.endpoint, str(world.folder / "cache")]
    subprocess.run([sys.executable, "-c", PUSH, *arguments], env=environment(), check=True, timeout=60)
    assert world.num_commits() == 1 and len(world.hub.repos["lina/ada"].tags) == 1
    assert not any("/info/lfs" in request.path for request in world.hub.requests) and not world.uploads.bucket.received
    stored = sum(path.stat().st_size for path in storage.rglob("*") if path.is_file())
    assert stored > (source / "model.safetensors").stat().st_size / 2


# --- Refused ----------------------------------------------------------------------------------------------


def test_an_unknown_token_says_how_to_log_in(world: World) -> None:
    with pytest.raises(ModelGated, match="hf auth login"):
        world.push(token="hf_wrong")


def test_nobody_logged_in_says_how_to(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_target, "get_token", lambda: None)
    with pytest.raises(ModelGated, match=r"not logged in .*hf auth login"):
        world.push(token=None)


def test_a_token_that_only_reads_is_refused_before_anything_is_fetched(world: World) -> None:
    world.uploads.users[TOKEN] = User("lina", role="read")
    with pytest.raises(ModelGated, match="may only read"):
        world.push()
    assert not any("resolve" in request.path for request in world.rookery.requests)


def test_somebody_elses_namespace_is_refused_with_what_to_do(world: World) -> None:
    with pytest.raises(ModelGated, match=r"write to 'readers/ada' \(403\).*--to"):
        world.push(to="readers/ada")


def test_a_busy_hub_says_when_to_come_back(world: World) -> None:
    world.uploads.refuse("/commit/main", 429, {"Retry-After": "3600"}, times=9)
    with pytest.raises(StoreUnavailable, match=r"429 .* in 3600 s") as refused:
        world.push()
    assert refused.value.retry_after_s == 3600


def test_a_card_that_the_hub_does_not_take_is_told(world: World) -> None:
    folder = world.rookery.repos[ADA].head.folder
    card = (folder / "README.md").read_text().replace("base_model: gpt2", "base_model: ./base")
    (folder / "README.md").write_text(card)
    world.rookery.add(ADA, folder)
    with pytest.raises(Conflict, match="README.md"):
        world.push()


@pytest.mark.parametrize("to", ["a/b/c", "lina/ada@main", "../ada", ""])
def test_an_impossible_target_is_refused(world: World, to: str) -> None:
    with pytest.raises(InvalidRequest, match="org/name"):
        world.push(to=to)


def test_a_model_that_the_server_lacks_is_not_found(world: World) -> None:
    for model_id in ("huggingtweets/nobody", f"{ADA}@{'0' * 40}"):
        with pytest.raises(ModelNotFound, match=r"at http://127.0.0.1"):
            world.push(model_id)


def test_a_model_without_safetensors_leaves_the_hub_as_it_is(world: World) -> None:
    folder = world.rookery.repos[ADA].head.folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    world.rookery.add(ADA, folder)
    add_strangers_model(world)
    head = world.hub.repos["lina/ada"].head.sha
    with pytest.raises(Conflict, match=r"'huggingtweets/ada' .* has no model.safetensors"):
        world.push()
    assert world.hub.repos["lina/ada"].head.sha == head


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_of_ours_is_no_hub_and_does_not_get_the_token_however_it_is_spelled(world: World, host: str) -> None:
    def list_models(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
        return Answer(200, b'{"object": "list", "data": []}', {"Content-Type": "application/json"})

    world.rookery.routes.insert(0, ("GET", re.compile("/v1/models"), list_models))
    with pytest.raises(InvalidRequest, match="HF_ENDPOINT"):
        world.push(endpoint=f"http://{host}:{world.rookery.port}/")
    assert not any(request.authorization for request in world.rookery.requests)


def test_a_server_that_cannot_say_what_it_is_does_not_get_the_token(world: World) -> None:
    world.hub.routes.insert(0, ("GET", re.compile("/v1/models"), lambda hub, request, match: Answer(503)))
    with pytest.raises(StoreUnavailable):
        world.push()
    assert not any(request.authorization for request in world.hub.requests)


def test_a_hub_that_is_not_there_is_an_outage(world: World) -> None:
    world.hub.close_door()
    with pytest.raises(StoreUnavailable, match="broke off"):
        world.push()


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
