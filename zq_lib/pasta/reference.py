"""PASTA in plain torch, in the paper's order: the only ground truth, and the text to read first.

Zhang et al., "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs" (ICLR 2024, arXiv 2311.02262),
section 3.1, post-hoc attention steering. Everything here runs in any float dtype (use float64 to check others against
it), is differentiable, and materialises whatever it likes.

| paper      | here      | shape            | meaning                                                  |
| ---------- | --------- | ---------------- | -------------------------------------------------------- |
| A          | `probs`   | [B, H, T, S]     | attention probabilities, rows sum to one                 |
| G          | `marked`  | [B, S]           | tokens the user emphasised                               |
| G-minus    | `unmarked`| [B, S]           | prompt tokens that are not emphasised                    |
| alpha      | `alpha`   | scalar           | scale of the unmarked tokens, 0 < alpha < 1              |
| C_i        | –         | [B, H, T, 1]     | the row's new sum                                        |
| –          | `gate`    | [B or 1, H]      | 1 for a steered head, 0 otherwise                        |
| –          | `beta`    | [B, S]           | log-bias: log(alpha) on G-minus, 0 elsewhere             |
| –          | `rows`    | [B, T]           | 1 where the row rule allows a bias                       |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reweight(probs: Tensor, unmarked: Tensor, alpha: float) -> Tensor:
    """Scale down what is not marked, then renormalise (section 3.1).

    A'[i, j] = A[i, j] / C_i          where j is marked
    A'[i, j] = alpha A[i, j] / C_i    where j is not,   C_i = sum_G A + alpha sum_{G-minus} A

    Args: `probs` [B, H, T, S], rows summing to one; `unmarked` [B, S] bool. Returns [B, H, T, S].
    """
    scaled = torch.where(unmarked[:, None, None, :], alpha * probs, probs)
    return scaled / scaled.sum(-1, keepdim=True)


def bias_from_marks(unmarked: Tensor, alpha: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The log-bias whose softmax is `reweight`: softmax(s + beta)_j = A_j e^beta_j / sum_k A_k e^beta_k.  [B, S]"""
    return torch.zeros(unmarked.shape, dtype=dtype, device=unmarked.device).masked_fill(unmarked, math.log(alpha))


def visible_keys(
    queries: int, keys: int, mask: Tensor | None, causal: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """Which keys each query may see, [B or 1, 1, T, S] bool. Query i sits at key position S - T + i."""
    if mask is not None:
        return mask
    if not causal:
        return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    position = torch.arange(keys - queries, keys, device=device)
    return (torch.arange(keys, device=device)[None, :] <= position[:, None])[None, None]


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor,
    beta: Tensor,
    rows: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the rank-one bias gate[b, h] * rows[b, i] * beta[b, j] added to the scaled scores.

    Args: `q` [B, H, T, D]; `k`, `v` [B, G, S, D] with H a multiple of G; `mask` [B or 1, 1, T, S] bool, True = visible,
    or None for causal (or everything). Returns the output [B, H, T, D] and the probabilities [B, H, T, S]; a row that
    sees no key is zero.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # [B, H, S, D]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, T, S]
    column = gate[:, :, None, None] * beta[:, None, None, :]  # [B, H, 1, S]
    scores = scores + (column if rows is None else column * rows[:, None, :, None])
    seen = visible_keys(q.shape[2], k.shape[2], mask, causal, q.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    dead = ~seen.any(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return probs @ v, probs


def steered_share(share: Tensor, alpha: float) -> Tensor:
    """Share m~ of the marked tokens after steering, from the share m before: logit(m~) = logit(m) - log(alpha)."""
    return share / (share + alpha * (1 - share))


def alpha_for_share(share: Tensor, target: float) -> Tensor:
    """The alpha that moves a row's marked share from `share` to `target`: odds(m) (1 - psi) / psi."""
    return share / (1 - share) * (1 - target) / target


def two_part(marked_out: Tensor, unmarked_out: Tensor, share: Tensor, alpha: float) -> Tensor:
    """Every alpha from two partial outputs: (m O_G + alpha (1 - m) O_N) / (m + alpha (1 - m)).

    `marked_out`, `unmarked_out` [B, H, T, D] are the normalised outputs over each part, `share` [B, H, T, 1].
    """
    kept = steered_share(share, alpha)
    return kept * marked_out + (1 - kept) * unmarked_out
