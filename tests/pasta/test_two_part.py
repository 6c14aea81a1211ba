"""The two-part form: every alpha from one call, equal to steering with that alpha."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zq_lib.core.backend import interpreting, launches
from zq_lib.core.numerics import relative_rms
from zq_lib.pasta import reference
from zq_lib.pasta.two_part import Parts, mix, two_part

ALPHAS = (1.0, 0.3, 0.01, 1e-8)
in_interpreter = pytest.mark.skipif(not interpreting(), reason="a GPU is here, so kernels do not run on CPU tensors")
PATHS = ["torch", pytest.param("triton", marks=in_interpreter)]


def _inputs(B: int = 2, H: int = 4, G: int = 2, T: int = 21, S: int = 21, D: int = 16) -> tuple[Tensor, ...]:
    """q, k, v in fp32, and another mark in every row of the batch."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, t, D, generator=source) for n, t in ((H, T), (G, S), (G, S)))
    marked = torch.zeros(B, S, dtype=torch.bool)
    for b in range(B):
        marked[b, 3 + 2 * b : 6 + 2 * b] = True
    return q, k, v, marked


def _steered(q: Tensor, k: Tensor, v: Tensor, marked: Tensor, alpha: float, **options) -> Tensor:
    """The reference in float64, one alpha at a time, [B, T, H, D]."""
    beta = reference.bias_from_marks(~marked, alpha)
    gate = torch.ones(1, q.shape[1], dtype=torch.float64)
    out, _ = reference.biased_attention(q.double(), k.double(), v.double(), gate=gate, beta=beta, **options)
    return out.transpose(1, 2)


def _window(T: int, S: int, width: int) -> Tensor:
    """Causal, each query seeing the last `width` keys; the first query of the second batch row sees nothing."""
    key, at = torch.arange(S)[None], torch.arange(S - T, S)[:, None]
    mask = ((key <= at) & (key > at - width))[None, None].repeat(2, 1, 1, 1)
    mask[1, 0, 0] = False
    return mask


SHAPES = {
    "prompt": ({}, {}),
    "decode step": ({"T": 1, "S": 40}, {}),
    "chunk of a longer context": ({"T": 5, "S": 33}, {}),
    "no causal order": ({"T": 7, "S": 18}, {"causal": False}),
    "window that leaves the marks, and a blind query": ({}, {"mask": _window(21, 21, 4)}),
    "one head per key head": ({"H": 3, "G": 3}, {"scale": 0.5}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_gives_every_alpha(shape: str, path: str) -> None:
    sizes, options = SHAPES[shape]
    q, k, v, marked = _inputs(**sizes)
    parts = two_part(q, k, v, marked, backend=path, **options)
    for alpha in ALPHAS:
        assert relative_rms(mix(parts, alpha), _steered(q, k, v, marked, alpha, **options)) < 1e-6


@in_interpreter
@pytest.mark.parametrize("T", [1, 21])
def test_both_paths_agree_on_the_parts_and_two_launches_serve_every_alpha(T: int) -> None:
    q, k, v, marked = _inputs(T=T)
    one = two_part(q, k, v, marked, backend="torch")
    with launches() as seen:
        two = two_part(q, k, v, marked, backend="triton")
        outputs = [mix(two, alpha) for alpha in ALPHAS]
    kernels = ["pasta.forward"] if T > 1 else ["pasta.decode", "pasta.merge"]
    assert [launch.kernel for launch in seen] == 2 * kernels and len(outputs) == len(ALPHAS)
    both = one.log_odds.abs() < 80  # elsewhere one part has no weight
    for name in ("marked", "rest", "log_odds"):
        ours, theirs = (torch.where(both, getattr(parts, name), 0.0) for parts in (two, one))
        assert relative_rms(ours, theirs) < 1e-6
    assert torch.allclose(one.share[~both], two.share[~both])


def test_the_parts_are_the_references() -> None:
    q, k, v, marked = (x[:1] for x in _inputs())
    parts = two_part(q, k, v, marked, causal=False)
    by_reference = [
        _steered(q, k[:, :, keys], v[:, :, keys], marked[:, keys], 1.0, causal=False)
        for keys in (marked[0], ~marked[0])
    ]
    _, probs = reference.biased_attention(
        q.double(), k.double(), v.double(), gate=torch.zeros(1, 4), beta=torch.zeros(1, 21), causal=False
    )
    share = probs[..., marked[0]].sum(-1).transpose(1, 2)[..., None]
    assert relative_rms(parts.marked, by_reference[0]) < 1e-6 and relative_rms(parts.rest, by_reference[1]) < 1e-6
    assert relative_rms(parts.share, share) < 1e-6
    assert torch.allclose(mix(parts, 0.05).double(), reference.two_part(*by_reference, share, 0.05), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_alpha_1_is_attention_as_it_was(path: str) -> None:
    q, k, v, marked = _inputs()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative_rms(mix(two_part(q, k, v, marked, backend=path), 1.0), plain.transpose(1, 2)) < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_alpha_towards_0_hides_the_rest_from_queries_that_see_a_mark_and_leaves_the_others(path: str) -> None:
    q, k, v, marked = _inputs()
    parts = two_part(q, k, v, marked, backend=path)
    hidden, untouched = mix(parts, 0.0), mix(parts, 1.0)
    sees = marked.cumsum(-1).bool()
    assert torch.equal(hidden, mix(parts, 1e-8)) and hidden.isfinite().all()
    assert torch.allclose(hidden[sees], parts.marked[sees], atol=1e-4)
    assert torch.equal(hidden[~sees], untouched[~sees])
    assert not torch.allclose(hidden[sees], untouched[sees], atol=1e-2)


def test_the_marked_share_may_be_tiny_or_nearly_all() -> None:
    """Each part is summed on its own, so that no difference of two near equal numbers is taken."""
    q, k, v, marked = _inputs(T=1)
    for gain in (-40.0, 40.0):
        beta = torch.where(marked, gain, 0.0).double()
        pull = (
            torch.cat([q, torch.ones(*q.shape[:-1], 1)], -1),
            torch.cat([k, beta[:, None, :, None].expand(2, 2, 21, 1)], -1),
        )
        wide, scale = torch.nn.functional.pad(v, (0, 1)), q.shape[-1] ** -0.5
        for path in ("torch", "triton") if interpreting() else ("torch",):
            parts = two_part(pull[0], pull[1].float(), wide, marked, scale=scale, backend=path)
            for alpha in ALPHAS:
                expected = _steered(*pull, wide, marked, alpha, scale=scale)
                assert relative_rms(mix(parts, alpha), expected) < 1e-6


def test_double_precision_stays_double_and_bfloat16_comes_back_as_bfloat16() -> None:
    q, k, v, marked = _inputs()
    exact = mix(two_part(q.double(), k.double(), v.double(), marked), 0.01)
    assert exact.dtype == torch.float64 and relative_rms(exact, _steered(q, k, v, marked, 0.01)) < 1e-14
    half = [x.bfloat16() for x in (q, k, v)]
    rounded = mix(two_part(*half, marked), 0.01)
    assert rounded.dtype == torch.bfloat16 and relative_rms(rounded, _steered(*half, marked, 0.01)) < 4e-3


def test_gradients_reach_the_share_as_well() -> None:
    q, k, v, marked = _inputs(B=1, H=2, G=1, T=6, S=6, D=4)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: mix(two_part(q, k, v, marked[:1]), 0.1), leaves)


def test_the_steering_moves_an_output_on_a_straight_line() -> None:
    q, k, v, marked = _inputs(T=1)
    parts = two_part(q, k, v, marked)
    for alpha in ALPHAS:
        kept = reference.steered_share(parts.share, alpha)
        assert torch.allclose(mix(parts, alpha), parts.rest + kept * (parts.marked - parts.rest), atol=1e-6)
    assert torch.allclose(
        reference.steered_share(parts.share, 0.01).logit(), parts.log_odds - math.log(0.01), atol=1e-4
    )


def test_inputs_that_cannot_be_split_are_refused() -> None:
    q, k, v, marked = _inputs()
    with pytest.raises(ValueError, match=r"marked is torch.float32 \(2, 21\); give bool \[2 or 1, 21\]"):
        two_part(q, k, v, marked.float())
    with pytest.raises(ValueError, match=r"marked is torch.bool \(2, 20\)"):
        two_part(q, k, v, marked[:, :20])
    with pytest.raises(ValueError, match="gradient of the marked share is not in the kernel"):
        two_part(q.requires_grad_(), k, v, marked, backend="triton")
    with pytest.raises(ValueError, match="alpha=-0.1 must be at least 0"):
        mix(Parts(q, q, q[..., :1]), -0.1)
