"""AdaLoRA's page in a real browser: examples, a training, the scrubber, downloads, Stop and two visitors."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from browsing import open_page
from playwright.sync_api import TimeoutError

pytestmark = [pytest.mark.browser, pytest.mark.assets]
ARTIFACTS = Path(__file__).parents[2] / "artifacts"
SLOW = 120_000  # milliseconds; the short trainings here take ten seconds, more beside other tests


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of the page served alone."""
    from apps import adalora
    from zq_lib.ui import serve

    blocks = adalora.build()
    yield serve.launch(blocks, port=None, wait=False)
    blocks.close()


@pytest.fixture
def page(page, address):
    """The page."""
    open_page(page, address)
    return page


def _set(page, label: str, value: int) -> None:
    box = page.get_by_label(f"number input for {label}", exact=True)
    box.fill(str(value))
    box.press("Enter")
    page.wait_for_timeout(400)


def _train(page) -> None:
    page.get_by_role("button", name="Train", exact=True).press("Enter")


def _map(page):
    return page.locator("caption").first


def test_a_learner_hides_needs_trains_scrubs_and_takes_the_adapter_home(page, tmp_path):
    assert "on the 4 framed matrices" in _map(page).inner_text()
    page.get_by_role("radio", name="It loses").focus()
    page.keyboard.press("Space")
    page.get_by_text("A loss: all matrices need the same").wait_for()
    page.get_by_text("on the 12 framed matrices").wait_for()
    assert page.get_by_text("AdaLoRA loses").first.is_visible()

    page.get_by_text("Where should rank go?").click()
    page.get_by_role("radio", name="one matrix").press("Space")
    page.wait_for_function("document.querySelector('[aria-label=\"number input for FFN in, layer 1\"]').value == 8")
    _set(page, "key, layer 0", 3)
    page.wait_for_function("document.querySelectorAll('input[type=radio][value=\"one matrix\"]:checked').length == 0")
    page.get_by_text("More settings").click()
    planned = page.get_by_text("96 ranks shrink to 24 in 5 allocations")
    for _ in range(4):  # on a busy machine an answer that was under way may arrive after what was typed
        _set(page, "Steps", 20)
        _set(page, "Steps between allocations", 3)
        with suppress(TimeoutError):
            planned.wait_for(timeout=SLOW / 4)
            break
    assert planned.is_visible()
    _train(page)
    page.get_by_text("on the 2 framed matrices").wait_for()
    page.get_by_text("After step").first.wait_for()
    page.get_by_text("Done.", exact=True).wait_for()
    program = page.locator(".zq-code").inner_text()
    assert "total_steps=20" in program and "self.key': 3" in program
    assert page.get_by_text("Same final budget, 24 ranks").is_visible()

    _set(page, "Scrub through the allocations", 0)
    page.get_by_text("every matrix has 8 ranks, 96 together").wait_for()
    page.locator("img[alt*='96 ranks at step 0']").wait_for()
    page.get_by_role("radio", name="key", exact=True).press("Space")
    page.locator("img[alt*='triplets of layer 1 key']").first.wait_for()
    for image in page.locator(".zq-figure img").all():
        assert len(image.get_attribute("alt")) > 60

    for name, inside in (("PEFT LoRA", "r"), ("PEFT AdaLoRA", "init_r")):
        with page.expect_download() as found:
            page.get_by_role("link", name=name).click()
        found.value.save_as(tmp_path / "adapter.zip")
        with zipfile.ZipFile(tmp_path / "adapter.zip") as archive:
            assert f'"{inside}": ' in archive.read("adapter_config.json").decode()


def test_another_problem_brings_its_own_bounds_and_hides_the_needs(page):
    page.get_by_text("More settings").click()
    page.get_by_role("radio", name="TREC questions").press("Space")
    page.get_by_text("288 ranks shrink to 72").wait_for()
    page.get_by_text("Where should rank go? Your").wait_for(state="hidden")
    assert page.get_by_label("number input for Steps", exact=True).input_value() == "80"
    page.get_by_role("radio", name="Real questions").press("Space")
    page.get_by_text("Nobody knows where real text needs rank").wait_for()
    assert page.locator("tbody").first.locator("tr").count() == 6
    page.get_by_role("radio", name="5", exact=True).press("Space")
    page.locator("img[alt*='layer 5 query']").first.wait_for()


def test_a_target_above_the_initial_rank_is_explained_before_and_after_the_click(page):
    _set(page, "Initial rank", 3)
    _set(page, "Target rank", 5)
    page.get_by_text("raise init_rank or lower target_rank").wait_for()
    _train(page)
    page.get_by_text("Nothing was trained.").wait_for()
    page.get_by_text("raise init_rank or lower target_rank").nth(1).wait_for()


def test_visitors_do_not_mix_and_stop_ends_only_ones_own_training(page, browser, address):
    context = browser.new_context()
    context.set_default_timeout(SLOW)
    other = context.new_page()
    open_page(other, address)
    before = _map(other).inner_text()
    _train(page)
    page.get_by_text("AdaLoRA: step").first.wait_for()
    _train(other)
    other.get_by_text("Waiting for a free place.").wait_for()
    other.get_by_role("button", name="Stop").click()
    page.get_by_text("After step 20").first.wait_for()
    assert _map(other).inner_text() == before
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    other.get_by_text("Stopped.").wait_for()
    assert _map(other).inner_text() == before
    _set(page, "Scrub through the allocations", 0)
    page.get_by_text("Before the first cut").wait_for()  # a stopped training can be looked at
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_the_page_fits_its_window_and_is_kept_as_pictures(browser, address, scheme, width, height):
    ARTIFACTS.mkdir(exist_ok=True)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(SLOW)
    page = context.new_page()
    open_page(page, address)
    page.screenshot(path=ARTIFACTS / f"adalora_{scheme}_{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:
        foot = page.get_by_role("button", name="Train", exact=True).bounding_box()
        assert foot["y"] + foot["height"] <= height, "the Train button is below the fold"
    context.close()
