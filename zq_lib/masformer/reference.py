"""Mixed-span attention in plain torch, in the paper's order: the only ground truth, and the text to read first.

Zhang et al., "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer" (Findings
of EMNLP 2023, arXiv 2310.12442). Everything here runs in any float dtype (use float64 to check others against it), is
differentiable, and materialises whatever it likes.

| paper | here      | shape                  | meaning                                                     |
| ----- | --------- | ---------------------- | ----------------------------------------------------------- |
| V_i   | `visible` | [B or 1, H or 1, T, S] | keys that query i may see                                   |
| w, b  | `span`    | number, or one a head  | window (its own token included) or block; None is full      |
| –     | `sinks`   | number                 | first tokens that every query sees                          |
| i, j  | `position`| [S] or [B, S]          | place in the text, counted from the first real token        |

    O_i = sum_{j in V_i} softmax_j(scale q_i . k_j) v_j,      exact inside V_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zq_lib.masformer.spans import KINDS, Span


def positions(keys: int, padding: Tensor | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Places in the text, 0 at the first real token: [S], or [B, S] with `padding` [B, S] bool (True: real).

    Padding is no part of the text: it is not counted, and has the place of the real token before it.
    """
    return torch.arange(keys, device=device) if padding is None else padding.long().cumsum(-1) - 1


def sees(query: Tensor, key: Tensor, span: int | Tensor | None, kind: str, sinks: int) -> Tensor:
    """Whether a query at place `query` sees the key at place `key`: V_i of section 3 of the paper. All broadcast."""
    causal = key <= query
    if span is None:
        return causal
    if kind == "window":
        near = key > query - span
    elif kind == "block":
        near = key // span == query // span
    elif kind == "two_block":
        near = key // span >= query // span - 1
    else:
        raise ValueError(f"kind={kind!r} is not known; choose one of {', '.join(KINDS)}")
    return causal & (near | (key < sinks) if sinks else near)


def visible(
    queries: int, keys: int, span: Span, kind: str = "window", sinks: int = 0, *,
    position: Tensor | None = None, padding: Tensor | None = None, device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """The mask of a layer, [B or 1, H or 1, T, S] bool. Queries are the last T places of the key axis.

    `position` [S] or [B, S] says where keys are if a cache has dropped some; what `padding` [B, S] says is False
    is not seen and sees nothing.
    """
    place = positions(keys, padding, device) if position is None else position.to(device)
    place = place.reshape(-1, 1, 1, keys)  # [B or 1, 1, 1, S]
    row = place[..., keys - queries :].transpose(-1, -2)  # [B or 1, 1, T, 1]
    if isinstance(span, tuple):
        heads = [sees(row, place, one, kind, sinks) for one in span]
        mask = torch.cat(torch.broadcast_tensors(*heads), 1)  # [B or 1, H, T, S]
    else:
        mask = sees(row, place, span, kind, sinks)
    if padding is None:
        return mask
    real = padding.to(mask.device)
    return mask & real[:, None, None, :] & real[:, None, keys - queries :, None]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention under a mask: output [B, H, T, D] and probabilities [B, H, T, S]; a row that sees nothing is 0.

    `q` [B, H, T, D]; `k`, `v` [B, G, S, D] with H a multiple of G. `softcap` c bends a score s to c tanh(s / c).
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # [B, H, S, D]
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    dead = ~mask.any(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return probs @ v, probs


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, span: Span, kind: str = "window", sinks: int = 0, *,
    position: Tensor | None = None, padding: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """One layer's attention by the definition: `visible`, then `masked_attention`. [B, H, T, D]"""
    mask = visible(
        q.shape[2], k.shape[2], span, kind, sinks, position=position, padding=padding, device=q.device
    )  # fmt: skip
    return masked_attention(q, k, v, mask, scale=scale, softcap=softcap)[0]
