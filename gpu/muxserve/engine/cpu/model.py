"""`NativeModel`: a model as the native library sees it, over memory that the worker owns."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.cpu.library import Frequencies, Layer, Model
from muxserve.engine.spec import KVLayout, ModelSpec
from muxserve.engine.tables import TableViews

Array = NDArray[Any]


class NativeModel:
    """Pointers into weights, tables and arena, all of which it keeps alive.

    weights: the layout "panels". arena: uint8 `[bytes]`. Raises ValueError for a model that the library
    cannot run, KeyError for a missing weight.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Array],
        arena: Array,
        tables: TableViews,
        layout: KVLayout,
    ) -> None:
        _check(spec, layout)
        self.spec = spec
        self.tables = tables
        self._weights = weights
        self._arena = arena
        self._frequencies = [np.array(rope.inverse_frequencies, dtype=np.float32) for rope in spec.ropes]
        ropes = (Frequencies * len(spec.ropes))(
            *(
                Frequencies(_address(array), len(array), rope.attention_factor)
                for rope, array in zip(spec.ropes, self._frequencies, strict=True)
            )
        )
        layers = (Layer * len(spec.layers))(*(self._layer(i) for i in range(len(spec.layers))))
        self._kept = (ropes, layers)
        embed = _address(weights["embed"])
        self.struct = Model(
            bfloat16=spec.dtype == "bfloat16",
            gelu=spec.activation == "gelu_tanh",
            vocab=spec.vocab_size,
            hidden=spec.hidden_size,
            inner=spec.intermediate_size,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            layers=len(spec.layers),
            ropes=len(spec.ropes),
            rms_eps=spec.rms_eps,
            attention_scale=spec.attention_scale,
            attention_soft_cap=spec.attention_soft_cap or 0.0,
            final_soft_cap=spec.final_soft_cap or 0.0,
            embedding_scale=spec.embedding_scale,
            layer=ctypes.addressof(layers),
            frequencies=ctypes.addressof(ropes),
            embed=embed,
            head=embed if spec.tie_embeddings else _address(weights["lm_head"]),
            final_norm=_address(weights["final_norm"]),
            arena=_address(arena),
            blocks=arena.nbytes // layout.block_bytes,
            block_words=layout.block_bytes // 4,
            block_tokens=layout.tokens_per_block,
            table=_address(tables.blocks),
            slots=tables.slots,
            spans=tables.blocks.shape[3],
            tokens=_address(tables.tokens),
            context=tables.context,
        )

    def _layer(self, index: int) -> Layer:
        layer = self.spec.layers[index]
        found = {role: self._weights.get(f"layers.{index}.{role}") for role in Layer.POINTERS}
        for role in ("input_norm", "qkv", "o", "mlp_norm", "gate_up", "down"):
            if found[role] is None:
                raise KeyError(f"layers.{index}.{role}")
        pointers = {role: _address(array) for role, array in found.items() if array is not None}
        return Layer(window=layer.window or 0, rope=-1 if layer.rope is None else layer.rope, **pointers)


def _check(spec: ModelSpec, layout: KVLayout) -> None:
    if spec.dtype not in ("float32", "bfloat16") or layout.dtype != spec.dtype:
        raise ValueError(
            f"dtype: {spec.dtype} with KV in {layout.dtype}; on CPU both are float32 or both bfloat16"
        )
    if spec.head_dim % 2 or spec.heads % spec.kv_heads:
        raise ValueError(
            f"head_dim: {spec.head_dim} must be even, and {spec.heads} heads a multiple of {spec.kv_heads}"
        )
    if layout.block_bytes % 4 or layout.tokens_per_block < 1:
        raise ValueError(f"block_bytes: {layout.block_bytes} hold no token of this model")


def _address(array: Array) -> int:
    return int(array.ctypes.data)
