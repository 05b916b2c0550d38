"""A rank's part of a checkpoint, as a checkpoint of its own: what is not kept is never in memory at once.

Whatever fills memory from a checkpoint (shared memory or a device's) fills a rank's with it unchanged, piece
by piece. Of `o` and `down` every rank reads all rows and keeps its columns: of a file that is mapped, that
touches what it keeps; of quantised weights, it dequantises whole rows.
"""

from __future__ import annotations

from muxserve.engine.checkpoint.base import Array, Checkpoint, TensorSource
from muxserve.engine.checkpoint.canonical import CanonicalTensor, canonical_tensors
from muxserve.engine.parallel.shard import Cut, Shard


def shard_checkpoint(checkpoint: Checkpoint, rank: int, ranks: int) -> Checkpoint:
    """What rank `rank` of `ranks` loads of `checkpoint`; its spec is the rank's. Raises ShardError."""
    shard = Shard(checkpoint.spec, rank, ranks)
    return Checkpoint(shard.spec, _ShardSource(checkpoint.source, shard), shard.tensors())


class _ShardSource:
    """A TensorSource that shows the kept ranges of another one's tensors."""

    def __init__(self, source: TensorSource, shard: Shard) -> None:
        self._source = source
        self._cuts: dict[str, Cut] = {
            name: cut
            for tensor in canonical_tensors(shard.whole)
            for name, cut in zip(source.names(tensor), shard.cuts(tensor), strict=True)
        }

    def names(self, tensor: CanonicalTensor) -> tuple[str, ...]:
        return self._source.names(tensor)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._cuts[name].shape

    def rows(self, name: str, start: int, stop: int) -> Array:
        kept, *columns = self._cuts[name].axes
        rows = self._source.rows(name, kept.start + start, kept.start + stop)
        return rows[:, columns[0].start : columns[0].stop] if columns else rows
