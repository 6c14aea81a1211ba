"""The kernels are reached from the cache and the attention, and only where they can run."""

from __future__ import annotations

import pytest
import torch

from zq_lib.core import backend
from zq_lib.core.numerics import relative_rms, tolerance
from zq_lib.gear import GearConfig, compress, packed_attention, reference
from zq_lib.gear.cache import GearLayer


class Model:
    """Stands for a model's config: which attention reads the cache."""

    _attn_implementation = "sdpa"


def layer(config: GearConfig, tokens: int = 150) -> GearLayer:
    torch.manual_seed(0)
    made = GearLayer(config, Model())
    made.update(torch.randn(2, 2, tokens, 64), torch.randn(2, 2, tokens, 64))
    return made


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("scheme", ["kivi", "per_token"])
def test_the_fused_kernel_stores_the_same_bytes_as_the_torch_path(kind: str, scheme: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 64, 64)
    config = GearConfig(bits=3, scheme=scheme)
    plain = compress(x, getattr(config, kind), prompt=True)
    with backend.launches() as seen:
        fused = compress(x, getattr(config.but(backend="triton"), kind), prompt=True)
    assert [launch.path for launch in seen] == ["interpreter"]
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, fused.tensors()[name]), name


def test_one_query_goes_through_the_kernel_when_it_is_asked_for() -> None:
    view = layer(GearConfig(backend="triton", recent=1)).view()
    assert view.blocks and view.backend == "triton"
    query, mask = torch.randn(2, 6, 1, 64), torch.rand(2, 1, 1, view.length) > 0.2
    keys, values = (x.double().repeat_interleave(3, 1) for x in view.dense())
    expected = reference.attention(query.double(), keys, values, 0.125, mask)
    with backend.launches() as seen:
        out = packed_attention(query, view, scale=0.125, mask=mask)
    assert seen and {launch.path for launch in seen} == {"interpreter"}
    assert relative_rms(out, expected) <= tolerance(torch.float32, "interpreter").output


@pytest.mark.parametrize(
    ("queries", "mask", "why"),
    [(3, None, r"not \[B, H, 1, D\]"), (1, torch.zeros(2, 1, 1, 150), "float attention mask")],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(
    queries: int, mask: torch.Tensor | None, why: str
) -> None:
    view = layer(GearConfig(recent=1)).view()
    with pytest.raises(ValueError, match=why):
        packed_attention(torch.randn(2, 6, queries, 64), view, scale=0.125, mask=mask, path="triton")


def test_clipped_ranges_are_refused_by_the_kernel() -> None:
    with pytest.raises(ValueError, match="clipped ranges"):
        compress(torch.randn(1, 2, 64, 64), GearConfig(clip=True, backend="triton").keys, prompt=True)
