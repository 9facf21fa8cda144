"""How a bot came to be, as a drawing: archives, data set, model, and the two runs between, as huggingtweets did.

    tweets-ada --> @ada-preprocess --> dataset-ada --> @ada-train --> ada
                                       fledgling   -----^

Knows runs and artifacts, and nothing of pages: it gives an SVG that their style sheet colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from serve.types import Artifact, ModelId, ModelInfo, Run

_WIDTH, _HEIGHT = 196, 74  # of a box
_GAP, _SPACE = 26, 16  # between columns, between rows
_MARGIN = 4
_MAX_CHARS = 25  # of a name, in a box
_NUM_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class Box:
    """A thing that was used or made, or the run that did it."""

    kind: str
    name: str
    detail: str = ""
    is_run: bool = False


@dataclass(frozen=True, slots=True)
class Lineage:
    """All that led to one model."""

    raw: tuple[Box, ...]
    preprocess: Box
    dataset: Box
    base: Box
    train: Box
    model: Box

    @property
    def text(self) -> str:
        """The drawing in a sentence."""
        raw = " and ".join(box.name for box in self.raw)
        return (
            f"From {raw} the run {self.preprocess.name} made the data set {self.dataset.name}; from that and "
            f"the model {self.base.name} the run {self.train.name} made the model {self.model.name}."
        )


def lineage_of(info: ModelInfo, runs: Sequence[Run]) -> Lineage | None:
    """By what was recorded of both runs, else by what the model says of itself; None of a model that is no bot."""
    return _by_runs(runs) or _by_facts(info)


def draw(lineage: Lineage) -> Markup:
    """An SVG, with the same in words for those who do not see it."""
    num_rows = max(2, len(lineage.raw))
    width = _NUM_COLUMNS * _WIDTH + (_NUM_COLUMNS - 1) * _GAP + 2 * _MARGIN
    height = num_rows * (_HEIGHT + _SPACE) - _SPACE + 2 * _MARGIN
    middle = (num_rows - 1) / 2
    places = [(box, 0, middle + row - (len(lineage.raw) - 1) / 2) for row, box in enumerate(lineage.raw)]
    preprocess, dataset = (lineage.preprocess, 1, middle), (lineage.dataset, 2, middle - 0.5)
    base, train, model = (lineage.base, 2, middle + 0.5), (lineage.train, 3, middle), (lineage.model, 4, middle)
    ways = [(place, preprocess) for place in places]
    ways += [(preprocess, dataset), (dataset, train), (base, train), (train, model)]
    arrows = Markup().join(_arrow(start[1:], end[1:]) for start, end in ways)
    boxes = Markup().join(_box(*place) for place in (*places, preprocess, dataset, base, train, model))
    return Markup(
        '<svg class="lineage" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">{}{}</svg>'
    ).format(lineage.text, width, height, width, height, arrows, boxes)


def _by_runs(runs: Sequence[Run]) -> Lineage | None:
    found = {run.job_type: run for run in runs}
    preprocess, train = found.get("preprocess"), found.get("train")
    if preprocess is None or train is None:
        return None
    bases = [artifact for artifact in train.inputs if artifact.type == "pretrained-model"]
    if not (preprocess.inputs and preprocess.outputs and bases and train.outputs):
        return None
    return Lineage(
        raw=tuple(map(_artifact, preprocess.inputs)),
        preprocess=_run(preprocess.name),
        dataset=_artifact(preprocess.outputs[0]),
        base=_artifact(bases[0]),
        train=_run(train.name),
        model=_artifact(train.outputs[0]),
    )


def _by_facts(info: ModelInfo) -> Lineage | None:
    if not info.handles or info.base_model is None:
        return None
    name = ModelId.parse(info.model_id).name
    return Lineage(
        raw=tuple(Box("raw-dataset", f"tweets-{handle.lower()}") for handle in sorted(info.handles)),
        preprocess=_run(f"@{name}-preprocess"),
        dataset=Box("train-dataset", f"dataset-{name}"),
        base=Box("pretrained-model", info.base_model),
        train=_run(f"@{name}-train"),
        model=Box("finetuned-model", name, info.revision[:8]),
    )


def _artifact(artifact: Artifact) -> Box:
    return Box(artifact.type, artifact.name, f"v{artifact.version} · {artifact.digest[:8]}")


def _run(name: str) -> Box:
    return Box("run", name, is_run=True)


def _place(column: int, row: float) -> tuple[float, float]:
    return _MARGIN + column * (_WIDTH + _GAP), _MARGIN + row * (_HEIGHT + _SPACE)


def _box(box: Box, column: int, row: float) -> Markup:
    x, y = _place(column, row)
    top = 22 if box.detail else 31  # two lines or three, in the middle
    half = _MAX_CHARS // 2  # a run's name says at its end what it did
    name = box.name if len(box.name) <= _MAX_CHARS else f"{box.name[:half]}…{box.name[-half:]}"
    return Markup(
        '<g><title>{}</title><rect class="{}" x="{:g}" y="{:g}" width="{}" height="{}" rx="{}"/>'
        '<text class="kind" x="{x:g}" y="{:g}">{}</text><text x="{x:g}" y="{:g}">{}</text>'
        '<text class="kind" x="{x:g}" y="{:g}">{}</text></g>'
    ).format(
        box.name,
        *("run" if box.is_run else "box", x, y, _WIDTH, _HEIGHT, 24 if box.is_run else 8),
        *(y + top, box.kind, y + top + 20, name, y + top + 37, box.detail),
        x=x + 14,
    )


def _arrow(start: tuple[int, float], end: tuple[int, float]) -> Markup:
    """From the right side of one place to the left side of another."""
    (x1, y1), (x2, y2) = _place(*start), _place(*end)
    x1, y1, y2 = x1 + _WIDTH, y1 + _HEIGHT / 2, y2 + _HEIGHT / 2
    bend, tip = (x1 + x2) / 2, x2 - 7
    return Markup(
        '<path class="arrow" d="M{:g} {:g}C{:g} {:g} {:g} {:g} {:g} {:g}"/><path class="tip" d="M{:g} {:g}l-8 -5v10z"/>'
    ).format(x1, y1, bend, y1, bend, y2, tip, y2, x2 - 1, y2)
