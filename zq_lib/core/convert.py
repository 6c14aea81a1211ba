"""From the files of the asset packages to ordinary transformers folders: SmolLM2 (GGUF) and MiniLM-L3 (ONNX).

Weights of SmolLM2 are stored in fp16 (the original has four bits) and meant to be loaded in fp32: perplexity 6.2217
against 6.2222 for the exact dequantised values.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from zq_lib.core.cache import Advance

_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL = 3  # token type of special tokens in GGUF
_TOKENS = 0.5  # reading the file's 98,000 strings takes about half of the time


def llama_from_gguf(source: Path, target: Path, advance: Advance) -> None:
    """Write the Llama model with tied embeddings in the GGUF file `source` into the folder `target`.

    Writes config.json, generation_config.json, model.safetensors (fp16) and the tokenizer files.
    Raises `ValueError` when the file holds another architecture or an unknown tensor.
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    meta: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise ValueError(f"{source.name} holds architecture {meta['general.architecture']!r}: only 'llama' is read")
    _tokenizer(meta).save_pretrained(target)
    advance(_TOKENS)
    state = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        state[_llama_key(tensor.name)] = torch.from_numpy(_weight(tensor, meta).astype(np.float16))
        advance(_TOKENS + 0.4 * done / len(reader.tensors))
    _save(state, target / "model.safetensors")
    _write_configs(meta, target)


def _llama_key(name: str) -> str:
    """GGUF name to transformers name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    try:
        if name.startswith("blk."):
            _, layer, part, kind = name.split(".")
            return f"model.layers.{layer}.{_LAYER_PARTS[part]}.{kind}"
        part, kind = name.split(".")
        return f"{_WHOLE[part]}.{kind}"
    except (KeyError, ValueError):
        raise ValueError(f"tensor {name!r} has no place in a Llama model with tied embeddings") from None


def _weight(tensor: Any, meta: dict[str, Any]) -> np.ndarray:
    """Dequantised values in fp32 with the row order of transformers."""
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type)
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }.get(tensor.name.split(".")[-2])
    if heads is None:
        return weight
    rows, width = weight.shape  # GGUF interleaves the two rotary halves of each head; put one after the other
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    """Save tensors, with a full disk as the `OSError` it is (safetensors reports it in words)."""
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), str(error)) from error
        raise


def _write_configs(meta: dict[str, Any], target: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        dtype=torch.float16,
        **special,
    ).save_pretrained(target)
    GenerationConfig(**special).save_pretrained(target)


def _tokenizer(meta: dict[str, Any]) -> Any:
    """Byte-level BPE that splits every digit off, as `tokenizer.ggml.pre = smollm` asks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        model_max_length=meta["llama.context_length"],
        chat_template=meta["tokenizer.chat_template"],
    )


def minilm_l3_from_onnx(source: Path, target: Path, advance: Advance, *, tokenizer: Path) -> None:
    """Write the three-layer encoder in the ONNX file `source` (fp32, no pooler) into the folder `target`.

    `tokenizer` is the folder of MiniLM-L6, whose vocabulary it shares.
    """
    import onnx
    from onnx import numpy_helper
    from transformers import BertConfig

    graph = onnx.load(source).graph
    raw = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    prefix = "model.0.auto_model."
    state = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
    for node in graph.node:  # dense weights are stored transposed under anonymous names
        if node.op_type == "MatMul" and node.input[1] in raw:
            layer = node.name.split("auto_model/")[1].removesuffix("/MatMul").replace("/", ".")
            state[f"{layer}.weight"] = raw[node.input[1]].T.contiguous()
    advance(0.6)
    _save(state, target / "model.safetensors")
    BertConfig(
        architectures=["BertModel"],
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=1536,
    ).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(tokenizer / name, target / name)
