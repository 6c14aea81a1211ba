"""The low-rank residual: nearly as good as an SVD, finite whatever comes, and the same in a batch as alone."""

from __future__ import annotations

import pytest
import torch
from gear_cases import error, normal, packed

from zq_lib.gear import GearConfig
from zq_lib.gear.lowrank import factorise, orthonormalise, start_vectors, to_int8

CODEC = GearConfig().keys


def energy(residual: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Captured energy of every head."""
    return residual.square().sum((-2, -1)) - (residual - a @ b.mT).square().sum((-2, -1))


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize(("n", "d"), [(1024, 64), (64, 64), (256, 128), (40, 16)])
def test_three_rounds_capture_95_percent_of_what_the_svd_does(rank: int, n: int, d: int) -> None:
    """Gaussian noise plus four directions with four times its energy."""
    residual = normal(2, 3, n, d) + normal(2, 3, n, 4, seed=1) @ normal(2, 3, 4, d, seed=2)
    best = torch.linalg.svdvals(residual)[..., :rank].square().sum(-1)
    assert (energy(residual, *factorise(residual, rank, CODEC, seed=0)) >= 0.95 * best).all()
    svd = GearConfig(solver="svd").keys
    assert torch.allclose(energy(residual, *factorise(residual, rank, svd, seed=0)), best, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "d"), [(1024, 64), (64, 64), (40, 16)])
def test_cholesky_gives_what_qr_in_double_precision_does(rank: int, n: int, d: int) -> None:
    """Pure noise: the singular values are close together, the hardest case."""
    residual = normal(2, 3, n, d)
    x, p = residual.double(), start_vectors(d, rank, 0).double()
    for _ in range(3):
        q = torch.linalg.qr(x @ torch.linalg.qr(p).Q).Q
        p = x.mT @ q
    a, b = factorise(residual, rank, CODEC, seed=0)
    assert torch.allclose(energy(residual, a, b).double(), energy(x, q, p), rtol=1e-4)
    assert torch.allclose((a @ b.mT).double(), q @ p.mT, atol=2e-3)


def test_b_is_the_projection_of_the_residual_on_a() -> None:
    """Q Q^T R is the best approximation in the span of Q, so B can be no better."""
    residual = normal(1, 2, 64, 16)
    a, b = factorise(residual, 4, CODEC, seed=0)
    assert torch.allclose(a.mT @ a, torch.eye(4).expand(1, 2, 4, 4), atol=1e-4)
    assert torch.allclose(b, residual.mT @ a, atol=1e-4)


@pytest.mark.parametrize("rounds", [1, 10, 30])
@pytest.mark.parametrize("size", [1e-20, 1e-4, 1.0, 6e4, 1e15])
def test_many_rounds_and_any_size_stay_finite(rounds: int, size: float) -> None:
    """As published, ten rounds overflow to NaN."""
    residual = normal(1, 2, 256, 64) * size
    a, b = factorise(residual, 4, GearConfig(iterations=rounds).keys, seed=0)
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    assert ((residual - a @ b.mT) / size).norm() < (residual / size).norm()


def test_more_rounds_come_closer() -> None:
    residual = normal(1, 2, 256, 64)
    found = [energy(residual, *factorise(residual, 4, GearConfig(iterations=i).keys, seed=0)).sum() for i in (1, 3, 30)]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize(("n", "d", "rank"), [(2, 16, 4), (64, 8, 20), (1, 8, 2), (3, 3, 64)])
def test_a_rank_above_the_smaller_side_is_clamped_and_then_exact(n: int, d: int, rank: int) -> None:
    residual = normal(2, 2, n, d)
    a, b = factorise(residual, rank, CODEC, seed=0)
    assert a.shape == (2, 2, n, min(n, d)) and b.shape == (2, 2, d, min(n, d))
    assert torch.allclose(a @ b.mT, residual, atol=1e-3)


def test_a_zero_residual_gives_zero() -> None:
    for solver in ("power", "svd"):
        a, b = factorise(torch.zeros(1, 2, 64, 8), 4, GearConfig(solver=solver).keys, seed=0)
        assert not (a @ b.mT).any() and torch.isfinite(a).all()


def test_a_residual_of_lower_rank_than_asked_is_caught_whole() -> None:
    residual = normal(1, 2, 64, 1) @ normal(1, 2, 1, 16, seed=1)
    a, b = factorise(residual, 4, CODEC, seed=0)
    assert torch.allclose(a @ b.mT, residual, atol=1e-3)


def test_one_zero_head_does_not_touch_the_others() -> None:
    residual = normal(1, 3, 64, 16)
    residual[:, 1] = 0
    a, b = factorise(residual, 2, CODEC, seed=0)
    alone = factorise(residual[:, :1], 2, CODEC, seed=0)
    assert not (a @ b.mT)[:, 1].any()
    assert torch.equal(a[:, :1], alone[0]) and torch.equal(b[:, :1], alone[1])


def test_orthonormal_columns_span_the_same() -> None:
    x = normal(2, 64, 4) * torch.tensor([1.0, 10.0, 0.1, 3.0])
    q = orthonormalise(x)
    assert torch.allclose(q.mT @ q, torch.eye(4).expand(2, 4, 4), atol=1e-4)
    assert torch.allclose(q @ (q.mT @ x), x, atol=1e-3)


def test_the_global_generator_is_left_alone_and_the_seed_decides() -> None:
    residual, state = normal(1, 1, 64, 16), torch.get_rng_state()
    first, again, other = (factorise(residual, 2, CODEC, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_int8_factors_cost_half_and_hardly_more_error() -> None:
    x = normal(1, 2, 256, 64) + normal(1, 2, 256, 2, seed=1) @ normal(1, 2, 2, 64, seed=2)
    wide, narrow = (packed(x, "key", rank=4, factor_bits=bits) for bits in (16, 8))
    assert narrow.left.dtype == narrow.right.dtype == torch.int8 and narrow.left_scale.dtype == torch.float16
    assert narrow.left.nbytes * 2 == wide.left.nbytes
    assert narrow.left_scale.shape == narrow.right_scale.shape == (1, 1, 2, 1, 4)
    plain = error(x, packed(x, "key").dequantize())
    a, b = error(x, wide.dequantize()), error(x, narrow.dequantize())
    assert a < plain and b < a + 0.02 * (plain - a)


def test_int8_uses_its_whole_range_and_survives_zero_columns() -> None:
    x = normal(1, 64, 3)
    x[..., 1] = 0
    codes, scale = to_int8(x)
    assert codes[..., 0].abs().max() == 127 and not codes[..., 1].any() and scale[0, 0, 1] == 0
    assert torch.allclose(codes * scale.float(), x, atol=float(x.abs().max() / 127))


@pytest.mark.parametrize("size", [1e-3, 6e4])
def test_factors_of_large_and_small_residuals_fit_half_precision(size: float) -> None:
    x = normal(1, 2, 512, 16).clamp(-1, 1) * size
    for bits in (16, 8):
        plain = error(x, packed(x, "key", bits=2).dequantize())
        assert error(x, packed(x, "key", bits=2, rank=8, factor_bits=bits).dequantize()) < 0.95 * plain


def test_the_prompt_and_the_pages_have_their_own_ranks() -> None:
    x = normal(1, 2, 64, 16)
    assert packed(x, "key", prompt=True, rank=4, rank_decode=2).left.shape[-1] == 4
    assert packed(x, "key", prompt=False, rank=4, rank_decode=2).left.shape[-1] == 2
    assert packed(x, "key", prompt=False, rank=4, rank_decode=0).left is None
