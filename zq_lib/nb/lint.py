"""What every notebook must keep, checked without executing it.

    python -m zq_lib.nb.lint notebooks/*.ipynb

Each rule is a generator of findings in the table RULES; the numbers, names and patterns they use are the constants
below. Conventions that the rules hold:

- a code cell whose output is not compared has the tag `nbval-ignore-output` and says why in `metadata.reason`;
- `from zq_lib.<method> import exercises as ex` and one `check(ex.NAME, answer)` per exercise, in the order of `ALL`;
- pictures come from `zq_lib.core.show`, interactive parts from `zq_lib.core.Explorer`.
"""

from __future__ import annotations

import argparse
import ast
import html
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import nbformat
from nbformat import NotebookNode

from zq_lib.core.figures import caption_markup
from zq_lib.nb.canonical import KERNELSPEC, WIDGET_STATE, WIDGET_VIEW, canonical, dumps, references
from zq_lib.registry import METHODS, Method

MAX_CELLS, MAX_WORDS, MAX_LINES, MAX_BYTES = 55, 3000, 25, 1_500_000
MIN_COMPARED = 0.9
DIGITS = 6  # more significant digits than this differ between machines; three are asked for

RAISES, IGNORED = "raises-exception", "nbval-ignore-output"
TAGS = {RAISES, IGNORED, "hide-input"}

# What a method's notebook has to say somewhere in its text.
SECTIONS = {
    "goals ('You will be able to')": r"you will be able to",
    "needs ('You need')": r"\byou need\b",
    "minutes": r"\b\d+\s*(?:min\b|minutes?\b)",
    "questions (a heading)": r"^#+ .*question",
    "references (a heading)": r"^#+ .*(?:references|further reading)",
}

BANNED = {
    "its output lands in the widget and is not comparable; use Explorer": {
        "interact", "interactive", "interactive_output", "interact_manual", "Output",
    },
    "validation keeps what was cleared or updated; print once": {"clear_output", "update_display"},
    "progress bars are not comparable": {"tqdm", "trange"},
    "times are not comparable": {"perf_counter", "perf_counter_ns", "process_time", "monotonic", "time", "timeit"},
    "use show from zq_lib.core, which adds the description": {"plt.show", "savefig"},
    "a notebook fetches and installs nothing": {
        "urlopen", "urlretrieve", "hf_hub_download", "snapshot_download", "load_dataset", "system", "subprocess.run",
        "requests.get",
    },
}  # fmt: skip

_PATH = re.compile(
    r"(?<![\w:/.<])(?:/(?:home|root|tmp|usr|opt|work|workspace|content|var|mnt|Users)/[\w.]|[A-Za-z]:\\\w)"
)
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b|<Figure size ")
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\d.])")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)|(?:href|src)\s*=\s*[\"']([^\"']+)[\"']")
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.M | re.S)


@dataclass(frozen=True)
class Page:
    """A notebook on disk, with what several rules look at."""

    path: Path

    @cached_property
    def raw(self) -> bytes:
        return self.path.read_bytes()

    @cached_property
    def nb(self) -> NotebookNode:
        return nbformat.reads(self.raw.decode(), as_version=4)

    @cached_property
    def method(self) -> Method | None:
        return next((m for m in METHODS.values() if Path(m.notebook).name == self.path.name), None)

    @cached_property
    def code(self) -> list[tuple[int, NotebookNode]]:
        """Code cells with their place among all cells, counted from 0 as editors and `execute` do."""
        return [(i, cell) for i, cell in enumerate(self.nb.cells) if cell.cell_type == "code"]

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        """Text of the markdown cells without code."""
        return [(i, _CODE.sub("", c.source)) for i, c in enumerate(self.nb.cells) if c.cell_type == "markdown"]

    @cached_property
    def trees(self) -> list[tuple[int, NotebookNode, ast.Module]]:
        """The code cells that are plain Python; the rule `python` names the others."""
        found = []
        for i, cell in self.code:
            try:
                found.append((i, cell, ast.parse(cell.source)))
            except SyntaxError:
                continue
        return found

    @cached_property
    def root(self) -> Path:
        """The project the notebook lives in: the nearest folder with a pyproject.toml."""
        folders = self.path.resolve().parents
        return next((f for f in folders if (f / "pyproject.toml").exists()), folders[0])

    def outputs(self) -> Iterator[tuple[int, NotebookNode, NotebookNode, NotebookNode | None]]:
        """Place, cell, output and the output after it."""
        for i, cell in self.code:
            for k, output in enumerate(cell.outputs):
                yield i, cell, output, cell.outputs[k + 1] if k + 1 < len(cell.outputs) else None


Findings = Iterator[str]


def _tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def compared_ratio(nb: NotebookNode) -> float:
    """Executed code cells whose outputs validation compares, as a part of all code cells; 1 if there are none."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    compared = [c for c in code if c.execution_count is not None and not _tags(c) & {IGNORED, "nbval-skip"}]
    return len(compared) / len(code) if code else 1.0


def _budget(page: Page) -> Findings:
    if len(page.nb.cells) > MAX_CELLS:
        yield f"{len(page.nb.cells)} cells, at most {MAX_CELLS}"
    text = " ".join(re.sub(r"<[^>]+>|\]\([^)]*\)|\$\$.*?\$\$|\$[^$\n]+\$", " ", t, flags=re.S) for _, t in page.prose)
    words = len(re.findall(r"[^\W_][\w'’-]*", text))
    if words > MAX_WORDS:
        yield f"{words} words of prose, at most {MAX_WORDS}"
    if len(page.raw) > MAX_BYTES:
        yield f"{len(page.raw) / 1e6:.2f} MB, at most {MAX_BYTES / 1e6:.2f}"
    for i, cell in page.code:
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES:
            yield f"cell {i} has {lines} lines, at most {MAX_LINES}"


def _executed(page: Page) -> Findings:
    counts = [cell.execution_count for _, cell in page.code]
    if counts != list(range(1, len(counts) + 1)):
        yield f"code cells must be executed 1 to {len(counts)} in order, found {counts}"
    for i, cell in page.code:
        if not cell.source.strip():
            yield f"cell {i} is empty"


def _errors(page: Page) -> Findings:
    for i, cell in page.code:
        shown = [o for o in cell.outputs if o.output_type == "error"]
        if shown and RAISES not in _tags(cell):
            yield f"cell {i} shows {shown[0].ename} without the tag {RAISES}"
        if not shown and RAISES in _tags(cell):
            yield f"cell {i} has the tag {RAISES} but shows no error"
        if any(o.output_type == "stream" and o.name == "stderr" for o in cell.outputs):
            yield f"cell {i} writes to stderr; silence it in setup or mend its cause"


def _tagged(page: Page) -> Findings:
    for i, cell in enumerate(page.nb.cells):
        for tag in sorted(_tags(cell) - TAGS):
            yield f"cell {i} has the tag {tag!r}; allowed: {', '.join(sorted(TAGS))}"


def _compared(page: Page) -> Findings:
    ratio = compared_ratio(page.nb)
    if ratio < MIN_COMPARED:
        yield f"{ratio:.0%} of the code cells are compared, at least {MIN_COMPARED:.0%}"
    for i, cell in page.code:
        if IGNORED in _tags(cell) and not str(cell.metadata.get("reason", "")).strip():
            yield f"cell {i} is not compared and gives no reason in metadata.reason"
        if re.search(r"#\s*(?:NBVAL|PYTEST_VALIDATE)_", cell.source):
            yield f"cell {i} steers validation by a comment; use the tag"


def _python(page: Page) -> Findings:
    plain = {i for i, _, _ in page.trees}
    for i, _ in page.code:
        if i not in plain:
            yield f"cell {i} is not plain Python (no shell lines, no magics)"
    for i, cell, _ in page.trees:
        if _ends_in_semicolon(cell.source):
            yield f"cell {i} has a trailing semicolon, which validation does not honour; assign to _ instead"


def _ends_in_semicolon(source: str) -> bool:
    after = False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if after and token.type in (tokenize.NEWLINE, tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            return True
        after = token.type == tokenize.OP and token.string == ";"
    return False


def _banned(page: Page) -> Findings:
    for i, cell, tree in page.trees:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            dotted = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
            names = {dotted, dotted.rsplit(".", 1)[-1], ".".join(dotted.rsplit(".", 2)[-2:])}
            for why, banned in BANNED.items():
                if names & banned and not (why.startswith("times") and IGNORED in _tags(cell)):
                    yield f"cell {i} calls {dotted}: {why}"
            if dotted.endswith("display") and any(k.arg == "display_id" for k in node.keywords):
                yield f"cell {i} displays with a display_id: validation does not apply updates"


def _definitions(page: Page) -> Findings:
    used = {n.id for _, _, t in page.trees for n in ast.walk(t) if isinstance(n, ast.Name)}
    for i, _, tree in page.trees:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in used:
                yield f"cell {i} defines {node.name}, which nothing calls"


def _texts(page: Page) -> Iterator[tuple[int, str]]:
    """Everything a reader sees as text in the outputs."""
    for i, _, output, _ in page.outputs():
        if output.output_type == "stream":
            yield i, output.text
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield i, value


def _paths(page: Page) -> Findings:
    for i, text in [*((i, c.source) for i, c in enumerate(page.nb.cells)), *_texts(page)]:
        if found := _PATH.search(text):
            yield f"cell {i} names a path of one machine: {found.group()!r}"


def _comparable(page: Page) -> Findings:
    for i, text in _texts(page):
        if found := _ADDRESS.search(text):
            yield f"cell {i} shows {found.group()!r}: end the cell on something with a stable text"
        for found in _DECIMAL.finditer(text):
            if len(found.group().replace(".", "").strip("0")) > DIGITS:
                yield f"cell {i} shows {found.group()}: more digits than machines agree on; print three"
                break


def _images(page: Page) -> Findings:
    for i, _, output, following in page.outputs():
        data = output.get("data", {})
        for kind in data:
            if kind.startswith("image/") and kind != "image/png":
                yield f"cell {i} shows {kind}; use show from zq_lib.core, which writes PNG"
        if "image/png" not in data:
            continue
        alt = output.metadata.get("image/png", {}).get("alt", "")
        below = following.get("data", {}).get("text/html") if following else None
        if not alt:
            yield f"cell {i} shows a picture without alternative text"
        elif data.get("text/plain") != alt:
            yield f"cell {i} shows a picture whose text/plain is not its description"
        elif WIDGET_VIEW not in data and below != caption_markup(alt):
            yield f"cell {i} shows a picture without its caption below it"
    for i, text in page.prose:
        for tag in re.findall(r"<img\b[^>]*>", text):
            if not re.search(r"\balt\s*=\s*[\"'][^\"']", tag):
                yield f"cell {i} has an <img> without alternative text"
        if re.search(r"!\[\s*\]", text):
            yield f"cell {i} has a picture without alternative text"


def _widgets(page: Page) -> Findings:
    state = page.nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for i, _, output, _ in page.outputs():
        data = output.get("data", {})
        if WIDGET_VIEW not in data:
            continue
        if "image/png" not in data:
            yield f"cell {i} shows a widget without a stored picture; use Explorer"
        queue, seen = [data[WIDGET_VIEW].get("model_id")], set()
        while queue:
            model = queue.pop()
            if model in seen:
                continue
            seen.add(model)
            if model not in state:
                yield f"cell {i} shows a widget whose state is not stored ({model})"
            else:
                queue.extend(references(state[model].get("state", {})))


def _sections(page: Page) -> Findings:
    text = "\n".join(t for _, t in page.prose)
    if not page.nb.cells or not page.nb.cells[0].source.startswith("# "):
        yield "the first cell must open with the title ('# ...')"
    if page.method:
        for name, pattern in SECTIONS.items():
            if not re.search(pattern, text, re.I | re.M):
                yield f"no {name}"


def _setup(page: Page) -> Findings:
    slug = re.sub(r"^\d+_", "", page.path.stem)
    first = page.trees[0][2] if page.trees else ast.Module([], [])
    calls = [ast.unparse(n) for n in ast.walk(first) if isinstance(n, ast.Call)]
    if page.code and not any(re.match(rf"setup\('{slug}'[,)]", call) for call in calls):
        yield f'the first code cell must call setup("{slug}")'


def _exercises(page: Page) -> Findings:
    if page.method is None or not page.method.built:
        return
    module = page.method.load("exercises")
    names = {id(value): name for name, value in vars(module).items()}
    expected = [names.get(id(exercise), exercise.name) for exercise in module.ALL]
    found = []
    for i, _, tree in page.trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check":
                if node.args and isinstance(node.args[0], ast.Attribute):
                    found.append(node.args[0].attr)
                else:
                    yield f"cell {i} calls check in another form than check(ex.NAME, answer)"
    if found != expected:
        yield f"exercises checked: {found}; exercises defined, in order: {expected}"


def _links(page: Page) -> Findings:
    for i, text in page.prose:
        for groups in _LINK.findall(text):
            target = html.unescape(groups[0] or groups[1])
            for file in _files(page, target):
                if not file.exists():
                    yield f"cell {i} links to {target}, which does not exist"


def _files(page: Page, target: str) -> Iterator[Path]:
    """The files of the project that a link points at: relative ones, and those a badge opens."""
    parts = urlsplit(target)
    if not parts.scheme and not parts.netloc:
        if parts.path:
            yield page.path.parent / unquote(parts.path)
        return
    for key in ("labpath", "urlpath", "filepath"):
        for value in parse_qs(parts.query).get(key, []):
            yield page.root / re.sub(r"^(?:lab|doc)/(?:tree/)?", "", unquote(value))
    if "colab" in parts.netloc and (blob := re.search(r"/blob/[^/]+/(.+)$", parts.path)):
        yield page.root / unquote(blob.group(1))


def _kernel(page: Page) -> Findings:
    name = page.nb.metadata.get("kernelspec", {}).get("name")
    if name != KERNELSPEC["name"]:
        yield f"the kernel is {name!r}, must be {KERNELSPEC['name']!r}"


def _bytes(page: Page) -> Findings:
    if page.raw != dumps(canonical(page.nb, page.path.name)):
        yield "not written by `python -m zq_lib.nb.execute`: the bytes are not canonical"


RULES: dict[str, Callable[[Page], Findings]] = {
    "budget": _budget,
    "executed": _executed,
    "errors": _errors,
    "tags": _tagged,
    "compared": _compared,
    "python": _python,
    "banned": _banned,
    "definitions": _definitions,
    "paths": _paths,
    "comparable": _comparable,
    "images": _images,
    "widgets": _widgets,
    "sections": _sections,
    "setup": _setup,
    "exercises": _exercises,
    "links": _links,
    "kernel": _kernel,
    "bytes": _bytes,
}


def lint(path: Path) -> list[str]:
    """Findings as `rule: sentence`, in the order of RULES; empty when the notebook keeps them all."""
    page = Page(Path(path))
    try:
        nbformat.validate(page.nb)
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, UnicodeDecodeError) as error:
        return [f"format: not a notebook: {str(error).splitlines()[0]}"]
    return [f"{name}: {finding}" for name, rule in RULES.items() for finding in rule(page)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zq_lib.nb.lint", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    found = [f"{path}: {finding}" for path in parser.parse_args(argv).notebooks for finding in lint(path)]
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
