"""A causal language model as a policy: its completions' log-probabilities and loss, without logits where it can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zq_lib.r3m.data import labels_of
from zq_lib.r3m.fused import Terms, preference_from_hidden
from zq_lib.r3m.logps import Head, logits_logps, sequence_logps
from zq_lib.r3m.loss import RobustDPOLoss, check_margin

SCALED = ("logit_scale", "logits_scaling", "lm_head_multiplier")  # configs in which the head is not all there is


def head_of(model: nn.Module) -> Head | None:
    """The linear head of a causal language model, with Gemma's cap; None if its logits are more than that.

    Then, as for a head with an adapter, `policy_logps` takes the model's own logits.
    """
    model = bare(model)
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(layer) is not nn.Linear or any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALED):
        return None
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None))


def policy_logps(
    model: nn.Module, batch: Mapping[str, Tensor], *, average: bool = False, backend: str = "auto"
) -> Tensor:
    """log pi(y | x) of each completion of a batch of `PreferenceCollator`, [2B], or its mean over words."""
    labels, head = labels_of(batch), head_of(model)
    if head is None:
        logits = model(**_inputs(batch)).logits
        return logits_logps(logits, labels, average=average, overwrite=True, backend=backend)
    return sequence_logps(_hidden(model, batch), head, labels, average=average, backend=backend)


def preference_terms(model: nn.Module, batch: Mapping[str, Tensor], reference: Tensor, loss: RobustDPOLoss) -> Terms:
    """Loss, margins [B] and log-probabilities [2B] of a batch, for the reference's log-probabilities [2B].

    In train mode an outlier budget moves its cut-off by these margins after it has judged them.

    Raises ValueError for margins that are not finite.
    """
    config, head = loss.config, head_of(model)
    if head is None:
        logps = policy_logps(model, batch, average=config.average, backend=config.backend)
        margin = loss.margin(logps, reference)
        return Terms(loss.of_margins(margin), margin.detach(), logps.detach())
    terms = preference_from_hidden(
        _hidden(model, batch), head, labels_of(batch), reference, loss.rule, average=config.average,
        backend=config.backend,
    )  # fmt: skip
    check_margin(terms.margin)
    loss.follow(terms.margin)
    return terms


def bare(model: nn.Module) -> Any:
    """The language model inside a wrapper for several processes or for adapters."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}


def _hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the head reads, [2B, T, C]. The model itself is called, so that wrappers see it, for one logit a row."""
    found: list[Tensor] = []
    decoder = bare(model).get_decoder()
    handle = decoder.register_forward_hook(lambda module, args, output: found.append(output[0]))
    try:
        model(**_inputs(batch), logits_to_keep=1)
    finally:
        handle.remove()
    return found[-1]
