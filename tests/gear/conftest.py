"""Caches in these tests are short; they are read tile by tile nevertheless."""

from __future__ import annotations

import pytest

from zq_lib.gear import attention


@pytest.fixture(autouse=True)
def no_cache_counts_as_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)
