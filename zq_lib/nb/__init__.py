"""Author tools for the notebooks: execute them to reproducible bytes, lint them, turn them into slides."""
