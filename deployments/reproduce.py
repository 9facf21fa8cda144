"""The command `rookery reproduce`: trains a model again as it was trained, and tells whether the weights are the same.

Works on the data folder alone: no server is needed, and a running one does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from deployments import show
from deployments.cli.options import print_json, remark, remarks
from serve.settings import Settings

if TYPE_CHECKING:  # torch takes seconds to import
    from serve.training.finetune import Progress as Step
    from serve.training.reproduce import Reproduction


def reproduce_model(
    settings: Settings, model_id: str, archives: Sequence[Path], *, out: Path | None, strict: bool
) -> Reproduction:
    """Warns of what differs on standard error, and shows there how far it is. Raises: RookeryError."""
    from serve.hub.opening import open_hub
    from serve.store.opening import open_store
    from serve.training.reproduce import reproduce

    store = open_store(settings)
    with _bar() as on_progress:
        return reproduce(
            store,
            model_id,
            archives=archives,
            out=out,
            strict=strict,
            locate=open_hub(settings, store).locate,
            on_difference=remark,
            on_progress=on_progress,
        )


@contextmanager
def _bar() -> Iterator[Callable[[Step], None]]:
    columns = ("steps", MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=remarks, disable=not remarks.is_terminal, transient=True) as bar:
        task = bar.add_task("training", total=None)
        yield lambda step: bar.update(task, completed=step.step, total=step.total_steps)


def print_reproduction(done: Reproduction, out: Console, *, as_json: bool) -> None:
    """Both hashes, for programs or for people."""
    if as_json:
        report = {
            "model": done.model_id,
            "revision": done.revision,
            "expected_sha256": done.expected_sha256,
            "reproduced_sha256": done.reproduced_sha256,
            "equal": done.equal,
            "dataset_sha256": done.dataset_sha256,
            "seconds": round(done.duration_s, 2),
            "differences": list(done.differences),
        }
        return print_json(report)
    out.print(
        show.facts_table(
            {
                "model": f"{done.model_id}@{done.revision}",
                "weights then": done.expected_sha256,
                "weights now": done.reproduced_sha256,
                "learnt from": done.dataset_sha256,
                "seconds": f"{done.duration_s:.1f}",
            }
        )
    )
    out.print("The weights are the same, bit for bit." if done.equal else "The weights are not the same.")
