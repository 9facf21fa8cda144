"""Lines of the log: one JSON object each, whatever is in the fields, and nothing that people wrote."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from serve import logs
from serve.errors import ModelNotFound
from serve.logs import bound, get_logger
from serve.settings import Settings
from tests.fakes.logs import logging_to, read_lines

log = get_logger()

TEXTS = st.text(st.characters(), max_size=50)  # lone surrogates, controls and line ends too
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
_RESERVED = {"event", "level", "timestamp", "exc_info", "self"}


def test_a_line_has_the_promised_fields(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log", replica="r1"), bound(request_id="req-1"):
        log.info("model_loaded", model="ada", bytes=3, tier=None)
    [line] = read_lines(tmp_path / "log")
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        **{"level": "info", "event": "model_loaded", "part": "test", "replica": "r1"},
        **{"request_id": "req-1", "model": "ada", "bytes": 3},
    }


@given(
    name=TEXTS.filter(bool), fields=st.dictionaries(TEXTS.filter(lambda key: key not in _RESERVED), VALUES, max_size=4)
)
@pytest.mark.parametrize("render", [logs._as_json, logs._as_text])
def test_nothing_in_a_field_breaks_a_line(render: Any, name: str, fields: dict[str, Any]) -> None:
    event = logs._clean(None, "info", {"event": name, "level": "info", **fields})
    line: bytes = render(dict(event))
    assert line.isascii() and all(byte >= 0x20 and byte != 0x7F for byte in line)
    if render is logs._as_json:
        told = json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
        assert {"timestamp", "level"} <= told.keys()


def test_of_a_foreign_error_only_its_kind_and_place_are_told(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log"):
        errors = ValueError("CANARY"), ModelNotFound("There is no model 'ada'."), OSError(28, "No space", "CANARY")
        for error in errors:
            try:
                raise error
            except Exception:
                log.exception("step_failed")
    foreign, ours, disk = read_lines(tmp_path / "log")
    assert foreign["error"] == "ValueError" and "test_logs.py" in foreign["trace"][0] and "reason" not in foreign
    assert ours["reason"] == "There is no model 'ada'." and disk["reason"] == "No space"
    assert "CANARY" not in (tmp_path / "log").read_text()


def test_other_libraries_records_take_the_same_way(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log"):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request %s\nreceived %s", "CANARY", "CANARY")
        logging.getLogger("httpx").info("GET https://hub/?token=CANARY")
        logging.getLogger("ours.by.chance").log(35, ValueError("CANARY"))  # an odd level, and no text
        try:
            raise ValueError("CANARY")
        except ValueError:
            logging.getLogger("asyncio").exception("Task exception was never retrieved")
    line, odd, failed = read_lines(tmp_path / "log")
    assert (line["event"], line["logger"], line["level"]) == ("library_said", "uvicorn.error", "warning")
    assert line["message"] == "Invalid HTTP request %s" and line["part"] == "test"
    assert "test_logs.py:" in line["place"]
    assert (odd["level"], odd["message"]) == ("warning", "ValueError")
    assert failed["error"] == "ValueError" and "test_logs.py" in failed["trace"][0]
    assert "CANARY" not in (tmp_path / "log").read_text()


def test_what_a_library_has_put_into_its_text_is_told_as_it_is(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log"):
        logging.getLogger("lib").warning(f"2 of {1 + 2} files")
    [line] = read_lines(tmp_path / "log")
    assert line["message"] == "2 of 3 files"


def test_records_of_other_libraries_stay_whole_for_other_handlers(tmp_path: Path) -> None:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    with logging_to(tmp_path / "log"):
        logging.getLogger().addHandler(handler)
        logging.getLogger("lib").warning("%d of %d files", 2, 3)
    assert seen == ["2 of 3 files"]


def test_the_host_programs_own_structlog_is_left_alone() -> None:
    code = """if True:
        import structlog
        def say(logger, method, event):
            return "of the host: " + event["event"]
        structlog.configure(processors=[say], cache_logger_on_first_use=False)
        before = structlog.get_config()
        from serve.logs import configure, get_logger
        from serve.settings import Settings
        get_logger().warning("ours")
        configure(Settings(), part="test")
        get_logger().warning("ours")
        assert structlog.get_config() == before
        structlog.get_logger().warning("theirs")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "of the host: theirs\n"
    first, second = done.stderr.splitlines()
    assert first.endswith("warning ours") and json.loads(second)["part"] == "test"


@pytest.mark.parametrize(("level", "said"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_the_level_decides_what_is_said(tmp_path: Path, level: str, said: int) -> None:
    with logging_to(tmp_path / "log", replace(Settings(), log_level=level)):
        log.debug("one")
        log.info("two")
        log.warning("three")
    assert len((tmp_path / "log").read_bytes().splitlines()) == said


def test_text_is_for_people(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log", replace(Settings(), log_format="text")):
        log.info("model_loaded", model="ada/x", reason="two words\n")
    [line] = (tmp_path / "log").read_text().splitlines()
    assert line.endswith('info    model_loaded part=test model=ada/x reason="two words\\n"')


async def test_what_is_bound_ends_with_its_task(tmp_path: Path) -> None:
    async def one(request_id: str) -> None:
        with bound(request_id=request_id):
            await asyncio.sleep(0)
            log.info("said", by=request_id)

    with logging_to(tmp_path / "log"):
        await asyncio.gather(*(one(f"r{number}") for number in range(5)))
        log.info("after")
    *lines, after = read_lines(tmp_path / "log")
    assert all(line["request_id"] == line["by"] for line in lines) and "request_id" not in after


def test_a_program_that_configures_nothing_says_warnings_on_stderr() -> None:
    code = "from serve.logs import get_logger; log = get_logger(); log.info('quiet'); log.warning('loud', why='a b')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr.strip().endswith('warning loud why="a b"')


def test_without_a_file_lines_go_to_the_descriptor_of_stderr(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with logging_to(tmp_path / "unused"):
        logs.configure(Settings(), part="test")
        log.info("said")
    assert json.loads(capfd.readouterr().err)["event"] == "said"


def _say_much(path: Path, name: str) -> None:
    output = logs._File(path, max_bytes=200_000)
    for number in range(1000):
        output._looked_at = 0.0  # as if a second had passed since
        output.write(json.dumps({"name": name, "number": number, "pad": "x" * 100}).encode() + b"\n")


def test_processes_share_a_file_that_makes_room_when_it_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_say_much, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    now, before = read_lines(path), read_lines(path.with_name("log.1"))
    assert {process.exitcode for process in processes} == {0}
    assert path.stat().st_size < 201_000 and path.with_name("log.1").stat().st_size < 201_000
    assert before and max(line["number"] for line in now) == 999


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log"), open("/dev/full", "wb", buffering=0) as full:
        logs._set_up(logs._Output(logs._as_json, lambda line: logs._write_all(full.fileno(), line)), logging.INFO, {})
        log.info("said")


def test_a_line_after_one_that_was_cut_off_begins_anew(tmp_path: Path) -> None:
    file, room = logs._File(tmp_path / "log"), 30

    def write(line: bytes) -> None:
        file.write(line[:room])
        if room < len(line):
            raise OSError(28, "No space left on device")

    output = logs._Output(logs._as_json, write)
    for number in range(5):
        room = 30 if number in (1, 3) else 1000
        with pytest.raises(structlog.DropEvent):
            output(None, "info", {"level": "info", "event": "said", "number": number})
    lines = (tmp_path / "log").read_bytes().splitlines()
    assert len(lines) == 5 and len(lines[1]) == 30 and len(lines[3]) == 30
    assert [json.loads(lines[number])["number"] for number in (0, 2, 4)] == [0, 2, 4]


def test_a_file_that_cannot_be_opened_is_told_of_once_on_stderr(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with logging_to(tmp_path / "nowhere" / "log"):
        log.info("said")
    refused, said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert (refused["event"], refused["level"]) == ("log_file_unusable", "warning")
    assert refused["reason"] == "No such file or directory" and refused["path"].endswith("nowhere/log")
    assert said["event"] == "said"


def test_processes_that_are_started_elsewhere_get_the_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with logging_to(Path("log")):
        assert os.environ["ROOKERY_LOG_FILE"] == str(tmp_path / "log")


def test_a_log_whose_folder_is_gone_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    file = logs._File(tmp_path / "logs" / "log")
    (tmp_path / "logs").rename(tmp_path / "moved")
    file._looked_at = 0.0
    file.write(b"{}\n")
    assert read_lines(tmp_path / "moved" / "log") == [{}]
