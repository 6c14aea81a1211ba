from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from zq_lib.nb.canonical import WIDGET_STATE, canonical, dumps
from zq_lib.nb.lint import RULES, compared_ratio, lint, main

Notebook = nbformat.NotebookNode
SETUP, FIGURE, TABLE, EXPLORER, ERROR, EXERCISE = range(1, 7)  # places of the sample's code cells


def add(source: str, *outputs: Notebook, tags: list[str] | None = None, **metadata: str) -> Callable[[Notebook], None]:
    """Append an executed code cell."""

    def change(nb: Notebook) -> None:
        count = 1 + sum(c.cell_type == "code" for c in nb.cells)
        extra = {"tags": tags} if tags else {}
        nb.cells.append(new_code_cell(source, execution_count=count, outputs=list(outputs), metadata=extra | metadata))

    return change


def save(nb: Notebook, path: Path) -> None:
    path.write_bytes(dumps(canonical(nb, path.name)))


def say(text: str) -> Callable[[Notebook], None]:
    return lambda nb: nb.cells.append(new_markdown_cell(text))


def replace(old: str, new: str) -> Callable[[Notebook], None]:
    """Replace in every source."""

    def change(nb: Notebook) -> None:
        for cell in nb.cells:
            cell.source = cell.source.replace(old, new)

    return change


def stream(text: str, name: str = "stdout") -> Notebook:
    return new_output("stream", name=name, text=text)


def picture(nb: Notebook) -> Notebook:
    return nb.cells[FIGURE].outputs[0]


BREAKERS: list[tuple[str, str, Callable[[Notebook], object]]] = [
    ("budget", "56 cells, at most 55", lambda nb: nb.cells.extend(new_markdown_cell("x") for _ in range(48))),
    ("budget", "words of prose, at most 3000", say("word " * 3000)),
    ("budget", "cell 8 has 26 lines, at most 25", add("\n".join(["pass"] * 26))),
    ("budget", "MB, at most 1.50", add("pass", stream("x" * 1_500_000))),
    ("executed", "executed 1 to 7 in order", lambda nb: nb.cells.append(new_code_cell("pass"))),
    ("executed", "cell 8 is empty", add("")),
    ("executed", "in order, found [2,", lambda nb: nb.cells[SETUP].update(execution_count=2)),
    ("errors", "cell 5 shows ZeroDivisionError", lambda nb: nb.cells[ERROR].metadata.update(tags=[])),
    ("errors", "cell 8 has the tag raises-exception but shows no error", add("pass", tags=["raises-exception"])),
    ("errors", "cell 8 writes to stderr", add("pass", stream("a warning", "stderr"))),
    ("tags", "cell 8 has the tag 'nbval-skip'", add("pass", tags=["nbval-skip"])),
    ("compared", "86% of the code cells", add("pass", tags=["nbval-ignore-output"], reason="random")),
    ("compared", "cell 8 is not compared and gives no reason", add("pass", tags=["nbval-ignore-output"])),
    ("compared", "cell 8 steers validation by a comment", add("# NBVAL_IGNORE_OUTPUT\npass")),
    ("python", "cell 8 is not plain Python", add("!ls")),
    ("python", "cell 8 is not plain Python", add("%pip install torch")),
    ("python", "cell 8 has a trailing semicolon", add("x = 1;  # quiet")),
    ("python", "cell 8 has a trailing semicolon", add("len('a');")),
    ("banned", "cell 8 calls interact: its output", add("interact(len)")),
    ("banned", "cell 8 calls ipywidgets.Output: its output", add("ipywidgets.Output()")),
    ("banned", "cell 8 calls clear_output: validation keeps", add("clear_output()")),
    ("banned", "cell 8 displays with a display_id", add("display(1, display_id='a')")),
    ("banned", "cell 8 calls tqdm: progress", add("_ = list(tqdm([1]))")),
    ("banned", "cell 8 calls time.perf_counter: times", add("_ = time.perf_counter()")),
    ("banned", "cell 8 calls plt.show: use show", add("plt.show()")),
    ("banned", "cell 8 calls requests.get: a notebook fetches", add("_ = requests.get('x')")),
    ("definitions", "cell 8 defines unused, which nothing calls", add("def unused():\n    return 1")),
    ("paths", "cell 8 names a path of one machine", add("_ = open('/usr/share/file')")),
    ("paths", "cell 8 names a path of one machine", add("pass", stream("in /usr/lib/python"))),
    ("paths", "cell 8 names a path of one machine", say("See C:\\data.")),
    ("comparable", "cell 8 shows '0x7f12ab34'", add("object()", stream("<object at 0x7f12ab34>"))),
    ("comparable", "cell 8 shows 0.12345678: more digits", add("pass", stream("loss 0.12345678"))),
    ("images", "cell 2 shows a picture without alternative", lambda nb: picture(nb).metadata.clear()),
    ("images", "whose text/plain is not its description", lambda nb: picture(nb).data.update({"text/plain": "x"})),
    ("images", "cell 2 shows a picture without its caption", lambda nb: nb.cells[FIGURE].outputs.pop()),
    ("images", "cell 8 shows image/svg+xml", add("pass", new_output("display_data", {"image/svg+xml": "<svg/>"}))),
    ("images", "cell 8 has an <img> without", say('<img src="../README.md">')),
    ("images", "cell 8 has a picture without", say("![](../README.md)")),
    ("widgets", "cell 4 shows a widget whose state", lambda nb: nb.metadata.pop("widgets")),
    ("widgets", "cell 4 shows a widget whose state", lambda nb: nb.metadata.widgets[WIDGET_STATE]["state"].popitem()),
    ("widgets", "cell 4 shows a widget without a", lambda nb: nb.cells[EXPLORER].outputs[0].data.pop("image/png")),
    ("sections", "must open with the title", replace("# A picture", "A picture")),
    ("sections", "no goals", replace("You will be able to", "We shall")),
    ("sections", "no needs", replace("You need", "Bring")),
    ("sections", "no minutes", replace("5 min", "a while")),
    ("sections", "no questions", replace("## Questions", "## End")),
    ("sections", "no references", replace("## References", "References")),
    ("setup", 'the first code cell must call setup("pasta")', replace('setup("pasta")', 'setup("gear")')),
    ("exercises", "exercises checked: []", replace("check(ex.DOUBLE, double)", "double")),
    ("exercises", "exercises checked: ['HALVE']", replace("check(ex.DOUBLE", "check(ex.HALVE")),
    ("exercises", "exercises checked: ['DOUBLE', 'DOUBLE']", add("check(ex.DOUBLE, double)")),
    ("exercises", "another form than check(ex.NAME, answer)", replace("check(ex.DOUBLE", "check(ex['DOUBLE']")),
    ("links", "links to ../LOST.md#part, which does not exist", say("[lost](../LOST.md#part)")),
    ("links", "links to lost.png", say('<img alt="a" src="lost.png">')),
    ("links", "labpath=notebooks%2Flost.ipynb", say("[b](https://mybinder.org/v2/gh/a/b/main?labpath=notebooks%2Flost.ipynb)")),
    ("links", "blob/main/lost.ipynb", say("[b](https://colab.research.google.com/github/a/b/blob/main/lost.ipynb)")),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "finding", "change"), BREAKERS, ids=[f"{r}-{f[:30]}" for r, f, _ in BREAKERS])
def test_a_notebook_that_breaks_a_rule_is_told_so(rule, finding, change, committed):
    nb = nbformat.read(committed, 4)
    change(nb)
    if "state" in finding:  # canonical form would already drop what is broken here
        nbformat.write(nb, committed)
    else:
        save(nb, committed)
    found = lint(committed)
    assert any(text.startswith(f"{rule}: ") and finding in text for text in found), found


def test_every_rule_has_a_notebook_that_breaks_it():
    assert {rule for rule, _, _ in BREAKERS} | {"kernel", "bytes"} == set(RULES)


def test_another_kernel_or_layout_is_found(committed):
    content = committed.read_bytes()
    committed.write_bytes(content.replace(b'"name": "python3"', b'"name": "julia"'))
    assert any(text.startswith("kernel: the kernel is 'julia'") for text in lint(committed))
    committed.write_bytes(content.replace(b"\n ", b"\n  "))
    assert [text.split(":")[0] for text in lint(committed)] == ["bytes"]


def test_a_file_that_is_no_notebook_is_one_finding(committed):
    committed.write_text("{}")
    assert len(found := lint(committed)) == 1 and found[0].startswith("format: not a notebook")
    committed.write_text("text")
    assert len(found := lint(committed)) == 1 and found[0].startswith("format: not a notebook")


def test_what_looks_like_a_fault_but_is_none_is_left_alone(committed):
    nb = nbformat.read(committed, 4)
    say("Code: `[a](lost.md)`, 3.14 and\n```python\nx  # [b](lost.md)\n```\n[in](#page) [out](https://a.org/tmp/x)")(nb)
    add("text = 'a;b'\nrate = 7 % len(text) / 2; print(rate)", stream("0.00000123 on 2024-01-02, torch 2.13.0"))(nb)
    save(nb, committed)
    assert lint(committed) == []


def test_one_ignored_cell_with_a_reason_is_allowed_a_clock(committed):
    nb = nbformat.read(committed, 4)
    for _ in range(4):
        add("pass")(nb)
    add("_ = time.time()", tags=["nbval-ignore-output"], reason="shows the speed of this machine")(nb)
    save(nb, committed)
    assert lint(committed) == []
    assert compared_ratio(nb) == 10 / 11


def test_the_start_notebook_needs_no_sections_of_a_method(committed):
    nb = nbformat.read(committed, 4)
    for old, new in {"You will be able to": "Here we", "Questions": "End", '"pasta"': '"start_here"'}.items():
        replace(old, new)(nb)
    add("pass")(nb)
    start = committed.with_name("00_start_here.ipynb")
    save(nb, start)
    assert lint(start) == []


def test_the_command_prints_findings_with_their_file(committed, capsys):
    assert main([str(committed)]) == 0 and capsys.readouterr().out == ""
    committed.write_bytes(committed.read_bytes() + b"\n")
    assert main([str(committed)]) == 1
    assert capsys.readouterr().out.startswith(f"{committed}: bytes: not written by")
