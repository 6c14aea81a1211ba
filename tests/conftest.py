"""One thread, no network, one shared language model; a missing asset package skips, or fails where it is required."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by transformers when it is imported

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated, its own helpers included: before transformers or a test imports it.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_sessionstart() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("assets")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _skip_without_assets(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _skip_without_assets(item))


def _skip_without_assets(item: pytest.Item) -> Iterator[None]:
    """Turn `AssetMissing` of a test marked `assets` into a skip, unless `ZQ_REQUIRE_ASSETS=1`."""
    from zq_lib.core.assets import AssetMissing

    try:
        return (yield)
    except AssetMissing as error:
        if item.get_closest_marker("assets") is None or os.environ.get("ZQ_REQUIRE_ASSETS") == "1":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in fp32 and its tokenizer. Do not change them."""
    from zq_lib.core import models

    return models.load("smollm2")
