"""The tree speaks of itself alone: no place of one machine, no host, one version, no test that cannot fail."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

import zq_lib

ROOT = Path(__file__).parents[2]
# Built from parts, so that this file does not hold what it looks for.
PLACES = [r"(?<![\w.~$}])/" + f"(?:{name})/" for name in ("work", "opt", "root", "tmp", "home", "Users")]
HOSTS = [re.escape(".".join(parts)) for parts in (("pypi", "org"), ("files", "pythonhosted"), ("pythonhosted", "org"))]
KEYS = ["hf" + "_[A-Za-z0-9]{20}", "gh" + "p_[A-Za-z0-9]{20}", "-----BEGIN" + " [A-Z ]*PRIVATE"]
TEXT = (
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".yml",
    ".yaml",
    ".cfg",
    ".ipynb",
    ".json",
    ".csv",
    ".css",
    ".js",
    ".sh",
    ".html",
)


@cache
def tracked() -> tuple[Path, ...]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return tuple(p for name in listed.stdout.split("\0") if name and (p := ROOT / name).is_file())


def found(patterns: list[str]) -> list[str]:
    wanted = re.compile("|".join(patterns))
    places = []
    for path in tracked():
        if path.suffix in TEXT or path.suffix == "":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if hit := wanted.search(line):
                    places.append(f"{path.relative_to(ROOT)}:{number}: {hit[0]}")
    return places


def test_no_file_names_a_place_on_one_machine() -> None:
    assert found(PLACES) == []


def test_no_file_names_a_package_registrys_host() -> None:
    assert found(HOSTS) == []


def test_no_file_holds_a_key() -> None:
    assert found(KEYS) == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("see /" + "tmp/x", True),
        ('"/' + "opt/venv/bin", True),
        ("a/" + "tmp/x", False),
        ("~/" + "work/x", False),
        ("the tmp folder", False),
    ],
)
def test_the_search_for_places_finds_paths_from_the_root_alone(text: str, caught: bool) -> None:
    assert bool(re.search("|".join(PLACES), text)) is caught


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", zq_lib.__version__)
    written = [p for p in tracked() if p.suffix in (".py", ".toml", ".cfg") or p.name == "Makefile"]
    pattern = re.compile(rf"""version\w*\s*=\s*["']{re.escape(zq_lib.__version__)}["']""")
    holders = [p.relative_to(ROOT).as_posix() for p in written if pattern.search(p.read_text(encoding="utf-8"))]
    assert holders == ["zq_lib/__init__.py"]


def _tests() -> list[Path]:
    return sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", _tests(), ids=lambda p: p.stem)
def test_no_test_is_skipped_or_allowed_to_fail_whatever_happens(path: Path) -> None:
    assert _always_skipped(path.read_text(encoding="utf-8")) == []


def _always_skipped(source: str) -> list[str]:
    """Skips of a whole file at its top, and `skip` or `xfail` marks, which hold without a condition."""
    tree = ast.parse(source)
    top = [ast.unparse(node) for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    marks = [ast.unparse(d) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for d in n.decorator_list]
    wrong = [code for code in top if code.startswith(("pytest.skip(", "pytest.xfail("))]
    return wrong + [code for code in top + marks if re.search(r"mark\.(skip|xfail)\b", code)]


def test_a_test_that_never_runs_is_noticed() -> None:
    skip = "pytest." + "mark.skip"
    assert _always_skipped(f"@{skip}\ndef test_a():\n    assert 1")
    assert _always_skipped(f"pytestmark = {skip}('later')")
    assert _always_skipped("pytest.skip('later', allow_module_level=True)")
    assert not _always_skipped(f"@{skip}if(not torch.cuda.is_available())\ndef test_a():\n    assert 1")
