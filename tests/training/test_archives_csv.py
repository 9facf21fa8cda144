"""Tables, and texts of a post to the line."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.errors import BadUpload
from serve.training.archives import read_archive
from serve.training.clean import clean
from tests.training.archive_files import texts, write

# --- CSV ----------------------------------------------------------------------------------------------------


def test_a_retweet_may_bear_the_name_of_who_wrote_it(tmp_path: Path) -> None:
    table = "id,username,text,retweet\n1,ada,mine,False\n2,bob,theirs,True\n"
    archive = read_archive(write(tmp_path / "t.csv", table))
    assert ([post.is_retweet for post in archive.posts], archive.handle) == ([False, True], "ada")


@pytest.mark.parametrize("column", ["Visibility", "recipient_id", "deleted_at", "Community Id"])
def test_what_is_private_is_left_out_of_tables_by_their_columns(tmp_path: Path, column: str) -> None:
    archive = read_archive(write(tmp_path / "t.csv", f"id,text,{column}\n1,CANARY,direct\n2,mine,\n"))
    assert (texts(archive), sum(archive.left_out.values())) == (["mine"], 1)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_csv_of_any_delimiter_encoding_and_line_end_is_read(
    tmp_path: Path, delimiter: str, encoding: str, line_end: str
) -> None:
    rows = [["Tweet Id", "Datetime", "Username", "Text"], ["1", "2022-04-29 20:56:57+00:00", "Ada", '"café; a, b|c"']]
    rows.append(["2", "2022-04-29", "Ada", f'"two{line_end}lines ""quoted"""'])
    content = "".join(delimiter.join(row) + line_end for row in rows)
    archive = read_archive(write(tmp_path / "t.csv", content.encode(encoding)))
    assert texts(archive) == ["café; a, b|c", f'two{line_end}lines "quoted"']
    assert (archive.handle, archive.posts[0].id) == ("Ada", "1")
    assert archive.posts[1].created_at == datetime(2022, 4, 29, tzinfo=UTC)


@pytest.mark.parametrize("column", ["text", "full_text", "Full Text", "tweet", "Tweet", "content", "Tweet-Text"])
def test_the_text_column_may_have_many_names(tmp_path: Path, column: str) -> None:
    assert texts(read_archive(write(tmp_path / "t.csv", f"a,{column}\n1,hello\n"))) == ["hello"]


def test_a_table_is_known_by_its_header_whatever_its_name(tmp_path: Path) -> None:
    assert read_archive(write(tmp_path / "t.txt", "id,text\n1,hello\n")).format == "csv"
    assert read_archive(write(tmp_path / "p.txt", "My first text, and more\nMy tweet, too\n")).format == "text"
    assert read_archive(write(tmp_path / "stored-7", "text\nhello\n"), filename="mine.CSV").format == "csv"


def test_ids_spoilt_by_excel_do_not_make_two_tweets_one(tmp_path: Path) -> None:
    archive = read_archive(write(tmp_path / "t.csv", "id,text\n1.45E+18,a\n1.45E+18,b\n7,c\n7,c\n"))
    assert texts(archive) == ["a", "b", "c"]
    assert [post.id for post in archive.posts] == [None, None, "7"]


def test_texts_written_as_python_bytes_are_decoded(tmp_path: Path) -> None:
    row = r"""1,"b'it\'s caf\xc3\xa9\xe2\x80\xa6\nnext \\ C:\\new'" """.strip()
    archive = read_archive(write(tmp_path / "t.csv", f'id,text\n{row}\n2,"b\'open"\n'))
    assert texts(archive) == ["it's café…\nnext \\ C:\\new", "b'open"]


def test_links_that_a_scraper_glued_to_words_are_taken_out_alone(tmp_path: Path) -> None:
    content = "date;text;permalink\n2017-01-01;A big win:https://t.co/abc …pic.twitter.com/xyz;https://x\n"
    assert clean(read_archive(write(tmp_path / "t.csv", content))).kept == ("A big win:",)


def test_rows_may_be_ragged(tmp_path: Path) -> None:
    content = "id,date,text\n1,2020-01-01,unquoted, with commas\n2\n\n3,,whole\n"
    archive = read_archive(write(tmp_path / "t.csv", content))
    assert texts(archive) == ["unquoted, with commas", "whole"]
    assert archive.left_out == {"no_text": 1}


@pytest.mark.parametrize("header", ["isRetweet", "retweeted", "retweeted_status_id"])
@pytest.mark.parametrize(("cell", "is_retweet"), [("True", True), ("False", False), ("", False), ("nan", False)])
def test_a_retweet_in_a_table_is_known_by_its_columns(tmp_path: Path, header: str, cell: str, is_retweet: bool) -> None:
    archive = read_archive(write(tmp_path / "t.csv", f"id,text,{header}\n1,hello,{cell}\n"))
    assert archive.posts[0].is_retweet == is_retweet


@pytest.mark.parametrize("before", ["sep=;\n", "\n", "\r\n  \r\n", "\ufeffsep=;\r\n"])
@pytest.mark.parametrize("name", ["t.csv", "t.txt"])
def test_a_table_may_begin_with_excels_line_or_a_blank_one(tmp_path: Path, before: str, name: str) -> None:
    archive = read_archive(write(tmp_path / name, before + "id;text\n1;hello\n"))
    assert (texts(archive), archive.format) == (["hello"], "csv")


def test_a_table_without_texts_is_refused_without_repeating_it(tmp_path: Path) -> None:
    with pytest.raises(BadUpload, match="none of its columns") as refused:
        read_archive(write(tmp_path / "t.csv", "secret,words\n1,2\n"))
    assert "secret" not in str(refused.value)


def test_a_quote_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadUpload, match="not a sound CSV"):
        read_archive(write(tmp_path / "t.csv", 'id,text\n1,"open' + "\nmore" * 50_000))


# --- Text ---------------------------------------------------------------------------------------------------


def test_each_line_of_a_text_is_a_post(tmp_path: Path) -> None:
    archive = read_archive(write(tmp_path / "t.txt", "\ufeffone two three\r\n\r\n  RT @b: x\rline\u2028sep\n"))
    assert texts(archive) == ["one two three", "RT @b: x", "line\u2028sep"]
    assert [post.is_retweet for post in archive.posts] == [False, True, False]


@pytest.mark.parametrize("line_end", [" ", "\n\n"])
def test_prose_is_refused_and_says_what_to_do(tmp_path: Path, line_end: str) -> None:
    paragraph = "It was a dark and stormy night; the rain fell in torrents. " * 30
    with pytest.raises(BadUpload, match="prose and not posts. Put each post on a line of its own"):
        read_archive(write(tmp_path / "novel.txt", line_end.join([paragraph] * 20)))


def test_a_long_post_among_short_ones_is_a_post(tmp_path: Path) -> None:
    lines = ["a short one", *["x" * 3_000], *["another short one"] * 20]
    assert len(read_archive(write(tmp_path / "t.txt", "\n".join(lines))).posts) == 22
