"""One prompt, one answer, streamed, with nothing but ctypes:
LORIS_LIBRARY=target/release/libloris.so python3 generate.py models/SmolLM2-135M-Instruct "Why is the sky blue?" """

import ctypes as c
import ctypes.util
import os
import sys

lib = c.CDLL(os.environ.get("LORIS_LIBRARY") or ctypes.util.find_library("loris") or "libloris.so.0")
OnToken = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_uint32, c.c_void_p, c.c_size_t)


class GenerateParams(c.Structure):  # loris_generate_params of loris.h
    _fields_ = [("struct_size", c.c_uint32), ("flags", c.c_uint32), ("max_tokens", c.c_uint64),
                ("stop", c.POINTER(c.c_char_p)), ("n_stop", c.c_size_t),
                ("on_token", OnToken), ("user_data", c.c_void_p)]


def check(status):
    """Raises what loris_last_error says of a failure."""
    if status < 0 or 0 < status < 4:
        message = c.create_string_buffer(1024)
        lib.loris_last_error(message, c.c_size_t(len(message)))
        raise RuntimeError(f"status {status}: {message.value.decode()}")


def opened(function, *args):
    """The handle that an open function makes. It must stay a pointer: as an int, ctypes would cut it to 32 bits."""
    handle = c.c_void_p()
    check(function(*args, c.byref(handle)))
    return handle


def on_token(_user_data, _token, text, text_len):
    """Text comes as whole characters. An exception must not pass through the library, so there is none to raise."""
    os.write(1, c.string_at(text, text_len))
    return 0


model_dir, text = (arg.encode() for arg in sys.argv[1:3])
engine = opened(lib.loris_engine_open, None)
model = opened(lib.loris_model_open, engine, model_dir, None)
session = opened(lib.loris_session_open, model, None)

# The model's chat template makes the prompt: first its length, then its tokens.
n = c.c_size_t()
chat = (model, c.byref(c.c_char_p(b"user")), c.byref(c.c_char_p(text)), c.c_size_t(1), c.c_uint32(1))
check(lib.loris_chat_tokenize(*chat, None, c.c_size_t(0), c.byref(n)))
tokens = (c.c_uint32 * n.value)()
check(lib.loris_chat_tokenize(*chat, tokens, n, c.byref(n)))
check(lib.loris_session_prefill(session, tokens, n, None, None))

params = GenerateParams()
check(lib.loris_generate_params_init(c.byref(params), c.c_size_t(c.sizeof(params))))
params.max_tokens, params.on_token = int((sys.argv[3:] or [512])[0]), OnToken(on_token)
check(lib.loris_session_generate(session, c.byref(params)))
for free, handle in ("session", session), ("model", model), ("engine", engine):
    getattr(lib, f"loris_{free}_free")(handle)
