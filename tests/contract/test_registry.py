"""The registry says what exists, and what it says exists is there."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from zq_lib.registry import METHODS, Method, built

ROOT = Path(__file__).parents[2]
FILES = ("__init__", "config", "reference", "kernels", "lab", "figures", "exercises")
BUILT = pytest.mark.parametrize("method", built(), ids=lambda m: m.slug)


def test_nine_methods_in_teaching_order_with_their_own_slugs_and_papers() -> None:
    assert [m.number for m in METHODS.values()] == list(range(1, 10))
    assert all(slug == m.slug and re.fullmatch("[a-z0-9]+", slug) for slug, m in METHODS.items())
    for name in ("title", "paper", "arxiv", "sentence", "asks", "notebook", "app"):
        assert len({getattr(m, name) for m in METHODS.values()}) == 9, name


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_row_is_filled_in(method: Method) -> None:
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert re.search(r"\(.*20\d\d\)$", method.paper)
    assert method.sentence.endswith(".") and method.asks.endswith("?") and method.plugs_into
    assert method.notebook == f"notebooks/{method.number:02d}_{method.slug}.ipynb"


def test_only_what_is_built_is_listed_as_built() -> None:
    whole = [m for m in METHODS.values() if (ROOT / m.notebook).is_file() and (ROOT / f"apps/{m.slug}.py").is_file()]
    assert built() == whole


@BUILT
def test_a_built_method_has_the_fixed_files(method: Method) -> None:
    folder = ROOT / "zq_lib" / method.slug
    assert [name for name in FILES if not (folder / f"{name}.py").is_file()] == []


@BUILT
def test_a_built_method_has_its_notebook_its_sheet_its_app_and_its_tests(method: Method) -> None:
    assert (ROOT / method.notebook).is_file()
    assert (ROOT / "notebooks" / "teaching" / f"{method.number:02d}_{method.slug}.md").is_file()
    assert (ROOT / (method.app.replace(".", "/") + ".py")).is_file()
    assert list((ROOT / "tests" / method.slug).glob("test_*.py"))
    assert method.minutes > 0


@BUILT
@pytest.mark.parametrize("part", ["config", "lab", "exercises"])
def test_the_parts_of_a_built_method_load_by_name(method: Method, part: str) -> None:
    assert method.load(part).__name__ == f"zq_lib.{method.slug}.{part}"


@BUILT
def test_a_built_method_is_an_attribute_of_the_package(method: Method) -> None:
    import zq_lib

    assert method.slug in zq_lib.__all__
    assert getattr(zq_lib, method.slug) is import_module(f"zq_lib.{method.slug}")


@BUILT
def test_everything_a_method_exports_exists_and_is_documented(method: Method) -> None:
    module = import_module(f"zq_lib.{method.slug}")
    assert module.__doc__ and module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        item = getattr(module, name)
        assert len(inspect.getdoc(item) or "") > 20, name
        own = (item.__dict__.get("__doc__") or "") if inspect.isclass(item) else (item.__doc__ or "")
        assert not own.startswith(f"{name}("), f"{name} has the docstring that dataclass made up"
        if inspect.isclass(item):
            for attribute, member in vars(item).items():
                if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    assert inspect.getdoc(member), f"{name}.{attribute}"
