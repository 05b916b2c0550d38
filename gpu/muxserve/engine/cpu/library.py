"""The native library: which build of it this machine can run, and its structures, mirrored field by field.

The sources are in `native/`; the wheel's build compiles them once for each instruction set of `VARIANTS`
(see `build_native.py` at the root of the repository).
"""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np

from muxserve.engine.cpu.errors import NativeLibraryError

VARIANTS: dict[str, frozenset[str]] = {
    "avx512bf16": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "fma", "bmi2"}),
    "avx2": frozenset({"avx2", "fma", "bmi2", "f16c"}),
    "generic": frozenset(),
}
"""Builds, best first, and the processor flags (Linux's names) that each needs."""

FOLDER = Path(__file__).parent / "native"

PARTS = ("matrices", "attention", "sampling", "rest")
"""Where a job's time goes, in the order of `Job.parts`."""

NO_BLOCK, OUT_OF_RANGE, NO_TOKEN = 1, 2, 3
"""`Job.failure`."""

NOT_FINITE, ABSENT = 3, -1
"""In `Job.finished`, beside UNFINISHED, STOP and LENGTH: no token to choose; not in the step."""


class Layer(ctypes.Structure):
    """See `native/model.h`."""

    POINTERS = (
        *("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias", "attention_out_norm"),
        *("mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias", "mlp_out_norm"),
    )
    _fields_ = [*((name, c_void_p) for name in POINTERS), ("window", c_int64), ("rope", c_int64)]


class Frequencies(ctypes.Structure):
    """See `native/model.h`."""

    _fields_ = [("inverse", c_void_p), ("half", c_int64), ("attention_factor", c_float)]


class Model(ctypes.Structure):
    """See `native/model.h`."""

    _fields_ = [
        *((name, c_int32) for name in ("bfloat16", "gelu")),
        *(
            (name, c_int64)
            for name in ("vocab", "hidden", "inner", "heads", "kv_heads", "head_dim", "layers", "ropes")
        ),
        *(
            (name, c_float)
            for name in (
                *("rms_eps", "attention_scale", "attention_soft_cap", "final_soft_cap"),
                "embedding_scale",
            )
        ),
        *((name, c_void_p) for name in ("layer", "frequencies", "embed", "head", "final_norm", "arena")),
        *((name, c_int64) for name in ("blocks", "block_words", "block_tokens")),
        ("table", c_void_p),
        *((name, c_int64) for name in ("slots", "spans")),
        ("tokens", c_void_p),
        ("context", c_int64),
    ]


SAMPLING = np.dtype(
    [
        *((name, np.float32) for name in ("temperature", "min_p", "repetition", "presence", "frequency")),
        *((name, np.int32) for name in ("top_k", "logprobs", "stops")),
        ("stop_ids", np.uintp),
        ("top_p", np.float64),
        ("seed", np.uint64),
        ("prompt_length", np.int64),
    ],
    align=True,
)
"""See `Sampling` in `native/model.h`."""


class Job(ctypes.Structure):
    """See `native/model.h`."""

    _fields_ = [
        ("model", c_void_p),
        *((name, c_int64) for name in ("rows", "steps")),
        *((name, c_void_p) for name in ("slot", "begin", "end", "limit", "samples", "sampling")),
        ("logprobs", c_int64),
        *((name, c_double) for name in ("hold", "lead")),
        *((name, c_void_p) for name in ("tokens", "finished", "logprob", "logprob_ids")),
        *((name, c_int64) for name in ("threads", "stop", "done", "ended")),
        *((name, c_int64) for name in ("failure", "failed_layer", "nears_end")),
        ("seconds", c_double),
        ("parts", c_double * len(PARTS)),
    ]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of this machine's processors by Linux's names; none where they are not told."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def variant(flags: frozenset[str]) -> str:
    """The best build for a processor with these flags."""
    return next(name for name, needed in VARIANTS.items() if needed <= flags)


@functools.cache
def load(name: str = "") -> ctypes.CDLL:
    """The library, built for this machine or, for tests, the variant `name`. Raises NativeLibraryError."""
    path = FOLDER / f"{name or variant(cpu_flags())}.so"
    if not path.exists():
        raise NativeLibraryError(
            f"{path} is missing: MuxServe was installed without its CPU engine for {platform.machine()}; "
            "install it again (make setup)"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(f"{path}: {error}") from error
    library.muxserve_engine_new.restype = c_void_p
    library.muxserve_engine_new.argtypes = [ctypes.c_int]
    library.muxserve_engine_free.argtypes = [c_void_p]
    library.muxserve_engine_free.restype = None
    library.muxserve_engine_event.argtypes = [c_void_p]
    library.muxserve_engine_submit.argtypes = [c_void_p, ctypes.POINTER(Job)]
    library.muxserve_engine_submit.restype = None
    library.muxserve_attend.argtypes = [c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 5, ctypes.c_int]
    library.muxserve_attend.restype = c_int64
    return library
