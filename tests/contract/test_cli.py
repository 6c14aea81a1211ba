"""The command line: every command answers, and explained errors are one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from zq_lib import __version__, cli
from zq_lib.core import assets


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and __version__ in capsys.readouterr().out


def test_doctor_names_every_asset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(s.asset.package in said for s in assets.status())


def test_doctor_says_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = assets.status()
    broken = [type(found[0])(found[0].asset, found[0].version, "not installed"), *found[1:]]
    monkeypatch.setattr(assets, "status", lambda: broken)
    cli.main(["doctor"])
    said = capsys.readouterr().out
    assert "not installed" in said and "zq assets" in said


def test_an_explained_error_is_one_sentence_and_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lab"]) == 1
    assert capsys.readouterr().err == (
        "zq lab: notebooks/00_start_here.ipynb is not here; run this in a clone of the repository\n"
    )
    assert cli.main(["bench", "pasta", "nothing"]) == 1
    assert "no benchmark 'nothing'" in capsys.readouterr().err


def test_a_wrong_command_lists_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve"])
    assert "demo" in capsys.readouterr().err
