"""Models by name: the embedded ones, any other through `ZQ_MODEL` or an argument, and tiny random ones for tests.

    model, tokenizer = load()                      # SmolLM2-135M-Instruct, fp32
    model, tokenizer = load("minilm-l6", num_labels=2)
    model = tiny("llama")

Nothing is downloaded for the embedded models, no code of a model repository is run and no pickle is read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from zq_lib.core import assets, convert
from zq_lib.core.cache import Advance, Progress, Recipe, ensure

ENCODERS = ("minilm-l6", "minilm-l3")
BUILT_IN = ("smollm2", *ENCODERS)
_NEW_HEADS = ("classifier.", "score.", "bert.pooler.")  # random by nature when a classifier is asked for


def _l3_source() -> Path:
    if find_spec("onnx") is None:
        raise assets.AssetMissing('reading minilm-l3 needs the package onnx: run `pip install "zq_lib[encoders]"`')
    return assets.verified("minilm-l3")


def _l3(source: Path, target: Path, advance: Advance) -> None:
    convert.minilm_l3_from_onnx(source, target, advance, tokenizer=assets.path("minilm-l6").parent)


RECIPES = {
    "smollm2": Recipe(
        name="smollm2",
        source=partial(assets.verified, "smollm2"),
        origin=assets.ASSETS["smollm2"].sha256,
        convert=convert.llama_from_gguf,
        size=275_000_000,
    ),
    "minilm-l3": Recipe(
        name="minilm-l3",
        source=_l3_source,
        origin=assets.ASSETS["minilm-l3"].sha256,
        convert=_l3,
        size=71_000_000,
    ),
}


def load(
    name: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    num_labels: int | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in eval mode and its tokenizer.

    `name` is `smollm2` (the default), `minilm-l6`, `minilm-l3`, a local folder or a Hugging Face id; without it the
    environment variable `ZQ_MODEL` decides. With `num_labels` the model is a sequence classifier whose head is new
    (drawn from torch's global generator, so seed first); without, the encoders are bare encoders and all others causal
    language models. A tokenizer without a padding token pads with its end token.

    Raises `assets.AssetMissing` when the package is not installed, `cache.CacheError` when the cache has no room and
    `ValueError` when `name` leads nowhere or its weights are incomplete.
    """
    name = name or os.environ.get("ZQ_MODEL") or "smollm2"
    where = folder(name, progress=progress) if name in BUILT_IN else Path(name).expanduser()
    target = str(where) if where.is_dir() else name
    options: dict[str, Any] = {"trust_remote_code": False}
    if num_labels is not None:
        kind, options["num_labels"] = AutoModelForSequenceClassification, num_labels
    elif name in ENCODERS:
        kind = AutoModel
    else:
        kind = AutoModelForCausalLM
    if name == "minilm-l3" and num_labels is None:
        options["add_pooling_layer"] = False  # the original has none
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
            model, info = kind.from_pretrained(
                target, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"no model {name!r}: give one of {', '.join(BUILT_IN)}, a local folder with config.json and "
                f"model.safetensors, or a Hugging Face id that is reachable ({str(error).splitlines()[0]})"
            ) from error
    absent = sorted(k for k in info["missing_keys"] if num_labels is None or not k.startswith(_NEW_HEADS))
    if absent:
        raise ValueError(
            f"model {name!r} lacks {len(absent)} weights, the first is {absent[0]!r}: "
            "give a folder whose safetensors are complete"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer


def folder(name: str, *, progress: Progress | None = None) -> Path:
    """Transformers folder of an embedded model, verified, and converted first if need be."""
    if name == "minilm-l6":
        return assets.verified(name).parent
    return ensure(RECIPES[name], progress or console_progress())


def converted() -> list[str]:
    """Embedded models that are converted before use and can be here (the encoder needs `onnx`)."""
    return [name for name in RECIPES if name != "minilm-l3" or find_spec("onnx")]


def console_progress() -> Progress:
    """One line on stderr that grows in a terminal; a single sentence when stderr is a file or a notebook."""
    said: list[str] = []

    def show(fraction: float, message: str) -> None:
        if sys.stderr.isatty():
            end = "\n" if fraction >= 1 else ""
            print(f"\rzq_lib: {message} {fraction:4.0%}", end=end, file=sys.stderr, flush=True)
        elif not said:
            said.append(message)
            print(f"zq_lib: {message}.", file=sys.stderr, flush=True)

    return show


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' bars and its report on new heads, which `load` checks itself."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


# One row per architecture: what differs from the others. All have vocabulary 128, and heads of width 8 or 16.
_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 256}
_GATED = {**_HEADS, "intermediate_size": 64, "num_key_value_heads": 2}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GATED, "num_hidden_layers": 3}),
    "qwen2": ("qwen2", _GATED),
    "gpt2": ("gpt2", {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 256}),
    "opt": ("opt", {**_HEADS, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "gpt_neox": ("gpt_neox", {**_HEADS, "intermediate_size": 64}),
    "gemma": ("gemma", {**_GATED, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        {
            **_GATED,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 16,
        },
    ),
}


def tiny(arch: str, **overrides: Any) -> PreTrainedModel:
    """Tiny random causal language model of one architecture, always with the same weights, fp32, eval mode, sdpa.

    `arch` is one of llama (grouped queries), qwen2 (biases), gpt2, opt, gpt_neox, gemma (one key/value head) and gemma3
    (sliding window 8 in every second layer); `overrides` go to its config. Weights are ten times larger than usual and
    biases are drawn as well, so that attention is far from uniform and a forgotten bias shows.
    """
    if arch not in TINY:
        raise ValueError(f"arch={arch!r} is not one of {', '.join(TINY)}")
    kind, settings = TINY[arch]
    common = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
    config = AutoConfig.for_model(kind, **{**common, **settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
