"""Which part of a model each rank of a mesh holds: a pure function of (spec, rank, ranks). No torch.

Attention goes by KV heads, each with its query heads; the MLP by its inner dimension; logits by rows of the
vocabulary (Megatron-LM, arXiv 1909.08053). So a layer needs two sums over the ranks, after `o` and `down`:

    qkv, qkv_bias            rows of the rank's heads, of each of q, k and v
    o                        columns of the rank's query heads; o_bias whole, added once, after the sum
    gate_up, gate_up_bias    rows of the rank's inner dimensions, of each of gate and up
    down                     columns of the same; down_bias whole, added once, after the sum
    lm_head                  rows of the rank's part of the vocabulary
    embed, norms             whole

Where there are more ranks than KV heads, each KV head is on several ranks, which share its query heads out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from muxserve.engine.checkpoint.canonical import CanonicalTensor, canonical_tensors
from muxserve.engine.checkpoint.errors import CheckpointError
from muxserve.engine.spec import ModelSpec

VOCABULARY_MULTIPLE = 8
"""Rows of the vocabulary on a rank, but for the last rank's: rows of its logits then begin on 16 bytes."""


class ShardError(CheckpointError):
    """The model cannot be cut into so many parts. `field` is that of `ModelSpec` (or `ranks`, `rank`)."""


@dataclass(frozen=True, slots=True)
class Range:
    """Indices `[start, stop)`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Cut:
    """What stays of one part of a canonical tensor: one range for each of its axes."""

    axes: tuple[Range, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that rank `rank` of `ranks` holds.

    Raises ShardError from the constructor if the model cannot be cut so: heads and inner dimension must be
    multiples of `ranks`; KV heads a multiple or a divisor of it.
    """

    whole: ModelSpec
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        whole, ranks = self.whole, self.ranks
        if ranks < 1:
            raise ShardError("ranks", f"must be at least 1, got {ranks}")
        if not 0 <= self.rank < ranks:
            raise ShardError("rank", f"must be in [0, {ranks}), got {self.rank}")
        if whole.kv_heads % ranks and ranks % whole.kv_heads:
            raise ShardError("kv_heads", f"{whole.kv_heads} KV heads do not spread evenly over {ranks} ranks")
        if whole.heads % ranks:
            raise ShardError("heads", f"{whole.heads} attention heads do not divide into {ranks} ranks")
        if whole.intermediate_size % ranks:
            raise ShardError(
                "intermediate_size", f"{whole.intermediate_size} columns do not divide into {ranks} ranks"
            )
        if (ranks - 1) * self.vocabulary_width >= whole.vocab_size:
            raise ShardError("vocab_size", f"{whole.vocab_size} tokens are too few for {ranks} ranks")

    @property
    def spec(self) -> ModelSpec:
        """The rank's own model: what its decoder, its KV layout and so its block tables are made from.

        The same for every rank, so a span takes as many blocks on each, and one block table serves all.
        `vocab_size` stays that of the whole: embeddings are, and so are logits once they are gathered.
        """
        return msgspec.structs.replace(
            self.whole,
            heads=self.whole.heads // self.ranks,
            kv_heads=self.kv_heads.size,
            intermediate_size=self.whole.intermediate_size // self.ranks,
        )

    @property
    def heads(self) -> Range:
        """Query heads."""
        return self._part(self.whole.heads)

    @property
    def kv_heads(self) -> Range:
        """KV heads: those that the rank's query heads read."""
        if self.whole.kv_heads >= self.ranks:
            return self._part(self.whole.kv_heads)
        head = self.rank * self.whole.kv_heads // self.ranks
        return Range(head, head + 1)

    @property
    def inner(self) -> Range:
        """Columns of gate and up."""
        return self._part(self.whole.intermediate_size)

    @property
    def vocabulary(self) -> Range:
        """Tokens whose logits the rank computes: `vocabulary_width`, the last rank the rest."""
        start = self.rank * self.vocabulary_width
        return Range(start, min(start + self.vocabulary_width, self.whole.vocab_size))

    @property
    def vocabulary_width(self) -> int:
        multiple = VOCABULARY_MULTIPLE if self.ranks > 1 else 1
        return -(-self.whole.vocab_size // (self.ranks * multiple)) * multiple

    def cuts(self, tensor: CanonicalTensor) -> tuple[Cut, ...]:
        """What the rank keeps of each part of a tensor of the whole model."""
        dim = self.whole.head_dim
        queries, keys = _scaled(self.heads, dim), _scaled(self.kv_heads, dim)
        rows: tuple[Range, ...] = ()
        columns: Range | None = None
        match tensor.role:
            case "qkv" | "qkv_bias":
                rows = (queries, keys, keys)
            case "gate_up" | "gate_up_bias":
                rows = (self.inner, self.inner)
            case "lm_head":
                rows = (self.vocabulary,)
            case "o":
                columns = queries
            case "down":
                columns = self.inner
        cuts = []
        for index, part in enumerate(tensor.parts):
            axes = [Range(0, length) for length in part]
            if rows:
                axes[0] = rows[index]
            if columns is not None:
                axes[1] = columns
            cuts.append(Cut(tuple(axes)))
        return tuple(cuts)

    def tensors(self) -> Iterator[CanonicalTensor]:
        """The rank's tensors, named and ordered as those of the whole model."""
        for tensor in canonical_tensors(self.whole):
            yield replace(tensor, parts=tuple(cut.shape for cut in self.cuts(tensor)))

    def _part(self, length: int) -> Range:
        size = length // self.ranks
        return Range(self.rank * size, (self.rank + 1) * size)


def _scaled(heads: Range, head_dim: int) -> Range:
    return Range(heads.start * head_dim, heads.stop * head_dim)
