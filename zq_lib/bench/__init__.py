"""Benchmarks: the harness, and the committed results it wrote."""
