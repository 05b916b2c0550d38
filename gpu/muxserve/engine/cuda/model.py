"""`CudaModel`: a model as the jobs of a GPU see it, over memory that the worker owns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from muxserve.engine.cuda.columns import Rectangle
from muxserve.engine.cuda.lanes import Lane
from muxserve.engine.cuda.weights import DeviceWeights
from muxserve.engine.errors import JobError, UnallocatedBlockError
from muxserve.engine.kernels.interface import KVCache
from muxserve.engine.messages import AddModel
from muxserve.engine.models.decoder import Decoder
from muxserve.engine.tables import TableViews

Integers = NDArray[np.int64]


class CudaModel:
    """decoders: by kind of job. Tables are the worker's, in host memory: a job takes its rows along."""

    def __init__(
        self,
        command: AddModel,
        weights: DeviceWeights,
        tables: TableViews,
        arena: Tensor,
        decoders: dict[str, Decoder],
    ) -> None:
        self.name = command.model
        self.spec = command.spec
        self.layout = command.layout
        self.tables = tables
        self.decoders = decoders
        self._weights = weights
        self._cache = KVCache.over(arena, arena[:0], command.layout)
        self._blocks = len(self._cache.blocks)

    def close(self) -> None:
        """Let go of weights and tables; nothing of it may be running. Raises DeviceError."""
        self.decoders.clear()
        self._weights.release()
        self.tables.close()

    def cache(self, table: Tensor) -> KVCache:
        """table: int32 `[layers, rows, kv_heads, spans]` on the device."""
        return KVCache(self._cache.blocks, table, self.layout)

    def check(self, slots: Integers, begins: Integers, ends: Integers, places: Integers) -> None:
        """Rows of a job: tokens `[begins, ends)` of `slots` are its input, and tokens up to `places` are to
        have a place. Raises JobError."""
        inside = (slots >= 0) & (slots < self.tables.slots) & (begins >= 0) & (begins < ends)
        if not (inside & (places <= self.tables.context)).all():
            raise JobError(f'model "{self.name}" has no such slot or position')

    def known(self, slots: Integers, begins: Integers, ends: Integers) -> Integers:
        """The tokens `[begins, ends)` of each row, one row after another. Raises JobError."""
        counts = ends - begins
        starts = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(starts - begins, counts)
        tokens: Integers = self.tables.tokens[np.repeat(slots, counts), within].astype(np.int64)
        if ((tokens < 0) | (tokens >= self.spec.vocab_size)).any():
            vocab = self.spec.vocab_size
            raise JobError(f'a known token is not one of the {vocab} of model "{self.name}"')
        return tokens

    def block_ids(self, slots: Integers, held: Integers) -> NDArray[np.int32]:
        """Of the rows' first `held` tokens, `[layers, rows, kv_heads, widest]`; beyond a row's own spans they
        are anything. Raises UnallocatedBlockError."""
        spans = -(-held // self.layout.tokens_per_block)
        widest = int(spans.max())
        ids: NDArray[np.int32] = self.tables.blocks[:, slots, :, :widest]
        missing = ((ids < 0) | (ids >= self._blocks)) & (np.arange(widest) < spans[:, None, None])
        if missing.any():
            raise UnallocatedBlockError(int(np.argmax(missing.any(axis=(1, 2, 3)))))
        return ids

    def stage_blocks(
        self, memory: Rectangle, lane: Lane, ids: NDArray[np.int32], rows: int, longest: int
    ) -> KVCache:
        """Begin to copy block ids, as `block_ids` gives them. rows, longest: what to make room for."""
        layout = self.layout
        shape = (layout.layers, rows, layout.kv_heads, layout.spans(longest))
        array = memory.host(shape)
        array[:, : ids.shape[1], :, : ids.shape[3]] = ids
        return self.cache(memory.upload(lane, shape))

    def stage_history(
        self, memory: Rectangle, lane: Lane, slots: Integers, rows: int, longest: int
    ) -> Tensor:
        """Begin to copy the rows' tokens, for penalties: int32 `[rows, longest]`."""
        shape = (rows, longest)
        array = memory.host(shape)
        width = min(longest, self.tables.context)
        array[: len(slots), :width] = self.tables.tokens[slots, :width]
        return memory.upload(lane, shape)

    def write_tokens(
        self, slots: tuple[int, ...], positions: tuple[int, ...], tokens: tuple[int, ...]
    ) -> None:
        """Enter what was sampled."""
        if slots:
            self.tables.tokens[list(slots), list(positions)] = tokens
