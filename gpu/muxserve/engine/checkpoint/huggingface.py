"""Hugging Face directories: config.json, generation_config.json and safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from muxserve.engine.checkpoint.base import Array, Checkpoint
from muxserve.engine.checkpoint.canonical import CanonicalTensor
from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.checkpoint.families import spec_of
from muxserve.engine.checkpoint.fields import Fields
from muxserve.engine.checkpoint.shards import Shards, find_shards
from muxserve.engine.spec import DType

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "input_norm": ("input_layernorm.weight",),
    "qkv": tuple(f"{name}.weight" for name in QKV),
    "qkv_bias": tuple(f"{name}.bias" for name in QKV),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "o": ("self_attn.o_proj.weight",),
    "o_bias": ("self_attn.o_proj.bias",),
    "gate_up": tuple(f"{name}.weight" for name in GATE_UP),
    "gate_up_bias": tuple(f"{name}.bias" for name in GATE_UP),
    "down": ("mlp.down_proj.weight",),
    "down_bias": ("mlp.down_proj.bias",),
    "mlp_norm": ("post_attention_layernorm.weight",),
}
GEMMA_NORMS: dict[str, tuple[str, ...]] = {
    "attention_out_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_out_norm": ("post_feedforward_layernorm.weight",),
}

PREFIXES = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
"""Where the decoder lies: alone, in a multimodal model (newer, older layout), or saved without its head."""


class HuggingFaceSource:
    """Canonical tensors of a model directory's safetensors."""

    def __init__(self, shards: Shards, gemma: bool) -> None:
        self._shards = shards
        self._gemma = gemma
        self._prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in shards), PREFIXES[0])
        self._head = next(
            (name for name in ("lm_head.weight", "language_model.lm_head.weight") if name in shards),
            "lm_head.weight",
        )

    def names(self, tensor: CanonicalTensor) -> tuple[str, ...]:
        if tensor.role == "lm_head":
            return (self._head,)
        if tensor.layer is None:
            return (
                self._prefix + {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}[tensor.role],
            )
        table = LAYER_NAMES | GEMMA_NORMS if self._gemma else LAYER_NAMES
        return tuple(f"{self._prefix}layers.{tensor.layer}.{name}" for name in table[tensor.role])

    def shape(self, name: str) -> tuple[int, ...] | None:
        stored = self._shards.get(name)
        if stored is None:
            return None
        self._shards.rows(name, 0, 0)  # a dtype we cannot read is an error of the header, not of the load
        return stored.shape

    def rows(self, name: str, start: int, stop: int) -> Array:
        rows = self._shards.rows(name, start, stop)
        if self._gemma and name.endswith("norm.weight"):
            return rows.astype(np.float32) + np.float32(1.0)
        return rows


def open_directory(path: Path, dtype: str) -> Checkpoint:
    """Open a model directory. `dtype` "auto" is the configuration's, with float16 served as bfloat16.

    Raises CheckpointError.
    """
    config = _read_json(path, "config.json")
    if config is None:
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; name the file itself, such as {files[0]}" if files else ""
        raise CheckpointError("path", f"{path} has no config.json, so it is not a model directory{hint}")
    generation = Fields(_read_json(path, "generation_config.json") or {}, "generation_config.json:")
    eos = generation.token_ids("eos_token_id") if "eos_token_id" in generation else None
    # The configuration is judged before the weights are looked for: its errors say more.
    spec = spec_of(config, "float32", eos)
    shards = Shards(find_shards(path))
    resolved = _dtype(Fields(config, "config.json:"), shards) if dtype == "auto" else dtype
    if resolved == "bfloat16":
        spec = spec_of(config, "bfloat16", eos)
    return Checkpoint(spec, HuggingFaceSource(shards, gemma=spec.post_norms))


def _dtype(config: Fields, shards: Shards) -> DType:
    text = config.section("text_config")
    for fields in (config, text):
        for key in ("dtype", "torch_dtype"):
            value = fields.get(key) if fields is not None else None
            if value is not None:
                return "float32" if value in ("float32", "float64") else "bfloat16"
    stored = next(
        (shards.get(f"{p}embed_tokens.weight") for p in PREFIXES if f"{p}embed_tokens.weight" in shards), None
    )
    return "float32" if stored is not None and stored.dtype in ("F32", "F64") else "bfloat16"


def _read_json(directory: Path, name: str) -> dict[str, object] | None:
    """A JSON object of the directory, None if there is no such file."""
    file = directory / name
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(name, f"is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(name, "must hold a JSON object")
    return document
