"""Brings the files of one commit into one folder: config.json first, the weights last, when there is room for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from serve.errors import ModelUnusable
from serve.hub.download import ETAG_SUFFIX, Expected, download
from serve.hub.pace import Deadline
from serve.hub.repository import Repository
from serve.hub.session import Session
from serve.shape import GPT2Shape
from serve.store.budget import DiskBudget
from serve.store.convert import shard_names
from serve.store.model_files import LOOKS, MODEL_FILES, WEIGHT_FILES
from serve.store.validate import MAX_JSON_BYTES, WEIGHTS, read_shape
from serve.types import PullProgress

OnProgress = Callable[[PullProgress], None]

CONFIG = "config.json"
_OPTIONAL = ("README.md", *LOOKS)  # a model is served without them
_MAX_OPTIONAL_BYTES = 5_000_000


class Transfer:
    """Of what `repository` lists into `folder`, which may hold some of it, or parts of it, already."""

    def __init__(
        self,
        session: Session,
        repository: Repository,
        folder: Path,
        deadline: Deadline,
        budget: DiskBudget,
        on_progress: OnProgress,
    ) -> None:
        self._session, self._repository, self._folder = session, repository, folder
        self._deadline, self._budget, self._on_progress = deadline, budget, on_progress
        self._file, self._num_bytes, self._total_bytes = "", 0, 0

    def run(self) -> None:
        """Raises: ModelUnusable, ModelGated, DiskFull, StoreUnavailable."""
        self._remove_what_was_made()
        files, name = self._repository.files, self._repository.model_id
        weights = next((one for one in WEIGHT_FILES if one in files), None)
        if CONFIG not in files or weights is None:
            raise ModelUnusable(f"'{name}' on the Hub has no config.json or no PyTorch or safetensors weights.")

        # 1. A kilobyte, after which most that is not a GPT-2 is refused.
        self._bring(CONFIG, MAX_JSON_BYTES)
        limit = weight_limit(read_shape(self._folder))

        # 2. Which files the weights are in, and whether that can be.
        parts = [weights]
        if weights.endswith(".index.json"):
            self._bring(weights, MAX_JSON_BYTES)
            parts = shard_names(self._folder / weights)
        weight_bytes = self._check_parts(parts, limit)

        # 3. All that is small.
        small = [one for one in (*MODEL_FILES, *LOOKS) if one in files and one != CONFIG and not self._is_left(one)]
        self._total_bytes = self._num_bytes + weight_bytes + sum(files[one].num_bytes or 0 for one in small)
        for one in small:
            self._bring(one, MAX_JSON_BYTES)

        # 4. The weights.
        self._make_room(parts, weight_bytes, is_converted=weights != WEIGHTS)
        for part in parts:
            limit -= self._bring(part, limit)

    def _remove_what_was_made(self) -> None:
        """Of the files by who then failed: half-converted weights would pass for the repository's own."""
        for path in list(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix().removesuffix(ETAG_SUFFIX)
            if path.is_file() and name not in self._repository.files:
                path.unlink()

    def _check_parts(self, parts: Sequence[str], limit: int) -> int:
        """How many bytes the weights have at most. Raises: ModelUnusable."""
        files, name = self._repository.files, self._repository.model_id
        if missing := [part for part in parts if part not in files]:
            raise ModelUnusable(f"'{name}' on the Hub lacks {missing[0]}, which its index names.")
        sizes = [files[part].num_bytes for part in parts]
        known = sum(size for size in sizes if size is not None)
        if known > limit:
            raise ModelUnusable(
                f"The weights of '{name}' have {known:,} bytes; for a GPT-2 of its shape {limit:,} are the limit."
            )
        return limit if None in sizes else known

    def _is_left(self, name: str) -> bool:
        return name in _OPTIONAL and (self._repository.files[name].num_bytes or 0) > _MAX_OPTIONAL_BYTES

    def _make_room(self, parts: Sequence[str], weight_bytes: int, *, is_converted: bool) -> None:
        here = sum(path.stat().st_size for part in parts if (path := self._folder / part).exists())
        self._budget.make_room(
            self._repository.model_id,
            weight_bytes,
            working_bytes=max(0, weight_bytes * (2 if is_converted else 1) - here),
            folder=self._folder,
        )

    def _bring(self, name: str, limit: int) -> int:
        """Downloads what is missing of one file; how many bytes it has. Raises: ModelUnusable, StoreUnavailable."""
        file, repository = self._repository.files[name], self._repository
        expected = Expected(name, file.num_bytes, file.sha256, file.blob_id, limit)
        path, target = f"/{repository.hub_id}/resolve/{repository.sha}/{name}", self._folder / name
        before, self._file = self._num_bytes, name
        target.parent.mkdir(exist_ok=True)
        download(self._session, path, expected, target, self._deadline, self._count)
        num_bytes = target.stat().st_size
        self._num_bytes = before + num_bytes
        self._report()
        return num_bytes

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._report()

    def _report(self) -> None:
        self._on_progress(PullProgress("downloading", self._file, self._num_bytes, self._total_bytes))


def weight_limit(shape: GPT2Shape) -> int:
    """Most bytes a checkpoint may have: float32, an output layer of its own, and the masks old ones carry."""
    numbers = shape.num_parameters + shape.vocab_size * shape.n_embd + shape.n_layer * (shape.n_positions**2 + 1)
    return 4 * numbers + MAX_JSON_BYTES
