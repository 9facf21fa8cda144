"""What people see of a revision before they use it: its card, and the picture that goes with it.

Knows no training and no store: what it shows is what it is told.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from serve.store.card import PICTURE, CardFacts, build_card
from serve.training.picture.draw import Face, choose_prediction, draw_picture
from serve.training.preprocess import Preprocessed


def write_presentation(
    folder: Path,
    data: Preprocessed,
    *,
    base_model: str,
    created_at: int,
    losses: Mapping[str, float],
    predictions: Sequence[str],
    hyperparameters: Mapping[str, float | int | str] | None = None,
) -> None:
    """Writes README.md and the picture into a model's folder. `predictions` begin with the picture's prompt."""
    people = data.people
    facts = CardFacts(
        model_id=data.model_id,
        handles=data.handles,
        base_model=base_model,
        display_names={person.handle: person.display_name for person in people if person.display_name},
        counts=data.counts,
        hyperparameters=hyperparameters or {},
        losses=losses,
        trained_on=time.strftime("%Y-%m-%d", time.gmtime(created_at)),
    )
    (folder / "README.md").write_text(build_card(facts), encoding="utf-8")
    faces = [Face(person.handle, person.display_name, person.avatar) for person in people]
    prediction = choose_prediction(predictions, learnt=(text for person in people for text in person.cleaned.kept))
    (folder / PICTURE).write_bytes(draw_picture(faces, prediction, model_id=data.model_id))
