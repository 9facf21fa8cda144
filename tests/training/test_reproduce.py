"""A trained model is made again from what it says of itself, and has the same weights bit for bit."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from deployments.cli import app
from serve.errors import Conflict, InvalidRequest, ModelNotFound, NotFound
from serve.store.datasets import read_dataset
from serve.store.revisions import Revision, Store
from serve.training.dataset import Dataset, build_dataset, epoch_texts
from serve.training.finetune import FineTuneSpec, finetune
from serve.training.kept_dataset import from_lines, to_lines
from serve.training.preprocess import preprocess
from serve.training.reproduce import reproduce
from serve.training.tracking.provenance import Making, dataset_sha256, write_records
from serve.types import FileRecord, Job, JobRequest, JobStatus
from tests.fakes.models import write_tiny_gpt2
from tests.training.making import made_up_texts

BASE = "tiny/base"
ADA, BOTH = "huggingtweets/ada", "huggingtweets/ada-bob"


@dataclass(frozen=True)
class Trained:
    """A store with the models of one person and of two, and the archives they were made from."""

    store: Store
    root: Path
    archives: Mapping[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Only looked at: a test that changes something makes its own."""
    return make(tmp_path_factory.mktemp("made"))


def make(root: Path) -> Trained:
    store = Store(root, embedded={})
    store.publish(BASE, write_tiny_gpt2(store.stage()))
    archives = {}
    for number, (handle, length) in enumerate({"ada": 150, "bob": 180}.items()):
        archives[handle] = root / f"{handle}-posts.txt"
        archives[handle].write_text("\n".join(made_up_texts(length, seed=number)) + "\n", encoding="utf-8")
    trained = Trained(store, root, archives)
    train(trained, ADA, ("ada",), seed=7, batch_size=2, dtype="float32")
    train(trained, BOTH, ("bob", "ada"), seed=8, batch_size=1)
    return trained


def train(
    trained: Trained,
    model_id: str,
    handles: tuple[str, ...],
    *,
    seed: int,
    batch_size: int,
    dtype: Literal["auto", "float32"] = "auto",
    validation: Path | None = None,
) -> Revision:
    """As a job does it."""
    store, base = trained.store, trained.store.resolve(BASE)
    judge_by = None if validation is None else record(validation)
    data = preprocess([(record(trained.archives[handle]), handle) for handle in handles], validation=judge_by)
    texts = None if data.validation is None else data.validation.kept
    dataset = build_dataset(data.kept_by_handle, seed=seed, validation=texts)
    spec = FineTuneSpec(
        base=base.path,
        epochs=[epoch_texts(dataset, seed, epoch) for epoch in range(2)],
        held_out=dataset.held_out,
        out=store.stage(),
        seed=seed,
        batch_size=batch_size,
        num_previews=1,
        num_threads=1,
        dtype=dtype,
    )
    result = finetune(spec)
    request = JobRequest(BASE, (), validation_file=None if judge_by is None else judge_by.id)
    job = Job("ftjob-1", request, JobStatus.RUNNING, 1_700_000_000, seed)
    write_records(spec.out, Making(job, 1, 1_700_000_000, base.model_id, base.revision, data, dataset, spec, result))
    store.keep_dataset(spec.out, dataset_sha256(dataset), to_lines(dataset))
    return store.publish(model_id, spec.out)


def record(path: Path) -> FileRecord:
    return FileRecord(f"file-{path.stem}", path.name, path.stat().st_size, 0, "fine-tune", path)


def dataset_path(trained: Trained, model_id: str) -> Path:
    sha256 = json.loads((trained.store.resolve(model_id).path / "rookery.json").read_text())["dataset_sha256"]
    path = trained.store.find_dataset(model_id, sha256)
    assert path is not None
    return path


def with_provenance(trained: Trained, model_id: str, **changes: Any) -> Revision:
    """A further revision that tells another story of itself, of which the `changes` that are None are left out."""
    found = trained.store.resolve(model_id)
    folder = trained.store.stage()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "rookery.json", "runs/preprocess.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((found.path / name).read_bytes())
    told = json.loads((folder / "rookery.json").read_text()) | changes
    (folder / "rookery.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return trained.store.publish(model_id, folder, alias=None)


# --- Bit for bit ------------------------------------------------------------------------------------------------


def test_a_model_is_made_again_with_the_same_weights(made: Trained) -> None:
    first, again = (reproduce(made.store, model_id, strict=True) for model_id in (ADA, BOTH))
    for done in (first, again):
        print(f"{done.model_id}: {done.expected_sha256} == {done.reproduced_sha256} in {done.duration_s:.1f} s")
        assert done.equal and done.differences == ()
        assert done.expected_sha256 == done.reproduced_sha256 and len(done.expected_sha256) == 64
        assert made.store.resolve(done.model_id).revision == done.revision
    assert first.expected_sha256 != again.expected_sha256
    assert os.listdir(made.root / "models/.staging") == []


def test_another_seed_makes_other_weights(made: Trained) -> None:
    other = with_provenance(made, ADA, seed=9)
    done = reproduce(made.store, f"{ADA}@{other.revision[:8]}")
    assert not done.equal and done.revision == other.revision


def test_the_model_that_is_made_is_kept_on_request(made: Trained, tmp_path: Path) -> None:
    done = reproduce(made.store, ADA, out=tmp_path / "again")
    assert done.equal
    written = (tmp_path / "again/model.safetensors").read_bytes()
    assert written == (made.store.resolve(ADA).path / "model.safetensors").read_bytes()
    with pytest.raises(InvalidRequest, match="not empty"):
        reproduce(made.store, ADA, out=tmp_path / "again")


# --- What it has learnt -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_archives_in_any_order_take_the_place_of_a_data_set_that_is_not_kept(tmp_path: Path) -> None:
    trained = make(tmp_path)
    dataset_path(trained, BOTH).unlink()
    digests = json.loads((trained.store.resolve(BOTH).path / "rookery.json").read_text())["file_sha256"].values()
    with pytest.raises(NotFound, match="Give the 2 archives it was made from with --archive") as missing:
        reproduce(trained.store, BOTH)
    assert all(digest in missing.value.message for digest in digests)

    assert reproduce(trained.store, BOTH, archives=[trained.archives["ada"], trained.archives["bob"]]).equal
    renamed = trained.archives["bob"].rename(tmp_path / "posts.txt")
    assert reproduce(trained.store, BOTH, archives=[trained.archives["ada"], renamed], strict=True).equal


@pytest.mark.slow
def test_a_model_that_was_judged_by_a_file_of_its_own_is_made_again_from_its_archives(tmp_path: Path) -> None:
    trained = make(tmp_path)
    judge_by = tmp_path / "judge.txt"
    texts = [*made_up_texts(5, seed=9), *trained.archives["ada"].read_text().splitlines()[:5]]
    judge_by.write_text("\n".join(texts) + "\n", encoding="utf-8")
    found = train(trained, BOTH, ("bob", "ada"), seed=8, batch_size=1, validation=judge_by)
    told = json.loads((found.path / "rookery.json").read_text())
    assert told["validation_sha256"] not in told["file_sha256"].values() and len(told["file_sha256"]) == 2
    assert reproduce(trained.store, BOTH, strict=True).equal

    dataset_path(trained, BOTH).unlink()
    with pytest.raises(NotFound, match=f"Give the 3 archives .*{told['validation_sha256']}"):
        reproduce(trained.store, BOTH)
    archives = [judge_by, *trained.archives.values()]
    assert reproduce(trained.store, BOTH, archives=archives, strict=True).equal
    with pytest.raises(Conflict, match=f"is not given: sha256 {told['validation_sha256']}"):
        reproduce(trained.store, BOTH, archives=archives[1:], strict=True)


def test_archives_that_give_other_texts_are_refused_before_anything_is_trained(made: Trained, tmp_path: Path) -> None:
    longer = tmp_path / "longer.txt"
    longer.write_text(made.archives["ada"].read_text() + "one more post of many words that nobody has seen\n")
    told: list[str] = []
    with pytest.raises(Conflict, match="do not give the texts"):
        reproduce(made.store, ADA, archives=[longer], on_difference=told.append, on_progress=lambda step: pytest.fail())
    assert [sentence.partition(":")[0] for sentence in told] == [
        "It was not made from 'longer.txt'.",
        "An archive it was made from is not given",
    ]
    with pytest.raises(Conflict):
        reproduce(made.store, BOTH, archives=[made.archives["ada"]])


@pytest.mark.parametrize("damage", ["cut", "no gzip", "flipped", "other texts", "no json", "other json"])
def test_a_damaged_data_set_is_told_with_what_to_give(made: Trained, damage: str) -> None:
    path = dataset_path(made, ADA)
    whole = path.read_bytes()
    lines = {"other texts": read_dataset(path)[1:], "no json": ["{"], "other json": ["[1]"]}.get(damage, [])
    middle = len(whole) // 2
    spoilt = {
        "cut": whole[:-20],
        "no gzip": b"x" * 100,
        "flipped": whole[:middle] + bytes(99) + whole[middle + 99 :],
    }.get(damage, gzip.compress("\n".join(lines).encode()))
    path.write_bytes(spoilt)
    try:
        with pytest.raises(NotFound, match="is damaged. Give the archive"):
            reproduce(made.store, ADA)
    finally:
        path.write_bytes(whole)


def test_kept_lines_are_the_data_set_again() -> None:
    generator = random.Random(0)
    for seed in range(50):
        people = {
            f"h{i}": [f'tweet {generator.randrange(40)} \u2028 🤖\n"' for _ in range(generator.randrange(1, 30))]
            for i in range(generator.randrange(1, 4))
        }
        dataset = build_dataset(people, seed=seed)
        assert from_lines(to_lines(dataset)) == dataset
    bare = Dataset(train=("a", "b"), held_out=("c",), counts={"ada": {"kept": 2, "train": 2, "held_out": 0}})
    assert from_lines(to_lines(bare)) == bare  # held out from another file: nobody's


# --- What is not as it was ---------------------------------------------------------------------------------------


def test_whatever_differs_is_told_and_refused_when_strict(made: Trained) -> None:
    found = made.store.resolve(ADA)
    versions = json.loads((found.path / "rookery.json").read_text())["versions"] | {"torch": "1.0", "nothing": "2"}
    other = with_provenance(made, ADA, versions=versions, machine="abacus", base_revision="0" * 40, code_sha256="5")
    name, told = f"{ADA}@{other.revision}", list[str]()
    done = reproduce(made.store, name, on_difference=told.append)
    assert done.equal and tuple(told) == done.differences  # none of these differences is a real one
    for word in ("torch was 1.0", "nothing was 2", "was abacus", "The base 'tiny/base' was 000", "code of the service"):
        assert any(word in sentence for sentence in told)
    with pytest.raises(Conflict, match="not how 'huggingtweets/ada' was made.*torch was 1.0"):
        reproduce(made.store, name, strict=True)


def test_models_without_a_whole_story_are_refused(made: Trained) -> None:
    with pytest.raises(NotFound, match="does not say how it was made"):
        reproduce(made.store, BASE)
    untold: list[dict[str, Any]] = [{"seed": None}, {"seed": "x"}, {"file_sha256": []}, {"handles": 3}]
    for changes in untold:
        with pytest.raises(NotFound, match="does not say how it was made"):
            reproduce(made.store, f"{ADA}@{with_provenance(made, ADA, **changes).revision}")
    checkpoint = with_provenance(made, ADA, checkpoint_step=3)
    with pytest.raises(InvalidRequest, match="is a checkpoint"):
        reproduce(made.store, f"{ADA}@{checkpoint.revision}")
    homeless = with_provenance(made, ADA, base_model="tiny/gone")
    for model_id in ("huggingtweets/nobody", f"{ADA}@{homeless.revision}"):
        with pytest.raises(ModelNotFound):
            reproduce(made.store, model_id)


# --- The command --------------------------------------------------------------------------------------------------


def test_the_command_prints_both_hashes_and_its_exit_code_tells_whether_they_are_equal(made: Trained) -> None:
    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        environment = {"ROOKERY_HUB_ENABLED": "0"}
        command = ["reproduce", *arguments, "--json", "--data", str(made.root)]
        result = CliRunner().invoke(app, command, env=environment, catch_exceptions=False)
        return result.exit_code, json.loads(result.stdout)

    code, told = run("HuggingTweets/Ada", "--archive", str(made.archives["ada"]))
    assert code == 0 and told["equal"] is True
    assert told.keys() == {
        *("model", "revision", "expected_sha256", "reproduced_sha256", "equal", "dataset_sha256", "seconds"),
        "differences",
    }
    assert told["expected_sha256"] == told["reproduced_sha256"] and told["model"] == ADA

    code, told = run(f"{ADA}@{with_provenance(made, ADA, learning_rate=0.01).revision}")
    assert code == 1 and told["equal"] is False
