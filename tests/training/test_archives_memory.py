"""What reading takes of memory: the same for an archive of 2 GB as for one of a hundred posts."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training.archive_files import Car, account, create, tweet, wrapped

MIB = 2**20
PART_BYTES = 100_000_000  # where X cuts tweets.js
# The peak of its own memory, which the system counts; ru_maxrss may hold the parent's.
REPORT = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
PREVIEW = f"""
import sys
from deployments.cli import app
app(["preview", sys.argv[1], "--json"], standalone_mode=False)
{REPORT}
"""
CREATE_JOB = f"""
import json, sys
from pathlib import Path
from serve.training.preprocess import preprocess
from serve.types import FileRecord
path = Path(sys.argv[1])
data = preprocess([(FileRecord("file-1", path.name, 1, 1, "fine-tune", path), "ada")])
print(json.dumps(data.counts["ada"]))
{REPORT}
"""


def measure(program: str, path: Path) -> tuple[int, int]:
    """(peak in bytes, posts that were kept)."""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1]) * 1024, json.loads(done.stdout)["kept"]


def made_up_texts() -> Iterator[str]:
    generator = random.Random(0)
    words = [generator.randbytes(generator.randint(1, 5)).hex() for _ in range(5_000)]
    while True:
        yield " ".join(generator.choices(words, k=15)) + " é https://t.co/x"


def write_x(path: Path, num_bytes: int) -> None:
    more = {
        "source": '<a href="https://mobile.twitter.com" rel="nofollow">Twitter Web App</a>',
        "entities": {
            "hashtags": [],
            "symbols": [],
            "user_mentions": [],
            "urls": [{"url": "https://t.co/x"} for _ in "abc"],
        },
        "edit_info": {"initial": {"editableUntil": "2024-11-09T13:14:18.648Z", "editsRemaining": "5"}},
    }
    records = (json.dumps(wrapped(tweet(i, text, **more))[0], indent=2) for i, text in enumerate(made_up_texts()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("data/account.js", account())
        for part, start in enumerate(range(0, num_bytes, PART_BYTES)):
            with file.open(f"data/tweets{f'-part{part}' if part else ''}.js", "w") as member:
                member.write(f"window.YTD.tweets.part{part} = [".encode())
                for piece in pieces(records, min(PART_BYTES, num_bytes - start)):
                    member.write(piece)
                member.write(b"]")


def write_page(path: Path, num_bytes: int) -> None:
    """All tweets in one object of one line."""
    records = (json.dumps({"id": str(i), "author_id": "1", "text": text}) for i, text in enumerate(made_up_texts()))
    with path.open("wb") as file:
        file.write(b'{"data": [')
        file.writelines(pieces(records, num_bytes))
        file.write(b'], "includes": {"users": [{"id": "1", "username": "ada"}]}}')


def write_mastodon(path: Path, num_bytes: int) -> None:
    records = (json.dumps(create(i, f"<p>{text}</p>")) for i, text in enumerate(made_up_texts()))
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("outbox.json", "w") as box,
    ):
        box.write(b'{"type": "OrderedCollection", "orderedItems": [')
        box.writelines(pieces(records, num_bytes))
        box.write(b"]}")


def write_car(path: Path, num_bytes: int) -> None:
    car, texts = Car(), made_up_texts()
    # One node of 500 posts after another, each the subtree after the last post of the one before.
    tree = None
    for start in reversed(range(0, num_bytes // 200, 500)):
        keys = (f"app.bsky.feed.post/{number:08}" for number in range(start, start + 500))
        tree = car.node({key: car.put({"text": next(texts), "langs": ["en"]}) for key in keys}, after=tree)
    assert tree is not None
    path.write_bytes(car.finish(tree))


def write_table(path: Path, num_bytes: int) -> None:
    lines = (f"{i},{text}\n".encode() for i, text in enumerate(made_up_texts()))
    with path.open("wb") as file:
        file.write(b"id,text\n")
        file.writelines(itertools.islice(lines, num_bytes // 150))


def pieces(records: Iterator[str], num_bytes: int) -> Iterator[bytes]:
    """Records with commas between, until they are that many bytes."""
    separator = b""
    while num_bytes > 0:
        piece = separator + next(records).encode()
        num_bytes, separator = num_bytes - len(piece), b","
        yield piece


@pytest.mark.parametrize("program", [pytest.param(PREVIEW, marks=pytest.mark.slow), CREATE_JOB], ids=["preview", "job"])
def test_an_x_archive_of_many_posts_takes_as_much_memory_as_one_of_few(tmp_path: Path, program: str) -> None:
    write_x(tmp_path / "few.zip", 100_000)
    write_x(tmp_path / "many.zip", 40_000_000)
    few, many = (measure(program, tmp_path / name) for name in ("few.zip", "many.zip"))
    assert many[1] > 300 * few[1]
    assert many[0] - few[0] < 32 * MIB


def test_an_object_made_to_fill_memory_takes_little(tmp_path: Path) -> None:
    write_table(tmp_path / "few", 100_000)
    posts = ",".join(f'{{"text": "{text}"}}' for text in itertools.islice(made_up_texts(), 100))
    (tmp_path / "many").write_text(f'{{"data": [{posts}], "includes": [' + "[]," * 3_000_000 + "[]]}")
    few, many = (measure(PREVIEW, tmp_path / name) for name in ("few", "many"))
    assert many[0] - few[0] < 64 * MIB


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("write", [write_page, write_mastodon, write_car, write_table])
def test_other_archives_of_many_posts_take_little_memory(tmp_path: Path, write: Callable[[Path, int], None]) -> None:
    write(tmp_path / "few", 100_000)
    write(tmp_path / "many", 200_000_000)
    few, many = (measure(PREVIEW, tmp_path / name) for name in ("few", "many"))
    assert many[1] > 300 * few[1]
    assert many[0] - few[0] < 64 * MIB


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("program", [PREVIEW, CREATE_JOB], ids=["preview", "create a job"])
def test_an_x_archive_of_two_gigabytes_takes_less_than_64_mb_of_memory(tmp_path: Path, program: str) -> None:
    write_x(tmp_path / "few.zip", 100_000)
    write_x(tmp_path / "many.zip", 2_100_000_000)
    few, many = (measure(program, tmp_path / name) for name in ("few.zip", "many.zip"))
    assert many[1] > 1_000_000
    assert many[0] - few[0] < 64 * MIB
