from __future__ import annotations

import math

import pytest
import torch

from zq_lib.core.numerics import TOLERANCES, relative_rms, tolerance


def test_the_error_is_relative_to_the_size_of_what_was_expected() -> None:
    assert relative_rms(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_it_is_computed_in_double_precision() -> None:
    expected = torch.ones(1000, dtype=torch.float64)
    assert relative_rms(expected + 1e-12, expected) == pytest.approx(1e-12, rel=1e-3)


def test_zero_is_met_only_by_zero() -> None:
    zero = torch.zeros(3)
    assert relative_rms(zero, zero) == 0
    assert relative_rms(zero + 1e-30, zero) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_number_that_is_none_passes_no_tolerance(bad, size) -> None:
    assert not relative_rms(torch.tensor([bad, 1.0]), torch.full((2,), size)) <= 1e30


def test_shapes_that_differ_are_refused_rather_than_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) but expected has \(1, 2\)"):
        relative_rms(torch.zeros(2), torch.zeros(1, 2))


def test_every_kernel_path_has_its_row() -> None:
    assert tolerance(torch.float32, "interpreter") == TOLERANCES["interpreter_fp32"] == (2e-6, 2e-5)
    assert tolerance(torch.float32, "triton") == (1e-5, 1e-4)
    assert tolerance(torch.float32, "torch").output == 1e-6
    assert tolerance(torch.bfloat16, "triton") == tolerance(torch.bfloat16, "interpreter") == (1.5e-2, 2e-2)
    assert tolerance(torch.float16, "triton").gradient == 5e-3


@pytest.mark.parametrize(("dtype", "path"), [(torch.float64, "triton"), (torch.float32, "cuda")])
def test_a_row_that_does_not_exist_is_refused_with_the_choices(dtype, path) -> None:
    with pytest.raises(ValueError, match="use float32, float16 or bfloat16 on one of 'interpreter', 'triton', 'torch'"):
        tolerance(dtype, path)
