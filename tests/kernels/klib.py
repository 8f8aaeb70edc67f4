"""The kernels as a small shared library of their own, through ctypes and numpy; no torch, no extension."""

import ctypes as C
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
SHIM = Path(__file__).with_name("shim.c")
F32, F64, BF16, F16 = range(4)
DTYPES = {"f32": F32, "f64": F64, "bf16": BF16, "f16": F16}
STORED = {F32: np.float32, F64: np.float64, BF16: np.uint16, F16: np.float16}
OK, NONFINITE, CHANGED, FULL_RECORD, EINVAL = 0, 1, 2, 3, -1
LOWRANK, DELTA = range(2)
CHECK = 1


class Mat(C.Structure):
    _fields_ = [("data", C.c_void_p)] + [(n, C.c_int64) for n in ("rows", "cols", "rs", "cs")] + [("dtype", C.c_int)]


class LowRank(C.Structure):
    _fields_ = [("down", Mat), ("up", Mat), ("scale", C.c_double)]


class Delta(C.Structure):
    _fields_ = [
        ("law", C.c_int),
        ("factors", C.POINTER(LowRank)),
        ("nf", C.c_int),
        ("full", Mat),
        ("alpha", C.c_double),
    ]


class Record(C.Structure):
    _fields_ = [("data", C.c_void_p), ("capacity", C.c_size_t), ("size", C.c_size_t)]


class Backward(C.Structure):
    _fields_ = [(n, Mat) for n in "gxtu"] + [("factor", LowRank)] + [(n, Mat) for n in ("dx", "da", "db")]
    _fields_ += [("dx_add", C.c_int)]


def build(extra=()):
    """Compiles the library once per source state and returns its path."""
    sources = sorted(KERNELS.glob("*.c")) + [SHIM]
    digest = hashlib.sha256(" ".join(extra).encode())
    for path in sorted(KERNELS.iterdir()) + [SHIM]:
        digest.update(path.read_bytes())
    out = Path(tempfile.gettempdir()) / f"pk-kernels-{os.getuid()}" / f"{digest.hexdigest()[:16]}.so"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        part = out.with_suffix(f".{os.getpid()}")
        flags = "-std=c11 -O3 -ffp-contract=off -fPIC -shared -pthread -Wall -Wextra -Wshadow -Wconversion".split()
        command = [os.environ.get("CC", "gcc"), *flags, "-Werror", *extra, f"-I{KERNELS}", *map(str, sources)]
        subprocess.run([*command, "-o", str(part)], check=True)
        part.rename(out)
    return out


def load(path=None):
    """The library with argument types declared."""
    lib = C.CDLL(str(path or build()))
    P, mat, delta, rec, ptr = C.POINTER, C.POINTER(Mat), C.POINTER(Delta), C.POINTER(Record), C.c_void_p
    table = {
        "pk_lowrank_apply_work": (C.c_size_t, [mat, mat, P(LowRank), C.c_int]),
        "pk_lowrank_apply": (C.c_int, [mat, mat, P(LowRank), C.c_int, mat, ptr, ptr]),
        "pk_lowrank_set": (C.c_int, [mat, mat, P(LowRank), C.c_int, mat, ptr, ptr]),
        "pk_lookup_apply_work": (C.c_size_t, [mat, P(LowRank), C.c_int]),
        "pk_lookup_apply": (C.c_int, [mat, ptr, P(LowRank), C.c_int, ptr, ptr]),
        "pk_lowrank_backward_work": (C.c_size_t, [P(Backward)]),
        "pk_lowrank_backward": (C.c_int, [P(Backward), ptr, ptr]),
        "pk_linear_suits": (C.c_int, [C.c_int] + [C.c_int64] * 3),
        "pk_linear_grad_suits": (C.c_int, [C.c_int, C.c_int64, C.c_int64, C.c_int64]),
        "pk_linear_work": (C.c_size_t, [mat, mat, mat, P(LowRank), C.c_int]),
        "pk_linear": (C.c_int, [mat, mat, mat, mat, P(LowRank), C.c_int, mat, ptr, ptr]),
        "pk_record_bound": (C.c_size_t, [mat]),
        "pk_merge_work": (C.c_size_t, [mat, delta, delta]),
        "pk_merge": (C.c_int, [mat, delta, C.c_uint, rec, ptr, ptr]),
        "pk_unmerge": (C.c_int, [mat, delta, rec, ptr, ptr]),
        "pk_switch": (C.c_int, [mat, delta, rec, delta, C.c_uint, rec, ptr, ptr]),
        "pk_finite": (C.c_int, [mat, ptr]),
        "pk_isa_list": (C.c_char_p, [C.c_int]),
        "pk_isa_name": (C.c_char_p, []),
        "pk_isa_select": (C.c_int, [C.c_char_p]),
    }
    for name, (result, arguments) in table.items():
        getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    return lib


def isas(lib):
    """The names of the ISAs that run here, best first."""
    names, i = [], 0
    while (name := lib.pk_isa_list(i)) is not None:
        names.append(name.decode())
        i += 1
    return names


def widen(a, dtype):
    """A stored array as float64."""
    if dtype == BF16:
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


def narrow(a, dtype):
    """Float values as stored, rounded to nearest even."""
    if dtype != BF16:
        return np.asarray(a).astype(STORED[dtype])
    f = np.ascontiguousarray(a, dtype=np.float32)
    u = f.view(np.uint32)
    rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(f), (u >> 16).astype(np.uint16) | 0x40, rounded).astype(np.uint16)


def mat(a, dtype):
    """A view of a 2-d array; keep the array alive."""
    if a is None:
        return Mat()
    size = a.itemsize
    return Mat(a.ctypes.data, a.shape[0], a.shape[1], a.strides[0] // size, a.strides[1] // size, dtype)


def buffer(size):
    """Uninitialised bytes, at an odd address on purpose."""
    b = np.empty(size + 1, np.uint8)
    return b, C.c_void_p(b.ctypes.data + 1 if size else None)


def factors(parts):
    """pk_lowrank array of (A, dtype, B, dtype, scale)."""
    return (LowRank * len(parts))(*[LowRank(mat(a, da), mat(b, db), s) for a, da, b, db, s in parts])


def lowrank(parts, alpha=1.0):
    """A pk_delta of those parts."""
    f = factors(parts)
    d = Delta(LOWRANK, f, len(parts), Mat(), alpha)
    d.keep = (f, parts)
    return d


def full(a, dtype, alpha=1.0):
    """A pk_delta of a whole matrix."""
    d = Delta(DELTA, None, 0, mat(a, dtype), alpha)
    d.keep = a
    return d
