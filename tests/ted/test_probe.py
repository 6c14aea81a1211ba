"""The probe finds what is there, and no more than chance where nothing is."""

from __future__ import annotations

import pytest
import torch

from zq_lib.ted import probe


def _draw(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (rows,), generator=source)
    return torch.nn.functional.one_hot(labels, 4) + 0.1 * torch.randn(rows, 4, generator=source), labels


def test_what_is_linear_is_read_and_noise_is_not() -> None:
    (x, y), (test_x, test_y) = _draw(400, 0), _draw(400, 1)
    mixed = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    assert probe(x @ mixed, y, test_x @ mixed, test_y) > 0.99
    assert probe(x @ mixed * 1e4 + 7, y, test_x @ mixed * 1e4 + 7, test_y) > 0.99, "scale does not matter"
    noise = torch.randn(800, 12, generator=torch.Generator().manual_seed(3))
    assert probe(noise[:400], y, noise[400:], test_y) < 0.4


def test_it_is_repeatable_and_works_without_gradients_being_on() -> None:
    (x, y), (test_x, test_y) = _draw(100, 0), _draw(50, 1)
    with torch.no_grad():
        again = probe(x, y, test_x, test_y)
    assert again == probe(x, y, test_x, test_y)


def test_states_and_labels_must_fit() -> None:
    x, y = _draw(10, 0)
    with pytest.raises(
        ValueError, match=r"test_states has shape \(10, 4\) and its labels \(9,\); give \[n, d\] and \[n\]"
    ):
        probe(x, y, x, y[:9])
