"""`BlockAttention`: one layer's attention by itself, for tests and measurements.

It is what a pass does between a layer's projections, without norms and rotation: the new tokens' keys and
values are written to their blocks, then every new token attends to all of its sequence up to itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muxserve.engine.cpu.library import NO_BLOCK, Layer, Model, load
from muxserve.engine.errors import JobError, UnallocatedBlockError
from muxserve.engine.spec import KVLayout

Array = NDArray[Any]


class BlockAttention:
    """Attention over blocks of `arena` (uint8 `[bytes]`) named by `table` (int32 `[layers, slots, kv_heads,
    spans]`, -1 = none); both are used in place.

    heads: query heads. window: positions a query sees, None = all. soft_cap: `soft_cap * tanh(score /
    soft_cap)`, None = none. threads: how many compute. variant: build of the library, "" = this machine's.
    """

    def __init__(
        self,
        arena: Array,
        table: Array,
        layout: KVLayout,
        *,
        heads: int,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        threads: int = 1,
        variant: str = "",
    ) -> None:
        self._threads = threads
        self._library = load(variant)
        self._engine = self._library.muxserve_engine_new(threads)
        self._shape = (heads, layout.head_dim)
        self._columns = (heads + 2 * layout.kv_heads) * layout.head_dim
        layers = (Layer * layout.layers)(*(Layer(window=window or 0, rope=-1) for _ in range(layout.layers)))
        self._kept = (arena, table, layers)
        self._model = Model(
            bfloat16=layout.dtype == "bfloat16",
            heads=heads,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            layers=layout.layers,
            attention_scale=scale,
            attention_soft_cap=soft_cap or 0.0,
            layer=ctypes.addressof(layers),
            arena=arena.ctypes.data,
            blocks=arena.nbytes // layout.block_bytes,
            block_words=layout.block_bytes // 4,
            block_tokens=layout.tokens_per_block,
            table=table.ctypes.data,
            slots=table.shape[1],
            spans=table.shape[3],
            context=table.shape[3] * layout.tokens_per_block,
        )

    def close(self) -> None:
        """End its threads."""
        if self._engine:
            self._library.muxserve_engine_free(self._engine)
            self._engine = None

    def __call__(self, layer: int, pieces: Sequence[tuple[int, int, int]], qkv: Array) -> Array:
        """pieces: (slot, begin, end) of each sequence's new tokens, at least one; qkv: float32 `[tokens,
        heads + 2 kv_heads, head_dim]`, theirs one after another. Returns float32 `[tokens, heads, head_dim]`.

        Raises UnallocatedBlockError, JobError.
        """
        slots, begins, ends = np.array(pieces, dtype=np.int64).T.copy()
        rows = np.ascontiguousarray(qkv, dtype=np.float32).reshape(int((ends - begins).sum()), self._columns)
        out = np.empty((len(rows), *self._shape), np.float32)
        failure = self._library.muxserve_attend(
            self._engine,
            ctypes.addressof(self._model),
            layer,
            len(pieces),
            *(array.ctypes.data for array in (slots, begins, ends, rows, out)),
            self._threads,
        )
        if failure == NO_BLOCK:
            raise UnallocatedBlockError(layer)
        if failure:
            raise JobError("a piece names a slot or a position that the table does not have")
        return out
