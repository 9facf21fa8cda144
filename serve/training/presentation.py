"""What people see of a revision before they use it: its card, the picture that goes with it, and its people's faces.

Knows no training and no store: what it shows is what it is told.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from serve.store.card import PICTURE, CardFacts, build_card
from serve.store.model_files import AVATARS
from serve.training.picture.avatar import encode_face
from serve.training.picture.draw import Face, draw_picture
from serve.training.preprocess import Preprocessed


def write_presentation(
    folder: Path,
    data: Preprocessed,
    *,
    base_model: str,
    created_at: int,
    losses: Mapping[str, float],
    sample: str = "",
    hyperparameters: Mapping[str, float | int | str] | None = None,
) -> None:
    """Writes README.md, the picture and the faces into a model's folder. `sample` begins with the picture's prompt."""
    people = data.people
    facts = CardFacts(
        model_id=data.model_id,
        handles=data.handles,
        base_model=base_model,
        display_names=data.display_names,
        counts=data.counts,
        hyperparameters=hyperparameters or {},
        losses=losses,
        trained_on=time.strftime("%Y-%m-%d", time.gmtime(created_at)),
    )
    (folder / "README.md").write_text(build_card(facts), encoding="utf-8")
    faces = [Face(person.handle, person.display_name, person.avatar) for person in people]
    (folder / PICTURE).write_bytes(draw_picture(faces, sample, model_id=data.model_id))
    for name, person in zip(AVATARS, people, strict=False):  # the first ones'
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_face(person.handle, person.avatar))
