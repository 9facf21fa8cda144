"""Any script is shown whole, shaped and in order; lines hold; nothing that a stranger writes breaks them."""

from __future__ import annotations

import gzip
import json
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat, features

from serve.training.picture.typesetting import (
    Block,
    Glyph,
    clean_text,
    draw_block,
    fit_text,
    set_text,
    split_clusters,
)

FONTS = Path(__file__).parents[2] / "serve" / "training" / "picture" / "fonts"
COUNTRIES = (
    "AC AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ "
    "CA CC CD CF CG CH CI CK CL CM CN CO CP CR CU CV CW CX CY CZ DE DG DJ DK DM DO DZ EA EC EE EG EH ER ES ET EU FI FJ "
    "FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU IC ID IE IL IM IN IO IQ IR "
    "IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM "
    "MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT "
    "PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TA TC TD TF TG TH TJ TK TL "
    "TM TN TO TR TT TV TW TZ UA UG UM UN US UY UZ VA VC VE VG VI VN VU WF WS XK YE YT ZA ZM ZW"
)
TONES = [chr(code) for code in range(0x1F3FB, 0x1F400)]
SEQUENCES = """
    😀 😂 🥹 🫠 🫨 🤖 🦾 ❤️ ☀️ ✈️ ☎️ ⚓ ⭐ ✅ ❌ ‼️ ⁉️ ℹ️ ↔️ ©️ ®️ ™️ 〰️ ㊗️ 🅰️ 🈁 🀄 🃏 💯 🔞 🕰️ 🏳️ 🏴
    👁️‍🗨️ 🏳️‍🌈 🏳️‍⚧️ 🏴‍☠️ ❤️‍🔥 ❤️‍🩹 🐻‍❄️ 🐈‍⬛ 🐦‍⬛ 🐕‍🦺 😮‍💨 😵‍💫 😶‍🌫️ 🧔‍♂️ 🧔‍♀️ 🧑‍🎄 🧑‍🤝‍🧑 👯‍♀️ 🤼‍♂️ 🧞‍♀️
    👨‍👩‍👧 👨‍👩‍👧‍👦 👩‍👩‍👦‍👦 👨‍❤️‍👨 👩‍❤️‍💋‍👩 👨🏻‍❤️‍💋‍👨🏽
    👩🏽‍🤝‍👩🏿 🧑🏻‍🤝‍🧑🏿 👩🏽‍💻 👨🏾‍🚀 🧑🏿‍🦽 🕵🏼‍♀️ 🏋🏽‍♂️ ⛹🏿‍♀️ 🫱🏻‍🫲🏿
    🏴󠁧󠁢󠁥󠁮󠁧󠁿 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🏴󠁧󠁢󠁷󠁬󠁳󠁿
"""
EMOJI = [
    *SEQUENCES.split(),
    *(f"{key}\ufe0f\u20e3" for key in "0123456789#*"),
    *(base + tone for base in "👋✋👌👍👶🧒👩👨🧑👴👮👷🏃💃🛀🤳💪🦵👂🙏🫶🫵☝✌" for tone in TONES),
    *("".join(chr(0x1F1E6 + ord(letter) - ord("A")) for letter in country) for country in COUNTRIES.split()),
]


def glyphs(block: Block) -> list[Glyph]:
    return [glyph for line in block.lines for glyph in line.glyphs]


def setting(text: str, size: int = 40, width: float = 10_000) -> Block:
    return set_text(clean_text(text, max_chars=5000), size, width)


def drawn(text: str, size: int = 40) -> Image.Image:
    block = setting(text, size)
    canvas = Image.new("RGB", (int(block.width) + 40, int(block.height) + 20), "white")
    draw_block(canvas, block, 20, 10, (0, 0, 0))
    return canvas


def ink(image: Image.Image) -> Image.Image:
    """What is drawn, cut out, white on black."""
    grey = ImageChops.invert(image.convert("L"))
    return grey.crop(grey.getbbox())


@pytest.mark.parametrize(
    "text",
    [
        "Hello, “world” — fi ffl ŁŒß ğış đẹp",
        "Привет, мир! Ёж",
        "Καλημέρα κόσμε",
        "السلام عليكم ورحمة الله ۱۲۳ پچ",
        "שָׁלוֹם עולם ״כן״",
        "नमस्ते विद्यार्थी क्षत्रिय श्री।",
        "বাংলা ਪੰਜਾਬੀ ગુજરાતી தமிழ் తెలుగు ಕನ್ನಡ മലയാളം ଓଡ଼ିଆ සිංහල",
        "ภาษาไทยที่นี่ ພາສາລາວ ខ្មែរ မြန်မာ ქართული Հայերեն አማርኛ",
        "私の夢は「友愛」です。ｶﾞﾝﾊﾞﾚ！ 简体中文 繁體中文 한국어",
        "→ ✓ ★ ☆ ♪ ⓐ ■ ℕ 𝓐𝕓𝔠𝟙 ½ € ₹ ₺ ₪",
    ],
)
def test_script_is_drawn_without_a_missing_glyph(text: str) -> None:
    assert clean_text(text, max_chars=500) == unicodedata.normalize("NFC", text)
    assert all(glyph.id != 0 for glyph in glyphs(setting(text)))
    assert drawn(text).getcolors(2) is None  # more than the paper


def test_every_emoji_sequence_is_one_picture_in_colour() -> None:
    for emoji in EMOJI:
        name = " ".join(f"{ord(char):x}" for char in emoji)
        assert split_clusters(emoji) == [emoji] and clean_text(f"a {emoji} b", max_chars=50) == f"a {emoji} b", name
        seen = [glyph for glyph in glyphs(setting(emoji)) if glyph.font.get_glyph_h_advance(glyph.id)]
        assert len(seen) == 1 and seen[0].id != 0, name
        assert len(drawn(emoji).getcolors(100_000) or ()) > 2, name


def test_emoji_is_coloured_and_its_text_form_is_not() -> None:
    def saturation(text: str) -> float:
        return float(ImageStat.Stat(drawn(text).convert("HSV").getchannel("S")).mean[0])

    assert saturation("❤️") > 20 and saturation("❤\ufe0e") < 1 and saturation("a") < 1


def test_right_to_left_letters_stand_from_right_to_left() -> None:
    (line,) = setting("אבגד").lines
    assert [glyph.at for glyph in sorted(line.glyphs, key=lambda glyph: glyph.x)] == [3, 2, 1, 0]
    (line,) = setting("abאבcd").lines
    assert [glyph.at for glyph in sorted(line.glyphs, key=lambda glyph: glyph.x)] == [0, 1, 3, 2, 4, 5]
    assert setting("אב").is_right_to_left and not setting("ab אב").is_right_to_left


def test_arabic_letters_join_across_a_change_of_font() -> None:
    alone, joined = glyphs(setting("ب"))[0], glyphs(setting("ببب"))
    assert len({alone.id, *(glyph.id for glyph in joined)}) == 4  # alone, and at each of three places
    assert setting("ببب").width < 3 * setting("ب").width


@pytest.mark.skipif(not features.check("raqm"), reason="needs Pillow with libfribidi")
@pytest.mark.parametrize(
    ("text", "font"),
    [
        ("السلام", "NotoSansArabic-Regular.ttf"),
        ("שלום", "NotoSansHebrew-Regular.ttf"),
        ("विद्यार्थी", "NotoSansDevanagari-Regular.ttf"),
        ("Hello world", "NotoSans-Regular.ttf"),
    ],
)
def test_drawing_looks_like_the_one_of_another_library(text: str, font: str) -> None:
    canvas = Image.new("RGB", (800, 160), "white")
    theirs = ImageFont.truetype(FONTS / font, 64, layout_engine=ImageFont.Layout.RAQM)
    ImageDraw.Draw(canvas).text((20, 20), text, fill="black", font=theirs)
    ours, other = ink(drawn(text, 64)), ink(canvas)
    other = other.resize(ours.size)

    def difference(image: Image.Image) -> float:
        return float(ImageStat.Stat(ImageChops.difference(ours, image)).mean[0])

    mirrored = other.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert difference(other) < 20 and 2 * difference(other) < difference(mirrored)


# --- Lines ------------------------------------------------------------------------------------------------


def lines_of(text: str, width: float, size: int = 30) -> list[str]:
    block = set_text(text, size, width)
    starts = [min(glyph.at for glyph in line.glyphs) for line in block.lines]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def test_lines_break_between_words_and_none_is_wider_than_it_may_be() -> None:
    text = "The quick brown fox jumps over the lazy dog, again and again. " * 5
    for width in (150, 300, 700):
        block = set_text(text.strip(), 30, width)
        assert len(block.lines) > 1 and block.width <= width + 1
        assert all(line.endswith(" ") for line in lines_of(text.strip(), width)[:-1])


def test_chinese_and_japanese_break_between_characters_but_not_before_a_full_stop() -> None:
    text = "私の夢は、世界を平和にすることです。" * 6
    for width in range(100, 400, 7):
        lines = lines_of(text, width)
        assert set_text(text, 30, width).width <= width + 1
        assert not any(line[0] in "、。" for line in lines)


def test_word_longer_than_a_line_breaks_anywhere_but_not_inside_a_character() -> None:
    block = set_text("w" * 200, 30, 200)
    assert len(block.lines) > 10 and block.width <= 201
    family = "👨‍👩‍👧‍👦"
    assert all(line.count("👨") == line.count("👦") for line in lines_of(family * 40, 200))


def test_text_takes_the_largest_size_that_fits_and_is_cut_with_an_ellipsis_at_the_smallest() -> None:
    assert fit_text("short", (60, 30), 500, 200).size == 60
    assert fit_text("longer than that " * 5, (60, 30), 500, 250).size == 30
    cut = fit_text("far too long " * 99, (60, 30), 500, 100)
    assert cut.size == 30 and cut.height <= 100 and cut.width <= 501
    ellipsis = glyphs(set_text("…", 30, 99))[0].id
    assert cut.lines[-1].glyphs[-1].id == ellipsis
    assert fit_text("", (60, 30), 500, 100).lines == ()
    fit_text("a b", (60,), 1, 1)  # no room at all


def test_lead_has_its_own_colour() -> None:
    canvas = Image.new("RGB", (400, 80), "white")
    draw_block(canvas, set_text("lead tail", 40, 400), 10, 10, (0, 0, 0), num_lead=4, lead_colour=(255, 0, 0))
    colours = {colour for _, colour in canvas.getcolors(10_000) or ()}
    assert {(255, 0, 0), (0, 0, 0)} <= colours


# --- Strangers' texts -------------------------------------------------------------------------------------


def test_marks_of_direction_and_controls_are_left_out() -> None:
    assert clean_text("a\u202eb\x00\x1b[2J\u2066\ufeff\u200b\u00ad\r\n\tc\ud800", max_chars=99) == "ab[2J c"


def test_what_no_font_has_is_replaced_once_and_its_marks_are_dropped() -> None:
    assert clean_text("a\U00012000\U0001b000b", max_chars=99) == "a\ufffd\ufffdb"
    assert glyphs(setting("\U00012000"))[0].id != 0


def test_tower_of_marks_is_cut_down() -> None:
    cleaned = clean_text("e" + "\u0301\u0489\u0360" * 5000 + "nd", max_chars=500)
    assert len(cleaned) <= 500 and sum(unicodedata.combining(char) > 0 for char in cleaned) <= 4
    chain = clean_text("\u200d".join("👩" * 9000), max_chars=9000)
    assert len(chain) <= 12


@pytest.mark.parametrize(
    "text",
    [
        *(char * 100_000 for char in ("x", " ", "(", "م", "w\u0301", "\u202e", "🇩", "👩\u200d", "لا", "夢", "😀")),
        *(char * 9999 for char in ("\U0001f1e6a", "\u0e33", "\u200d", "\ufe0f\u20e3", "\U000e0067", "\u0301")),
    ],
    ids=lambda text: f"{ord(text[0]):x}",
)
def test_hostile_text_is_cut_and_set_in_little_time(text: str) -> None:
    started = time.process_time()
    block = fit_text(clean_text(text, max_chars=600), (64, 48, 31), 980, 264)
    assert block.height <= 264 and block.width <= 981
    draw_block(Image.new("RGB", (1200, 630)), block, 0, 0, (255, 255, 255))
    assert time.process_time() - started < 2.0


def test_setting_does_not_depend_on_the_machines_language(monkeypatch: pytest.MonkeyPatch) -> None:
    before = drawn("Ştefan 直 骨 ığ").tobytes()
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    assert drawn("Ştefan 直 骨 ığ").tobytes() == before


def _tweets(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["full_text"]


@pytest.mark.slow
def test_every_visible_character_of_real_tweets_is_covered(shared_data: Path) -> None:
    counts: Counter[str] = Counter()
    for text in _tweets(shared_data / "tweets"):
        counts.update(text)
    visible = {char: n for char, n in counts.items() if unicodedata.category(char)[0] not in "CZ" and char != "\ufffc"}
    missing = {char: n for char, n in visible.items() if "\ufffd" in clean_text(char, max_chars=9) and char != "\ufffd"}
    assert sum(missing.values()) < 1e-6 * sum(visible.values()), missing
