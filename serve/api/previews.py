"""What people see of a bot before it speaks: its picture, its faces, and the text that stands for it.

It does not know how a picture is drawn.
"""

from __future__ import annotations

import colorsys
from hashlib import blake2b
from html import escape
from pathlib import Path

from fastapi import Request
from starlette.responses import Response

from serve.api.caching import is_known
from serve.api.service import Service
from serve.errors import Conflict, InvalidRequest, ModelNotFound
from serve.types import MAX_SAMPLE_CHARS, ModelId, ModelInfo, Viewer

PNG, WEBP, SVG = "image/png", "image/webp", "image/svg+xml"

_MAX_IMAGE_BYTES = 8 << 20  # ours have some 100 kB; a folder from elsewhere may hold anything under that name


def choose_preview(service: Service, model_id: str, text: str, prompt: str, viewer: Viewer) -> ModelInfo:
    """Has `text`, which begins with `prompt`, stand for the revision that `model_id` names, on its picture too. Blocks.

    Raises: InvalidRequest, ModelNotFound, NotOwner; Conflict where it cannot be.
    """
    _check(text, prompt)
    if service.draw_preview is None:
        raise Conflict("This server draws no pictures: they stay as they were made.")
    catalogue = service.catalogue
    info = catalogue.get_model(model_id, viewer)
    named = f"{info.model_id}@{info.revision}"  # whatever becomes `main` meanwhile
    avatars = [read_image(catalogue.find_avatar(named, number)) for number in range(info.num_avatars)]
    catalogue.set_preview(named, text, service.draw_preview(info, avatars, text, prompt=prompt), viewer)
    return catalogue.get_model(model_id)


def _check(text: str, prompt: str) -> None:
    if not 1 <= len(text) <= MAX_SAMPLE_CHARS or not text.strip():
        raise InvalidRequest(
            f"'text' must have 1 to {MAX_SAMPLE_CHARS} characters, not {len(text)}, and not be blank.", param="text"
        )
    if not text.startswith(prompt):
        raise InvalidRequest("'text' must begin with 'prompt'; send the text with its prompt.", param="text")


# --- Images -------------------------------------------------------------------------------------------------


def face_of(service: Service, model_id: str, info: ModelInfo, number: int) -> tuple[bytes, str]:
    """The face of the model's handle `number`, from 0, and its media type: a letter where there is none. Blocks."""
    try:
        return read_image(service.catalogue.find_avatar(model_id, number)), WEBP
    except ModelNotFound:
        return draw_letter(info, number), SVG


def draw_letter(info: ModelInfo, number: int) -> bytes:
    """A square SVG: the first letter of whose face it would be, on a colour of the model's own. 4.5 : 1 or better."""
    who = info.handles[number] if number < len(info.handles) else ModelId.parse(info.model_id).name
    letter = next((char for char in info.names.get(who, "") + who if char.isalnum()), "?").upper()[:1]
    hue = blake2b(f"{info.model_id.lower()} {number}".encode(), digest_size=1).digest()[0] / 256
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.30, 0.5))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 96 96" width="96" height="96">'
        f'<rect width="96" height="96" fill="#{red:02x}{green:02x}{blue:02x}"/>'
        '<text x="48" y="50" fill="#fff" font-family="system-ui, sans-serif" font-size="48" text-anchor="middle"'
        f' dominant-baseline="central">{escape(letter)}</text></svg>'
    ).encode()


def read_image(path: Path) -> bytes:
    """Raises: ModelNotFound when it is gone, or too large to be shown."""
    try:
        with path.open("rb") as file:
            image = file.read(_MAX_IMAGE_BYTES + 1)
    except FileNotFoundError as exc:
        raise ModelNotFound("The model has just been deleted.", param="model") from exc
    if len(image) > _MAX_IMAGE_BYTES:
        raise ModelNotFound(
            f"The model's picture has more than {_MAX_IMAGE_BYTES} bytes, the most that is shown.", param="model"
        )
    return image


def image_reply(image: bytes, media_type: str, request: Request, caching: str) -> Response:
    """The image, or that the client has it already."""
    etag = f'"{blake2b(image, digest_size=16).hexdigest()}"'
    headers = {"etag": etag, "cache-control": caching}
    if is_known(request.headers.get("if-none-match"), etag):
        return Response(None, 304, headers)
    return Response(image, 200, headers, media_type=media_type)
