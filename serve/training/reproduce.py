"""Makes a revision again from what it says of its own making, and compares the weights bit for bit.

The recipe is in the revision's rookery.json; the texts are kept beside the model, or come from the archives again. It
needs a store and nothing else: no server, no database, no job.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serve.engine.device import multiplies_bfloat16
from serve.errors import Conflict, HubUnreachable, InvalidRequest, ModelNotFound, ModelUnusable, NotFound
from serve.store.datasets import damaged, read_dataset
from serve.store.describe import is_checkpoint
from serve.store.model_files import PREPROCESS_RUN, PROVENANCE
from serve.store.revisions import Revision, Store
from serve.store.validate import WEIGHTS, read_json
from serve.training.dataset import Dataset, build_dataset, epoch_texts
from serve.training.finetune import FineTuneSpec, Progress, finetune
from serve.training.kept_dataset import from_lines
from serve.training.preprocess import preprocess
from serve.training.tracking.provenance import code_sha256, dataset_sha256
from serve.types import FileRecord, ModelId
from serve.version import VERSION


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decided the bytes of a model, as its provenance has it; `environment` is what else may have."""

    base_model: str
    base_revision: str
    dataset_sha256: str
    seed: int
    n_epochs: int
    batch_size: int
    learning_rate: float
    num_threads: int
    bf16: bool  # whether its training multiplied in bfloat16
    held_out_share: float
    handles: tuple[str, ...]
    files: tuple[str, ...]  # sha256 of the archives, in the order of the job
    validation: str | None  # sha256 of the archive that was only judged by
    handle_of: Mapping[str, str]  # sha256 of an archive -> whose it is
    environment: Mapping[str, Any] = field(repr=False)

    @property
    def archives(self) -> tuple[str, ...]:
        """sha256 of all that it takes to make the data set again."""
        return tuple(dict.fromkeys([*self.files, *([self.validation] if self.validation else [])]))

    @classmethod
    def read(cls, found: Revision) -> Recipe:
        """Raises: NotFound when the revision does not say how it was made, as others' models do not."""
        try:
            told = json.loads((found.path / PROVENANCE).read_bytes())
            return cls(
                base_model=str(told["base_model"]),
                base_revision=str(told["base_revision"]),
                dataset_sha256=str(told["dataset_sha256"]),
                seed=int(told["seed"]),
                n_epochs=int(told["n_epochs"]),
                batch_size=int(told["batch_size"]),
                learning_rate=float(told["learning_rate"]),
                num_threads=int(told["num_threads"]),
                bf16=told["bf16"] is True,
                held_out_share=float(told["held_out_share"]),
                handles=tuple(told["handles"]),
                files=tuple(told["file_sha256"].values()),
                validation=str(told["validation_sha256"]) if told.get("validation_sha256") else None,
                handle_of=_owners_of_files(found.path),
                environment=told,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise NotFound(
                f"'{found.model_id}@{found.revision}' does not say how it was made. Only models that were trained "
                "here can be made again.",
                param="model",
            ) from exc


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of it. `differences`: sentences on what is not as it was when the model was made."""

    model_id: str
    revision: str
    expected_sha256: str
    reproduced_sha256: str
    dataset_sha256: str
    duration_s: float
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.expected_sha256 == self.reproduced_sha256


def reproduce(
    store: Store,
    model_id: str,
    *,
    archives: Sequence[Path] = (),
    out: Path | None = None,
    strict: bool = False,
    locate: Callable[[str], Revision] | None = None,
    on_difference: Callable[[str], None] = lambda difference: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Reproduction:
    """Trains `model_id` once more, into `out` or a folder that is then discarded. The model itself stays as it is.

    `locate` finds the base; None: in `store`. `strict` refuses to begin where anything differs.
    Raises: ModelNotFound; NotFound without the data set or the provenance; Conflict where the archives give other
    texts, or something differs and it is `strict`; InvalidRequest for a checkpoint, or where `out` is not empty.
    """
    # 1. How it was made, and what is different now.
    found = store.resolve(model_id)
    if is_checkpoint(found.path):
        raise InvalidRequest(
            f"'{found.model_id}@{found.revision}' is a checkpoint from the middle of a training; name the model that "
            "the training ended with.",
            param="model",
        )
    recipe = Recipe.read(found)
    base = _find_base(recipe, locate or store.resolve)
    differences = [*_differences(recipe, base), *_archive_differences(recipe, archives)]
    for difference in differences:
        on_difference(difference)
    if strict and differences:
        raise Conflict(f"This is not how '{found.model_id}' was made. {' '.join(differences)}")

    # 2. What it has learnt.
    dataset = _rebuild(recipe, found, archives) if archives else _recall(recipe, found, store)

    # 3. Learn it again.
    started = time.monotonic()
    folder = store.stage() if out is None else _empty(out)
    try:
        finetune(_spec(recipe, dataset, base, folder), on_progress=on_progress)
        return Reproduction(
            model_id=found.model_id,
            revision=found.revision,
            expected_sha256=_sha256(found.path / WEIGHTS),
            reproduced_sha256=_sha256(folder / WEIGHTS),
            dataset_sha256=dataset_sha256(dataset),
            duration_s=time.monotonic() - started,
            differences=tuple(differences),
        )
    finally:
        if out is None:
            store.discard(folder)


def _spec(recipe: Recipe, dataset: Dataset, base: Revision, out: Path) -> FineTuneSpec:
    return FineTuneSpec(
        base=base.path,
        epochs=[epoch_texts(dataset, recipe.seed, epoch) for epoch in range(recipe.n_epochs)],
        held_out=dataset.held_out,
        out=out,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        num_threads=recipe.num_threads,
        dtype="bfloat16" if recipe.bf16 else "float32",
    )


def _empty(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidRequest(f"The folder '{folder}' is not empty; name one that is, or a new one.", param="out")
    return folder


def _find_base(recipe: Recipe, locate: Callable[[str], Revision]) -> Revision:
    """The base as it was, or else as it is now."""
    try:
        return locate(f"{recipe.base_model}@{recipe.base_revision}")
    except (ModelNotFound, HubUnreachable):
        return locate(recipe.base_model)


# --- What is not as it was ----------------------------------------------------------------------------------


def _differences(recipe: Recipe, base: Revision) -> list[str]:
    told = recipe.environment
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [
        (f"The base '{recipe.base_model}'", recipe.base_revision, base.revision),
        ("The code of the service", told.get("code_sha256"), code_sha256()),
        ("The kind of processor", told.get("machine"), platform.machine()),
        ("The device", told.get("device"), str(device)),
        ("Multiplying in bfloat16", recipe.bf16, recipe.bf16 and multiplies_bfloat16(device)),
    ]
    versions = told.get("versions")
    for name, version in versions.items() if isinstance(versions, dict) else ():
        pairs.append((f"The version of {name}", version, _version(name)))
    return [_say(what, then, now) for what, then, now in pairs if then is not None and then != now]


def _version(name: str) -> str | None:
    if name in ("python", "rookery"):
        return platform.python_version() if name == "python" else VERSION
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _say(what: str, then: Any, now: Any) -> str:
    return f"{what} was {str(then)[:16]} then and is {str(now)[:16]} now."


def _archive_differences(recipe: Recipe, archives: Sequence[Path]) -> list[str]:
    if not archives:
        return []
    given = {_sha256(path): path.name for path in archives}
    unknown = [f"It was not made from '{name}'." for digest, name in given.items() if digest not in recipe.archives]
    missing = [f"An archive it was made from is not given: sha256 {d}." for d in recipe.archives if d not in given]
    return unknown + missing


# --- What it has learnt -------------------------------------------------------------------------------------


def _recall(recipe: Recipe, found: Revision, store: Store) -> Dataset:
    """The data set that is kept with the model."""
    try:
        path = store.find_dataset(found.model_id, recipe.dataset_sha256)
        if path is None:
            raise NotFound(f"What '{found.model_id}' has learnt is not kept here.")
        dataset = from_lines(read_dataset(path))
        if dataset_sha256(dataset) != recipe.dataset_sha256:
            raise damaged()
        return dataset
    except NotFound as exc:
        archives = "archive" if len(recipe.archives) == 1 else f"{len(recipe.archives)} archives"
        raise NotFound(
            f"{exc.message} Give the {archives} it was made from with --archive: sha256 {', '.join(recipe.archives)}.",
            param="archive",
        ) from exc


def _rebuild(recipe: Recipe, found: Revision, archives: Sequence[Path]) -> Dataset:
    """The data set made once more from the archives, in the order in which the job had them."""
    digests = {path: _sha256(path) for path in archives}
    place = {digest: number for number, digest in enumerate(recipe.files)}
    judge_by = next((path for path in archives if digests[path] == recipe.validation), None)
    learnt = [path for path in archives if path != judge_by or digests[path] in place]
    ordered = sorted(learnt, key=lambda path: place.get(digests[path], len(place)))
    only = recipe.handles[0] if len(recipe.handles) == 1 else None
    entries = [
        (_as_file(path, number), recipe.handle_of.get(digests[path], only)) for number, path in enumerate(ordered)
    ]
    data = preprocess(
        entries,
        suffix=ModelId.parse(found.model_id).name,
        validation=None if judge_by is None else _as_file(judge_by, len(entries)),
    )
    dataset = build_dataset(
        data.kept_by_handle,
        seed=recipe.seed,
        held_out_share=recipe.held_out_share,
        validation=None if data.validation is None else data.validation.kept,
    )
    if dataset_sha256(dataset) != recipe.dataset_sha256:
        raise Conflict(
            f"These archives do not give the texts that '{found.model_id}' has learnt: their data set has the sha256 "
            f"{dataset_sha256(dataset)}, and it learnt {recipe.dataset_sha256}. It was made from archives with the "
            f"sha256 {', '.join(recipe.archives)}.",
            param="archive",
        )
    return dataset


def _as_file(path: Path, number: int) -> FileRecord:
    return FileRecord(f"archive-{number}", path.name, path.stat().st_size, 0, "", path)


def _owners_of_files(folder: Path) -> dict[str, str]:
    try:
        raw = read_json(folder / PREPROCESS_RUN)["inputs"]
        return {digest: str(one["data"]["handle"]) for one in raw for digest in one["data"]["file_sha256"]}
    except (ModelUnusable, KeyError, TypeError):
        return {}  # one handle then is all archives' own


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
