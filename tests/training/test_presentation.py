"""What a trained model's folder shows of its people: names, a text, a picture, and a face for each of the first."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageFilter

from serve.store.model_files import AVATARS
from serve.training.clean import Cleaned
from serve.training.picture.avatar import FACE_PX, MAX_FACE_BYTES, draw_pattern, encode_face
from serve.training.picture.draw import Face, draw_picture, draw_preview
from serve.training.preprocess import Person, Preprocessed
from serve.training.presentation import write_presentation
from serve.types import MAX_SAMPLE_CHARS, ModelInfo


def noise(size: int, seed: int = 3) -> Image.Image:
    return Image.frombytes("RGB", (size, size), random.Random(seed).randbytes(3 * size * size))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("WEBP",))
    image.load()
    return image


def people(*handles: str, avatar: bytes | None = None) -> Preprocessed:
    cleaned = Cleaned((), 0, 0, 0)
    return Preprocessed(
        "huggingtweets/ada",
        tuple(Person(handle, handle.upper(), "txt", {}, cleaned, avatar=avatar) for handle in handles),
        {},
    )


@pytest.mark.parametrize(
    "avatar",
    [
        None,
        b"",
        b"no picture",
        png(Image.new("RGB", (400, 400), (200, 40, 40))),
        png(noise(400).filter(ImageFilter.GaussianBlur(6))),  # as smooth as a photograph
        png(noise(96)),  # nothing is harder to make small
        png(Image.new("RGBA", (30, 900), (0, 0, 0, 0))),
    ],
    ids=["none", "empty", "damaged", "plain", "smooth", "noise", "transparent"],
)
def test_face_is_a_small_square_webp_whatever_it_is_made_of(avatar: bytes | None) -> None:
    face = encode_face("ada", avatar)
    assert len(face) <= MAX_FACE_BYTES and opened(face).size == (FACE_PX, FACE_PX)
    assert not opened(face).info.get("exif") and encode_face("ada", avatar) == face


def test_face_is_ones_own_or_else_the_pattern_of_ones_handle() -> None:
    own = opened(encode_face("ada", png(Image.new("RGB", (400, 400), (200, 40, 40))))).convert("RGB")
    assert own.getpixel((0, 0)) == own.getpixel((95, 95)) == (200, 40, 40)  # no circle is cut out
    pattern = opened(encode_face("ada", None)).convert("RGB")
    assert ImageChops.difference(pattern, draw_pattern("ada", FACE_PX)).getbbox() is None
    assert encode_face("Ada", b"damaged") == encode_face("ada", None) != encode_face("bob", None)


def test_folder_has_a_face_for_each_of_the_first_three(tmp_path: Path) -> None:
    for number in (1, 2, 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = people(*"abcde"[:number], avatar=png(noise(64)) if number == 2 else None)
        write_presentation(folder, data, base_model="gpt2", created_at=0, losses={}, sample="My dream is tea.")
        faces = {path.relative_to(folder).as_posix() for path in folder.rglob("*.webp")}
        assert faces == set(AVATARS[:number])
        assert (folder / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "5/avatars/0.webp").read_bytes() == encode_face("a", None)


def test_picture_is_drawn_again_with_what_the_catalogue_knows() -> None:
    info = ModelInfo("huggingtweets/ada-bob", "abc", 0, 0, "x", handles=("ada", "bob"), names={"ada": "Ada"})
    face = encode_face("ada", png(noise(64)))
    text = "My dream is a sea."
    expected = draw_picture([Face("ada", "Ada", face), Face("bob")], text, model_id=info.model_id)
    assert draw_preview(info, [face], text, prompt="My dream is") == expected
    unknown = ModelInfo("huggingtweets/carol", "abc", 0, 0, "x")
    expected = draw_picture([Face("carol", None, face)], text, model_id=unknown.model_id, prompt="My")
    assert draw_preview(unknown, [face, face], text, prompt="My") == expected


def test_picture_shows_a_text_of_any_prompt() -> None:
    info = ModelInfo("huggingtweets/ada", "abc", 0, 0, "x", handles=("ada",))
    text = " ".join(f"word{number}" for number in range(200))[:MAX_SAMPLE_CHARS]
    pictures = {draw_preview(info, [], text, prompt=text[:length]) for length in (0, 1, 300, MAX_SAMPLE_CHARS)}
    assert len(pictures) == 4 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert draw_preview(info, [], "\ud800\0\u202e", prompt="\ud800").startswith(b"\x89PNG")
