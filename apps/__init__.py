"""The demos, one file per method: `python -m apps.pasta`, or `python -m apps.gallery` for all."""
