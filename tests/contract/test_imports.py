"""Importing is cheap, and imports run downward only: apps, ui, method, core."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from zq_lib.core.assets import ASSETS
from zq_lib.registry import METHODS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "gradio", "triton", "transformers", "numpy", "matplotlib", "gguf", "safetensors")
SOURCES = sorted(p for folder in ("zq_lib", "apps") for p in (ROOT / folder).rglob("*.py"))


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_importing_the_package_takes_less_than_three_tenths_of_a_second() -> None:
    code = "import time; t = time.perf_counter(); import zq_lib; print(time.perf_counter() - t)"
    assert min(float(_python(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("module", ["zq_lib", "zq_lib.registry", "zq_lib.cli"])
def test_importing_loads_none_of_the_heavy_dependencies(module: str) -> None:
    loaded = _python(f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})").split()
    assert not set(HEAVY) & set(loaded)


def test_importing_a_method_loads_neither_gradio_nor_triton() -> None:
    """Triton reads TRITON_INTERPRET when it is imported, so kernels are loaded on first use only."""
    code = "import sys; sys.modules['triton'] = None; from zq_lib import pasta; print('gradio' in sys.modules)"
    assert _python(code) == "False"


def test_a_name_that_is_no_method_is_refused_with_those_that_are() -> None:
    import zq_lib

    methods = ", ".join(name for name in zq_lib.__all__ if not name.startswith("_"))
    with pytest.raises(AttributeError, match=f"module 'zq_lib' has no attribute 'paste'; methods: {methods}"):
        _ = zq_lib.paste


def _imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _layer(dotted: str) -> str:
    """The layer a module of ours belongs to: core, a method's slug, ui, bench, nb, apps, top, or '' for others."""
    parts = dotted.split(".")
    if parts[0] == "apps":
        return "apps"
    if parts[0] != "zq_lib":
        return ""
    if len(parts) > 1 and (parts[1] in METHODS or parts[1] in ("core", "ui", "bench", "nb")):
        return parts[1]
    return "top"


def _may_import(layer: str) -> set[str]:
    methods = set(METHODS)
    everywhere = {"", "top", layer}
    return {
        "core": everywhere,
        "ui": everywhere | methods | {"core"},
        "apps": everywhere | methods | {"core", "ui", "bench"},
        "bench": everywhere | {"core"},
        "nb": everywhere | {"core"},
        "top": {"", "top", "core", "ui", "bench", "nb", "apps"},
    }.get(layer, everywhere | {"core"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward_only(path: Path) -> None:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    layer = _layer(dotted)
    assert {_layer(name) for name in _imports(path)} <= _may_import(layer), dotted


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_gradio_is_imported_by_the_user_interface_alone_and_asset_packages_by_nobody(path: Path) -> None:
    used = {name.split(".")[0] for name in _imports(path)}
    if path.parent not in (ROOT / "zq_lib" / "ui", ROOT / "apps"):
        assert "gradio" not in used
    assert not used & {asset.file.split("/")[0].split(".")[0] for asset in ASSETS.values()}
    assert not used & {asset.package.replace("-", "_") for asset in ASSETS.values()}


def test_triton_is_imported_by_kernel_modules_alone() -> None:
    for path in SOURCES:
        top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body]
        names = {a.name.split(".")[0] for node in top if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module.split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
        assert "triton" not in names or path.stem.startswith("kernels"), path


def test_the_layers_of_an_import_are_told_apart() -> None:
    """The tests above can fail: each of these is an import that they must refuse."""
    wrong = [
        ("zq_lib.core.x", "zq_lib.pasta"),
        ("zq_lib.pasta.x", "zq_lib.gear.cache"),
        ("zq_lib.pasta.x", "apps.pasta"),
    ]
    wrong += [("zq_lib.core.x", "zq_lib.ui.theme"), ("zq_lib.bench.x", "zq_lib.pasta"), ("zq_lib.gear.x", "zq_lib.ui")]
    for importer, imported in wrong:
        assert _layer(imported) not in _may_import(_layer(importer)), (importer, imported)
