"""The command line: `zq lab | demo | bench | assets | doctor`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zq_lib import __version__
from zq_lib.registry import built


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that the library explains are printed as one sentence. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="zq", description="Nine methods from paper to running code.")
    parser.add_argument("--version", action="version", version=f"zq_lib {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    slugs = [m.slug for m in built()]
    lab = commands.add_parser("lab", help="open the notebooks in JupyterLab")
    lab.add_argument("slug", nargs="?", choices=slugs, help="open this method's notebook")
    demo = commands.add_parser("demo", help="open the demos in a browser")
    demo.add_argument("slug", nargs="?", choices=slugs, help="open this method's demo")
    demo.add_argument("--port", type=int, default=7860)
    demo.add_argument("--share", action="store_true", help="ask Gradio for a public link")
    demo.add_argument("--no-browser", action="store_true", help="print the address only")
    bench = commands.add_parser("bench", help="run a method's benchmarks and write their tables")
    bench.add_argument("slug", choices=slugs)
    bench.add_argument("names", nargs="*", help="only these benchmarks")
    commands.add_parser("assets", help="install the embedded models and data, and convert them")
    commands.add_parser("doctor", help="say what is installed and what is missing")
    given = parser.parse_args(arguments)
    try:
        return _COMMANDS[given.command](given)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"zq {given.command}: {error}", file=sys.stderr)
        return 1


def _lab(given: argparse.Namespace) -> int:
    start = Path("notebooks") / "00_start_here.ipynb"
    notebook = start if given.slug is None else Path(next(m.notebook for m in built() if m.slug == given.slug))
    if not notebook.exists():
        raise FileNotFoundError(f"{notebook.as_posix()} is not here; run this in a clone of the repository")
    return subprocess.call([sys.executable, "-m", "jupyter", "lab", str(notebook)])


def _demo(given: argparse.Namespace) -> int:
    from zq_lib.ui.gallery import launch_demo

    launch_demo(given.slug, port=given.port, open_browser=not given.no_browser, share=given.share)
    return 0


def _bench(given: argparse.Namespace) -> int:
    from zq_lib.bench.harness import run

    run(given.slug, given.names)
    return 0


def _assets(_: argparse.Namespace) -> int:
    from zq_lib.core import assets

    assets.fetch(print)
    assets.prepare(print)
    return 0


def _doctor(_: argparse.Namespace) -> int:
    """Print versions and assets. Returns 1 when something that the library itself needs is missing."""
    from zq_lib.core import assets

    missing = 0
    print(f"zq_lib {__version__}, Python {sys.version.split()[0]}")
    for package in ("torch", "transformers", "triton", "jupyterlab", "ipywidgets", "gradio", "matplotlib", "nbval"):
        try:
            print(f"  {package} {version(package)}")
        except PackageNotFoundError:
            needed = package in ("torch", "transformers", "matplotlib")
            missing += needed
            print(f"  {package}: not installed{' (needed)' if needed else ''}")
    for status in assets.status():
        print(f"  {status.asset.package}: {status.problem or status.version} ({status.asset.holds})")
    if any(s.problem for s in assets.status()):
        print("To install what is missing of the models and data: zq assets")
    return 1 if missing else 0


_COMMANDS = {"lab": _lab, "demo": _demo, "bench": _bench, "assets": _assets, "doctor": _doctor}

if __name__ == "__main__":
    sys.exit(main())
