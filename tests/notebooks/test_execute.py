from __future__ import annotations

import copy
import uuid

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from zq_lib.nb.canonical import WIDGET_STATE, canonical, dumps, views
from zq_lib.nb.execute import NotebookError, compare, execute, first_difference, main
from zq_lib.nb.lint import lint


def renamed(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook as another execution would leave it: other ids, times and versions."""
    state = nb.metadata.widgets[WIDGET_STATE].state
    text = nbformat.writes(nb)
    for old in state:
        text = text.replace(old, uuid.uuid4().hex)
    other = nbformat.reads(text, 4)
    for cell in other.cells:
        cell.id = uuid.uuid4().hex[:8]
        cell.metadata["execution"] = {"iopub.status.busy": "now"}
    other.metadata.language_info["version"] = "3.99.1"
    other.metadata["vscode"] = {"hash": "1"}
    return other


def test_a_second_execution_gives_the_same_bytes_and_is_reported_as_saved(committed, capsys):
    before = committed.read_bytes()
    assert main([str(committed), "--check"]) == 0
    assert "MB, as saved" in capsys.readouterr().out
    assert committed.read_bytes() == before


def test_an_executed_notebook_is_clean_and_its_widget_is_alive(committed):
    assert lint(committed) == []
    nb = nbformat.read(committed, 4)
    (view,) = views(nb)
    assert nb.metadata.widgets[WIDGET_STATE].state[view["model_id"]].model_name == "VBoxModel"


def test_seconds_and_memory_of_the_kernel_are_measured(run):
    assert 0.5 < run.seconds < 90
    assert 50e6 < run.peak_bytes < 1.5e9


def test_canonical_form_does_not_depend_on_ids_times_or_versions(run):
    nb = nbformat.reads(run.content.decode(), 4)
    for _ in range(3):
        assert dumps(canonical(renamed(nb), "01_pasta.ipynb")) == run.content
    assert dumps(canonical(nb, "other.ipynb")) != run.content  # two notebooks on one page must not share ids


def test_equal_cells_get_different_ids_and_a_new_cell_leaves_the_others_alone():
    nb = canonical(new_notebook(cells=[new_code_cell("1"), new_code_cell("1"), new_code_cell("2")]), "a")
    ids = [c.id for c in nb.cells]
    assert len(set(ids)) == 3
    nb.cells.insert(0, new_code_cell("0"))
    assert [c.id for c in canonical(nb, "a").cells][1:] == ids


def test_models_that_no_output_shows_are_dropped(run):
    nb = nbformat.reads(run.content.decode(), 4)
    state = nb.metadata.widgets[WIDGET_STATE].state
    state["f" * 32] = copy.deepcopy(next(iter(state.values())))
    assert dumps(canonical(nb, "01_pasta.ipynb")) == run.content


def test_a_raising_cell_fails_by_name_and_leaves_the_file_untouched(tmp_path, capsys):
    path = tmp_path / "broken.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1"), new_code_cell("x / 0")]), path)
    before = path.read_bytes()
    assert main([str(path)]) == 1
    said = capsys.readouterr().err
    assert "broken.ipynb: cell 1 failed, nothing was written" in said and "ZeroDivisionError" in said
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_kernel_that_dies_is_an_error_that_names_the_cell(tmp_path):
    path = tmp_path / "dead.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("import os\nos._exit(1)")]), path)
    with pytest.raises(NotebookError, match="cell 0 failed, nothing was written\nKernel died"):
        execute(path)


def test_saving_happens_only_when_something_changed_and_check_names_the_change(tmp_path, capsys):
    path = tmp_path / "small.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("import os\nprint(len(os.listdir('.')))")]), path)
    assert main([str(path)]) == 0 and "written" in capsys.readouterr().out
    assert main([str(path)]) == 0 and "unchanged" in capsys.readouterr().out
    saved = path.read_bytes()
    path.write_bytes(saved.replace(b'"1\\n"', b'"7\\n"'))
    assert main([str(path), "--check"]) == 1
    assert "differs: cells[0].outputs[0].text line 1[0]: '7' became '1'" in capsys.readouterr().out


def test_a_missing_or_broken_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "text.ipynb").write_text("not a notebook")
    assert main([str(tmp_path / "none.ipynb"), str(tmp_path / "text.ipynb")]) == 1
    assert "none.ipynb" in (said := capsys.readouterr().err) and "Traceback" not in said


@pytest.mark.parametrize(
    ("saved", "new", "found"),
    [
        ({"a": [1, 2]}, {"a": [1, 2]}, None),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a[1]: 2 became 3"),
        ({"a": [1]}, {"a": [1, 3]}, "a: 1 items became 2"),
        ({"b": 1}, {"b": 1, "c": 2}, "c: None became 2"),
        ({"metadata": 1, "cells": 1}, {"metadata": 2, "cells": 2}, "cells: 1 became 2"),
        ("one\ntwo\n", "one\nten\n", " line 2[0]: 'two' became 'ten'"),
        ("one\n", "one\ntwo\n", " line 2[0]: '' became 'two'"),
        ("x" * 500, "y", f": {'x' * 116!r:.117}... became 'y'"),
    ],
)
def test_the_first_difference_is_named_with_its_place(saved, new, found):
    assert first_difference(saved, new) == found


def test_a_file_with_another_layout_is_not_as_saved(committed):
    content = committed.read_bytes()
    committed.write_bytes(content + b"\n")
    assert compare(committed, content) == "only the layout of the file differs"
