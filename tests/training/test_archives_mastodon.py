"""Archives of Mastodon: their audiences, their HTML and their tars."""

from __future__ import annotations

import random
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serve.errors import BadUpload
from serve.training.archives import read_archive
from serve.training.clean import clean
from tests.training.archive_files import (
    ADA,
    PNG,
    PUBLIC,
    boost,
    create,
    mastodon_members,
    outbox,
    texts,
    write,
    write_tar,
    write_zip,
)

FOLLOWERS = f"{ADA}/followers"


def test_a_mastodon_archive_gives_what_is_public_or_unlisted(tmp_path: Path) -> None:
    activities = [
        create(1, "<p>public</p>", cc=[FOLLOWERS]),
        create(2, "<p>unlisted</p>", to=[FOLLOWERS], cc=[PUBLIC]),
        create(3, "<p>CANARY-followers</p>", to=[FOLLOWERS]),
        create(4, "<p>CANARY-direct</p>", to=["https://other.example/users/bob"]),
        create(5, "<p>CANARY-nobody</p>", to=[]),
        boost(6),
        {**boost(7), "to": [FOLLOWERS]},
        {"id": "8", "type": "Delete", "actor": ADA, "to": [PUBLIC], "object": "CANARY"},
        create(9, "<p>CANARY-theirs</p>", attributedTo="https://other.example/users/bob"),
    ]
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(*activities)))
    assert [(post.text.strip(), post.is_retweet) for post in archive.posts] == [
        ("public", False),
        ("unlisted", False),
        ("", True),
    ]
    assert archive.left_out == {"not_public": 4, "other_record": 1, "other_account": 1}
    assert (archive.handle, archive.display_name, archive.format) == ("ada.social.example", "Ada & Co", "mastodon")
    assert archive.avatar == PNG
    assert archive.posts[0].created_at == datetime(2024, 11, 9, 12, 14, 18, tzinfo=UTC)


BOB = "https://social.example/users/bob"


def test_activities_of_another_account_than_the_owner_are_left_out(tmp_path: Path) -> None:
    activities = [create(1, "mine"), create(2, "CANARY", attributedTo=BOB) | {"actor": BOB}]
    activities.append(create(3, "mine too", attributedTo=[{"id": BOB}, ADA]))
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(*activities)))
    assert (texts(archive), archive.left_out) == (["mine", "mine too"], {"other_account": 1})


@pytest.mark.parametrize("actor_json", [None, "{broken", "[]"])
def test_an_outbox_of_several_accounts_is_refused_where_nothing_names_its_owner(
    tmp_path: Path, actor_json: str | None
) -> None:
    activities = [create(1, "mine"), create(2, "CANARY", attributedTo=BOB) | {"actor": BOB}]
    members = mastodon_members(*activities) | {"actor.json": actor_json or ""}
    with pytest.raises(BadUpload, match="several accounts"):
        read_archive(write_zip(tmp_path / "m.zip", members))
    with pytest.raises(BadUpload, match="several accounts"):
        read_archive(write(tmp_path / "outbox.json", outbox(*activities)))
    alone = read_archive(write_zip(tmp_path / "m.zip", members | {"outbox.json": outbox(*activities[:1])}))
    assert (texts(alone), alone.handle) == (["mine"], "ada.social.example")


def test_a_note_that_is_private_in_a_public_activity_is_private(tmp_path: Path) -> None:
    activity = create(1, "CANARY") | {"to": [PUBLIC]}
    activity["object"]["to"] = [FOLLOWERS]
    assert texts(read_archive(write_zip(tmp_path / "m.zip", mastodon_members(activity)))) == []


def test_warnings_poll_options_and_descriptions_of_pictures_are_not_text(tmp_path: Path) -> None:
    options = [{"type": "Note", "name": "CANARY-option"}]
    more: dict[str, Any] = {
        "summary": "CANARY-warning",
        "attachment": [{"name": "CANARY-alt"}],
        "oneOf": options,
        "type": "Question",
    }
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(create(1, "<p>Tea or coffee?</p>", **more))))
    assert clean(archive).kept == ("Tea or coffee?",)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p><p>two<br />three</p>", "one\n\ntwo\nthree"),
        ("<p>it&#39;s &lt;b&gt; &amp;amp;</p>", "it's <b> &amp;"),
        (
            '<a href="x"><span class="invisible">https://</span><span class="ellipsis">example.org/a</span>'
            '<span class="invisible">/b?c=1</span></a>',
            "https://example.org/a/b?c=1",
        ),
        ('hi <span class="h-card"><a class="u-url mention">@<span>bob</span></a></span>', "hi @bob"),
        ('<a class="mention hashtag">#<span>Tag</span></a>', "#Tag"),
        ("<ul><li>a</li><li>b</li></ul>c", "a\nb\n\n\nc"),
        ("a<script>CANARY</script><style>CANARY</style>", "a"),
        ('<p class="quote-inline">RE: <a>https://x</a></p><p>mine</p>', "mine"),
        ("plain, no tags", "plain, no tags"),
        ("", ""),
    ],
)
def test_html_becomes_what_a_reader_sees(tmp_path: Path, html: str, text: str) -> None:
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(create(1, html))))
    assert [post.text.strip() for post in archive.posts] == [text]


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "archive-2019/"])
def test_a_mastodon_archive_of_an_older_server_is_a_tar(tmp_path: Path, mode: str, form: int, folder: str) -> None:
    long_name = "media_attachments/files/" + "é" * 60 + "x" * 90
    members = {**mastodon_members(create(1, "<p>mine</p>")), long_name if form else "a": bytes(3_000)}
    named = {folder + name: content for name, content in members.items()}
    archive = read_archive(write_tar(tmp_path / "m.tar.gz", dict(reversed(named.items())), mode, format=form))
    assert [post.text.strip() for post in archive.posts] == ["mine"]
    assert (archive.handle, archive.avatar) == ("ada.social.example", PNG)


def test_an_outbox_alone_is_read_and_names_its_owner_by_address(tmp_path: Path) -> None:
    archive = read_archive(write(tmp_path / "outbox.json", outbox(create(1, "<p>mine</p>"), boost(2))))
    assert [post.is_retweet for post in archive.posts] == [False, True]
    assert (archive.handle, archive.format) == ("ada.social.example", "mastodon")


def test_an_outbox_too_large_to_hold_is_read_in_parts(tmp_path: Path) -> None:
    activities = [create(number, f"<p>{random.Random(number).randbytes(1_000).hex()} é</p>") for number in range(2_000)]
    archive = read_archive(write_zip(tmp_path / "m.zip", mastodon_members(*activities)))
    assert (len(archive.posts), archive.left_out) == (2_000, {})


@pytest.mark.parametrize("actor", ["http://[", "x", "https://social.example/", ["x"], None])
def test_an_owner_with_a_made_up_address_has_no_handle(tmp_path: Path, actor: object) -> None:
    activity = {**create(1, "<p>mine</p>"), "actor": actor}
    activity["object"].pop("attributedTo")
    assert read_archive(write(tmp_path / "outbox.json", outbox(activity))).handle is None
