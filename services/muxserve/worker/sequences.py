"""`SequenceBook`: the sequences of one Jobs stream, their slots and blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from muxserve.engine.messages import Sampling
from muxserve.engine.pool import BlockPool
from muxserve.engine.tables import NoFreeSlot
from muxserve.worker.models import LoadedModel, ModelTable
from muxserve.worker.orders import Opening
from muxserve.worker.prefix_cache import PrefixCache

log = structlog.get_logger(__name__)

NO_SLOT = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence that is open."""

    number: int
    model: LoadedModel
    tokens: NDArray[np.int32]
    """All that are known when it is opened; in the token table once it has a slot."""
    limit: int
    sampling: Sampling
    known: int
    """Tokens in the token table, or to be there."""
    ordered: int = 0
    """Where its next chunk starts: the scheduler takes so many tokens for computed."""
    computed: int = 0
    """Tokens whose KV is written; more than `ordered` where the prefix cache had more."""
    slot: int = NO_SLOT
    spans: int = 0
    """Block groups it holds."""
    published: int = 0
    """The first of these, which the prefix cache knows: others may read them."""
    hashes: list[bytes] = field(default_factory=list)
    """Of its first spans, as far as they were needed."""
    tainted: bool = False
    """Whether what it wrote is not to be trusted."""
    busy: bool = False
    """In a job that runs: its blocks are being read and written."""
    finished: bool = False
    closing: bool = False
    """To be closed when it is no longer busy."""


class SequenceBook:
    """Owns slots and blocks of its sequences. A busy sequence keeps both until it leaves its job."""

    def __init__(self, models: ModelTable, pool: BlockPool, prefixes: PrefixCache) -> None:
        self.prefixes = prefixes
        self._models = models
        self._pool = pool
        self._open: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._open)

    def serves(self, model: str) -> bool:
        """Whether `model` is loaded."""
        return self._models.get(model) is not None

    def get(self, number: int) -> Sequence | None:
        """The sequence, if it is open and not about to be closed."""
        sequence = self._open.get(number)
        return None if sequence is None or sequence.closing else sequence

    def open(self, opening: Opening) -> None:
        """Open a sequence and seat it if there is a slot. One that makes no sense is not opened: jobs that
        name it are told so, and its neighbours never notice."""
        model = self._models.get(opening.model)
        tokens = np.array(opening.tokens, dtype=np.int64)
        if problem := self._problem(opening, model, tokens):
            log.warning("sequence not opened", sequence=opening.sequence, model=opening.model, reason=problem)
            return
        assert model is not None
        model.open_sequences += 1
        sequence = Sequence(
            opening.sequence,
            model,
            tokens.astype(np.int32),
            opening.limit,
            opening.sampling,
            known=len(tokens),
        )
        self._open[opening.sequence] = sequence
        self.seat(sequence)

    def seat(self, sequence: Sequence) -> bool:
        """Give it a slot, if it has none and one is free; whether it has one now."""
        if sequence.slot == NO_SLOT:
            try:
                slot = sequence.slot = sequence.model.tables.acquire(sequence.number)
            except NoFreeSlot:
                return False
            sequence.model.tables.tokens[slot, : len(sequence.tokens)] = sequence.tokens
        return True

    def reserve(self, sequence: Sequence, tokens: int, *, borrow: bool) -> None:
        """Have it hold blocks for KV of `tokens` tokens, beyond its model's quota only with `borrow`. All or
        nothing. Raises OutOfBlocks."""
        needed = sequence.model.shape.layout.spans(tokens)
        if needed > sequence.spans:
            ids = self._pool.allocate(sequence.model.name, needed - sequence.spans, borrow=borrow)
            sequence.model.tables.assign(sequence.slot, sequence.spans, ids)
            sequence.spans = needed

    def writes_alone(self, sequence: Sequence, tokens: int) -> bool:
        """Whether nobody else can read what it will write when it is computed up to `tokens` tokens."""
        layout = sequence.model.shape.layout
        first, last = sequence.computed // layout.tokens_per_block, layout.spans(tokens)
        heads = sequence.model.tables.blocks[0, sequence.slot, 0, first:last].tolist()
        return all(self._pool.private(head) for head in heads)

    def count(self, sequence: Sequence, tokens: int, cached: int) -> None:
        """A chunk of it was taken into a job, of which the prefix cache had `cached` tokens."""
        sequence.model.prefix_counts.queried += tokens
        sequence.model.prefix_counts.hit += cached

    def computed(self, sequence: Sequence, end: int) -> None:
        """A chunk of it up to `end` was computed."""
        sequence.ordered = end
        sequence.computed = max(sequence.computed, end)
        self.prefixes.publish(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It is no longer in a job."""
        sequence.busy = False
        if sequence.closing:
            self._close(sequence)

    def close(self, numbers: Iterable[int]) -> None:
        """Close sequences, busy ones when they leave their job. Unknown numbers are ignored."""
        for number in numbers:
            if (sequence := self._open.get(number)) is None:
                continue
            sequence.closing = True
            if not sequence.busy:
                self._close(sequence)

    def close_all(self) -> None:
        """Close every sequence."""
        self.close(list(self._open))

    def _close(self, sequence: Sequence) -> None:
        del self._open[sequence.number]
        sequence.model.open_sequences -= 1
        if sequence.slot == NO_SLOT:
            return
        tables = sequence.model.tables
        if sequence.spans:
            self.prefixes.publish_output(sequence)
            self._pool.free(sequence.model.name, tables.groups(sequence.slot, sequence.spans))
        tables.release(sequence.slot)

    def _problem(self, opening: Opening, model: LoadedModel | None, tokens: NDArray[np.int64]) -> str:
        """Why it cannot be opened, or nothing."""
        if opening.sequence in self._open:
            return "its number is taken"
        if model is None:
            return "its model is not loaded"
        spec = model.shape.weights.spec
        if not len(tokens) or tokens.min() < 0 or tokens.max() >= spec.vocab_size:
            return f"token_ids: empty, or not all in [0, {spec.vocab_size})"
        if not len(tokens) < opening.limit <= model.shape.context_length:
            context = model.shape.context_length
            return f"limit {opening.limit} is not above {len(tokens)} tokens and within {context}"
        return ""
