#!/usr/bin/env python3
"""The shapes of `benches/cuda/kernels.rs` in PyTorch, in the same columns.

    torch_kernels.py [--csv FILE] [--rev REV] [--quick] [FILTER]

Products are cuBLAS (`torch.nn.functional.linear`), attention is `scaled_dot_product_attention` with
the flash and the cuDNN backend over keys and values that lie in one piece. Timing as there: the
median of CUDA graphs of many runs, over several sets of random inputs that are larger than the
cache together.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

COLUMNS = "peer,kernel,variant,shape,us,gb_s,tflops,copy_share,matrix_share,device,driver,rev"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# name: hidden_dim, ffn_dim, vocab_size, n_q_heads, n_kv_heads, head_dim
MODELS = {
    "llama-2-7b": (4096, 11008, 32000, 32, 32, 128),
    "llama-3.1-8b": (4096, 14336, 128256, 32, 8, 128),
    "llama-3.2-1b": (2048, 8192, 128256, 32, 8, 64),
    "smollm2-135m": (576, 1536, 49152, 9, 3, 64),
}
TINY = {"tiny": (64, 96, 128, 4, 2, 32)}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("filter", nargs="?", default="")
parser.add_argument("--csv", type=Path)
parser.add_argument("--rev", default="")
parser.add_argument("--quick", action="store_true", help="tiny shapes, once")
args = parser.parse_args()

properties = torch.cuda.get_device_properties(0)
copy_rate = matrix_rate = math.nan


def random(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda").uniform_(-1, 1)


def measure(n_bytes, make, run):
    """Seconds of one `run(*make())`."""
    wanted = 4 * properties.L2_cache_size // max(n_bytes, 1) + 1
    sets = [make() for _ in range(2 if args.quick else min(max(wanted, 2), 256))]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(work):
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def all_sets():
        for inputs in sets:
            run(*inputs)

    side = torch.cuda.Stream()  # warm up where capture will be, as PyTorch asks for
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_sets()
    torch.cuda.current_stream().wait_stream(side)
    n_rounds = 1 if args.quick else math.ceil(2e-3 / max(timed(all_sets), 1e-6))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n_rounds):
            all_sets()
    graph.replay()
    least, budget = (1, 0) if args.quick else (5, 1)
    begin, seconds = time.monotonic(), []
    while len(seconds) < least or (time.monotonic() < begin + budget and len(seconds) < 50):
        seconds.append(timed(graph.replay) / (n_rounds * len(sets)))
    return statistics.median(seconds)


def case(peer, kernel, variant, shape, n_bytes, flops, make, run):
    """Times and writes a row; operations and bytes a second."""
    name = f"{peer} {kernel} {variant} {shape}"
    if args.filter not in name:
        return math.nan, math.nan
    try:
        seconds = measure(n_bytes, make, run)
    except RuntimeError as error:  # no memory, or a backend that does not do this
        print(f"| {name:<72} | {str(error).splitlines()[0][:60]}", flush=True)
        torch.cuda.empty_cache()
        return math.nan, math.nan
    us, gb_s, tflops = seconds * 1e6, n_bytes / seconds / 1e9, flops / seconds / 1e12
    copy, matrix = n_bytes / seconds / copy_rate, flops / seconds / matrix_rate
    rates = f"{gb_s:>8.0f} | {tflops:>7.1f} | {copy:>5.2f} | {matrix:>5.2f}"
    print(f"| {name:<72} | {us:>10.2f} | {rates} |", flush=True)
    if args.csv:
        is_new = not args.csv.exists()
        with args.csv.open("a") as file:
            if is_new:
                print(COLUMNS, file=file)
            fields = [f"{us:.3f}", f"{gb_s:.1f}", f"{tflops:.2f}", f"{copy:.3f}", f"{matrix:.3f}"]
            about = [properties.name, f"cuda {torch.version.cuda}", args.rev]
            print(",".join([peer, kernel, variant, shape, *fields, *about]), file=file)
    return flops / seconds, n_bytes / seconds


def linear(kernel, variant, name, rows, n, k):
    def run(a, w):
        return F.linear(a, w)

    n_bytes = 2 * (n * k + rows * k + rows * n)
    shape = f"{name} rows={rows} n={n} k={k}"
    make = lambda: (random(rows, k), random(n, k))
    return case("torch", kernel, variant, shape, n_bytes, 2 * rows * n * k, make, run)


def gate_up(variant, name, rows, n, k):
    def run(a, w):
        gate, up = F.linear(a, w).chunk(2, dim=1)
        return F.silu(gate) * up

    n_bytes = 2 * (2 * n * k + rows * k + rows * n)
    shape = f"{name} rows={rows} n={n} k={k}"
    make = lambda: (random(rows, k), random(2 * n, k))
    case("torch", "gate_up", variant, shape, n_bytes, 4 * rows * n * k, make, run)


def attention(variant, shape, n_seqs, n_rows, n_slots, heads):
    """Causal, or one row a sequence that sees all slots."""
    n_q, n_kv, d = heads
    pairs = n_seqs * (n_rows * (n_rows + 1) // 2 if n_rows > 1 else n_slots)
    n_bytes = 4 * d * n_seqs * (n_q * n_rows + n_kv * n_slots)

    def make():
        k, v = random(n_seqs, n_kv, n_slots, d), random(n_seqs, n_kv, n_slots, d)
        return random(n_seqs, n_q, n_rows, d), k, v

    for backend, kind in BACKENDS.items():
        def run(q, k, v):
            with sdpa_kernel(kind):
                gqa, causal = n_q != n_kv, n_rows > 1
                F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        peer, flops = f"torch-{backend}", 4 * n_q * d * pairs
        case(peer, "attention", variant, shape, n_bytes, flops, make, run)


def attention_mass(name, n_slots, heads):
    n_q, n_kv, d = heads

    def run(q, k, lse):
        scores = (q @ k.transpose(1, 2)).float() / math.sqrt(d)  # [n_kv][group][slot]
        return (scores - lse).exp().mean(dim=(0, 1))

    def make():
        q, lse = random(n_kv, n_q // n_kv, d), random(n_kv, n_q // n_kv, 1).float()
        return q, random(n_kv, n_slots, d), lse

    shape, n_bytes = f"{name} rows=1 context={n_slots}", n_slots * (2 * n_kv * d + 4)
    case("torch", "attention_mass", "prefill", shape, n_bytes, 2 * n_q * d * n_slots, make, run)


def sampling(rows, vocab):
    def draw(logits):
        return torch.multinomial(logits.softmax(dim=1), 1)

    def top_k(logits):
        values, ids = logits.topk(40)
        return ids.gather(1, draw(values))

    def top_p(logits):
        values, ids = logits.sort(descending=True)
        weights = values.softmax(dim=1)
        kept = weights.cumsum(dim=1) - weights < 0.9
        return ids.gather(1, draw(values.masked_fill(~kept, -math.inf)))

    greedy = lambda logits: logits.argmax(dim=1)
    variants = {"greedy": greedy, "plain": draw, "top_k=40": top_k, "top_p=0.9": top_p}
    make = lambda: (15 * (random(rows, vocab, dtype=torch.float) - 1) ** 3,)
    for variant, run in variants.items():
        shape, n_bytes = f"rows={rows} vocab={vocab}", 4 * rows * vocab
        case("torch", "sample", variant, shape, n_bytes, 0, make, run)


def hidden_state(name, rows, hidden, vocab):
    shape, count = f"{name} rows={rows} n={hidden}", rows * hidden
    tokens, weight = torch.arange(rows, device="cuda"), random(hidden)
    table = lambda: (random(min(vocab, 8192), hidden),)
    embed = lambda t: F.embedding(tokens, t).float()
    case("torch", "embed", "any", shape, 6 * count, 0, table, embed)
    x = lambda: (random(rows, hidden, dtype=torch.float),)
    norm = lambda x: F.rms_norm(x.bfloat16(), (hidden,), weight, 1e-5)
    case("torch", "rmsnorm", "any", shape, 6 * count, 4 * count, x, norm)
    wide = lambda: (random(2 * rows, hidden, dtype=torch.float),)
    gather = lambda x: x.index_select(0, 2 * tokens)
    case("torch", "row_copy", "f32", shape, 8 * count, 0, wide, gather)
    case("torch", "row_copy", "f32 to bf16", shape, 6 * count, 0, wide, lambda x: gather(x).bfloat16())


def main():
    global copy_rate, matrix_rate
    pick = lambda full, tiny: tiny if args.quick else full
    models = pick(MODELS, TINY)
    wanted, args.filter = args.filter, ""
    n = pick(1 << 30, 1 << 12)
    make = lambda: (random(n // 2), torch.empty(n // 2, dtype=torch.bfloat16, device="cuda"))
    copy = lambda a, b: b.copy_(a)
    _, copy_rate = case("torch", "copy", "driver", f"{n} bytes", 2 * n, 0, make, copy)
    size = pick(8192, 64)
    matrix_rate, _ = linear("linear", "prefill", "square", size, size, size)
    args.filter = wanted

    phases = [("decode", rows) for rows in pick([1, 4, 16], [1, 4])]
    phases += [("prefill", rows) for rows in pick([512, 2048, 4096], [70])]
    for name, (hidden, ffn, vocab, n_q, n_kv, d) in models.items():
        for variant, rows in phases:
            linear("linear", variant, name, rows, hidden, n_q * d)
            linear("linear", variant, name, rows, hidden, ffn)
            gate_up(variant, name, rows, ffn, hidden)
            linear("qkv", variant, name, rows, (n_q + 2 * n_kv) * d, hidden)
            if variant == "decode":
                linear("lm_head", variant, name, rows, vocab, hidden)
        heads = (n_q, n_kv, d)
        for slots in pick([1 << 10, 8 << 10, 32 << 10, 128 << 10], [70]):
            for seqs in pick([1, 16], [2]):
                attention("decode", f"{name} rows={seqs} context={slots}", seqs, 1, slots, heads)
        for rows in pick([2 << 10, 8 << 10, 16 << 10, 32 << 10], [70]):
            attention("prefill", f"{name} rows={rows}", 1, rows, rows, heads)
        for slots in pick([32 << 10, 128 << 10], [70]):
            attention_mass(name, slots, heads)
        for rows in pick([1, 4096], [3]):
            hidden_state(name, rows, hidden, vocab)
    for n in pick([32 << 10, 128 << 10], [100]):
        select = lambda x: x.topk(x.numel() // 2).indices.sort()
        make = lambda: (random(n, dtype=torch.float),)
        case("torch", "token_select", "half", f"n={n}", 8 * n, 0, make, select)
    for vocab in pick([49152, 128256], [100]):
        for rows in pick([1, 16], [2]):
            sampling(rows, vocab)


main()
