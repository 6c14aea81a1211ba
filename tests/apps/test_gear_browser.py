"""GEAR's page in a real browser: examples, settings, a run, Stop and typed markup, and pictures of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from browsing import open_page
from playwright.sync_api import TimeoutError

pytestmark = pytest.mark.browser
ARTIFACTS = Path(__file__).parents[2] / "artifacts"
SLOW = 120_000  # milliseconds; a run takes five seconds, more beside other tests
TYPED = " <img src=x onerror=\"document.title='broken'\"> <b>Ben</b> ${7+7} {{7+7}}"


@pytest.fixture
def page(page, gear_address):
    """GEAR's page."""
    open_page(page, gear_address)
    return page


def _run(page) -> None:
    page.get_by_role("button", name="Compress", exact=True).press("Enter")
    page.get_by_text("Done.", exact=True).wait_for()


def test_a_learner_chooses_measures_and_compares_with_the_keyboard(page):
    compressed = page.get_by_label("The compressed cache writes")
    assert "Nikos" in compressed.inner_text()

    page.get_by_role("radio", name="Codes alone").focus()
    page.keyboard.press("Space")
    page.get_by_text("remembers a wrong name").wait_for()
    page.get_by_text("plain 2 bit: 2.50 bits").wait_for()
    assert "Nikos" not in compressed.inner_text()

    page.get_by_role("radio", name="balanced").press("Space")
    page.get_by_text("balanced: 3.50 bits").wait_for()
    rank = page.get_by_label("number input for Rank of the low-rank part")
    rank.fill("1")
    rank.press("Enter")
    page.get_by_text("your setting: 3.").wait_for()
    assert not page.get_by_role("radio", name="balanced").is_checked()
    _run(page)
    assert "rank=1" in page.locator(".zq-code").inner_text()
    assert "Nikos" in compressed.inner_text()
    assert page.get_by_text("Same bytes: ").first.is_visible()
    for image in page.locator(".zq-figure img").all():
        assert len(image.get_attribute("alt")) > 60


def test_another_head_is_drawn_when_it_is_chosen(page):
    page.get_by_role("radio", name="keys").press("Space")
    page.locator("img[alt*='error of keys, layer 10, head 0']").wait_for()
    page.get_by_role("radio", name="2", exact=True).last.press("Space")
    page.locator("img[alt*='error of keys, layer 10, head 2']").wait_for()


def test_a_group_that_does_not_fit_the_buffer_takes_the_buffer_along(page):
    page.get_by_text("More settings").click()
    page.get_by_role("radio", name="128").first.press("Space")
    page.wait_for_function("document.querySelectorAll('input[type=radio][value=\"128\"]:checked').length == 2")
    page.get_by_role("radio", name="16", exact=True).last.press("Space")
    page.wait_for_function("document.querySelectorAll('input[type=radio][value=\"16\"]:checked').length == 2")


def test_typed_markup_stays_text(page):
    page.get_by_text("More settings").click()
    page.get_by_label("Let it go on with").fill(TYPED)
    page.get_by_label("number input for Answer length, in tokens").fill("2")
    _run(page)
    for part in ("img[src=x]", "img[onerror]", "main b", "main i"):
        assert page.locator(part).count() == 0, part
    assert "broken" not in page.title() and "<img src=x" in page.locator(".zq-code").inner_text()


def test_stop_ends_a_run_and_the_next_one_works(page):
    page.get_by_text("More settings").click()
    page.get_by_label("Let it go on with").fill(" Once upon a time")
    page.get_by_label("number input for Answer length, in tokens").fill("48")
    page.get_by_role("button", name="Compress", exact=True).click()
    stopped = page.get_by_text("Stopped.")
    for _ in range(20):  # a run of this length takes several seconds, and on a busy machine begins late
        page.wait_for_timeout(1500)
        page.get_by_role("button", name="Stop").click()
        with suppress(TimeoutError):
            stopped.wait_for(timeout=1500)
            break
    assert stopped.is_visible()
    page.get_by_label("number input for Answer length, in tokens").fill("2")
    _run(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_the_page_fits_its_window_and_is_kept_as_pictures(browser, gear_address, scheme, width, height):
    ARTIFACTS.mkdir(exist_ok=True)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(SLOW)
    page = context.new_page()
    open_page(page, gear_address)
    page.screenshot(path=ARTIFACTS / f"gear_{scheme}_{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:
        foot = page.get_by_role("button", name="Compress", exact=True).bounding_box()
        assert foot["y"] + foot["height"] <= height, "the Compress button is below the fold"
    context.close()
