"""The preview picture is a picture that others can show, whatever names, texts and avatars strangers bring."""

from __future__ import annotations

import io
import random
import resource
import struct
import time
import zlib
from collections.abc import Sequence
from functools import cache

import pytest
from PIL import Image, ImageChops, ImageStat

from serve.training.picture.avatar import draw_avatar, draw_pattern
from serve.training.picture.draw import HEIGHT, MAX_BYTES, WIDTH, Face, choose_prediction, draw_picture

ADA = Face("ada", "Ada Lovelace")
SAID = " to see an engine weave algebraic patterns."


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox(alpha_only=False) is None


def accent(handle: str) -> tuple[int, int, int]:
    """The colour of the prompt: the most frequent one where nothing but large letters is, beside white."""
    image = opened(draw_picture([Face(handle)], "")).convert("RGB").crop((100, 230, 600, 490))
    _, colour = sorted(image.getcolors(100_000) or (), key=lambda found: found[0])[-2]
    assert isinstance(colour, tuple)
    red, green, blue = colour
    return red, green, blue


def changed(one: bytes, other: bytes) -> tuple[int, int, int, int] | None:
    """The box outside of which two pictures are the same."""
    return ImageChops.difference(opened(one).convert("RGB"), opened(other).convert("RGB")).getbbox()


def test_picture_is_a_png_of_the_size_that_links_show() -> None:
    data = draw_picture([ADA], SAID, model_id="huggingtweets/ada")
    image = opened(data)
    assert (image.format, image.size) == ("PNG", (1200, 630)) and len(data) <= MAX_BYTES
    assert image.info.keys() <= {"Software", "Comment", "XML:com.adobe.xmp", "xmp"}  # no date, nothing of the machine


def test_same_inputs_give_the_same_bytes() -> None:
    assert draw_picture([ADA], SAID) == draw_picture([ADA], SAID)


def test_picture_tells_programs_that_it_is_generated() -> None:
    said = opened(draw_picture([ADA], SAID)).text  # type: ignore[attr-defined]
    assert "AI-generated" in said["Comment"] and "trainedAlgorithmicMedia" in said["XML:com.adobe.xmp"]


def test_every_part_is_on_the_picture_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.training.picture.draw.MAX_BYTES", 10**6)  # with 256 colours, each has its own
    plain = draw_picture([ADA], SAID, model_id="huggingtweets/ada")
    avatar = encoded(Image.new("RGB", (400, 400), (200, 40, 40)), "JPEG")
    others = {
        "names": draw_picture([Face("ada", "Grace")], SAID, model_id="huggingtweets/ada"),
        "avatar": draw_picture([Face("ada", "Ada Lovelace", avatar)], SAID, model_id="huggingtweets/ada"),
        "text": draw_picture([ADA], SAID.replace("engine", "enigma"), model_id="huggingtweets/ada"),
        "prompt": draw_picture([ADA], SAID, prompt="My drama is", model_id="huggingtweets/ada"),
        "model": draw_picture([ADA], SAID, model_id="huggingtweets/bob"),
    }
    boxes = {part: changed(plain, picture) for part, picture in others.items()}
    assert None not in boxes.values()
    tops = {part: box[1] for part, box in boxes.items() if box}
    assert tops["avatar"] < tops["names"] < tops["prompt"] <= tops["text"] < tops["model"]
    assert boxes["avatar"] and boxes["avatar"][2] <= 220 and boxes["names"] and boxes["names"][0] > 220


def test_prompt_has_a_colour_and_what_the_bot_said_is_black() -> None:
    def inks(box: tuple[int, int, int, int]) -> set[tuple[int, ...]]:
        colours = opened(draw_picture([ADA], " is")).convert("RGB").crop(box).getcolors(100_000) or ()
        return {colour for _, colour in colours if isinstance(colour, tuple) and min(colour) < 100}

    lead, said = inks((100, 230, 400, 500)), inks((485, 230, 700, 500))
    assert (15, 20, 25) in said and (15, 20, 25) not in lead and lead


def test_colour_of_every_bot_can_be_read_on_white() -> None:
    for number in range(40):
        red, green, blue = ((part / 255) ** 2.2 for part in accent(f"bot{number}"))
        assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) > 4.5


def test_prediction_may_or_may_not_begin_with_the_prompt() -> None:
    assert draw_picture([ADA], "My dream is" + SAID) == draw_picture([ADA], SAID)
    assert draw_picture([ADA], "My dream is, well, big.") == draw_picture([ADA], ", well, big.")


def test_hebrew_stands_at_the_right_behind_the_prompt() -> None:
    box = changed(draw_picture([ADA], " שלום עולם"), draw_picture([ADA], " שלום לכם"))
    assert box is not None and box[2] < 800  # the prompt has the right side to itself


def test_several_people_are_a_cyborg_with_all_their_avatars() -> None:
    red, blue = (encoded(Image.new("RGB", (64, 64), colour), "PNG") for colour in ("red", "blue"))
    image = opened(draw_picture([Face("ada", None, red), Face("bob", None, blue)], SAID)).convert("RGB")
    assert image.getpixel((130, 150)) == (255, 0, 0) and image.getpixel((240, 150)) == (0, 0, 255)
    bot = draw_picture([Face("ada")], SAID)
    assert draw_picture([Face("ada", "\u200d \u200c")], SAID) == bot, "a name that nobody sees"
    assert changed(bot, draw_picture([Face("ada"), Face("ada")], SAID)) is not None
    for num_people in (3, 8):
        draw_picture([Face(f"someone_{i}", "A Rather Long Name") for i in range(num_people)], SAID)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x" * 100_000,
        "word " * 20_000,
        "\u202e\u2066\u200f" * 1000 + "abc\u202e",
        "a" + "\u0301" * 100_000,
        "😀" * 5000,
        "م" * 5000,
        "\x00\x1b[2J\ud800\udfff",
        "<script>alert(1)</script> {{7*7}} %s",
        "\U0001f3fb\u200d\ufe0f\U000e007f\U0001f1e6",
        "﷽" * 99,
    ],
    ids=range(11),
)
def test_hostile_names_and_texts_are_drawn_like_any_other(text: str) -> None:
    started = time.process_time()
    data = draw_picture([Face(text, text), Face("bob", text)], text, model_id=text, prompt=text)
    assert opened(data).size == (WIDTH, HEIGHT) and len(data) <= MAX_BYTES
    plain = opened(draw_picture([Face(text)], "")).convert("RGB")
    edge = opened(data).convert("RGB").crop((0, 0, 40, HEIGHT))
    assert ImageStat.Stat(ImageChops.difference(edge, plain.crop((0, 0, 40, HEIGHT)))).mean < [3, 3, 3]  # stays inside
    assert time.process_time() - started < 5.0


def test_picture_takes_little_time() -> None:
    """Some 45 ms where nothing else runs; ten times that is the alarm."""
    faces = [Face("ada", "Ada 👩🏽‍💻", encoded(noise(400), "JPEG"))]
    draw_picture(faces, SAID)
    times = []
    for _ in range(5):
        started = time.process_time()
        draw_picture(faces, SAID * 5)
        times.append(time.process_time() - started)
    assert min(times) < 0.45


# --- Avatars ----------------------------------------------------------------------------------------------


def noise(size: int, seed: int = 7) -> Image.Image:
    return Image.frombytes("RGB", (size, size), random.Random(seed).randbytes(size * size * 3))


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 1, kind: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_avatar_of_each_format_is_shown_round(kind: str) -> None:
    avatar = draw_avatar("ada", encoded(Image.new("RGB", (400, 300), (250, 0, 0)), kind), 100)
    assert avatar.size == (100, 100) and avatar.mode == "RGBA"
    centre, corner = avatar.getpixel((50, 50)), avatar.getpixel((1, 1))
    assert isinstance(centre, tuple) and isinstance(corner, tuple)
    assert centre[0] > 240 and centre[1] < 10 and centre[3] == 255 and corner[3] == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_avatar_of_any_mode_is_shown(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    avatar = draw_avatar("ada", encoded(Image.new(mode, (50, 50)), kind), 64)
    assert not same(avatar, draw_avatar("ada", None, 64))


def test_first_frame_of_an_animation_is_shown() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ((0, 0, 255), (0, 255, 0), (255, 0, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        centre = draw_avatar("ada", data, 40).getpixel((20, 20))
        assert isinstance(centre, tuple) and centre[2] > 240 and centre[0] < 20, kind


def test_avatar_is_turned_as_its_camera_was_and_transparency_is_white() -> None:
    image = Image.new("RGB", (100, 100), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 100, 50))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    below = draw_avatar("ada", encoded(image, "JPEG", exif=exif), 100).getpixel((50, 80))
    assert isinstance(below, tuple) and below[0] > 200
    clear = encoded(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), "PNG")
    assert draw_avatar("ada", clear, 50).getpixel((25, 25)) == (255, 255, 255, 255)


@cache
def hostile_avatars() -> dict[str, bytes]:
    good = {kind: encoded(noise(64), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP")}
    rows = zlib.compress(b"\0" * 3_000_000, 9)
    text = b"k\0\0" + zlib.compress(b"x" * 50_000_000, 9)
    webp = bytearray(encoded(Image.new("RGBA", (1, 1)), "WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16383 - 1 | (16383 - 1) << 14)
    gif = bytearray(good["GIF"])
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    jpeg = bytearray(good["JPEG"])
    frame = jpeg.find(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return {
        "nothing": b"",
        "no picture": b"hello" * 999,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%id) (w) file\n",
        "tiff": encoded(noise(8), "TIFF"),
        "bmp": encoded(noise(8), "BMP"),
        "ico": encoded(noise(16), "ICO"),
        "too many bytes": encoded(noise(1300), "PNG"),
        "too many pixels": encoded(Image.new("1", (4000, 4000)), "PNG"),
        "bomb": png(20_000, 30_000, (b"IDAT", rows)),
        "endless rows": png(4_000_000_000, 4_000_000_000, (b"IDAT", rows)),
        "no pixels": png(0, 0, (b"IDAT", rows)),
        "text bomb": png(8, 8, (b"zTXt", text), (b"IDAT", rows)),
        "profile bomb": png(8, 8, (b"iCCP", text), (b"IDAT", zlib.compress(b"\0"))),
        "huge webp": bytes(webp),
        "huge gif": bytes(gif),
        "huge jpeg": bytes(jpeg),
        **{f"half a {kind}": data[: len(data) // 2] for kind, data in good.items()},
        **{f"a {kind}'s beginning": data[:20] for kind, data in good.items()},
    }


@pytest.mark.parametrize("name", hostile_avatars())
def test_hostile_avatar_is_replaced_by_the_pattern(name: str) -> None:
    data = hostile_avatars()[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    assert same(draw_avatar("ada", data, 64), draw_avatar("ada", None, 64))
    assert time.process_time() - started < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_damaged_avatars_never_fail() -> None:
    chance = random.Random(5)
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        good = encoded(noise(40), kind)
        for _ in range(150):
            data = bytearray(good)
            for _ in range(chance.randint(1, 20)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            assert draw_avatar("ada", bytes(data), 32).size == (32, 32)


def test_each_handle_has_its_own_pattern_in_any_case() -> None:
    assert same(draw_pattern("ada", 100), draw_pattern("Ada", 100))
    patterns = {draw_pattern(f"bot{i}", 100).tobytes() for i in range(100)}
    assert len(patterns) == 100
    pattern = draw_pattern("ada", 100)
    assert same(pattern, pattern.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


# --- Which prediction -------------------------------------------------------------------------------------

GOOD = "My dream is to see the sea again, soon."


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([], GOOD),
        (["My dream is big."], GOOD),  # too short
        (["My dream is"], GOOD),
        (["My dream is to thank @bob for his kind words."], GOOD),
        (["My dream is here: https://t.co/abc for you all."], GOOD),
        (["My dream is to be cut off in the middle of"], GOOD),
        (["My dream is " + "to go on and " * 30 + "on."], GOOD),
        (["My dream is to repeat what   was learnt."], GOOD),
        (["My dream is another good one, first."], "My dream is another good one, first."),
        (["My dream is 世界を平和にすることです。みんなで。"], "My dream is 世界を平和にすることです。みんなで。"),
    ],
)
def test_first_prediction_without_a_fault_is_chosen(others: Sequence[str], chosen: str) -> None:
    assert choose_prediction([*others, GOOD], learnt=["my dream", "My dream is to repeat what was learnt."]) == chosen


def test_of_bad_predictions_the_least_bad_is_chosen_and_of_none_nothing() -> None:
    assert choose_prediction(["My dream is @bob", "My dream is to be cut off in the"]).endswith("off in the")
    assert choose_prediction([]) == ""
