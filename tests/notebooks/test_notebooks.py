"""What every notebook in the repository keeps. Their outputs are compared in test_nbval.py."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from zq_lib.nb.lint import MIN_COMPARED, compared_ratio, lint
from zq_lib.nb.slides import problems
from zq_lib.registry import built

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METHODS = [ROOT / method.notebook for method in built()]


def test_every_built_method_has_its_notebook_and_its_instructor_sheet():
    assert built()
    assert [m.notebook for m in built() if not (ROOT / m.notebook).is_file()] == []
    teaching = ROOT / "notebooks" / "teaching"
    assert [m.slug for m in built() if not list(teaching.glob(f"*{m.slug}*.md"))] == []


def test_the_course_begins_somewhere():
    assert ROOT / "notebooks" / "00_start_here.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_lint_clean(path):
    assert lint(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_nine_of_ten_code_cells_are_compared(path):
    assert compared_ratio(nbformat.read(path, as_version=4)) >= MIN_COMPARED


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_s_notebook_makes_a_readable_set_of_slides(path):
    assert problems(nbformat.read(path, as_version=4)) == []
