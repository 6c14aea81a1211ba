"""One walk through the gallery in a real browser, and the pictures of it in light and dark, wide and narrow."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
ARTIFACTS = Path(__file__).parents[2] / "artifacts"
SLOW = 120_000  # milliseconds; a page usually takes two seconds, an answer five, more beside other tests
TYPED = "<img src=x onerror=\"document.title='broken'\"> <b>Ben</b> ${7+7} {{7+7}} has a *blue <i>hat</i>*. His hat is"


def _open(page, url: str) -> None:
    """Go to `url` and wait until its scripts listen: they attach a moment after the first paint."""
    page.goto(url)
    page.get_by_role("heading", level=1).wait_for()
    page.locator("img").last.wait_for()
    page.wait_for_timeout(700)


def test_a_learner_goes_from_the_gallery_to_an_answer_with_the_keyboard(page, address):
    _open(page, address)
    link = page.get_by_role("link", name="Open the PASTA demo")
    link.focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="PASTA: can a model be told where to look?").wait_for()
    assert "Rome" in page.get_by_label("Steered answer", exact=True).input_value()

    page.get_by_role("radio", name="New fact").focus()
    page.keyboard.press("Tab")  # gradio gives every radio a group of its own, so arrows do not move between them
    page.keyboard.press("Space")
    page.get_by_text("Both sentences answer the question").wait_for()
    prompt = page.get_by_label("Prompt, with *stars*")
    assert prompt.input_value().startswith("Alice has a snake.")
    assert "duck" in page.get_by_label("Steered answer", exact=True).input_value()

    words = page.locator(".zq-words")
    for word in ("Bruno", "duck."):
        box = words.get_by_role("checkbox", name=word, exact=True)
        box.focus()
        page.keyboard.press("Space")
        box.wait_for()
    page.wait_for_function("document.querySelector('textarea').value.includes('Bruno *has a* duck.')")

    for word in ("Alice", "has", "a", "snake."):
        words.get_by_role("checkbox", name=word, exact=True).first.press("Space")
        page.wait_for_timeout(300)
    for word in ("has", "a"):
        words.get_by_role("checkbox", name=word, exact=True).nth(1).press("Space")
        page.wait_for_timeout(300)
    page.wait_for_function(
        "document.querySelector('textarea').value.startsWith('*Alice has a snake.* Bruno has a duck.')"
    )

    slider = page.get_by_role("slider").first
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("alpha = 10^-1.75 = 0.018").wait_for()
    page.get_by_role("button", name="Steer", exact=True).press("Enter")
    page.get_by_text("Done.", exact=True).wait_for()
    assert "snake" in page.get_by_label("Steered answer", exact=True).input_value()
    assert "alpha=0.0177828" in page.locator(".zq-code").inner_text()
    for image in page.locator(".zq-figure img").all():
        assert len(image.get_attribute("alt")) > 60


def test_typed_markup_stays_text_and_an_open_mark_is_explained(page, address):
    _open(page, f"{address}pasta")
    prompt = page.get_by_label("Prompt, with *stars*")
    prompt.fill(TYPED)
    page.locator(".zq-words").get_by_text("${7+7}").wait_for()
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("Done.", exact=True).wait_for()
    for part in ("img[src=x]", "img[onerror]", "main b", "main i"):
        assert page.locator(part).count() == 0, part
    assert "broken" not in page.title() and "<img src=x" in page.locator(".zq-code").inner_text()

    prompt.fill("<img src=x> an *open mark")
    page.get_by_text("close the mark that is open").wait_for()
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("never closes it").wait_for()
    assert page.locator("img[src=x]").count() == 0


def test_stop_ends_a_run_and_the_next_one_works(page, address):
    _open(page, f"{address}pasta")
    page.get_by_text("More settings").click()
    page.get_by_label("number input for Answer length, in tokens").fill("48")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("answer: ").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert page.locator(".zq-note").first.inner_text().startswith("Stopped.")  # and not an error
    page.get_by_label("number input for Answer length, in tokens").fill("2")
    page.get_by_role("button", name="Steer", exact=True).click()
    page.get_by_text("Done.", exact=True).wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_pages_fit_their_window_and_are_kept_as_pictures(browser, address, scheme, width, height):
    ARTIFACTS.mkdir(exist_ok=True)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(SLOW)
    page = context.new_page()
    for name, path in (("gallery", ""), ("pasta", "pasta")):
        _open(page, f"{address}{path}")
        page.screenshot(path=ARTIFACTS / f"{name}_{scheme}_{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than its window"
    if width == 1280:
        foot = page.get_by_role("button", name="Steer", exact=True).bounding_box()
        assert foot["y"] + foot["height"] <= height, "the Steer button is below the fold"
    context.close()
