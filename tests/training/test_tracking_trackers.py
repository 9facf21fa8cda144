"""Both libraries for real: W&B offline, synced later and online (a server of our own), Trackio in its own SQLite."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.store.model_files import content_hash
from serve.training.tracking.lineage import read_runs, record_runs
from serve.training.tracking.provenance import dataset_sha256
from serve.training.tracking.trackers import Telling, tracker_environment
from serve.types import Integration, Run
from tests.fakes.models import write_tiny_gpt2
from tests.training.making import BASE, Training
from tests.training.tracked import PREVIEWS, create_job, making_of, runs_of
from tests.training.wandb_server import API_KEY, WandbServer

MODEL = "huggingtweets/ada"
INPUTS = {
    "preprocess": [("raw-dataset", "tweets-ada")],
    "train": [("train-dataset", "dataset-ada"), ("pretrained-model", BASE.replace("/", "--"))],
}
OUTPUTS = {"preprocess": [("train-dataset", "dataset-ada")], "train": [("finetuned-model", "ada")]}
WANDB = Integration("wandb")
TRACKIO = Integration("trackio")


@pytest.fixture
def server() -> Iterator[WandbServer]:
    pytest.importorskip("wandb")
    server = WandbServer()
    yield server
    server.close()


def recorded(training: Training, *handles: str, revision: str = "a" * 64, seed: int = 0) -> tuple[Run, ...]:
    """The runs of a new job, by way of the database."""
    job = create_job(training, *(handles or ("ada",)), seed=seed)
    runs = runs_of(training, job, training.options.data_dir / revision, revision)
    with training.database.write() as session:
        record_runs(session, job.id, runs)
    with training.database.read() as session:
        return read_runs(session, job.id)


def environment(training: Training, **variables: str) -> dict[str, str]:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    return tracker_environment(training.options.data_dir, {**quiet, **variables})


def online(server: WandbServer) -> dict[str, str]:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}


def tell(training: Training, telling: Telling, **variables: str) -> dict[str, str]:
    """What the process answers."""
    done = subprocess.run(
        [sys.executable, "-m", "serve.training.tracking.trackers", "--parent", str(os.getpid())],
        input=telling.to_json(),
        env=environment(training, **variables),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


def offline_folders(training: Training) -> dict[str, Path]:
    """By job type."""
    folders = (training.options.data_dir / "trackers" / "wandb").glob("offline-run-*")
    return {folder.name.rpartition("-")[2]: folder for folder in folders}


def told_text(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def publish(training: Training) -> str:
    """A model with weights and the data set that it has learnt; its revision."""
    making = making_of(training, create_job(training, "ada"))
    stage = training.store.stage()
    write_tiny_gpt2(stage, seed=5)
    training.store.keep_dataset(stage, dataset_sha256(making.dataset), ['{"text": "secret"}'])
    return training.store.publish(MODEL, stage, revision=content_hash(stage)).revision


# --- W&B ----------------------------------------------------------------------------------------------------


def test_wandb_offline_run_holds_the_whole_lineage(training: Training) -> None:
    pytest.importorskip("wandb")
    from tests.training.wandb_files import read_offline_run

    runs = recorded(training)
    tags = Integration("wandb", tags=("bots",))
    answer = tell(training, Telling(runs, tags, training.options.data_dir))
    folders = offline_folders(training)
    assert answer == {"outcome": folders["train"].name}
    for run in runs:
        found = read_offline_run(folders[run.job_type])
        assert (found.run.display_name, found.run.job_type, found.run.run_group) == (run.name, run.job_type, run.job_id)
        assert (found.run.project, list(found.run.tags)) == ("huggingtweets", ["bots"])
        assert found.inputs == INPUTS[run.job_type]
        assert [made for made in found.outputs if made[0] != "run_table"] == OUTPUTS[run.job_type]
        assert found.config.items() >= json.loads(json.dumps(run.config)).items()
        for artifact, expected in zip(found.artifacts, (*run.inputs, *run.outputs), strict=False):
            if artifact.type != "run_table":
                assert json.loads(artifact.metadata)["digest"] == expected.digest
                assert expected.digest[:12] in artifact.aliases
                [manifest] = artifact.manifest.contents
                assert json.loads(Path(manifest.local_path).read_text())["digest"] == expected.digest
    train = read_offline_run(folders["train"])
    steps = [(row["_step"], row.get("train_loss"), row.get("valid_loss")) for row in train.history]
    assert steps == [(0, None, 4.0), (1, 3.5, None), (2, 3.0, 3.25)]
    assert train.summary["trained_tokens"] == 128
    [table] = folders["train"].rglob("*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["Input", "Prediction"],
        "data": [["My dream is", text] for text in PREVIEWS],
    }


@pytest.mark.slow
def test_wandb_is_told_no_archives_text_and_nothing_of_this_machine(training: Training) -> None:
    pytest.importorskip("wandb")
    from tests.training.wandb_files import read_offline_run

    runs = recorded(training)
    [upload] = [path for path in training.options.uploads.iterdir() if path.is_file()]
    tell(training, Telling(runs, WANDB, training.options.data_dir))
    told = told_text(training.options.data_dir / "trackers")
    assert not any(text.encode() in told for text in upload.read_text().splitlines())
    for folder in offline_folders(training).values():
        assert read_offline_run(folder).run.host == "rookery"
        assert not list((folder / "files").glob("*"))[1:]  # at most the tables: no list of packages, no metadata


@pytest.mark.slow
def test_telling_offline_again_leaves_one_run_of_each(training: Training) -> None:
    pytest.importorskip("wandb")
    telling = Telling(recorded(training), WANDB, training.options.data_dir)
    for _ in range(2):
        assert "outcome" in tell(training, telling)
    assert len(list((training.options.data_dir / "trackers" / "wandb").glob("offline-run-*"))) == 2


def check_server_has(server: WandbServer, runs: tuple[Run, ...]) -> None:
    for run in runs:
        name = f"{run.job_id}-{run.job_type}"
        told = server.runs[name]
        assert (told["displayName"], told["jobType"], told["groupName"]) == (run.name, run.job_type, run.job_id)
        config = {key: entry["value"] for key, entry in json.loads(told["config"]).items()}
        assert config.items() >= json.loads(json.dumps(run.config)).items()
        assert sorted(server.artifact(used) for by, used in server.inputs if by == name) == sorted(INPUTS[run.job_type])
        made = [server.artifact(made) for by, made in server.outputs if by == name]
        assert [artifact for artifact in made if artifact[0] != "run_table"] == OUTPUTS[run.job_type]
        assert told.get("host", "rookery") == "rookery" and "/" not in told.get("program", "")
        assert name in server.complete
    assert all(artifact["state"] == "COMMITTED" for artifact in server.artifacts.values())
    names = [(artifact["type"], artifact["name"]) for artifact in server.artifacts.values()]
    assert len(names) == len(set(names)) == 5  # the data set that one run made is the one that the other used
    for number, artifact in server.artifacts.items():
        if artifact["type"] != "run_table":
            content = json.loads(server.content(number, "manifest.json"))
            assert content["digest"] == artifact["metadata"]["digest"] and content["digest"][:12] in artifact["aliases"]
    train = f"{runs[1].job_id}-train"
    rows = [server.history[train][line] for line in sorted(server.history[train])]
    assert [row.get("train_loss") for row in rows] == [None, 3.5, 3.0]
    assert rows[-1]["examples"]["nrows"] == len(PREVIEWS)
    assert server.summary[train]["trained_tokens"] == 128
    assert server.unknown == []


def test_wandb_server_gets_both_runs_with_their_lineage(training: Training, server: WandbServer) -> None:
    runs = recorded(training)
    answer = tell(training, Telling(runs, WANDB, training.options.data_dir), **online(server))
    assert answer == {"outcome": f"{server.url}/ada/huggingtweets/runs/{runs[1].job_id}-train"}
    check_server_has(server, runs)
    assert not list((training.options.data_dir / "trackers" / "wandb").glob("run-*"))  # nothing heaps up here


@pytest.mark.slow
def test_wandb_server_gets_the_lineage_of_offline_runs_that_are_synced_later(
    training: Training, server: WandbServer
) -> None:
    runs = recorded(training)
    tell(training, Telling(runs, WANDB, training.options.data_dir))
    folders = offline_folders(training)
    for job_type in ("preprocess", "train"):
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(folders[job_type])],
            env=environment(training, **online(server)),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    check_server_has(server, runs)


@pytest.mark.slow
def test_weights_are_told_by_whose_they_are_not_where_they_lie_and_go_along_only_when_asked_for(
    training: Training, server: WandbServer
) -> None:
    runs = recorded(training, revision=publish(training))
    tell(training, Telling(runs, WANDB, training.options.data_dir), **online(server))
    [(number, _)] = [found for found in server.artifacts.items() if found[1]["type"] == "finetuned-model"]
    contents = json.loads(server.files[f"/upload/manifest/{number}"])["contents"]
    found = training.store.resolve(MODEL)
    weights = found.path / "model.safetensors"
    assert contents["model.safetensors"]["ref"] == f"rookery://{MODEL}@{found.revision}/model.safetensors"
    words = (b"secret", b"file://", str(training.options.data_dir / "models").encode())
    assert not any(word in content for content in server.files.values() for word in words)

    whole = Telling(runs, WANDB, training.options.data_dir, uploads=("texts", "weights"))
    assert "outcome" in tell(training, whole, **online(server))
    number = [number for number, found in server.artifacts.items() if found["type"] == "finetuned-model"][-1]
    assert server.content(number, "model.safetensors") == weights.read_bytes()
    number = [number for number, found in server.artifacts.items() if found["type"] == "train-dataset"][-1]
    assert server.content(number, "dataset.jsonl.gz").startswith(b"\x1f\x8b")


@pytest.mark.slow
def test_wandb_that_refuses_the_key_is_an_error_with_a_reason(training: Training, server: WandbServer) -> None:
    server.mood = "refuses"
    answer = tell(training, Telling(recorded(training), WANDB, training.options.data_dir), **online(server))
    assert answer.keys() == {"error"} and answer["error"]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_library_that_is_not_installed_is_an_error_that_names_it(
    training: Training, tmp_path: Path, library: str
) -> None:
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / f"{library}.py").write_text(f"raise ModuleNotFoundError(name={library!r})")
    path = f"{tmp_path / 'absent'}{os.pathsep}{Path(__file__).parents[2]}"
    integration = Integration(library)  # type: ignore[arg-type]
    answer = tell(training, Telling(recorded(training), integration, training.options.data_dir), PYTHONPATH=path)
    assert answer == {"error": f"The library '{library}' is not installed."}


# --- Trackio ------------------------------------------------------------------------------------------------


def trackio_rows(training: Training, query: str) -> list[dict[str, Any]]:
    path = training.options.data_dir / "trackers" / "trackio" / "huggingtweets.db"
    with sqlite3.connect(path) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute(query)]
    connection.close()
    return rows


def trackio_links(training: Training) -> set[tuple[str, str, str, int]]:
    """(run, direction, artifact, version)."""
    rows = trackio_rows(
        training,
        "SELECT run_name, direction, name, version FROM run_artifact_links "
        "JOIN artifact_versions ON artifact_versions.id = artifact_version_id "
        "JOIN artifacts ON artifacts.id = artifact_id",
    )
    return {(row["run_name"], row["direction"], row["name"], row["version"]) for row in rows}


def test_trackio_holds_both_runs_with_their_lineage(training: Training) -> None:
    pytest.importorskip("trackio")
    runs = recorded(training)
    answer = tell(training, Telling(runs, TRACKIO, training.options.data_dir))
    assert answer == {"outcome": "project huggingtweets, run @ada-train"}
    base = BASE.replace("/", "--")
    assert trackio_links(training) == {
        ("sources", "output", "tweets-ada", 0),
        ("sources", "output", base, 0),
        ("@ada-preprocess", "input", "tweets-ada", 0),
        ("@ada-preprocess", "output", "dataset-ada", 0),
        ("@ada-train", "input", "dataset-ada", 0),
        ("@ada-train", "input", base, 0),
        ("@ada-train", "output", "ada", 0),
    }
    configs = {row["run_name"]: json.loads(row["config"]) for row in trackio_rows(training, "SELECT * FROM configs")}
    for run in runs:
        told = configs[run.name]
        assert told["job_type"] == run.job_type and told["summary"] == json.loads(json.dumps(run.summary))
        assert told.items() >= json.loads(json.dumps(run.config)).items()
    logged = trackio_rows(training, "SELECT step, metrics FROM metrics WHERE run_name = '@ada-train' ORDER BY id")
    rows = [(row["step"], json.loads(row["metrics"])) for row in logged]
    assert [(step, row.get("train_loss")) for step, row in rows if "tokens" in row] == [(0, None), (1, 3.5), (2, 3.0)]
    [table] = [row["examples"] for _, row in rows if "examples" in row]
    assert [line["Prediction"] for line in table["_value"]] == list(PREVIEWS)


@pytest.mark.slow
def test_trackio_told_again_replaces_a_run_and_told_of_a_retraining_keeps_both(training: Training) -> None:
    pytest.importorskip("trackio")
    first = Telling(recorded(training), TRACKIO, training.options.data_dir)
    second = Telling(recorded(training, revision="b" * 64, seed=1), TRACKIO, training.options.data_dir)
    for telling in (first, first, second):
        assert "outcome" in tell(training, telling)
    configs = [json.loads(row["config"]) for row in trackio_rows(training, "SELECT * FROM configs")]
    assert sorted(config["run_id"] for config in configs if "run_id" in config) == sorted(
        f"{run.job_id}-{run.job_type}" for run in (*first.runs, *second.runs)
    )
    links = trackio_links(training)
    assert {("@ada-train", "output", "ada", 0), ("@ada-train", "output", "ada", 1)} <= links
    assert {("@ada-train", "input", "dataset-ada", 0), ("@ada-train", "input", "dataset-ada", 1)} <= links
