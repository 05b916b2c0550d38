"""From an order to an engine job: who takes part, with which blocks, and who is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from muxserve.engine.messages import DecodeJob, DecodeRow, PrefillChunk, PrefillJob
from muxserve.engine.pool import OutOfBlocks
from muxserve.worker.orders import Chunk, DecodeOrder, Order, PrefillOrder, Refused
from muxserve.worker.sequences import Sequence, SequenceBook


@dataclass(slots=True)
class Plan:
    """An order made ready. `message` None: nobody takes part."""

    message: PrefillJob | DecodeJob | None = None
    sequences: dict[int, Sequence] = field(default_factory=dict)
    """Who takes part, by slot; each is busy."""
    refused: list[tuple[int, Refused]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What a scheduler should not have asked for."""


def plan(order: Order, job: int, book: SequenceBook) -> Plan:
    """Seat the order's sequences and reserve their blocks; `job` is the engine's number for it."""
    made = Plan()
    if not book.serves(order.model):
        made.refused = [(number, Refused.NO_MODEL) for number in order.sequences]
        return made
    if isinstance(order, PrefillOrder):
        taken = (_chunk(chunk, order, book, made) for chunk in order.chunks)
        if chunks := tuple(chunk for chunk in taken if chunk is not None):
            made.message = PrefillJob(job, order.model, chunks)
    else:
        each = (_row(number, order, book, made) for number in order.sequences)
        if rows := tuple(row for row in each if row is not None):
            made.message = DecodeJob(job, order.model, rows, order.steps)
    return made


def _chunk(chunk: Chunk, order: PrefillOrder, book: SequenceBook, made: Plan) -> PrefillChunk | None:
    sequence = _candidate(chunk.sequence, order.model, book, made)
    if sequence is None:
        return None
    if not sequence.computed == chunk.start < chunk.end <= sequence.known:
        _reject(sequence, f"chunk [{chunk.start}, {chunk.end})", book, made)
        return None
    if not _admit(sequence, chunk.end, order, book, made):
        return None
    ends = chunk.end == sequence.known
    sampling = sequence.sampling if ends else None
    return PrefillChunk(sequence.slot, chunk.start, chunk.end, sequence.limit, sampling)


def _row(number: int, order: DecodeOrder, book: SequenceBook, made: Plan) -> DecodeRow | None:
    sequence = _candidate(number, order.model, book, made)
    if sequence is None:
        return None
    if sequence.computed != sequence.known - 1:
        _reject(sequence, "decode before its prompt is computed", book, made)
        return None
    # The last token of a sequence is sampled at position limit - 1 and its KV never written.
    tokens = min(sequence.computed + order.steps, sequence.limit - 1)
    if not _admit(sequence, tokens, order, book, made):
        return None
    return DecodeRow(sequence.slot, sequence.known, sequence.limit, sequence.sampling)


def _candidate(number: int, model: str, book: SequenceBook, made: Plan) -> Sequence | None:
    """The sequence, if it can take part in a job of `model` at all."""
    sequence = book.get(number)
    # A finished one: the order was sent before the scheduler knew.
    if sequence is None or sequence.finished:
        made.refused.append((number, Refused.NOT_OPEN))
        return None
    if sequence.busy or sequence.model.name != model:
        made.refused.append((number, Refused.NOT_OPEN))
        what = "is in another job" if sequence.busy else f'is of model "{sequence.model.name}"'
        made.problems.append(f"sequence {number} {what}")
        return None
    return sequence


def _admit(sequence: Sequence, tokens: int, order: Order, book: SequenceBook, made: Plan) -> bool:
    """Take a slot, and blocks for KV of `tokens` tokens; whether both were to be had."""
    if not book.seat(sequence):
        made.refused.append((sequence.number, Refused.OUT_OF_SLOTS))
        return False
    try:
        book.reserve(sequence, tokens, borrow=order.borrow)
    except OutOfBlocks:
        made.refused.append((sequence.number, Refused.OUT_OF_BLOCKS))
        return False
    sequence.busy = True
    made.sequences[sequence.slot] = sequence
    return True


def _reject(sequence: Sequence, what: str, book: SequenceBook, made: Plan) -> None:
    """The scheduler and the worker disagree about a sequence: close it, so that it is computed anew."""
    made.refused.append((sequence.number, Refused.NOT_OPEN))
    made.problems.append(
        f"sequence {sequence.number}: {what}, with {sequence.computed} of {sequence.known} tokens computed"
    )
    book.close([sequence.number])
