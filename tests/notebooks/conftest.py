"""A small notebook with everything the author tools handle, built and executed once for all tests here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from zq_lib.core.exercises import Exercise
from zq_lib.nb.execute import Run, execute

NAME = "01_pasta.ipynb"

INTRO = """# A picture of a square

Read 5 min. [The project](../README.md)
[![Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/a/b/main?labpath=notebooks%2F01_pasta.ipynb)

**You will be able to** square. **You need** nothing."""

FIGURE = """\
from zq_lib.core import show
from zq_lib.core.figures import Figure, style, subplots

with style():
    fig, axes = subplots(width=4, height=3)
    axes.plot([0, 1, 2], [0, 1, 4])
show(Figure(fig, "A line over x from 0 to 2: y reaches 4.00."))"""

EXPLORER = """\
import ipywidgets
from zq_lib.core import Explorer

def draw(power):
    fig, axes = subplots(width=4, height=3)
    axes.plot([0, 1, 2], [x**power for x in (0, 1, 2)])
    return Figure(fig, f"A line over x: y reaches {2**power:.1f}.")

Explorer(draw, power=ipywidgets.IntSlider(value=2, min=1, max=4))"""

EXERCISE = """\
from types import SimpleNamespace
from zq_lib.core import check
from zq_lib.core.exercises import Exercise

ex = SimpleNamespace(DOUBLE=Exercise("double", "Exercise 1", "Double x.", lambda f: f(2) == 4, None, [], "Add x to x."))

def double(x):
    raise NotImplementedError

check(ex.DOUBLE, double)"""


def sample() -> nbformat.NotebookNode:
    """The notebook as an author leaves it: not executed, random ids."""
    return new_notebook(
        cells=[
            new_markdown_cell(INTRO),
            new_code_cell('from zq_lib.core import setup\n\nsetup("pasta")'),
            new_code_cell(FIGURE),
            new_code_cell("from zq_lib.core import table\n\ntable([['a', 1 / 3], ['b', 2]], ['name', 'value'])"),
            new_code_cell(EXPLORER),
            new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}),
            new_code_cell(EXERCISE),
            new_markdown_cell("## Questions\n\nWhy?\n\n## References\n\nNone."),
        ]
    )


def project(folder: Path) -> Path:
    """An empty project around the notebook; returns where the notebook goes."""
    (folder / "notebooks").mkdir()
    (folder / "pyproject.toml").touch()
    (folder / "README.md").touch()
    return folder / "notebooks" / NAME


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first execution of the sample."""
    path = project(tmp_path_factory.mktemp("first"))
    nbformat.write(sample(), path)
    return execute(path)


@pytest.fixture
def committed(run: Run, tmp_path: Path, exercises: ModuleType) -> Path:
    """The executed sample, in a project of its own."""
    path = project(tmp_path)
    path.write_bytes(run.content)
    return path


@pytest.fixture
def exercises(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for the exercises of the method whose name the sample bears."""
    module = ModuleType("zq_lib.pasta.exercises")
    module.DOUBLE = Exercise("double", "Exercise 1", "Double x.", lambda f: f(2) == 4, None, [], "Add x to x.")
    module.ALL = [module.DOUBLE]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
