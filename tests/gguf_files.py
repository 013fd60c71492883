"""Small GGUF files for the tests: a random Llama and a vocabulary like SentencePiece's, as llama.cpp writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

gguf = pytest.importorskip("gguf")  # one of the requirements for development, but not on every machine with a GPU

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CHARACTERS = "▁abcdehinorst"
# Merged pieces, best first. "▁th" can be made in two ways; "the" competes with "▁t" for the t of "▁the".
PIECES = "he ▁t in th ▁a er the ▁the an on ▁th and ▁and re or st rest est".split()


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types: control, byte, user-defined, normal."""
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<|end|>", 0.0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    rows += [("\n\n", -1000.0, USER_DEFINED), ("<tool>", -1000.0, USER_DEFINED)]
    rows += [(token, -float(rank), NORMAL) for rank, token in enumerate([*PIECES, *CHARACTERS])]
    tokens, scores, types = zip(*rows, strict=True)
    return list(tokens), list(scores), list(types)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": len(vocabulary()[0]),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of query and key: rotary pairs are neighbours instead of half a head apart."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    names |= {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    tensors = {}
    for name, weight in model.state_dict().items():
        layer = name.removeprefix("model.").removesuffix(".weight")
        prefix = ""
        if layer.startswith("layers."):
            number, layer = layer.removeprefix("layers.").split(".", 1)
            prefix = f"blk.{number}."
        if layer in heads:
            weight = interleave(weight, heads[layer])
        tensors[f"{prefix}{names[layer]}.weight"] = weight.float().numpy()
    return tensors


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    quantized: dict[str, gguf.GGMLQuantizationType] | None = None,
    architecture: str = "llama",
    tokenizer: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write `tensors` with the settings of `tiny_llama`. `tokenizer` replaces or (None) removes keys `tokenizer.*`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens, scores, types = vocabulary()
    keys: dict[str, Any] = {"ggml.model": "llama", "ggml.tokens": tokens, "ggml.scores": scores}
    keys |= {"ggml.token_type": types, "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0}
    for key, value in {**keys, **(tokenizer or {})}.items():
        _add(writer, f"tokenizer.{key}", value)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    for name, values in tensors.items():
        kind = (quantized or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {type(value)}")
