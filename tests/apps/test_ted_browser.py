"""TED's page in a real browser: its three parts, a drawing, a run, Stop, typed markup and two visitors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import open_page

pytestmark = pytest.mark.browser
ARTIFACTS = Path(__file__).parents[2] / "artifacts"
SLOW = 240_000  # milliseconds; seconds on a quiet machine, more beside other tests
TYPED = "<img src=x onerror=\"document.title='broken'\"> <b>Who</b> is Ben?"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of the page served alone; nothing was trained before, and everything is small."""
    from apps import ted, ted_run
    from zq_lib.ted import digits, text
    from zq_lib.ui import serve

    pairs = digits.Size(256, 128, 800, 2, 2, 20, 2)  # 40 steps of a training
    sizes = text.Size(48, 16, 32, 12, 1, 1, 1)
    ted_run.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ted_run, "DIGITS", ted_run.Once(lambda say: digits.digits(pairs, 0, say), 1))
        patch.setattr(ted_run, "SETTING", ted_run.Once(lambda say: text.setting(sizes, 0, say), 2))
        blocks = ted.build()
        yield serve.launch(blocks, port=None, wait=False)
        blocks.close()
        ted_run.forget()


@pytest.fixture
def page(page, address):
    """The page."""
    page.set_default_timeout(SLOW)
    open_page(page, address)
    return page


def _set(page, label: str, value: int) -> None:
    box = page.get_by_label(f"number input for {label}", exact=True)
    box.fill(str(value))
    box.press("Enter")


def _button(page, name: str):
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


def test_a_learner_looks_at_layers_another_pair_and_a_drawing(page):
    page.get_by_text("It lets go of the digit that the task does not need").wait_for()
    page.get_by_role("radio", name="64", exact=True).locator("visible=true").press("Space")
    page.get_by_text("It drops neither digit").wait_for()
    page.get_by_role("radio", name="1", exact=True).locator("visible=true").press("Space")
    page.locator("img[alt*='readers of layer 1 say']").wait_for()
    assert "dims=(64,), layers=(1,)" in page.locator(".zq-code").inner_text()

    _set(page, "Right digit", 2)
    page.get_by_text("Not run yet with these settings").locator("visible=true").wait_for()
    _button(page, "Show this pair").press("Enter")
    page.get_by_text("Done.", exact=True).wait_for()
    page.locator("img[alt*='and a 2 on the right']").wait_for()
    _set(page, "Left digit", 0)
    page.locator("img[alt*='a 0 on the left']").wait_for()
    page.get_by_text("The pictures follow your choice.").wait_for()

    page.get_by_role("button", name="Draw a pair yourself").click()
    _button(page, "Begin with the pair that is shown").click()
    board = page.locator(".cm-content[contenteditable=true]")
    page.wait_for_function("document.querySelector('.cm-content[contenteditable=true]').innerText.includes('#')")
    board.press("Control+a")
    board.press_sequentially("####\n#..#")
    page.locator("img[alt*='A drawn pair']").wait_for()
    board.press_sequentially("x")
    page.get_by_text("drawing has the character 'x'").wait_for()
    for image in page.locator(".zq-figure img").all():
        assert len(image.get_attribute("alt")) > 60


def test_a_training_is_watched_and_compared(page):
    page.get_by_role("tab", name="Training").click()
    page.get_by_text("The gap to the teacher").or_(page.locator("img[alt*='Rising lines']")).first.wait_for()
    page.get_by_role("checkbox", name="1", exact=True).press("Space")
    page.get_by_text("Not run yet with these settings").locator("visible=true").wait_for()
    assert "layers=((2, 2), (3, 3))" in page.locator(".zq-code").inner_text()
    _button(page, "Train").press("Enter")
    page.get_by_text("TED 8: step").first.wait_for()
    page.get_by_text("The comparison comes when all students").wait_for()
    page.get_by_text("Done.", exact=True).wait_for()
    page.get_by_text("TED 8 closes").wait_for()

    for name in ("2", "3"):
        page.get_by_role("checkbox", name=name, exact=True).press("Space")
    _button(page, "Train").click()
    page.get_by_text("layers is empty; choose at least one").wait_for()


def test_typed_markup_is_asked_as_text(page):
    page.get_by_role("tab", name="Sentences").click()
    page.get_by_role("textbox", name="Your question").fill(TYPED)
    _button(page, "Ask").press("Enter")
    page.get_by_text("Done.", exact=True).wait_for()
    assert page.get_by_text("<b>Who</b> is Ben?").first.is_visible()
    for part in ("img[src=x]", "img[onerror]", "main b"):
        assert page.locator(part).count() == 0, part
    assert "broken" not in page.title()
    page.get_by_role("textbox", name="Your question").fill("  ")
    _button(page, "Ask").click()
    page.get_by_text("has no words; write a question").wait_for()


def test_stop_ends_only_ones_own_run(page, browser, address):
    context = browser.new_context()
    context.set_default_timeout(SLOW)
    other = context.new_page()
    open_page(other, address)
    page.get_by_role("radio", name="It loses", exact=True).press("Space")
    page.get_by_text("Both ways of matching states end below").wait_for()
    _set(page, "Seed of the student", 9)
    _button(page, "Train").press("Enter")
    page.get_by_text("TED 8: step").first.wait_for()
    _button(other, "Show this pair").press("Enter")
    other.get_by_text("Waiting for a free place.").wait_for()
    _button(page, "Stop").click()
    page.get_by_text("Stopped.").wait_for()
    other.get_by_text("Done.", exact=True).wait_for()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_the_page_fits_its_window_and_is_kept_as_pictures(browser, address, scheme, width, height):
    ARTIFACTS.mkdir(exist_ok=True)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(SLOW)
    page = context.new_page()
    open_page(page, address)
    for example, said, button in (
        ("The filter drops the right digit", "The teacher's state names both", "Show this pair"),
        ("TED helps", "A student whose start", "Train"),
        ("A question", "The start is wrong, its students come round", "Ask"),
    ):
        page.get_by_role("radio", name=example, exact=True).press("Space")
        page.get_by_text(said).wait_for()
        page.wait_for_timeout(500)
        page.screenshot(path=ARTIFACTS / f"ted_{button.split()[0]}_{scheme}_{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 1280:
            foot = page.get_by_role("button", name=button, exact=True).bounding_box()
            assert foot["y"] + foot["height"] <= height, "the button is below the fold"
    context.close()
