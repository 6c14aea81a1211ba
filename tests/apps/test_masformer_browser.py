"""MASFormer's page in a real browser: examples, the strip of layers, a run, Stop, typed markup and two visitors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import open_page

pytestmark = pytest.mark.browser
ARTIFACTS = Path(__file__).parents[2] / "artifacts"
SLOW = 120_000  # milliseconds; a short document takes five seconds, more beside other tests
TYPED = "<img src=x onerror=\"document.title='broken'\"> <b>Ben</b> ${7+7} {{7+7}}. "
ASK = "Ask for the code"


@pytest.fixture(scope="module")
def address(model) -> Iterator[str]:
    """Address of the page served alone."""
    from apps import masformer
    from zq_lib.ui import serve

    blocks = masformer.build()
    yield serve.launch(blocks, port=None, wait=False)
    blocks.close()


@pytest.fixture
def page(page, address):
    """The page."""
    open_page(page, address)
    return page


def _ask(page) -> None:
    page.get_by_role("button", name=ASK, exact=True).press("Enter")


def _set(page, label: str, value: int) -> None:
    box = page.get_by_label(f"number input for {label}", exact=True)
    box.fill(str(value))
    box.press("Enter")


def _layer(page, number: int):
    return page.get_by_role("checkbox", name=str(number), exact=True)


def test_a_learner_compares_places_plans_layers_and_asks_with_the_keyboard(page):
    ours = page.get_by_label("The plan answers")
    assert "482913" in ours.inner_text() and page.get_by_role("checkbox", checked=True).count() == 8

    page.get_by_role("radio", name="Bottom 8").focus()
    page.keyboard.press("Space")
    page.get_by_text("The plan loses the code").wait_for()
    assert "482913" not in ours.inner_text() and "482913" in page.get_by_label("Full attention answers").inner_text()
    assert page.get_by_role("radio", name="bottom", exact=True).is_checked()
    assert _layer(page, 0).is_checked() and not _layer(page, 18).is_checked()

    page.get_by_role("radio", name="profiled", exact=True).press("Space")
    page.get_by_text("profiled 8: ").first.wait_for()
    page.get_by_text("The answers are of the previous run").wait_for()
    assert _layer(page, 18).is_checked()
    _layer(page, 18).focus()
    page.keyboard.press("Space")
    page.get_by_text("own choice of 7: ").first.wait_for()
    assert page.get_by_label("number input for How many").input_value() == "7"
    assert not page.get_by_role("radio", name="profiled", exact=True).is_checked()
    page.locator("img[alt*='the 7 full layers']").wait_for()
    _set(page, "Span", 32)
    page.locator("img[alt*='its last 32 tokens']").wait_for()
    page.get_by_role("radio", name="block", exact=True).press("Space")
    page.locator("img[alt*='its own block of 32']").wait_for()
    page.get_by_role("radio", name="1k", exact=True).press("Space")
    page.locator("img[alt*='Masks of 1024 queries']").wait_for()
    _set(page, "How many", 0)
    page.locator("img[alt*='no layer is full']").wait_for()

    _set(page, "How many", 10)
    _set(page, "Take so many words of the story", 150)
    page.wait_for_function("document.querySelector('textarea').value.length < 1000")
    _ask(page)
    page.get_by_text("Done.", exact=True).wait_for()
    program = page.locator(".zq-code").inner_text()
    assert "plan(10, span=32, kind='block'" in program and "words=150" in program
    assert "482913" in ours.inner_text()
    for image in page.locator(".zq-figure img").all():
        assert len(image.get_attribute("alt")) > 60


def test_typed_markup_and_a_bad_code_stay_text(page):
    document = page.get_by_role("textbox", name="Document, yours or the story")
    document.fill(TYPED + document.input_value())
    page.get_by_label("Code, 3 to 8 digits").fill("<b>7")
    page.keyboard.press("Tab")
    page.get_by_text("is no pass code").wait_for()
    _ask(page)
    page.get_by_text("Nothing was run.").wait_for()
    page.get_by_text("is no pass code").nth(1).wait_for()  # the message beside the note under the button
    page.get_by_label("Code, 3 to 8 digits").fill("7007")
    _ask(page)
    page.get_by_text("Done.", exact=True).wait_for()
    for part in ("img[src=x]", "img[onerror]", "main b", "main i"):
        assert page.locator(part).count() == 0, part
    assert "broken" not in page.title() and "<img src=x" in page.locator(".zq-code").inner_text()


def test_visitors_do_not_mix_and_stop_ends_only_ones_own_run(page, browser, address):
    context = browser.new_context()
    context.set_default_timeout(SLOW)
    other = context.new_page()
    open_page(other, address)
    before = other.locator("img").first.get_attribute("alt")
    page.get_by_role("radio", name="It loses").press("Space")
    page.get_by_text("over this longer document").wait_for()
    page.get_by_label("Code, 3 to 8 digits").fill("515151")
    _ask(page)
    page.get_by_text("Full attention: 256 of").first.wait_for()
    other.get_by_label("Code, 3 to 8 digits").fill("8086")
    _ask(other)
    other.get_by_text("Waiting for a free place.").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    other.get_by_text("Done.", exact=True).wait_for()
    after = other.locator("img").first.get_attribute("alt")
    assert after != before and "digit of the code 8086" in after
    assert "961540" in page.get_by_label("Full attention answers").inner_text()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_the_page_fits_its_window_and_is_kept_as_pictures(browser, address, scheme, width, height):
    ARTIFACTS.mkdir(exist_ok=True)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(SLOW)
    page = context.new_page()
    open_page(page, address)
    page.screenshot(path=ARTIFACTS / f"masformer_{scheme}_{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:
        foot = page.get_by_role("button", name=ASK, exact=True).bounding_box()
        assert foot["y"] + foot["height"] <= height, "the button that asks is below the fold"
    context.close()
