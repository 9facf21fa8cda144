from __future__ import annotations

import sys

import pytest

from tests.web import check


def test_without_a_chromium_the_check_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, "apt-get install chromium" in printed.err) == ("", True)
