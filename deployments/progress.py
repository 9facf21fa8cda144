"""Live bars for what takes its time: jobs, and models on their way. Knows the server's JSON, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from deployments.client import JobView
from deployments.show import as_bytes, as_minutes, plain, show_list
from deployments.stopping import interrupts_held
from serve.types import JobStatus

_NARROW, _WIDE = 72, 100  # columns: with fewer a line has no room for all the numbers, or for a long bar


def _is_narrow(console: Console) -> bool:
    return console.is_terminal and console.width < _NARROW


def _bar(console: Console) -> BarColumn:
    return BarColumn(bar_width=30 if console.width >= _WIDE else 10)


def _start(bars: Progress) -> None:
    """No bar outlives a Ctrl-C: it would be drawn on, into what is said and asked afterwards."""
    try:
        with interrupts_held():
            bars.start()
    except BaseException:
        _stop(bars)
        raise


def _stop(bars: Progress) -> None:
    with interrupts_held():
        bars.stop()


class _Numbers(ProgressColumn):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        numbers = _few_numbers if _is_narrow(self._console) else _numbers
        return Text(numbers(task.fields["metrics"]))


class JobProgress:
    """A live bar for each job; where there is no terminal, a line at each new phase and quarter."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[phase]}", style="cyan", markup=False),
            _bar(console),
            _Numbers(console),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, tuple[str, int]] = {}  # job id -> phase and quarter of its last line
        self._held_out: dict[str, float] = {}  # job id -> loss of held-out posts, told once an epoch

    def __enter__(self) -> JobProgress:
        _start(self._bars)
        return self

    def __exit__(self, *_: object) -> None:
        _stop(self._bars)

    def update(self, view: JobView, title: str) -> None:
        """Shows where the job stands."""
        phase, job_id = _phase(view), view.job["id"]
        self._show_samples(view)
        metrics = self._with_held_out(job_id, view.metrics)
        total, done = metrics.get("total_steps"), metrics.get("step", 0)
        if not self._console.is_terminal:
            stage = phase, 4 * done // total if total else 0
            if self._told.get(job_id) != stage:
                self._told[job_id] = stage
                self._console.print(Text(f"{plain(title)} {phase} {_numbers(metrics)}".strip()))
            return
        if job_id not in self._tasks:
            self._tasks[job_id] = self._bars.add_task(plain(title), total=None, phase=phase, metrics={})
        if view.status is JobStatus.SUCCEEDED:
            total = done = total or 1
        self._bars.update(self._tasks[job_id], total=total, completed=done, phase=phase, metrics=metrics)

    def _show_samples(self, view: JobView) -> None:
        """What it writes as it learns; the last ones are shown with the result."""
        for event in view.events:
            numbers = event.get("data") or {}
            if numbers.get("samples") and numbers["step"] < numbers["total_steps"]:
                steps = f"After {numbers['step']} of {numbers['total_steps']} steps it writes:"
                self._console.print(Text(steps, "dim"))
                show_list(self._console, numbers["samples"])

    def _with_held_out(self, job_id: str, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        if metrics.get("valid_loss") is not None:
            self._held_out[job_id] = metrics["valid_loss"]
        return {**metrics, "valid_loss": self._held_out.get(job_id)} if metrics else metrics


class TransferProgress:
    """A live bar of a model on its way; where there is no terminal, a line at each new phase and quarter."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", style="cyan", markup=False),
            _bar(console),
            _Transferred(console),
        ]
        if not _is_narrow(console):
            columns.append(TextColumn("{task.fields[file]}", style="dim", markup=False))
        self._bars = Progress(
            *columns,
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._told: tuple[str, int] | None = None

    def __enter__(self) -> TransferProgress:
        _start(self._bars)
        return self

    def __exit__(self, *_: object) -> None:
        _stop(self._bars)

    def pause(self) -> None:
        """Gives the terminal to another's bars, until the next `update`."""
        _stop(self._bars)

    def update(self, phase: str, file: str, num_bytes: int, total_bytes: int) -> None:
        """Shows how far it is. `total_bytes` 0: nobody knows yet."""
        phase = plain(phase)
        if not self._console.is_terminal:
            stage = phase, 4 * num_bytes // total_bytes if total_bytes else 0
            if self._told != stage:
                self._told = stage
                self._console.print(Text(f"{phase} {_transferred(num_bytes, total_bytes)}".strip()), soft_wrap=True)
            return
        _start(self._bars)
        if self._task is None:
            self._task = self._bars.add_task(phase, total=None, file="")
        total = total_bytes or None
        self._bars.update(self._task, description=phase, total=total, completed=num_bytes, file=plain(file))


class _Transferred(ProgressColumn):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        if _is_narrow(self._console):
            return Text(f"{task.percentage:.0f} %" if task.total else "")
        return Text(_transferred(int(task.completed), int(task.total or 0)))


def _transferred(num_bytes: int, total_bytes: int) -> str:
    return f"{as_bytes(num_bytes)} of {as_bytes(total_bytes)}" if total_bytes else ""


def _phase(view: JobView) -> str:
    """`running` says little; whether there were steps yet, and how many are left, says more."""
    if view.status is not JobStatus.RUNNING:
        return view.status.value
    if not view.metrics:
        return "preparing"
    return "training" if view.metrics["step"] < view.metrics["total_steps"] else "publishing"


def _numbers(metrics: Mapping[str, Any]) -> str:
    """`12/80  loss 4.02  held-out 4.31  0:41 left`; empty before the first step."""
    if not metrics.get("step"):
        return ""
    told = [f"{metrics['step']}/{metrics['total_steps']}"]
    for name, word in (("train_loss", "loss"), ("valid_loss", "held-out")):
        if metrics.get(name) is not None:
            told.append(f"{word} {metrics[name]:.2f}")
    if metrics["step"] < metrics["total_steps"] and metrics.get("seconds_left") is not None:
        told.append(f"{as_minutes(metrics['seconds_left'])} left")
    return "  ".join(told)


def _few_numbers(metrics: Mapping[str, Any]) -> str:
    """`12/80  0:41`: how far it is, and for how long yet."""
    if not metrics.get("step"):
        return ""
    told = f"{metrics['step']}/{metrics['total_steps']}"
    seconds_left = metrics.get("seconds_left")
    return told if seconds_left is None else f"{told}  {as_minutes(seconds_left)}"
