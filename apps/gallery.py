"""All demos in one server: `python -m apps.gallery` is `zq demo`."""

from __future__ import annotations

from zq_lib.ui.gallery import build, launch_demo

__all__ = ["build"]

if __name__ == "__main__":
    launch_demo()
