"""One server with the whole gallery for all tests of this folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def model(smollm2):
    """The shared language model, put where the demos look for it."""
    from zq_lib.ui import serve

    serve._LOADED[:] = [smollm2]
    yield smollm2
    serve._LOADED.clear()


@pytest.fixture(scope="session")
def address(model) -> Iterator[str]:
    """Address of the running gallery."""
    from zq_lib.ui import gallery, serve

    blocks = gallery.build()
    yield serve.launch(blocks, port=None, wait=False)
    blocks.close()


@pytest.fixture(scope="session")
def client(address):
    """A client of the gallery."""
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.fixture(scope="session")
def gear_address(model) -> Iterator[str]:
    """Address of GEAR's page served alone."""
    from apps import gear
    from zq_lib.ui import serve

    blocks = gear.build()
    yield serve.launch(blocks, port=None, wait=False)
    blocks.close()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser. Missing, it is a failure: the page is tested or not."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.fail("the browser test needs Chromium; install it with: apt-get install chromium")


FLAGS = (
    "--no-sandbox --headless --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()
SLOW = 120_000  # milliseconds; a page usually takes two seconds, an answer five, more beside other tests


@pytest.fixture(scope="module")
def browser(chromium) -> Iterator[object]:
    """A running Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """An empty page of 1280 x 720 pixels that fails the test if its scripts fail."""
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    context.set_default_timeout(SLOW)
    made = context.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    yield made
    context.close()
    assert not problems


@pytest.fixture(scope="session")
def same_numbers():
    """Asserts that two JSON trees are equal, floats to three significant digits."""
    return _same


def _same(one: object, other: object, where: str = "") -> None:
    if isinstance(one, float) or isinstance(other, float):
        assert one == pytest.approx(other, rel=5e-3, abs=2e-4), where
    elif isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            _same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            _same(a, b, f"{where}[{i}]")
    else:
        assert json.dumps(one) == json.dumps(other), where
