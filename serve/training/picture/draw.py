"""The preview picture of a bot: a card that looks like a post, with one of its predictions, as links show it.

1200 x 630 pixels, what og:image and X's large cards ask for. The same inputs give the same bytes on one machine.
Names, texts and avatars are strangers': any of them may be hostile, none can make it fail. Knows no files.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

from serve.training.picture.avatar import draw_avatar, hue_of
from serve.training.picture.bidi import find_direction
from serve.training.picture.typesetting import LINE_HEIGHT, Colour, clean_text, draw_block, fit_text, set_text
from serve.types import MAX_SAMPLE_CHARS, PREVIEW_PROMPT, ModelId, ModelInfo

WIDTH, HEIGHT = 1200, 630
MAX_BYTES = 60_000  # what a page that shows it may weigh; with more (a photograph, emoji) 256 colours have to do

_CARD = (56, 48, WIDTH - 56, HEIGHT - 48)  # left, top, right, bottom
_PADDING = 52
_LEFT, _RIGHT = _CARD[0] + _PADDING, _CARD[2] - _PADDING
_TEXT_TOP, _TEXT_BOTTOM = 226, 494
_TEXT_SIZES = (64, 58, 52, 46, 40, 35, 31)
_AVATAR = 108
_MAX_AVATARS = 3  # of a cyborg; the names tell of the others
_MAX_NAME_CHARS = 120

_INK: Colour = (15, 20, 25)
_GREY: Colour = (83, 100, 113)
_LINE: Colour = (227, 232, 236)
_WHITE: Colour = (255, 255, 255)

_MAX_LUMINANCE = 0.18  # (1 + 0.05) / (0.18 + 0.05) = 4.6

_MIN_WORDS = 4
_MIN_CHARS = 16  # where words are not told apart by spaces
_MAX_CHARS = 240
# For programs, in XMP's simplest form. Source: IPTC, "digitalSourceType" of what a trained model has made.
_AI_GENERATED = """\
<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">\
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" \
xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType=\
"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""
_ADDRESSES = re.compile(r"@\w|https?:|www\.|t\.co/", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Face:
    """One person as the picture shows them. `handle` without `@`; `avatar`: a PNG, JPEG, GIF or WebP."""

    handle: str
    display_name: str | None = None
    avatar: bytes | None = None


def draw_picture(faces: Sequence[Face], prediction: str, *, model_id: str = "", prompt: str = PREVIEW_PROMPT) -> bytes:
    """A PNG. `prediction` begins with `prompt`, or goes on from it with its space. One face at least."""
    accent = _accent(faces[0].handle)
    canvas = _draw_background(accent)
    left = _draw_avatars(canvas, faces)
    mark_width = _draw_mark(canvas, "🤖 AI CYBORG" if len(faces) > 1 else "🤖 AI BOT", accent)
    _draw_names(canvas, faces, left, _RIGHT - mark_width - 24 - left)
    _draw_prediction(canvas, prompt, prediction, accent)
    _draw_footer(canvas, len(faces) > 1, model_id)
    data = _encode(canvas)
    return data if len(data) <= MAX_BYTES else _encode(canvas.quantize(256, dither=Image.Dither.NONE))


def draw_preview(info: ModelInfo, avatars: Sequence[bytes], text: str, /, *, prompt: str) -> bytes:
    """The picture of a model that is there: of `text`, with what the catalogue knows. `avatars`: the first handles'."""
    handles = info.handles or (ModelId.parse(info.model_id).name,)
    people = itertools.zip_longest(handles, avatars[: len(handles)])
    faces = [Face(handle, info.names.get(handle), avatar) for handle, avatar in people]
    return draw_picture(faces, text, model_id=info.model_id, prompt=prompt)


def choose_prediction(predictions: Sequence[str], *, prompt: str = PREVIEW_PROMPT, learnt: Iterable[str] = ()) -> str:
    """The first that shows a bot well; where none does, the one with the fewest faults; "" of none.

    It has some words, speaks to nobody, links nowhere, is no post that was `learnt`, and was not cut off.
    """
    candidates = {_on_one_line(part) for text in predictions for part in (text, _continuation(prompt, text))}
    posts = candidates.intersection(map(_on_one_line, learnt))  # one pass: they may lie on disk

    def faults(text: str) -> int:
        said = _on_one_line(_continuation(prompt, text))
        is_short = len(said.split()) < _MIN_WORDS and len(said) < _MIN_CHARS
        is_post = bool(posts & {said, _on_one_line(text)})
        is_long = len(said) > _MAX_CHARS
        return 4 * is_short + 2 * bool(_ADDRESSES.search(said)) + 2 * is_post + is_long + said[-1:].isalnum()

    return min(predictions, key=faults, default="")


def _continuation(prompt: str, text: str) -> str:
    return text[len(prompt) :] if text.startswith(prompt) else text


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _encode(image: Image.Image) -> bytes:
    stream, said = io.BytesIO(), PngInfo()
    said.add_text("Software", "Rookery")
    said.add_text("Comment", "AI-generated: a picture of a bot and of a text that it wrote.")
    said.add_itxt("XML:com.adobe.xmp", _AI_GENERATED)
    image.save(stream, "PNG", pnginfo=said)
    return stream.getvalue()


# --- Parts ------------------------------------------------------------------------------------------------


def _draw_background(accent: Colour) -> Image.Image:
    """A soft wash of the bot's colour, and a white card with a shadow upon it."""
    shades = Image.linear_gradient("L").resize((1, HEIGHT))
    top, bottom = (Image.new("RGB", (1, HEIGHT), _mix(accent, _WHITE, share)) for share in (0.55, 0.82))
    canvas = Image.composite(bottom, top, shades).resize((WIDTH, HEIGHT))
    left, up, right, down = _CARD
    card = _rounded((right - left, down - up), 36)
    shadow = Image.new("L", canvas.size)
    shadow.paste(card, (left, up + 8))
    shadow = shadow.filter(ImageFilter.GaussianBlur(14)).point(lambda value: value // 5)
    canvas.paste(_mix(accent, (0, 0, 0), 0.6), None, shadow)
    canvas.paste(_WHITE, (left, up), card)
    return canvas


def _draw_avatars(canvas: Image.Image, faces: Sequence[Face]) -> int:
    """Beside each other, each with a white ring over the one before. Returns where the names begin."""
    left, top = _LEFT, _CARD[1] + 44
    for face in faces[:_MAX_AVATARS]:
        ring = _rounded((_AVATAR + 10, _AVATAR + 10), (_AVATAR + 10) // 2)
        canvas.paste(_WHITE, (left - 5, top - 5), ring)
        avatar = draw_avatar(face.handle, face.avatar, _AVATAR)
        canvas.paste(avatar, (left, top), avatar)
        left += _AVATAR * 2 // 3
    return left + _AVATAR // 3 + 26


def _draw_mark(canvas: Image.Image, text: str, accent: Colour) -> int:
    """A pill at the right, in the bot's colour. Returns its width."""
    block = set_text(text, 27, WIDTH, bold=True)
    width, height = round(block.width) + 48, 58
    left, top = _RIGHT - width, _CARD[1] + 46
    canvas.paste(_mix(accent, _WHITE, 0.86), (left, top), _rounded((width, height), height // 2))
    draw_block(canvas, block, left + 24, top + (height - block.height) / 2 - 1, _mix(accent, (0, 0, 0), 0.25))
    return width


def _draw_names(canvas: Image.Image, faces: Sequence[Face], left: int, width: int) -> None:
    handles = [clean_text(face.handle, max_chars=_MAX_NAME_CHARS) for face in faces]
    names = [clean_text(face.display_name or "", max_chars=_MAX_NAME_CHARS) for face in faces]
    shown = " & ".join(name or handle for name, handle in zip(names, handles, strict=True))
    told = " & ".join(f"@{handle}" for handle in handles)
    for text, size, top, colour, bold in ((shown, 42, 92, _INK, True), (told, 29, 151, _GREY, False)):
        sizes = (size, size * 7 // 8, size * 3 // 4)
        block = fit_text(text, sizes, width, LINE_HEIGHT * size, bold=bold)
        draw_block(canvas, block, left, top + (size - block.size) * LINE_HEIGHT / 2, colour)


def _draw_prediction(canvas: Image.Image, prompt: str, prediction: str, accent: Colour) -> None:
    """The prompt in the bot's colour; what the bot made of it in black, which decides on the direction."""
    lead = clean_text(prompt, max_chars=MAX_SAMPLE_CHARS)
    said = _continuation(prompt, prediction)
    gap = " " if said[:1].isspace() else ""
    text = lead + gap + clean_text(said, max_chars=MAX_SAMPLE_CHARS)  # more would not fit at the smallest size
    direction = find_direction(said[:MAX_SAMPLE_CHARS])
    width, height = _RIGHT - _LEFT, _TEXT_BOTTOM - _TEXT_TOP
    block = fit_text(text, _TEXT_SIZES, width, height, direction=direction)
    top = _TEXT_TOP + (height - block.height) / 2
    draw_block(canvas, block, _LEFT, top, _INK, width=width, num_lead=len(lead), lead_colour=accent)


def _draw_footer(canvas: Image.Image, is_cyborg: bool, model_id: str) -> None:
    top = _CARD[3] - 72
    ImageDraw.Draw(canvas).line((_LEFT, top, _RIGHT, top), fill=_LINE, width=2)
    notice = "Written by a model. Nobody said this." if is_cyborg else "Written by a model. The person never said this."
    block = set_text(notice, 23, WIDTH)
    draw_block(canvas, block, _LEFT, top + 20, _GREY)
    name = clean_text(model_id, max_chars=_MAX_NAME_CHARS)
    room = _RIGHT - _LEFT - block.width - 40
    block = fit_text(name, (23,), room, LINE_HEIGHT * 23)
    draw_block(canvas, block, _RIGHT - block.width, top + 20, _GREY)


def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    """A mask with round corners, smooth: Pillow's own have steps."""
    width, height = size
    mask = Image.new("L", size, 255)
    large = Image.new("L", (radius * 8, radius * 8))
    ImageDraw.Draw(large).ellipse((0, 0, radius * 8 - 1, radius * 8 - 1), fill=255)
    circle = large.resize((radius * 2, radius * 2), Image.Resampling.BOX)
    for x, left in ((0, 0), (width - radius, radius)):
        for y, top in ((0, 0), (height - radius, radius)):
            mask.paste(circle.crop((left, top, left + radius, top + radius)), (x, y))
    return mask


def _accent(name: str) -> Colour:
    """The colour of `name`, dark enough to be read on white (WCAG's 4.5 : 1)."""
    colour = hue_of(name, 0.40, 0.65)
    while _luminance(colour) > _MAX_LUMINANCE:
        colour = _mix(colour, (0, 0, 0), 0.05)
    return colour


def _luminance(colour: Colour) -> float:
    """Source: WCAG 2, relative luminance, with its curve as a power of 2.2."""
    red, green, blue = (math.pow(part / 255, 2.2) for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue
