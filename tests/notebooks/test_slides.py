from __future__ import annotations

import re

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from zq_lib.nb.slides import export, main, problems, slides


def deck(*cells: tuple[str | None, str]) -> nbformat.NotebookNode:
    """Cells of a slide type and a source; a source that does not start with '#' is code."""
    made = []
    for kind, source in cells:
        metadata = {"slideshow": {"slide_type": kind}} if kind else {}
        make = new_markdown_cell if source.startswith("#") else new_code_cell
        made.append(make(source, metadata=metadata))
    return new_notebook(cells=made)


def test_cells_are_split_as_the_exporter_splits_them():
    nb = deck(
        ("skip", "# secret"), (None, "# one"), ("fragment", "x"), ("slide", "# two"), ("notes", "# said"),
        ("subslide", "# three"), (None, "y"),
    )  # fmt: skip
    assert [[c.source for c in slide] for slide in slides(nb)] == [["# one", "x"], ["# two"], ["# three", "y"]]
    page = export(nb, "deck")
    assert len(re.findall(r"<section[ >]", page)) == 3 + 2  # one more around each stack
    assert "secret" not in page


def test_too_few_slides_too_many_and_too_much_code_are_named():
    few = deck(*[("slide", "# a")] * 11)
    assert problems(few) == ["11 slides, expected 12 to 25"]
    assert problems(deck(*[("slide", "# a")] * 26)) == ["26 slides, expected 12 to 25"]
    good = deck(*[("slide", "# a")] * 12, (None, "\n".join("x" * 12)))
    assert problems(good) == []
    good.cells.append(new_code_cell("x"))
    assert problems(good) == ["slide 12 ('# a') has 13 lines of code, at most 12"]


def test_every_picture_on_a_slide_has_its_description(run, tmp_path, capsys):
    source = tmp_path / "01_pasta.ipynb"
    source.write_bytes(run.content)
    assert main([str(source), str(tmp_path / "deck.html")]) == 0
    assert capsys.readouterr().out.endswith("deck.html: 1 slides\n")
    page = (tmp_path / "deck.html").read_text()
    images = re.findall(r"<img\b[^>]*>", page.replace("../README.md", ""))
    embedded = [i for i in images if "data:image/png" in i]
    assert [re.search('alt="([^"]*)"', i).group(1) for i in embedded] == [
        "A line over x from 0 to 2: y reaches 4.00.",
        "A line over x: y reaches 4.0.",
    ]
    assert "No description" not in page
    assert page.count("<figcaption>") == 1  # the explorer's; the other figure has its caption below
    assert page.count("<p>A line over x from 0 to 2: y reaches 4.00.</p>") == 1
