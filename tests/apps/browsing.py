"""What the browser tests of several pages share."""

from __future__ import annotations


def open_page(page, url: str) -> None:  # noqa: ANN001
    """Go to `url` and wait until its scripts listen: they attach a moment after the first paint."""
    page.goto(url)
    page.get_by_role("heading", level=1).wait_for()
    page.locator("img").last.wait_for()
    page.wait_for_timeout(700)
