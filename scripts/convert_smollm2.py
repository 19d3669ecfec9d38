"""Turns the GGUF of SmolLM2-135M-Instruct into a Hugging Face model folder.

usage: convert_smollm2.py GGUF FOLDER

The weights are dequantised, rounded to bfloat16 (nearest even) and written as
safetensors. The result is the same, byte for byte, on every machine. The
weights are written last, under a temporary name: a folder that has
model.safetensors is complete.
"""

import hashlib
import json
import os
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "4ce99fd7dbe4a64b523f02fda595a46d1e33f59721dbd6975d1ca56359cb1cc9"

NAMES = {
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
SPECIAL = 3  # token type of added tokens in a GGUF


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    gguf_path, folder = sys.argv[1:]
    found = sha256(gguf_path)
    if found != GGUF_SHA256:
        sys.exit(f"{gguf_path}: SHA-256 is {found}, expected {GGUF_SHA256}.\n"
                 "The download is damaged or another version: delete it and try again.")
    gguf = GGUFReader(gguf_path)
    os.makedirs(folder, exist_ok=True)
    write_json(folder, "config.json", config(gguf))
    write_json(folder, "generation_config.json", generation_config(gguf))
    write_json(folder, "tokenizer.json", tokenizer(gguf))
    write_json(folder, "tokenizer_config.json", tokenizer_config(gguf))
    write_weights(gguf, os.path.join(folder, "model.safetensors"))


def field(gguf, key):
    return gguf.fields[key].contents()


def config(gguf):
    llama = {key.removeprefix("llama."): field(gguf, key) for key in gguf.fields if key.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field(gguf, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(gguf, "tokenizer.ggml.eos_token_id"),
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama["attention.head_count"],
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "pad_token_id": field(gguf, "tokenizer.ggml.padding_token_id"),
        # The file holds the nearest float32; the model was made with the short decimal.
        "rms_norm_eps": float(str(np.float32(llama["attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": llama["vocab_size"],
    }


def generation_config(gguf):
    return {
        "bos_token_id": field(gguf, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(gguf, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(gguf, "tokenizer.ggml.padding_token_id"),
    }


def added_tokens(gguf):
    types = field(gguf, "tokenizer.ggml.token_type")
    return {
        idx: {"content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}
        for idx, token in enumerate(field(gguf, "tokenizer.ggml.tokens")) if types[idx] == SPECIAL
    }


def tokenizer(gguf):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokens = field(gguf, "tokenizer.ggml.tokens")
    vocab = {token: idx for idx, token in enumerate(tokens)}
    assert len(vocab) == len(tokens), "two tokens with the same text"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": idx, **token} for idx, token in added_tokens(gguf).items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [pair.split(" ") for pair in field(gguf, "tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(gguf):
    tokens = field(gguf, "tokenizer.ggml.tokens")
    token = lambda role: tokens[field(gguf, f"tokenizer.ggml.{role}_token_id")]
    return {
        "add_bos_token": field(gguf, "tokenizer.ggml.add_bos_token"),
        "add_prefix_space": field(gguf, "tokenizer.ggml.add_space_prefix"),
        "added_tokens_decoder": {str(idx): token for idx, token in added_tokens(gguf).items()},
        "bos_token": token("bos"),
        "chat_template": field(gguf, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": field(gguf, "llama.context_length"),
        "pad_token": token("padding"),
        # GPT2Tokenizer, the class upstream, makes transformers 5 drop the split of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token("unknown"),
    }


def write_weights(gguf, path):
    n_heads = {"attn_q": field(gguf, "llama.attention.head_count"),
               "attn_k": field(gguf, "llama.attention.head_count_kv")}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in gguf.tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        header[hf_name(tensor.name)] = {"dtype": "BF16", "shape": [int(n) for n in reversed(tensor.shape)],
                                        "data_offsets": [start, end]}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % 64)  # the data starts at a multiple of 64

    temporary, digest = path + ".part", hashlib.sha256()
    with open(temporary, "wb") as out:
        def write(data):
            digest.update(data)
            out.write(data)

        write(len(header).to_bytes(8, "little") + header)
        for done, tensor in enumerate(gguf.tensors):
            show_progress(done, len(gguf.tensors))
            weight = dequantize(tensor.data, tensor.tensor_type)
            part = tensor.name.split(".")[-2]
            if part in n_heads:
                weight = split_halves(weight, n_heads[part])
            write(to_bf16(weight).tobytes())
        out.flush()
        os.fsync(out.fileno())
    show_progress(1, 1)
    if digest.hexdigest() != WEIGHTS_SHA256:
        os.remove(temporary)
        sys.exit(f"{path}: SHA-256 came out as {digest.hexdigest()}, expected {WEIGHTS_SHA256}.\n"
                 "Does the gguf package have the version that scripts/fetch-model installs?")
    os.replace(temporary, path)


def hf_name(name):
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    blk, layer_idx, part, weight = name.split(".")
    assert (blk, weight) == ("blk", "weight"), name
    return f"model.layers.{layer_idx}.{NAMES[part]}.weight"


def split_halves(weight, n_heads):
    """GGUF interleaves the rows of the two halves that RoPE rotates against each other; undo that."""
    rows, cols = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def to_bf16(array):
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    assert np.isfinite(array).all(), "the weights hold a value that is not finite"
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


def write_json(folder, name, value):
    path = os.path.join(folder, name)
    with open(path + ".part", "w", encoding="utf-8") as out:
        json.dump(value, out, indent=2, ensure_ascii=False)
        out.write("\n")
    os.replace(path + ".part", path)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def show_progress(done, total):
    if sys.stderr.isatty():
        width = 40 * done // total
        end = "\n" if done == total else ""
        print(f"\rconverting weights [{'#' * width:<40}] {100 * done // total:3}%", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
