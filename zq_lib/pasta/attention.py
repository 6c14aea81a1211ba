"""The attention that PASTA runs: stock SDPA, and for steered heads SDPA with one more column.

The bias gate[h] * rows[i] * beta[j] has rank one, so it fits into the dot product: q' = [q, c gate rows] and
k' = [k, beta / (scale c)] give scale q'.k' = scale q.k + gate rows beta. Nothing of size [H, T, S] is built, and any
fused attention will do. Where Triton runs on a GPU, the kernel of `kernels.py` does the same without the copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from zq_lib.core import backend
from zq_lib.core.attach import Gate, KeyBias, active_bias, register, rows_that_see

NAME = "zq_pasta"
COLUMN = 8.0  # c: a power of two, so that scaling by it loses no bit
OUT_OF_SIGHT = -1e4  # a bias that empties a key's share in every dtype, and fits float16


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Gate,
    beta: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    path: str = "torch",
) -> Tensor:
    """Attention of the heads `gate.heads` with the rank-one bias.

    Args: `q` [B, H, T, D]; `k`, `v` [B, G, S, D], not repeated; `beta` [B, S] float32; `rows` [B, T] bool; `mask` bool
    or float [B, 1, T, S] or None. Returns [B, T, len(heads), D] in q's dtype.
    """
    heads = list(gate.heads)
    if path == "triton":
        from zq_lib.pasta.kernels import flash_attention

        out, _ = flash_attention(
            q, k, v, gate=gate.strength, beta=beta, rows=rows, mask=mask, causal=causal, scale=scale
        )  # [B, T, H, D]
        return out[:, :, heads]
    group = q.shape[1] // k.shape[1]
    if len(heads) < q.shape[1]:
        q = q[:, heads]  # [B, n, T, D]
    source = [h // group for h in heads]
    if source != list(range(k.shape[1])):
        k, v = k[:, source], v[:, source]  # [B, n, S, D]
    strength = gate.strength[:, heads, None, None] * rows[:, None, :, None]  # [B, n, T, 1]
    q, k, v = add_bias_column(q, k, v, strength, beta, scale)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)
    return out[..., : -extra_columns(q.dtype)].transpose(1, 2)


def extra_columns(dtype: torch.dtype) -> int:
    """How many columns carry the bias: half precision keeps the rounding remainder of beta in a second one."""
    return 1 if dtype in (torch.float32, torch.float64) else 2


def add_bias_column(
    q: Tensor, k: Tensor, v: Tensor, strength: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Append the bias to the dot product. `strength` [B, n, T, 1], `beta` [B, S]; all heads given their own keys."""
    columns = extra_columns(q.dtype)
    exact = (beta / (scale * COLUMN))[:, None, :, None]  # [B, 1, S, 1]
    parts = [exact.to(k.dtype)]
    if columns == 2:
        parts.append((exact - parts[0].to(exact.dtype)).to(k.dtype))
    key_side = torch.cat(parts, -1).expand(*k.shape[:3], columns)
    query_side = (COLUMN * strength).to(q.dtype).expand(*q.shape[:3], columns)
    return torch.cat([q, query_side], -1), torch.cat([k, key_side], -1), F.pad(v, (0, columns))


def steered_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The function transformers calls: shapes and arguments as its AttentionInterface defines them.

    query [B, H, T, D]; key, value [B, G, S, D], rotated and cached; returns [B, T, H, D] contiguous and no weights.
    """
    bias = active_bias(module)
    gate = bias.gates.get(module) if bias is not None else None
    if bias is None or (gate is None and bias.record is None):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    queries = query.shape[2]
    causal = queries > 1 and attention_mask is None and bool(getattr(module, "is_causal", True))
    if causal and key.shape[2] > queries:  # first pass into a preallocated cache: the rest of it is still empty
        key, value = key[:, :, :queries], value[:, :, :queries]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    beta, favoured = bias.keys(query.shape[0], queries, key.shape[2])
    if bias.record is not None:
        _record(bias, module, query, key, attention_mask, beta, favoured, gate, scale)

    def stock(**more: object) -> Tensor:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs, **more
        )[0]

    if gate is None:
        return stock(), None
    bias.calls[bias.layers[module]] = bias.calls.get(bias.layers[module], 0) + 1
    rows = rows_that_see(favoured, queries, attention_mask, causal)  # [B, T]
    path = backend.choose(bias.backend, query.device, *kernel_can(query, attention_mask, dropout))
    exact = query.dtype in (torch.float32, torch.float64)  # log(alpha) in bfloat16 would be another alpha
    if queries == 1 and path == "torch" and exact and bias.share is None and kwargs.get("position_bias") is None:
        # One query: a [B, H, 1, S] bias is no larger than the scores, and SDPA need not copy the keys.
        column = torch.where(rows, beta, 0.0).to(query.dtype)  # [B, S]
        return stock(position_bias=gate.strength.to(query.dtype)[:, :, None, None] * column[:, None, None, :]), None

    def biased(beta: Tensor, rows: Tensor) -> Tensor:
        return attend(
            query, key, value, gate=gate, beta=beta, rows=rows, mask=attention_mask, causal=causal, scale=scale,
            dropout=dropout, path=path,
        )  # fmt: skip

    if bias.share is None:
        steered = biased(beta, rows)
    else:
        scaled_down = beta != 0
        sees_rest = rows_that_see(scaled_down, queries, attention_mask, causal)
        marked_only = biased(OUT_OF_SIGHT * scaled_down, rows)
        rest_only = biased(OUT_OF_SIGHT * ~scaled_down, rows & sees_rest)
        mix = torch.where((rows & sees_rest)[:, :, None, None], bias.share, 1.0).to(query.dtype)  # [B, T, 1, 1]
        steered = mix * marked_only + (1 - mix) * rest_only
    if len(gate.heads) == query.shape[1]:
        return steered.contiguous(), None
    out = stock()  # [B, T, H, D]
    out[:, :, list(gate.heads)] = steered
    return out, None


def kernel_can(q: Tensor, mask: Tensor | None, dropout: float) -> tuple[bool, str]:
    if dropout:
        return False, "attention dropout is not in the kernel; set attention_dropout to 0"
    if mask is not None and mask.dtype != torch.bool:
        return False, "a float attention mask is not in the kernel; give a boolean one"
    if q.dtype == torch.float64:
        return False, "float64 is not in the kernel; use float32, float16 or bfloat16"
    return q.shape[-1] <= 256, f"head width {q.shape[-1]} is above 256"


@torch.no_grad()
def _record(
    bias: KeyBias, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, beta: Tensor, favoured: Tensor,
    gate: Gate | None, scale: float,
) -> None:  # fmt: skip
    """Share of the favoured keys in the last query row of every head, [B, H] float64, without and with the bias."""
    group = q.shape[1] // k.shape[1]
    last = q[:, :, -1].double().unflatten(1, (k.shape[1], group))  # [B, G, group, D]
    scores = torch.einsum("bgnd,bgsd->bgns", last, k.double()).flatten(1, 2) * scale  # [B, H, S]
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        scores = scores.masked_fill(~visible[:, :, -1], -torch.inf)
    layer, marks = bias.layers[module], favoured[:, None, :]
    probs = scores.softmax(-1)
    bias.record["before"][layer] = (probs * marks).sum(-1)
    bias.record["probs"][layer] = probs
    if gate is not None:
        scores = scores + gate.strength[:, :, None] * beta[:, None, :]
        probs = scores.softmax(-1)
    bias.record["after"][layer] = (probs * marks).sum(-1)


register(NAME, steered_attention_forward)
