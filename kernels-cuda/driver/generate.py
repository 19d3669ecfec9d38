#!/usr/bin/env python3
"""Writes trampolines.h: one row for each driver function that cust and loris-kernels refer to.

    generate.py [--check]

Prototypes come from cuda.h (of `CUDA_HOME`, or .venv as scripts/cuda-tools makes it) after the preprocessor, so that
names carry their version suffix. Pointers and handles become `void *`, enumerations `unsigned`: the same calling
convention without the header. What cust refers to and which result codes its enum knows is read in its source.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

# What kernels-cuda/src/driver_ext.rs calls beyond cust.
OWN = """cuDeviceGetAttribute cuFuncSetAttribute cuGetErrorName cuGetErrorString cuGraphDestroy
cuGraphExecDestroy cuGraphInstantiateWithFlags cuGraphLaunch cuLaunchKernel cuStreamBeginCapture_v2
cuStreamCreate cuStreamEndCapture""".split()

INTEGERS = {"int", "unsigned int", "unsigned long long", "float", "size_t", "unsigned short",
            "unsigned char", "CUdevice", "CUdeviceptr", "cuuint32_t", "cuuint64_t", "CUtexObject",
            "CUsurfObject"}
PLAIN = {"CUdevice": "int", "CUdeviceptr": "unsigned long long", "cuuint32_t": "unsigned int",
         "cuuint64_t": "unsigned long long", "CUtexObject": "unsigned long long",
         "CUsurfObject": "unsigned long long"}


def preprocessed(header, *flags):
    command = ["cc", "-E", "-P", *flags, str(header)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def prototypes(text):
    found = {}
    for name, parameters in re.findall(r"CUresult\s+(cu\w+)\s*\(([^;]*?)\);", text):
        found.setdefault(name, " ".join(parameters.split()))
    return found


def plain(parameter, handles, enums):
    """A parameter's type without the header, and its name."""
    words = re.sub(r"\bconst\b|\benum\b|\bstruct\b", "", parameter).strip()
    if "*" in words or "[" in words:
        return "void *", re.search(r"(\w+)(\[\d*\])?$", words).group(1)
    kind, name = words.rsplit(None, 1)
    kind = kind.strip()
    if kind in INTEGERS:
        return PLAIN.get(kind, kind) + " ", name
    if kind in handles:
        return "void *", name
    if kind in enums:
        return "unsigned ", name
    sys.exit(f"{parameter}: unknown type")


def inputs():
    """cuda.h and the sources of cust and cust_raw."""
    root = pathlib.Path(__file__).resolve().parents[2]
    homes = [pathlib.Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    homes += root.glob(".venv/lib/python*/site-packages/nvidia/cu13")
    headers = [home / "include/cuda.h" for home in homes if (home / "include/cuda.h").is_file()]
    if not headers:
        sys.exit("no cuda.h: run scripts/cuda-tools")
    # Packages of other platforms need not be here.
    rustc = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout
    host = next(line.split()[1] for line in rustc.splitlines() if line.startswith("host: "))
    command = ["cargo", "metadata", "--format-version=1", "--offline", f"--filter-platform={host}",
               f"--manifest-path={root}/Cargo.toml"]
    packages = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["packages"]
    folders = {p["name"]: pathlib.Path(p["manifest_path"]).parent / "src" for p in packages}
    return headers[0], folders["cust"], folders["cust_raw"]


def main():
    cuda_h, cust, cust_raw = inputs()
    raw = (cust_raw / "cuda.rs").read_text()
    declared = set(re.findall(r"pub fn (cu[A-Z]\w+)\(", raw))
    used = {n for f in cust.rglob("*.rs") for n in re.findall(r"\bcu[A-Z]\w+", f.read_text())}
    names = sorted((used & declared) | set(OWN))

    public = preprocessed(cuda_h)
    internal = preprocessed(cuda_h, "-D__CUDA_API_VERSION_INTERNAL")
    known = {**prototypes(internal), **prototypes(public)}
    handles = set(re.findall(r"typedef struct \w+ \*(\w+);", public)) | {"CUhostFn", "CUoccupancyB2DSize"}
    enums = set(re.findall(r"\} (\w+);", public)) - set(re.findall(r"\} (CU\w*PARAMS\w*);", public))

    enum = re.search(r"pub enum cudaError_enum \{(.*?)\}", raw, re.S).group(1)
    codes = sorted(int(c) for c in re.findall(r"= (\d+)", enum))

    lines = ["// Written by generate.py: not edited by hand.", "// clang-format off", ""]
    lines += ["// Result codes of cust_raw's enum.", "#define KNOWN_CODES(CODE) \\"]
    for i in range(0, len(codes), 10):
        row = " ".join(f"CODE({c})" for c in codes[i:i + 10])
        lines.append(f"    {row}" + (" \\" if i + 10 < len(codes) else ""))
    lines += [""]
    for name in names:
        if name not in known:
            sys.exit(f"{name} is not in {cuda_h}")
        parameters = [] if known[name] in ("", "void") else known[name].split(",")
        pairs = [plain(p, handles, enums) for p in parameters]
        typed = ", ".join(kind + name for kind, name in pairs) or "void"
        lines.append(f"FORWARD({name}, ({typed}), ({', '.join(n for _, n in pairs)}))")
    text = "\n".join(lines) + "\n"

    out = pathlib.Path(__file__).with_name("trampolines.h")
    if "--check" in sys.argv:
        sys.exit(0 if out.read_text() == text else f"{out} is out of date")
    out.write_text(text)


main()
