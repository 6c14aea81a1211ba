"""The README says nothing that does not work."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from zq_lib import cli
from zq_lib.registry import markdown_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```(?:bash|powershell)\n(.*?)```", README, re.S))
COMMANDS = sorted(
    set(re.findall(r"\b(?:make|zq) [a-z]+(?: [a-z]+)?", "\n".join([SHELL, *re.findall(r"`([^`\n]+)`", README)])))
)


def test_the_table_is_the_registrys() -> None:
    assert markdown_table() in README


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_a_make_target_exists(command: str) -> None:
    done = subprocess.run(["make", "-n", command.split()[1]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("zq")])
def test_a_zq_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(cli, "_COMMANDS", {name: lambda given: ran.append(given) or 0 for name in cli._COMMANDS})
    assert cli.main(command.split()[1:]) == 0
    assert len(ran) == 1


def test_the_extras_and_files_of_the_install_lines_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [e for group in re.findall(r'"\.\[([a-z,]+)\]"', SHELL) for e in group.split(",")]
    assert named and set(named) <= set(extras)
    assert all((ROOT / f).exists() for f in re.findall(r"-c (\S+)", SHELL))


def test_links_and_pictures_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)\)", README) if "://" not in t]
    missing = [t for t in targets if not (ROOT / t).exists()]
    assert targets and not missing


@pytest.mark.assets
def test_the_python_examples_run_one_after_the_other_and_do_what_they_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    steered, compressed, local, adapted, smaller, distilled, shifted = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(steered, "README.md", "exec"), names)
    assert "pilot" in capsys.readouterr().out.split("works as a")[1]
    exec(compile(compressed, "README.md", "exec"), names)
    assert names["cache"].report()["codes"] > 0  # long enough that something was packed
    exec(compile(local, "README.md", "exec"), names)
    assert 0 < names["conversion"].report().share <= 1
    exec(compile(adapted, "README.md", "exec"), names)
    assert sum(names["handle"].ranks().values()) == 2 * len(names["handle"].ranks())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    exec(compile(smaller, "README.md", "exec"), names)
    assert 0.19 < names["handle"].report().ratio < 0.21
    assert (tmp_path / "small" / "losparse_model.safetensors").stat().st_size < 60e6  # dense: 91 MB
    capsys.readouterr()
    exec(compile(distilled, "README.md", "exec"), names)
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    exec(compile(shifted, "README.md", "exec"), names)
    assert float(capsys.readouterr().out) < 0.8  # from 1.1
