"""From an order to engine jobs: who takes part, with which blocks, and who is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from muxserve.engine.messages import DecodeJob, DecodeRow, PrefillChunk, PrefillJob
from muxserve.engine.pool import OutOfBlocks
from muxserve.worker.orders import Chunk, DecodeOrder, Order, PrefillOrder, Refused
from muxserve.worker.sequences import Sequence, SequenceBook

WORTH_WAITING = 64
"""Tokens that a chunk has to have in common with another one of its job to be computed after it, in a pass of
its own, rather than beside it: about as many as a pass costs before its first token."""


@dataclass(slots=True)
class Plan:
    """An order made ready. Chunks that begin alike are not computed together: the first goes ahead, and what
    it has in common with the others is in the prefix cache when their turn comes. So one order may need
    several engine jobs, one after the other, which the scheduler does not see."""

    message: PrefillJob | DecodeJob | None = None
    """The engine job that is next. None: there is nothing (more) to compute."""
    later: tuple[Chunk, ...] = ()
    """Chunks whose turn comes when that job has ended."""
    sequences: dict[int, Sequence] = field(default_factory=dict)
    """Who takes part, by slot; each is busy."""
    refused: list[tuple[int, Refused]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What a scheduler should not have asked for."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    prompts: set[int] = field(default_factory=set)
    """Slots of a decode job whose prompts its first step computes."""


def plan(order: Order, job: int, book: SequenceBook) -> Plan:
    """Seat the order's sequences and reserve their blocks; `job` is the engine's number for it."""
    made = Plan()
    if not book.serves(order.model):
        made.refused = [(number, Refused.NO_MODEL) for number in order.sequences]
        return made
    if isinstance(order, PrefillOrder):
        made.later = order.chunks
        plan_chunks(made, order, job, book)
    else:
        each = (_row(number, order, book, made) for number in order.sequences)
        if rows := tuple(row for row in each if row is not None):
            made.message = DecodeJob(job, order.model, rows, order.steps)
    return made


def plan_chunks(made: Plan, order: PrefillOrder, job: int, book: SequenceBook) -> None:
    """Make the next engine job of a prefill order from the chunks that are left."""
    taken: list[PrefillChunk] = []
    later: list[Chunk] = []
    coming: set[bytes] = set()
    for chunk in made.later:
        sequence = _begun(chunk, order, book, made)
        if sequence is None:
            continue
        if book.prefixes.common(sequence, chunk.end, coming) >= WORTH_WAITING:
            later.append(chunk)
        elif (part := _chunk(sequence, chunk, order, book, made)) is not None:
            coming.update(book.prefixes.coming(sequence, chunk.end))
            taken.append(part)
    made.later = tuple(later)
    made.message = PrefillJob(job, order.model, tuple(taken), lead=order.lead) if taken else None


def _begun(chunk: Chunk, order: PrefillOrder, book: SequenceBook, made: Plan) -> Sequence | None:
    """The chunk's sequence, with a slot and what the prefix cache has of it, if it can take part."""
    sequence = _candidate(chunk.sequence, order.model, book, made)
    if sequence is None:
        return None
    if not sequence.ordered == chunk.start < chunk.end <= sequence.known:
        _reject(sequence, f"chunk [{chunk.start}, {chunk.end})", book, made)
        return None
    if not _seat(sequence, book, made):
        return None
    book.prefixes.take(sequence, chunk.end, borrow=order.borrow)
    return sequence


def _chunk(
    sequence: Sequence, chunk: Chunk, order: PrefillOrder, book: SequenceBook, made: Plan
) -> PrefillChunk | None:
    """What is left to compute of a chunk, if anything."""
    if not _admit(sequence, chunk.end, order, book, made):
        return None
    _count(sequence, chunk.start, chunk.end, book, made)
    if sequence.computed >= chunk.end:
        sequence.ordered = chunk.end
        return None
    sampling = sequence.sampling if chunk.end == sequence.known else None
    return PrefillChunk(sequence.slot, sequence.computed, chunk.end, sequence.limit, sampling)


def _count(sequence: Sequence, start: int, end: int, book: SequenceBook, made: Plan) -> None:
    """Tokens `[start, end)` are taken into the job: how many of them the prefix cache had."""
    cached = min(sequence.computed, end) - start
    made.cached_tokens += cached
    book.count(sequence, end - start, cached)


def _row(number: int, order: DecodeOrder, book: SequenceBook, made: Plan) -> DecodeRow | None:
    sequence = _candidate(number, order.model, book, made)
    if sequence is None:
        return None
    last = sequence.known - 1
    joins = number in order.prompts and sequence.computed < last
    if sequence.computed != last and not joins:
        _reject(sequence, "decode before its prompt is computed", book, made)
        return None
    if not _seat(sequence, book, made):
        return None
    if joins:
        book.prefixes.take(sequence, sequence.known, borrow=order.borrow)
    # The last token of a sequence is sampled at position limit - 1 and its KV never written.
    tokens = min(last + order.steps, sequence.limit - 1)
    if not _admit(sequence, tokens, order, book, made):
        return None
    if not joins:
        return DecodeRow(sequence.slot, sequence.known, sequence.limit, sequence.sampling)
    _count(sequence, sequence.ordered, sequence.known, book, made)
    made.prompts.add(sequence.slot)
    return DecodeRow(sequence.slot, sequence.known, sequence.limit, sequence.sampling, sequence.computed)


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


def _seat(sequence: Sequence, book: SequenceBook, made: Plan) -> bool:
    """Take a slot; whether one was to be had."""
    if not book.seat(sequence):
        made.refused.append((sequence.number, Refused.OUT_OF_SLOTS))
        return False
    return True


def _admit(sequence: Sequence, tokens: int, order: Order, book: SequenceBook, made: Plan) -> bool:
    """Take blocks for KV of `tokens` tokens; whether they were to be had."""
    try:
        book.reserve(sequence, tokens, borrow=order.borrow)
    except OutOfBlocks:
        made.refused.append((sequence.number, Refused.OUT_OF_BLOCKS))
        return False
    if not book.writes_alone(sequence, tokens):
        _reject(sequence, "about to write to blocks that others read", book, made)
        return False
    sequence.busy = True
    made.sequences[sequence.slot] = sequence
    return True


def _reject(sequence: Sequence, what: str, book: SequenceBook, made: Plan) -> None:
    """The scheduler and the worker disagree about a sequence: close it, so that it is computed anew."""
    made.refused.append((sequence.number, Refused.NOT_OPEN))
    made.problems.append(
        f"sequence {sequence.number}: {what}, with {sequence.ordered} of {sequence.known} tokens computed"
    )
    book.close([sequence.number])
