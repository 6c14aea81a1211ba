"""One thread, no network, one shared language model; a missing asset package skips, or fails where it is required."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[..., list[Any]]:
    """`two_processes(script, *words)`: what two processes of one gloo group found.

    The script gets a folder and the words as arguments and writes `<rank>.json` there.
    """

    def run(script: str, *words: str) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (tmp_path / "train.py").write_text(textwrap.dedent(script))
        common = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        runs = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "train.py"), str(tmp_path), *words],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        errors = [run.communicate(timeout=240)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    return run
