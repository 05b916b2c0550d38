"""GGUF files → spec and canonical tensors. Metadata keys and tensor names are llama.cpp's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.checkpoint.base import Array, Checkpoint
from muxserve.engine.checkpoint.canonical import CanonicalTensor
from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.checkpoint.gguf_header import GGUFHeader
from muxserve.engine.checkpoint.gguf_spec import spec_of
from muxserve.engine.checkpoint.quants import SUPPORTED, to_float

LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "input_norm": ("attn_norm.weight",),
    "qkv": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "qkv_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "q_norm": ("attn_q_norm.weight",),
    "k_norm": ("attn_k_norm.weight",),
    "o": ("attn_output.weight",),
    "o_bias": ("attn_output.bias",),
    "attention_out_norm": ("post_attention_norm.weight",),
    "mlp_norm": ("ffn_norm.weight",),
    "gate_up": ("ffn_gate.weight", "ffn_up.weight"),
    "gate_up_bias": ("ffn_gate.bias", "ffn_up.bias"),
    "down": ("ffn_down.weight",),
    "down_bias": ("ffn_down.bias",),
    "mlp_out_norm": ("post_ffw_norm.weight",),
}
MODEL_NAMES = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight"}

INTERLEAVED = ("llama", "smollm3")
"""Architectures whose Q and K rows llama.cpp's converter reorders so that rotary pairs are neighbours."""

ROTATED = ("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias")


class GGUFSource:
    """Canonical tensors of a GGUF file."""

    def __init__(self, header: GGUFHeader, head_dim: int, interleaved_dim: int) -> None:
        """interleaved_dim: leading rows of a Q or K head that are stored with rotary pairs side by side."""
        self._header = header
        self._data = np.frombuffer(header.data, np.uint8)
        self._head_dim = head_dim
        self._interleaved_dim = interleaved_dim

    def names(self, tensor: CanonicalTensor) -> tuple[str, ...]:
        if tensor.layer is None:
            return (MODEL_NAMES[tensor.role],)
        return tuple(f"blk.{tensor.layer}.{name}" for name in LAYER_NAMES[tensor.role])

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._header.tensors.get(name)
        if tensor is None:
            return None
        if tensor.kind not in SUPPORTED:
            kinds = ", ".join(kind.name for kind in SUPPORTED)
            raise CheckpointError(name, f"is quantised as {tensor.kind.name}; supported: {kinds}")
        return tensor.shape

    def rows(self, name: str, start: int, stop: int) -> Array:
        tensor = self._header.tensors[name]
        stored = self._data[tensor.start : tensor.stop]
        reorder = self._interleaved_dim > 0 and name.endswith(ROTATED)
        if len(tensor.shape) == 1:
            # A vector is a single row to the format: its values, not its bytes, are what can be picked from.
            values = to_float(stored.reshape(1, -1), tensor.kind).reshape(-1)
            return values[self._order(start, stop)] if reorder else values[start:stop]
        # A matrix is put in order while its rows are still packed: cheaper, and any quantisation will do.
        rows = stored.reshape(math.prod(tensor.shape[:-1]), -1)
        return to_float(rows[self._order(start, stop)] if reorder else rows[start:stop], tensor.kind)

    def _order(self, start: int, stop: int) -> NDArray[np.intp]:
        """Where rows `[start, stop)` of the half-split order are stored."""
        head, place = np.divmod(np.arange(start, stop), self._head_dim)
        half = self._interleaved_dim // 2
        rotated = np.where(place < half, 2 * place, 2 * (place - half) + 1)
        return head * self._head_dim + np.where(place < 2 * half, rotated, place)


def open_gguf(path: Path, dtype: str) -> Checkpoint:
    """Open a GGUF file. `dtype` "auto" is bfloat16. Raises CheckpointError."""
    header = GGUFHeader(path)
    spec = spec_of(header, "float32" if dtype == "float32" else "bfloat16")
    rotary = 2 * len(spec.ropes[0].inverse_frequencies)
    interleaved = rotary if header.metadata["general.architecture"] in INTERLEAVED else 0
    return Checkpoint(spec, GGUFSource(header, spec.head_dim, interleaved))
