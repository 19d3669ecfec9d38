"""Writes the GGUF files that llama.cpp is measured on.

usage: make_gguf.py MODEL_FOLDER OUT.gguf        the bf16 weights of a Llama-like model folder, as they are
       make_gguf.py llama-3.2-1b OUT.gguf        random bf16 weights in the shape of Llama-3.2-1B
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

LLAMA_3_2_1B = {
    "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
}
PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def main():
    source, out = sys.argv[1:]
    if source == "llama-3.2-1b":
        config, weights = LLAMA_3_2_1B, random_weights(LLAMA_3_2_1B)
    else:
        config, weights = json.loads((Path(source) / "config.json").read_text()), stored_weights(Path(source))
    writer = GGUFWriter(out + ".part", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, bits in weights:
        if name.endswith("norm.weight"):  # llama.cpp wants these in f32
            writer.add_tensor(gguf_name(name), (bits.astype("<u4") << 16).view("<f4"))
            continue
        if "q_proj" in name or "k_proj" in name:
            bits = interleave_halves(bits, config["head_dim"])
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(bits).view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(out + ".part", out)


def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    layer_idx, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer_idx}.{PARTS[part]}.weight"


def interleave_halves(rows, head_dim):
    """GGUF puts the two rows that RoPE rotates against each other side by side."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def stored_weights(folder):
    file = np.memmap(folder / "model.safetensors", np.uint8, mode="r")
    start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    header = json.loads(file[8:start].tobytes())
    for name, tensor in header.items():
        if name != "__metadata__":
            assert tensor["dtype"] == "BF16", f"{name} is {tensor['dtype']}, expected BF16"
            begin, end = tensor["data_offsets"]
            yield name, file[start + begin:start + end].view("<u2").reshape(tensor["shape"])


def random_weights(config):
    chance = np.random.default_rng(1)
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def matrix(rows, cols):
        bits = np.empty((rows, cols), "<u2")
        for start in range(0, rows, 4096):
            part = chance.standard_normal((min(4096, rows - start), cols), np.float32)
            bits[start:start + 4096] = (part * np.float32(0.02)).view("<u4") >> 16
        return bits

    ones = np.full(hidden, 0x3F80, "<u2")
    yield "model.embed_tokens.weight", matrix(config["vocab_size"], hidden)
    for layer_idx in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": None, "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q), "post_attention_layernorm": None,
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
        }
        for part, shape in shapes.items():
            yield f"model.layers.{layer_idx}.{part}.weight", matrix(*shape) if shape else ones
    yield "model.norm.weight", ones


if __name__ == "__main__":
    main()
