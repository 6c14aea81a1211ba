"""One way to write a notebook down, so that a difference between two files means that something changed."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import nbformat
from nbformat import NotebookNode

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# Without the version: a patch release of Python changes no notebook.
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}
_VOLATILE = ("execution", "ExecuteTime", "collapsed", "scrolled", "trusted")  # written by editors, not by authors
_REFERENCE = "IPY_MODEL_"


def canonical(nb: NotebookNode, name: str) -> NotebookNode:
    """A copy of `nb` (nbformat 4) without anything that changes between two executions.

    Cell ids come from the cell's text, widget model ids from `name` (the file's name) and the order of appearance,
    models that no output shows are dropped, tracebacks are reduced to their last line (the rest names paths).
    Applying it twice changes nothing more.
    """
    nb = copy.deepcopy(nb)
    widgets = nb.metadata.get("widgets")
    nb.metadata = NotebookNode(kernelspec=NotebookNode(KERNELSPEC), language_info=NotebookNode(LANGUAGE))
    nb.nbformat, nb.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in nb.cells:
        text = f"{cell.cell_type}\n{cell.source}"
        cell.id = _hash(text, seen[text])[:8]
        seen[text] += 1
        for key in _VOLATILE:
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                output.traceback = [f"{output.ename}: {output.evalue}"]
    if widgets:
        state = _rename_models(nb, widgets.get(WIDGET_STATE, {}).get("state", {}), name)
        if state:
            nb.metadata.widgets = {WIDGET_STATE: {"state": state, "version_major": 2, "version_minor": 0}}
    return nb


def dumps(nb: NotebookNode) -> bytes:
    """The bytes that Jupyter itself would write: sorted keys, indent 1, one newline at the end."""
    return (nbformat.writes(nb, version=4).rstrip("\n") + "\n").encode()


def views(nb: NotebookNode) -> Iterator[dict[str, Any]]:
    """The widget views in the outputs, in order."""
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if WIDGET_VIEW in output.get("data", {}):
                yield output.data[WIDGET_VIEW]


def references(value: Any) -> Iterator[str]:
    """Ids of the models that a piece of widget state refers to, in an order that does not depend on them."""
    if isinstance(value, str):
        if value.startswith(_REFERENCE):
            yield value.removeprefix(_REFERENCE)
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from references(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def _rename_models(nb: NotebookNode, state: dict[str, Any], name: str) -> dict[str, Any]:
    """Rename before sorting: sorting by random ids first would make the order random too."""
    order: dict[str, str] = {}
    queue = [view["model_id"] for view in views(nb)]
    while queue:
        old = queue.pop(0)
        if old in state and old not in order:
            order[old] = _hash(name, len(order))
            queue.extend(references(state[old]["state"]))
    for view in views(nb):
        view["model_id"] = order.get(view["model_id"], view["model_id"])
    renamed = {}
    for old, new in order.items():
        model = _replace(state[old], order)
        if "buffers" in model:
            model["buffers"] = sorted(model["buffers"], key=lambda b: [str(p) for p in b["path"]])
        renamed[new] = model
    return renamed


def _replace(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str) and value.startswith(_REFERENCE):
        old = value.removeprefix(_REFERENCE)
        return _REFERENCE + names.get(old, old)
    if isinstance(value, dict):
        return {key: _replace(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, names) for item in value]
    return value


def _hash(*parts: object) -> str:
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:32]
