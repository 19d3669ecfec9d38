"""Measures transformers on request, so that a model is loaded once.

usage: transformers_worker.py MODEL_FOLDER|llama-3.2-1b bfloat16|float32 THREADS

Each line on stdin is the length of a prompt; the answer on stdout is its prefill rate in tokens/s.
"""

import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from make_gguf import LLAMA_3_2_1B


def main():
    source, dtype, n_threads = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
    logging.disable_progress_bar()
    torch.set_num_threads(n_threads)
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    if source == "llama-3.2-1b":
        shape = dict(LLAMA_3_2_1B)
        rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
        config = LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.eval()
    prefill(model, 64)
    print("ready", flush=True)
    for line in sys.stdin:
        print(prefill(model, int(line)), flush=True)


def prefill(model, n_tokens):
    tokens = torch.randint(100, 40000, (1, n_tokens))
    started = time.perf_counter()
    model(tokens, use_cache=True, logits_to_keep=1)
    return n_tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
