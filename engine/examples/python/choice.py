"""An answer that can only be a number of at most four digits, and how sure the model was of each token:
LORIS_LIBRARY=target/release/libloris.so python3 choice.py models/SmolLM2-135M-Instruct "How many legs has a spider?" """

import ctypes as c
import ctypes.util
import math
import os
import sys

lib = c.CDLL(os.environ.get("LORIS_LIBRARY") or ctypes.util.find_library("loris") or "libloris.so.0")
MAX_DIGITS, N_TOP, EOS, LORIS_EOS, BUFFER_TOO_SMALL, SHOW_SPECIAL = 4, 3, 2, 4, 8, 1


class Logprob(c.Structure):  # loris_logprob of loris.h
    _fields_ = [("token", c.c_uint32), ("logprob", c.c_float)]


OnLogprobs = c.CFUNCTYPE(None, c.c_void_p, c.c_uint32, c.c_float, c.POINTER(Logprob), c.c_size_t)
Mask = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.POINTER(c.c_uint32), c.c_size_t, c.POINTER(c.c_uint32), c.c_size_t)


class GenerateParams(c.Structure):  # loris_generate_params
    _fields_ = [("struct_size", c.c_uint32), ("flags", c.c_uint32), ("max_tokens", c.c_uint64),
                ("stop", c.POINTER(c.c_char_p)), ("n_stop", c.c_size_t), ("on_token", c.c_void_p), ("user_data", c.c_void_p),
                ("min_tokens", c.c_uint64), ("stop_ids", c.POINTER(c.c_uint32)), ("n_stop_ids", c.c_size_t),
                ("on_logprobs", OnLogprobs), ("n_top", c.c_uint64), ("mask", Mask)]


class ModelInfo(c.Structure):  # loris_model_info, as far as it is read here
    _fields_ = [("struct_size", c.c_uint32), ("skipped", c.c_uint32 * 6), ("vocab_size", c.c_uint32), ("rest", c.c_uint8 * 24)]


def check(status, *results):
    """Raises what loris_last_error says of a failure; `results` are none."""
    if status and status not in results:
        message = c.create_string_buffer(1024)
        lib.loris_last_error(message, c.c_size_t(len(message)))
        raise RuntimeError(f"status {status}: {message.value.decode()}")


def opened(function, *args):
    """The handle that an open function makes. It must stay a pointer: as an int, ctypes would cut it to 32 bits."""
    handle = c.c_void_p()
    check(function(*args, c.byref(handle)))
    return handle


def token_bytes(token):
    """What a token adds to a text; None where that is long."""
    buffer, n = (c.c_uint8 * 64)(), c.c_size_t()
    status = lib.loris_token_bytes(model, c.c_uint32(token), buffer, c.c_size_t(64), c.byref(n))
    check(status, BUFFER_TOO_SMALL)
    return None if status else bytes(buffer[: n.value])


def token_flags(token):
    flags = c.c_uint32()
    check(lib.loris_token_flags(model, c.c_uint32(token), c.byref(flags)))
    return flags.value


model_dir, text = (arg.encode() for arg in sys.argv[1:3])
engine = opened(lib.loris_engine_open, None)
model = opened(lib.loris_model_open, engine, model_dir, None)
session = opened(lib.loris_session_open, model, None)
n = c.c_size_t()
chat = (model, c.byref(c.c_char_p(b"user")), c.byref(c.c_char_p(text)), c.c_size_t(1), c.c_uint32(1))
tokens = (c.c_uint32 * 1024)()
check(lib.loris_chat_tokenize(*chat, tokens, c.c_size_t(1024), c.byref(n)))
check(lib.loris_session_prefill(session, tokens, n, None, None))

# What the mask needs to know of each token, asked for once.
info = ModelInfo(struct_size=c.sizeof(ModelInfo))
check(lib.loris_model_get_info(model, c.byref(info)))
flags = [token_flags(token) for token in range(info.vocab_size)]
texts = [token_bytes(token) for token in range(info.vocab_size)]
digits = {token: len(text) for token, text in enumerate(texts) if text and text.isdigit() and not flags[token]}
ends = [token for token, flag in enumerate(flags) if flag & EOS]


def digits_only(_user_data, answer, n_answer, allowed, _n_words):
    """Sets the bits of tokens that may come next."""
    n_digits = sum(digits[answer[i]] for i in range(n_answer))
    may = [token for token, more in digits.items() if n_digits + more <= MAX_DIGITS]
    for token in may + (ends if n_digits else []):
        allowed[token // 32] |= 1 << token % 32
    return 0


def shown(token):
    text = texts[token]
    return text.decode(errors="replace").replace("\n", "\\n") if text else f"#{token}"


def tell(_user_data, token, logprob, top, n_top):
    """What the model itself would have liked best, before the mask."""
    likeliest = ", ".join(f"'{shown(top[i].token)}' {100 * math.exp(top[i].logprob):.1f} %" for i in range(n_top))
    print(f"{shown(token)}: {100 * math.exp(logprob):.1f} %, likeliest {likeliest}")


params = GenerateParams()
check(lib.loris_generate_params_init(c.byref(params), c.c_size_t(c.sizeof(params))))
params.on_logprobs, params.n_top, params.mask = OnLogprobs(tell), N_TOP, Mask(digits_only)
check(lib.loris_session_generate(session, c.byref(params)), LORIS_EOS)
for free, handle in ("session", session), ("model", model), ("engine", engine):
    getattr(lib, f"loris_{free}_free")(handle)
