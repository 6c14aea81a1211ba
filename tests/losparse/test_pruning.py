"""The choice of rows: the published rule found by sorting rows, the exact budget, bounds, rounding."""

from __future__ import annotations

import time

import pytest
import torch

from zq_lib.losparse import reference
from zq_lib.losparse.pruning import choose_rows, places, round_rows

COUNTS, INPUTS = torch.tensor([7, 1, 12, 5]), torch.tensor([4, 30, 3, 9])


def _scores(seed: int, values: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    if values:
        return torch.randint(values, (25,), generator=source).float()
    return torch.rand(25, generator=source)


@pytest.mark.parametrize("values", [0, 4, 1])
@pytest.mark.parametrize("share", [1.0, 0.99, 0.5, 0.21, 0.05, 1e-4])
def test_sorting_rows_finds_the_threshold_over_entries(share: float, values: int) -> None:
    for seed in range(20):
        scores = _scores(seed, values)
        want = reference.keep_rows(scores.split(COUNTS.tolist()), INPUTS.tolist(), share)
        assert torch.equal(choose_rows(scores, COUNTS, INPUTS, share), torch.cat(want))


def test_the_published_rule_is_at_most_one_row_above_the_share_without_ties() -> None:
    lengths = INPUTS.repeat_interleave(COUNTS)
    for seed in range(20):
        for share in (0.9, 0.33, 0.1):
            over = int(lengths[choose_rows(_scores(seed), COUNTS, INPUTS, share)].sum()) - share * int(lengths.sum())
            assert 0 <= over < int(INPUTS.max()) + 1, "int() rounds the entries to drop down"
            exact = choose_rows(_scores(seed), COUNTS, INPUTS, share, exact=True)
            under = share * int(lengths.sum()) - int(lengths[exact].sum())
            assert 0 <= under < int(INPUTS.max())


def test_a_share_of_nothing_keeps_nothing() -> None:
    for exact in (False, True):
        assert not choose_rows(_scores(0), COUNTS, INPUTS, 0.0, exact=exact).any()
        assert choose_rows(_scores(0), COUNTS, INPUTS, 1.0, exact=exact).all()


def test_of_equal_rows_the_exact_choice_takes_the_earlier() -> None:
    keep = choose_rows(torch.ones(6), torch.tensor([2, 4]), torch.tensor([3, 3]), 0.5, exact=True)
    assert keep.tolist() == [True, True, True, False, False, False]


def test_bounds_hold_for_each_matrix_and_the_total_stays() -> None:
    least, most = torch.tensor([3, 0, 0, 2]), torch.tensor([7, 1, 4, 2])
    lengths = INPUTS.repeat_interleave(COUNTS)
    for seed in range(20):
        keep = choose_rows(_scores(seed), COUNTS, INPUTS, 0.5, exact=True, least=least, most=most)
        kept = torch.tensor([int(k.sum()) for k in keep.split(COUNTS.tolist())])
        assert (kept >= least).all() and (kept <= most).all()
        assert int(lengths[keep].sum()) <= 0.5 * int(lengths.sum())
        for scores, part in zip(_scores(seed).split(COUNTS.tolist()), keep.split(COUNTS.tolist()), strict=True):
            if part.any() and not part.all():
                assert scores[part].min() >= scores[~part].max(), "within a matrix the best rows stay"
    with pytest.raises(ValueError, match="min_rows asks for 30 entries of S and remaining allows 13"):
        choose_rows(_scores(0), COUNTS, INPUTS, 0.1, exact=True, least=torch.tensor([3, 0, 0, 2]))


def test_scores_that_are_no_numbers_are_refused() -> None:
    scores = _scores(0)
    scores[4] = float("nan")
    with pytest.raises(ValueError, match="not finite, so nothing can be ranked"):
        choose_rows(scores, COUNTS, INPUTS, 0.5)


def test_places_count_from_the_best_row_of_each_matrix() -> None:
    found = places(torch.tensor([1.0, 3, 3, 9, 4, 5]), torch.tensor([3, 1, 2]))
    assert found.tolist() == [2, 0, 1, 0, 1, 0]


def test_rounding_takes_and_adds_rows_by_score_within_a_matrix() -> None:
    counts, scores = torch.tensor([8, 10, 5]), torch.rand(23, generator=torch.Generator().manual_seed(0))
    keep = choose_rows(scores, counts, torch.tensor([2, 2, 2]), 0.5)
    rounded = round_rows(keep, scores, counts, 4)
    for part, before, score in zip(*(t.split(counts.tolist()) for t in (rounded, keep, scores)), strict=True):
        assert int(part.sum()) % 4 == 0 or part.all()
        assert abs(int(part.sum()) - int(before.sum())) <= 2
        if part.any() and not part.all():
            assert score[part].min() > score[~part].max()


def test_a_mask_step_over_five_million_weights_takes_five_milliseconds() -> None:
    """Three layers of MiniLM: the choice and the zeroing, best of several in CPU time."""
    from zq_lib.losparse.importance import RowImportance

    sizes = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
    matrices = [torch.nn.Parameter(torch.randn(n, k)) for n, k in sizes * 3]
    assert sum(p.numel() for p in matrices) == 5_308_416
    importance = RowImportance(matrices, "sensitivity", "window", 10, 0.85, "torch")
    importance.average.copy_(torch.rand(len(importance.average)))
    counts, inputs = (torch.tensor([s[i] for s in sizes * 3]) for i in (0, 1))
    best = float("inf")
    for _ in range(15):
        start = time.process_time()
        importance.zero(choose_rows(importance.scores(), counts, inputs, 0.15))
        best = min(best, time.process_time() - start)
    assert best <= 5e-3
