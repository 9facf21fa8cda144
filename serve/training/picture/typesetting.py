"""Sets a text of any script into lines and draws it: fonts chosen by character, shaped, ordered, broken, in colour.

HarfBuzz shapes and rasters everything, so that what is drawn does not depend on the libraries of the machine. Knows
the packaged fonts and no others; knows nothing of pictures beyond the canvas it draws upon.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import uharfbuzz as hb  # type: ignore[import-untyped]
from PIL import Image

from serve.training.picture.bidi import find_direction, order, resolve_levels

LINE_HEIGHT = 1.36  # of the size; Noto's own: room for the marks of Devanagari, Thai and Vietnamese
_BASELINE = 1.05
_UNITS = 64  # of HarfBuzz, a pixel

_FONTS = Path(__file__).parent / "fonts"
_LATIN, _LATIN_BOLD, _EMOJI = "NotoSans-Regular.ttf", "NotoSans-Bold.ttf", "Twemoji.ttf"
# What several fonts have is drawn from the first of them.
_SCRIPTS = [
    *("Arabic", "Hebrew", "Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Tamil", "Telugu", "Kannada", "Malayalam"),
    *("Oriya", "Sinhala", "Thai", "Lao", "Khmer", "Myanmar", "Georgian", "Armenian", "Ethiopic"),
    *("Symbols2", "Symbols", "Math"),
]
_OTHERS = (_EMOJI, "NotoSansCJKjp-Regular.otf", *(f"NotoSans{script}-Regular.ttf" for script in _SCRIPTS))
_SYNTHETIC_BOLD = (0.03, 0.03, True)  # of the size, for the fonts of which only the regular weight is here

_ZWJ, _TEXT_STYLE, _EMOJI_STYLE = "\u200d", "\ufe0e", "\ufe0f"
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_TAGS = {chr(code) for code in range(0xE0020, 0xE0080)}  # spell the flags of regions
_FLAG_LETTERS = {chr(code) for code in range(0x1F1E6, 0x1F200)}
_UNSEEN = {"\u200c", _ZWJ, _TEXT_STYLE, _EMOJI_STYLE, *_TAGS}  # they change how others look
_REPLACEMENT = "\ufffd"  # for what no font here has
_MAX_CLUSTER = 12  # characters; the longest emoji in use has 10
_MAX_MARKS = 4  # on one letter: towers of them would reach across the picture
_ELLIPSIS = "…"
_NOT_FIRST = frozenset("、。，．・：；？！）」』】〉》〕］｝ーぁぃぅぇぉっゃゅょァィゥェォッャュョ々…")  # of a line
_NOT_LAST = frozenset("（「『【〈《〔［｛")

# Edges in 16 shades: nobody sees the other 240, and a PNG of a long text is a quarter smaller without them.
_COVER = [round(alpha / 17) * 17 for alpha in range(256)]

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Glyph:
    """`x`, `y` in pixels from the line's beginning, `y` upwards. `at`: where in the text it comes from."""

    font: hb.Font
    id: int
    x: float
    y: float
    at: int


@dataclass(frozen=True, slots=True)
class Line:
    glyphs: tuple[Glyph, ...]
    width: float


@dataclass(frozen=True, slots=True)
class Block:
    """A text in lines, ready to be drawn. Right-to-left text stands against the right side."""

    lines: tuple[Line, ...]
    size: int
    is_right_to_left: bool

    @property
    def width(self) -> float:
        return max((line.width for line in self.lines), default=0.0)

    @property
    def height(self) -> float:
        return len(self.lines) * self.size * LINE_HEIGHT


# --- Characters -------------------------------------------------------------------------------------------


def clean_text(text: str, *, max_chars: int) -> str:
    """One line of what can be drawn, "" if none would be seen: no controls, no marks of direction, no towers."""
    spaced = " ".join(text[: 4 * max_chars].split())
    kept = "".join(c for c in spaced if c in _UNSEEN or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    clusters = (_drawable(cluster) for cluster in split_clusters(unicodedata.normalize("NFC", kept)))
    drawn = " ".join("".join(clusters)[:max_chars].split())
    return drawn if set(drawn) - _UNSEEN - {" "} else ""


def split_clusters(text: str) -> list[str]:
    """What a reader takes for one character: a letter with its marks, an emoji of several parts, a flag."""
    clusters: list[str] = []
    for char in text:
        if clusters and _continues(clusters[-1], char):
            clusters[-1] += char
        else:
            clusters.append(char)
    return clusters


def _continues(cluster: str, char: str) -> bool:
    if char in _UNSEEN or char in _SKIN_TONES or cluster.endswith(_ZWJ):
        return cluster != " "
    return unicodedata.category(char)[0] == "M" or (char in _FLAG_LETTERS and cluster in _FLAG_LETTERS)


def _drawable(cluster: str) -> str:
    marks = 0
    kept = ""
    font = _choose_font(cluster, False)
    for char in cluster[:_MAX_CLUSTER]:
        is_mark = char not in _UNSEEN and unicodedata.category(char)[0] == "M"
        marks += is_mark
        if char in _UNSEEN or (_has(font, char) and marks <= _MAX_MARKS):
            kept += char
        elif not is_mark:
            kept += _REPLACEMENT
    return kept


# --- Fonts ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _face(name: str) -> hb.Face:
    return hb.Face(hb.Blob.from_file_path(str(_FONTS / name)))


@lru_cache(maxsize=256)
def _font(name: str, size: int, bold: bool) -> hb.Font:
    font = hb.Font(_face(name))
    font.scale = (size * _UNITS, size * _UNITS)
    if bold and name not in (_LATIN_BOLD, _EMOJI):
        font.synthetic_bold = _SYNTHETIC_BOLD
    return font


@lru_cache(maxsize=4096)
def _has(name: str, char: str) -> bool:
    return _font(name, 1, False).get_nominal_glyph(ord(char)) is not None


@lru_cache(maxsize=4096)
def _choose_font(cluster: str, bold: bool) -> str:
    """The first of those that have the most of its characters."""
    names = (_LATIN_BOLD if bold else _LATIN, *_OTHERS)
    if _EMOJI_STYLE in cluster:
        names = (_EMOJI, *names)
    elif _TEXT_STYLE in cluster:
        names = tuple(name for name in names if name != _EMOJI) + (_EMOJI,)
    return max(names, key=lambda name: sum(_has(name, char) for char in cluster if char not in _UNSEEN))


# --- Lines ------------------------------------------------------------------------------------------------


def set_text(text: str, size: int, width: float, *, bold: bool = False, direction: int | None = None) -> Block:
    """`text`, already clean, in as many lines as it takes. `direction` None: as its first letter says."""
    if direction is None:
        direction = find_direction(text) or 0
    clusters = split_clusters(text)
    fonts = [name for cluster in clusters for name in [_choose_font(cluster, bold)] * len(cluster)]
    setting = _Setting(text, clusters, fonts, resolve_levels(text, direction), direction, size, bold)
    return Block(
        tuple(setting.set_line(start, end) for start, end in setting.break_lines(width)), size, bool(direction)
    )


def fit_text(
    text: str, sizes: Sequence[int], width: float, height: float, *, bold: bool = False, direction: int | None = None
) -> Block:
    """At the largest of `sizes` at which it fits; at the last of them it is cut, with an ellipsis."""
    for size in sizes:
        block = set_text(text, size, width, bold=bold, direction=direction)
        if block.height <= height:
            return block
    clusters = split_clusters(text)
    low, high = 0, len(clusters)  # so many clusters fit; so many do not
    while high - low > 1:
        middle = (low + high) // 2
        short = "".join(clusters[:middle]).rstrip() + _ELLIPSIS
        fits = set_text(short, sizes[-1], width, bold=bold, direction=direction).height <= height
        low, high = (middle, high) if fits else (low, middle)
    short = "".join(clusters[:low]).rstrip() + _ELLIPSIS
    return set_text(short, sizes[-1], width, bold=bold, direction=direction)


@dataclass(frozen=True, slots=True)
class _Setting:
    """A text with a font and a level for each of its characters."""

    text: str
    clusters: list[str]
    fonts: list[str]
    levels: list[int]
    direction: int
    size: int
    bold: bool

    def break_lines(self, width: float) -> Iterator[tuple[int, int]]:
        """(start, end) of each line, without the space at its end. The first that fits, as browsers do."""
        pieces = list(self._pieces(width))
        ends = [start + len(self.text[start:end].rstrip()) for start, end in pieces]
        first = 0
        while first < len(pieces):
            start = pieces[first][0]
            # Lines are measured whole, for neighbours change each other: kerning, ligatures, Arabic's joined letters.
            last = bisect_right(ends, width, lo=first + 1, key=lambda end: self._measure(start, end)) - 1
            yield start, ends[last]
            first = last + 1

    def _pieces(self, width: float) -> Iterator[tuple[int, int]]:
        """(start, end) of what is not broken: words, and the characters of scripts without spaces."""
        for clusters, start in self._words():
            end = start + sum(map(len, clusters))
            if len(clusters) == 1 or self._measure(start, start + len("".join(clusters).rstrip())) <= width:
                yield start, end
                continue
            for cluster in clusters:  # longer than a line: it breaks anywhere
                yield start, start + len(cluster)
                start += len(cluster)

    def _words(self) -> Iterator[tuple[list[str], int]]:
        word: list[str] = []
        start = at = 0
        for cluster in self.clusters:
            if word and _may_break(word[-1], cluster):
                yield word, start
                word, start = [], at
            word.append(cluster)
            at += len(cluster)
        if word:
            yield word, start

    def _measure(self, start: int, end: int) -> float:
        return sum(self._shape(*run)[1] for run in self._runs(start, end))

    def set_line(self, start: int, end: int) -> Line:
        runs = self._runs(start, end)
        glyphs: list[Glyph] = []
        x = 0.0
        for index in order([self.levels[run_start] for run_start, _ in runs]):
            run_glyphs, advance = self._shape(*runs[index], x)
            glyphs += run_glyphs
            x += advance
        return Line(tuple(glyphs), x)

    def _runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Neighbours of one font and one level, in the order in which they are read."""
        groups = itertools.groupby(range(start, end), key=lambda at: (self.fonts[at], self.levels[at]))
        spans = [list(group) for _, group in groups]
        return [(span[0], span[-1] + 1) for span in spans]

    def _shape(self, start: int, end: int, x: float = 0.0) -> tuple[list[Glyph], float]:
        """The glyphs from left to right from `x` on, and how far they reach."""
        font = _font(self.fonts[start], self.size, self.bold)
        buffer = hb.Buffer()
        buffer.add_str(self.text, start, end - start)  # with its surroundings, to which Arabic letters join
        buffer.direction = "rtl" if self.levels[start] % 2 else "ltr"
        buffer.language = "en"  # else the machine's own
        buffer.guess_segment_properties()
        hb.shape(font, buffer)
        glyphs = []
        begin = x
        for info, place in zip(buffer.glyph_infos or (), buffer.glyph_positions or (), strict=True):
            glyphs.append(
                Glyph(font, info.codepoint, x + place.x_offset / _UNITS, place.y_offset / _UNITS, info.cluster)
            )
            x += place.x_advance / _UNITS
        return glyphs, x - begin


def _may_break(before: str, after: str) -> bool:
    if before == " " or after == " ":
        return before == " " and after != " "
    if after[0] in _NOT_FIRST or before[0] in _NOT_LAST:
        return False
    return before in "-–—/" or any(unicodedata.east_asian_width(cluster[0]) in "WF" for cluster in (before, after))


# --- Pixels -----------------------------------------------------------------------------------------------


def draw_block(
    canvas: Image.Image,
    block: Block,
    left: float,
    top: float,
    colour: Colour,
    *,
    width: float | None = None,
    num_lead: int = 0,
    lead_colour: Colour = (0, 0, 0),
) -> None:
    """Draws upon `canvas`. The text's first `num_lead` characters have a colour of their own.

    `width`: right-to-left text stands against the right side of that; None: of the block itself.
    """
    room = block.width if width is None else width
    for row, line in enumerate(block.lines):
        x = left + (room - line.width if block.is_right_to_left else 0)
        y = top + (row * LINE_HEIGHT + _BASELINE) * block.size
        for glyph in line.glyphs:
            _draw_glyph(canvas, glyph, x + glyph.x, y - glyph.y, lead_colour if glyph.at < num_lead else colour)


def _draw_glyph(canvas: Image.Image, glyph: Glyph, x: float, y: float, colour: Colour) -> None:
    column, row = math.floor(x), math.floor(y)
    painter = hb.RasterPaint()
    painter.scale_factor = (_UNITS, _UNITS)
    painter.transform = (1, 0, 0, 1, (x - column) * _UNITS, (row - y) * _UNITS)
    painter.foreground = hb.Color(*colour, 255)
    extents = glyph.font.get_glyph_extents(glyph.id)
    if extents is None or not extents.width or not painter.set_glyph_extents(extents):
        return  # a space
    painter.paint_glyph(glyph.font, glyph.id)
    image = painter.render()
    if image is None or not (image.extents.width and image.extents.height):
        return
    box = image.extents  # its rows go from the bottom to the top
    pixels = Image.frombuffer("RGBA", (box.width, box.height), bytes(image.buffer), "raw", "BGRa", box.stride, -1)
    cover = pixels.getchannel("A").point(_COVER)
    canvas.paste(pixels, (column + box.x_origin, row - box.y_origin - box.height), cover)
