"""AdaShift's page in a real browser: sliders, steps by hand, a training, Stop, typed markup and two visitors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import open_page

pytestmark = pytest.mark.browser
ARTIFACTS = Path(__file__).parents[2] / "artifacts"
SLOW = 120_000  # milliseconds; a walk takes a second, a training a few, more beside other tests
TYPED = "<img src=x onerror=\"document.title='broken'\"> <b>3</b>, -1"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of the page served alone."""
    from apps import adashift
    from zq_lib.ui import serve

    adashift.warm()
    blocks = adashift.build()
    yield serve.launch(blocks, port=None, wait=False)
    blocks.close()


@pytest.fixture
def page(page, address):
    """The page."""
    page.set_default_timeout(SLOW)
    open_page(page, address)
    return page


def _set(page, label: str, value: float) -> None:
    box = page.get_by_label(f"number input for {label}", exact=True).locator("visible=true")
    box.fill(str(value))
    box.press("Enter")


def _choose(page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).locator("visible=true").press("Space")


def _button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def _code(page) -> str:
    return page.locator(".zq-code").inner_text()


def test_a_learner_moves_delta_over_the_mark_and_types_gradients_of_her_own(page):
    page.get_by_text("the wrong way Adam to +1.62").wait_for()
    page.get_by_text("delta_c = 5.05: left of it").wait_for()
    _set(page, "delta", 9)
    page.get_by_text("As expected of Adam: delta 9 is above").wait_for()
    page.locator("img[alt*='down is right']").wait_for()
    assert "Stochastic(101, 9)" in _code(page)
    _choose(page, "sequential")
    page.get_by_role("slider", name="Period d").wait_for()
    page.get_by_text("Nothing is random here").wait_for()
    assert page.get_by_role("slider", name="delta").count() == 0
    _set(page, "Gradient C", 2)
    page.get_by_text("C=2 must exceed (d - 1) other = 2").wait_for()
    _choose(page, "own")
    own = page.get_by_role("textbox", name="Your gradients").locator("visible=true")
    own.fill("5, -2, -1")
    page.get_by_text("The mean of your gradients is 0.667").wait_for()
    assert "np.resize([5, -2, -1]" in _code(page)
    own.fill(TYPED)
    page.get_by_text("which is not a number").wait_for()
    for part in ("img[src=x]", "img[onerror]", "main b"):
        assert page.locator(part).count() == 0, part
    assert "broken" not in page.title()
    _choose(page, "Same period: AdaShift fails")
    page.get_by_text("n = 3 is a multiple of the period 3").wait_for()
    assert page.get_by_role("slider", name="Period d").is_visible()
    for image in page.locator(".zq-figure img").all():
        assert len(image.get_attribute("alt")) > 60


def test_the_steps_by_hand_go_on_and_back(page):
    page.get_by_role("tab", name="By hand").click()
    page.get_by_text("Step 4 of 9: g_4 = 3. Into v goes not itself but g_3 = -1").wait_for()
    assert "net_update_factors" in _code(page)
    _button(page, "Next").press("Enter")
    page.get_by_text("Step 5 of 9").wait_for()
    for t in (4, 3):
        _button(page, "Back").press("Enter")
        page.get_by_text(f"Step {t} of 9").wait_for()
    page.locator("img[alt*='has got by step 3']").wait_for()
    _choose(page, "Adam")
    page.get_by_text("Into v goes itself g_3 = -1").wait_for()
    page.get_by_role("textbox", name="Gradients (2 to 12").fill("2, -1")
    page.get_by_text("Step 2 of 2").wait_for()
    page.get_by_role("textbox", name="Gradients (2 to 12").fill(TYPED)
    page.get_by_text("which is not a number").wait_for()
    assert page.locator("img[onerror]").count() == 0


def test_a_training_draws_as_it_goes_and_stop_ends_only_ones_own(page, browser, address):
    context = browser.new_context()
    context.set_default_timeout(SLOW)
    other = context.new_page()
    open_page(other, address)
    for one in (page, other):
        one.get_by_role("tab", name="Digits").click()
        one.get_by_text("breaks down").wait_for()
        _choose(one, "1e-05")
        one.get_by_text("Not run yet with these settings").locator("visible=true").wait_for()
        assert "eps=1e-05" in _code(one)
    _set(page, "Epochs", 30)
    _set(other, "Epochs", 2)
    page.get_by_text("Not run yet").locator("visible=true").wait_for()
    _button(page, "Train").press("Enter")
    page.get_by_text(": epoch ").first.wait_for()
    _button(other, "Train").press("Enter")
    other.get_by_text("Waiting for a free place.").wait_for()
    _button(page, "Stop").click()
    page.get_by_text("Stopped.").wait_for()
    other.get_by_text("Done.", exact=True).wait_for()
    other.get_by_text("what chance does to two shares").wait_for()
    other.locator("img[alt*='Lines of accuracy over epochs to 2']").wait_for()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (390, 844)])
def test_the_page_fits_its_window_and_is_kept_as_pictures(browser, address, scheme, width, height):
    ARTIFACTS.mkdir(exist_ok=True)
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(SLOW)
    page = context.new_page()
    open_page(page, address)
    for part, lowest in (("Walk", "slider"), ("By hand", "slider"), ("Digits", "button")):
        page.get_by_role("tab", name=part).click()
        page.locator(".zq-figure img").locator("visible=true").first.wait_for()
        page.wait_for_timeout(400)
        page.screenshot(path=ARTIFACTS / f"adashift_{part.split()[0]}_{scheme}_{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 1280:
            name = {"Walk": "Steps", "By hand": "beta1", "Digits": "Train"}[part]
            foot = page.get_by_role(lowest, name=name).locator("visible=true").last.bounding_box()
            assert foot["y"] + foot["height"] <= height, f"{name} is below the fold"
    context.close()
