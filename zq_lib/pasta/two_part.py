"""The two-part form: attend to the marked keys and to the rest apart, and every alpha follows (section 3.1).

Steering changes neither normalised output, only their mixture: O~ = m~ O_G + (1 - m~) O_N with
logit m~ = logit m - log(alpha). So a sweep over alpha costs one call, not one per alpha, and a head's output moves on
the straight line from what the rest says to what the marks say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zq_lib.core import backend as backends
from zq_lib.pasta.attention import OUT_OF_SIGHT, kernel_can
from zq_lib.pasta.config import FLOOR


@dataclass(frozen=True)
class Parts:
    """The normalised outputs over both parts, and the log-odds of the marked share without steering.

    A part that a query does not see has no weight at any alpha, and its output there means nothing. A query that sees
    no key at all has zeros.
    """

    marked: Tensor  # O_G [B, T, H, D], in q's type
    rest: Tensor  # O_N [B, T, H, D]
    log_odds: Tensor  # logit m [B, T, H, 1], float32 or more

    @property
    def share(self) -> Tensor:
        """m, what the marked keys get of each row without steering, [B, T, H, 1]."""
        return torch.sigmoid(self.log_odds)


def two_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    marked: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Parts:
    """Attention split by `marked`, for `mix`.

    Args: `q` [B, H, T, D]; `k`, `v` [B, G, S, D], not repeated; `marked` [B or 1, S] bool, True for every key that
    keeps its weight, which generated and protected tokens do too; `mask` bool [B or 1, 1, T, S], True = visible, or
    None for causal (query i at key position S - T + i) or everything.

    Raises ValueError for `marked` of another shape or type, and for backend="triton" where the kernel cannot run, for
    example where gradients are wanted: its log-sum-exp has none.

    >>> parts = two_part(q, k, v, marked)
    >>> outputs = [mix(parts, alpha) for alpha in (1.0, 0.1, 0.01)]
    """
    B, S, D = len(q), k.shape[2], q.shape[-1]
    if marked.dtype != torch.bool or marked.shape not in ((B, S), (1, S)):
        raise ValueError(
            f"marked is {marked.dtype} {tuple(marked.shape)}; give bool [{B} or 1, {S}], one truth value per key"
        )
    scale = D**-0.5 if scale is None else scale
    able, why = kernel_can(q, mask, 0.0)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        able, why = False, "the gradient of the marked share is not in the kernel"
    split = _flash if backends.choose(backend, q.device, able, why) == "triton" else _wide
    return split(q, k, v, marked, mask, causal, scale)


def mix(parts: Parts, alpha: float) -> Tensor:
    """The steered output for one alpha, [B, T, H, D]; alpha = 1 is attention as it was. Raises ValueError below 0.

    Below 1e-8 it stays there, as everywhere in PASTA: a query without a marked key is then what it was.
    """
    if alpha < 0:
        raise ValueError(f"alpha={alpha!r} must be at least 0; 1 is no steering and 0 hides the rest")
    kept = torch.sigmoid(parts.log_odds - math.log(max(alpha, FLOOR)))
    return torch.lerp(parts.rest.to(kept), parts.marked.to(kept), kept).to(parts.rest.dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, marked: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Parts:
    """Two runs of the kernel, each with the other part out of sight; their log-sum-exps differ by the log-odds."""
    from zq_lib.pasta.kernels import flash_attention

    outputs, sums = [], []
    for hidden in (~marked, marked):
        out, lse = flash_attention(
            q, k, v, gate=q.new_ones(1, q.shape[1]), beta=OUT_OF_SIGHT * hidden, mask=mask, causal=causal, scale=scale
        )  # [B, T, H, D], [B, H, T]
        outputs.append(out)
        sums.append(lse.transpose(1, 2)[..., None])  # [B, T, H, 1]
    return Parts(*outputs, (sums[0] - sums[1]).nan_to_num(nan=0.0))  # a query that sees nothing: -inf - -inf


def _wide(q: Tensor, k: Tensor, v: Tensor, marked: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Parts:
    """One run of any attention on wider values: v where marked, v elsewhere, and a column of ones for each."""
    kind, T, S, D = q.dtype, q.shape[2], k.shape[2], q.shape[-1]
    q, k, v = (x.to(torch.promote_types(kind, torch.float32)) for x in (q, k, v))
    inside = marked[:, None, :, None].to(v.dtype)  # [B or 1, 1, S, 1]
    ones = v.new_ones(*v.shape[:-1], 1)
    wide = torch.cat([v * inside, v * (1 - inside), ones * inside, ones * (1 - inside)], -1)  # [B, G, S, 2D + 2]
    q, k = (F.pad(x, (0, wide.shape[-1] - D)) for x in (q, k))  # fused attention wants one width
    aligned = T == S and mask is None  # torch aligns its causal order to the first key, not to the last
    if causal and mask is None and not aligned:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    out = F.scaled_dot_product_attention(
        q, k, wide, attn_mask=mask, is_causal=causal and aligned, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)  # [B, T, H, 2D + 2]
    of_marked, of_rest, m, n = out.split([D, D, 1, 1], -1)
    m, n = (mass.clamp(min=torch.finfo(out.dtype).tiny) for mass in (m, n))  # an unseen part has no mass to divide by
    return Parts((of_marked / m).to(kind), (of_rest / n).to(kind), m.log() - n.log())
