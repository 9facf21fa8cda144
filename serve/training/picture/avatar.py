"""The picture of one person: their own where an archive holds it, else a pattern that their handle decides.

The bytes are a stranger's: whatever is wrong with them, the pattern is drawn instead. Knows no network.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageOps

from serve.logs import get_logger
from serve.training.archives.avatar import MAX_AVATAR_BYTES

log = get_logger()

FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
MAX_PIXELS = 2048 * 2048  # X keeps 400 x 400, Mastodon as much, Bluesky 1000 x 1000; this is 16 MB, decoded

FACE_PX = 96  # each way: sharp at 48 CSS pixels on a telephone
MAX_FACE_BYTES = 4096
# The first that is small enough: a pattern has some 200 bytes, a photograph about 3 kB.
_FACE_OPTIONS: Sequence[Mapping[str, bool | int]] = (
    {"lossless": True},
    *({"quality": quality} for quality in (80, 60, 40, 20, 5)),
)

_CELLS = 10  # a margin of two cells all around, for a circle is cut out of it; the right half mirrors the left
_MARGIN = 2
_SMOOTH = 4  # times as large before it is made smaller: Pillow's circles have steps


def draw_avatar(handle: str, data: bytes | None, size: int) -> Image.Image:
    """`size` pixels both ways, RGBA, round."""
    image = (_decode(data, size) if data else None) or draw_pattern(handle, size)
    mask = Image.new("L", (size * _SMOOTH, size * _SMOOTH))
    ImageDraw.Draw(mask).ellipse((0, 0, size * _SMOOTH - 1, size * _SMOOTH - 1), fill=255)
    image.putalpha(mask.resize((size, size), Image.Resampling.BOX))
    return image


def encode_face(handle: str, data: bytes | None) -> bytes:
    """A small square WebP, which whoever shows it may cut round. The same inputs give the same bytes."""
    own = _decode(data, FACE_PX) if data else None
    images = [image for image in (own, draw_pattern(handle, FACE_PX)) if image]
    encoded = (_encode(image, options) for image in images for options in _FACE_OPTIONS)
    return next(face for face in encoded if len(face) <= MAX_FACE_BYTES)


def _encode(image: Image.Image, options: Mapping[str, bool | int]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "WEBP", method=6, **options)
    return stream.getvalue()


def draw_pattern(handle: str, size: int) -> Image.Image:
    """The same for the same handle, in any case."""
    digest = hashlib.sha256(handle.lower().encode("utf-8", "replace")).digest()
    image = Image.new("RGB", (_CELLS, _CELLS), (240, 240, 240))
    for y in range(_MARGIN, _CELLS - _MARGIN):
        for x in range(_MARGIN, _CELLS - _MARGIN):
            if digest[y * 3 - min(x, _CELLS - 1 - x)] % 2:  # 2 to 25, each pair of cells its own
                image.putpixel((x, y), hue_of(handle))
    return image.resize((size, size), Image.Resampling.NEAREST)


def hue_of(name: str, lightness: float = 0.45, saturation: float = 0.6) -> tuple[int, int, int]:
    """A colour that belongs to `name`."""
    hue = hashlib.sha256(name.lower().encode("utf-8", "replace")).digest()[0] / 256
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, saturation))
    return red, green, blue


def _decode(data: bytes, size: int) -> Image.Image | None:
    """The first frame, cut to a square, on white where it is transparent."""
    if len(data) > MAX_AVATAR_BYTES:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (size, size))  # JPEG alone: decodes no more than is shown
            upright = ImageOps.exif_transpose(image).convert("RGBA")
        square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
        background = Image.new("RGBA", square.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, square).convert("RGB")
    except Exception as exc:  # decoders meet hostile bytes with errors of every kind
        log.info("avatar_unreadable", error=type(exc).__name__)
        return None
