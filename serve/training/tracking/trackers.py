"""Tells a tracker of a job that has ended: its two runs, with all they used and made.

    python -m serve.training.tracking.trackers --parent 4711  < telling.json  prints {"outcome": ...} or {"error": ...}

W&B and Trackio agree on init, log, Table, Artifact and finish; what they do not is in a class each. They take their
settings from the environment as always (WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL, TRACKIO_DIR, TRACKIO_SERVER_URL,
...). They are told names, hashes, counts, losses and what the model says: no archive's text, and of the weights
whose they are, not where they lie, unless `Telling.uploads` names them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.errors import ModelNotFound
from serve.store.revisions import Store
from serve.store.validate import WEIGHTS
from serve.training.processes import tie_to_parent
from serve.training.tracking.lineage import run_id
from serve.training.tracking.provenance import to_run
from serve.types import Artifact, Integration, Run

DEFAULT_PROJECT = "huggingtweets"
UPLOADS = ("texts", "weights")
MANIFEST = "manifest.json"
DATASET = "dataset.jsonl.gz"
INIT_TIMEOUT_S = 30.0  # of W&B's server to answer at all
_MAX_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class Telling:
    """Runs and whom to tell. `uploads`: which of `UPLOADS` the tracker gets whole."""

    runs: tuple[Run, ...]
    integration: Integration
    data_dir: Path
    uploads: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Telling:
        values = json.loads(text)
        integration = values["integration"]
        return cls(
            runs=tuple(to_run(run) for run in values["runs"]),
            integration=Integration(**{**integration, "tags": tuple(integration["tags"])}),
            data_dir=Path(values["data_dir"]),
            uploads=tuple(values["uploads"]),
        )


def tracker_environment(data_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables under which a tracker's library runs: its folders are ours, and it calls nobody but its server.

    What the operator has set stays. Without W&B's key nothing can be sent, so runs are written for `wandb sync`.
    """
    folder = data_dir.absolute() / "trackers"
    mode = "online" if environ.get("WANDB_API_KEY") else "offline"
    ours = {
        "WANDB_MODE": mode,
        "WANDB_DIR": str(folder),  # W&B adds /wandb itself
        "WANDB_DATA_DIR": str(folder / "wandb" / "staged"),  # what offline runs refer to until they are sent
        "WANDB_CACHE_DIR": str(folder / "wandb" / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "wandb" / "config"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    theirs = {name: value for name, value in environ.items() if not name.startswith("ROOKERY_")}
    return {**ours, **theirs}


# --- Telling ------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """One library. `live` is its run."""

    library: Any

    def start(self, run: Run) -> Any: ...

    def use(self, live: Any, artifact: Artifact) -> None:
        """Something that the run used."""
        ...

    def give(self, live: Any, artifact: Artifact) -> None:
        """Something that the run made."""
        ...

    def finish(self, live: Any, run: Run) -> str:
        """Returns when everything has arrived; where it can be seen."""
        ...


def replay(telling: Telling) -> str:
    """Tells it all from the beginning; where it can be seen. Runs told before, wholly or in part, are replaced.

    Raises whatever the library does.
    """
    tracker: Tracker = _WandB(telling) if telling.integration.tracker == "wandb" else _Trackio(telling)
    where = ""
    for run in telling.runs:
        live = tracker.start(run)
        for artifact in run.inputs:
            tracker.use(live, artifact)
        last = 0
        for last, row in _rows(run.history):
            live.log(row, step=last)
        for name, table in run.tables.items():
            live.log({name: tracker.library.Table(columns=table["columns"], data=table["data"])}, step=last)
        for artifact in run.outputs:
            tracker.give(live, artifact)
        where = tracker.finish(live, run)
    return where


def _rows(history: Mapping[str, Sequence[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, what was measured then)."""
    names = [name for name in history if name != "step"]
    for i, step in enumerate(history.get("step", ())):
        yield step, {name: history[name][i] for name in names if history[name][i] is not None}


class _Contents:
    """What goes into a library's artifact: a manifest, and whatever else was asked for."""

    def __init__(self, telling: Telling) -> None:
        self._store = Store(telling.data_dir, embedded={})
        self._uploads = telling.uploads
        self._takes_references = telling.integration.tracker == "wandb"  # Trackio takes none that it cannot follow
        self._models = [
            output.data["model_id"] for run in telling.runs for output in run.outputs if _has_weights(output)
        ]
        self._folder = tempfile.TemporaryDirectory()

    def build(self, library: Any, artifact: Artifact) -> Any:
        """The same bytes for the same artifact, whichever run uses it: the tracker then knows it for the same."""
        facts = {"type": artifact.type, "name": artifact.name, "digest": artifact.digest, **artifact.data}
        manifest = Path(self._folder.name) / MANIFEST
        manifest.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        built = library.Artifact(
            artifact.name.replace("/", "--"),  # as the Hub's own cache spells an id
            type=artifact.type,
            metadata={**facts, "rookery_version": artifact.version},
        )
        built.add_file(str(manifest), name=MANIFEST)
        if _has_weights(artifact):
            self._add_weights(built, artifact)
        if artifact.type == "train-dataset" and "texts" in self._uploads:
            for texts in self._find_texts(artifact):
                built.add_file(str(texts), name=DATASET)
        return built

    def _add_weights(self, built: Any, artifact: Artifact) -> None:
        name = f"{artifact.data['model_id']}@{artifact.digest}"
        if "weights" in self._uploads:
            with contextlib.suppress(ModelNotFound):  # deleted since
                built.add_file(str(self._store.resolve(name).path.absolute() / WEIGHTS), name=WEIGHTS)
        elif self._takes_references:
            built.add_reference(f"rookery://{name}/{WEIGHTS}", name=WEIGHTS, checksum=False)

    def _find_texts(self, artifact: Artifact) -> list[Path]:
        found = (self._store.find_dataset(model_id, artifact.digest) for model_id in self._models)
        return [path for path in found if path is not None]


def _has_weights(artifact: Artifact) -> bool:
    return artifact.type == "finetuned-model"


def _aliases(artifact: Artifact) -> list[str]:
    return [artifact.digest[:12]]  # `latest` is every tracker's own


def _name_of(run: Run, integration: Integration) -> str:
    return run.name if integration.name is None else f"{integration.name}-{run.job_type}"


def _config_of(run: Run) -> dict[str, Any]:
    return {**run.config, "job_id": run.job_id, "started_at": run.started_at, "finished_at": run.finished_at}


# --- Where the libraries differ -----------------------------------------------------------------------------


class _WandB:
    """A run that is told again under the same id takes the place of the earlier one."""

    def __init__(self, telling: Telling) -> None:
        self.library: Any = importlib.import_module("wandb")
        self._integration = telling.integration
        self._contents = _Contents(telling)

    def start(self, run: Run) -> Any:
        self._forget_offline(run)
        integration = self._integration
        return self.library.init(
            project=integration.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            entity=integration.entity,
            id=run_id(run),
            name=_name_of(run, integration),
            group=run.job_id,
            job_type=run.job_type,
            tags=list(integration.tags),
            config=_config_of(run),
            settings=self.library.Settings(
                init_timeout=INIT_TIMEOUT_S,
                console="off",
                disable_git=True,
                disable_code=True,
                host="rookery",  # nothing of this machine
                program="rookery",
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def use(self, live: Any, artifact: Artifact) -> None:
        built = self._contents.build(self.library, artifact)
        if live.offline:
            # `use_artifact` refuses to work offline, though what it does with a new artifact is just this, and
            # `wandb sync` knows what to make of it.
            live._log_artifact(built, aliases=_aliases(artifact), is_user_created=True, use_after_commit=True)
        else:
            live.use_artifact(built, aliases=_aliases(artifact))  # waits

    def give(self, live: Any, artifact: Artifact) -> None:
        logged = live.log_artifact(self._contents.build(self.library, artifact), aliases=_aliases(artifact))
        if not live.offline:
            logged.wait()

    def finish(self, live: Any, run: Run) -> str:
        live.summary.update(dict(run.summary))
        folder, url = Path(live.settings.sync_dir), str(live.url)
        live.finish()
        if live.offline:
            return folder.name
        shutil.rmtree(folder, ignore_errors=True)  # it is all there
        return url

    def _forget_offline(self, run: Run) -> None:
        """Of a try that was interrupted: `wandb sync` would send both."""
        for folder in Path(os.environ["WANDB_DIR"]).glob(f"wandb/offline-run-*-{run_id(run)}"):
            shutil.rmtree(folder)


class _Trackio:
    """Has no job types and no summaries, so `config` holds them; and an artifact can be used only once it was made.

    So what comes from outside (archives and base models) is made by a run of its own, `sources`.
    """

    def __init__(self, telling: Telling) -> None:
        self.library: Any = importlib.import_module("trackio")
        self._integration = telling.integration
        self._contents = _Contents(telling)
        self._project = telling.integration.project or DEFAULT_PROJECT
        made = {_key(output) for run in telling.runs for output in run.outputs}
        self._bring_in([used for run in telling.runs for used in run.inputs if _key(used) not in made])

    def start(self, run: Run) -> Any:
        self._forget(run)
        config = {**_config_of(run), "job_type": run.job_type, "run_id": run_id(run), "summary": dict(run.summary)}
        if self._integration.tags:
            config["tags"] = list(self._integration.tags)
        return self._init(_name_of(run, self._integration), group=run.job_id, config=config)

    def use(self, live: Any, artifact: Artifact) -> None:
        built = self._contents.build(self.library, artifact)
        live.use_artifact(f"{built.name}:{_aliases(artifact)[0]}", type=artifact.type)

    def give(self, live: Any, artifact: Artifact) -> None:
        live.log_artifact(self._contents.build(self.library, artifact), aliases=_aliases(artifact))

    def finish(self, live: Any, run: Run) -> str:
        # A run of which no number was ever logged would be without its config as well.
        live.log({f"summary/{name}": value for name, value in run.summary.items() if isinstance(value, int | float)})
        self.library.finish()
        return f"project {self._project}, run {_name_of(run, self._integration)}"

    def _init(self, name: str, **arguments: Any) -> Any:
        return self.library.init(
            self._project, name=name, embed=False, auto_log_cpu=False, auto_log_gpu=False, **arguments
        )

    def _bring_in(self, artifacts: Sequence[Artifact]) -> None:
        sources = self._init("sources", resume="allow")
        for artifact in artifacts:
            self.give(sources, artifact)
        self.library.finish()

    def _forget(self, run: Run) -> None:
        for known in self.library.Api().runs(self._project):
            if (known.config or {}).get("run_id") == run_id(run):
                known.delete()


def _key(artifact: Artifact) -> tuple[str, str, str]:
    return artifact.type, artifact.name, artifact.digest


# --- The process --------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=int, required=True, help="the process without which this one ends")
    tie_to_parent(parser.parse_args().parent)
    telling = Telling.from_json(sys.stdin.read())
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # both libraries talk, one of them until the very end
    try:
        said = {"outcome": replay(telling)}
    except Exception as exc:  # whatever it is, it is the tracker's, and is told as the reason
        said = {"error": _explain(exc)}
    with answer:
        answer.write(json.dumps(said) + "\n")


def _explain(exc: Exception) -> str:
    if isinstance(exc, ModuleNotFoundError):
        return f"The library '{exc.name}' is not installed."
    return f"{type(exc).__name__}: {exc}"[:_MAX_REASON_CHARS]


if __name__ == "__main__":
    main()
