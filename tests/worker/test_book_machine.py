"""The worker's books under any orders, with executors that fail: nobody ever reads KV that is not its own
prefix's, writes to what others may read, or loses a block.

Lanes, book, prefix cache, pool and tables are the real ones. The executor is a dictionary that remembers
which tokens the KV at each place was computed from.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from muxserve.engine.messages import (
    LENGTH,
    UNFINISHED,
    DecodeJob,
    JobDone,
    PrefillJob,
    Sampling,
    Shares,
    Step,
)
from muxserve.engine.pool import BlockPool
from muxserve.engine.spec import KVLayout
from muxserve.engine.tables import SequenceTables
from muxserve.worker import jobs
from muxserve.worker.lanes import JobQueue, Lane
from muxserve.worker.models import LoadedModel, ModelChoice, ModelTable
from muxserve.worker.orders import (
    Chunk,
    DecodeOrder,
    Ended,
    Nearing,
    Opening,
    Order,
    Outcome,
    PrefillOrder,
    Tokens,
)
from muxserve.worker.prefix_cache import PrefixCache
from muxserve.worker.sequences import Sequence, SequenceBook
from muxserve.worker.shapes import ServedShape

CONTEXT = 24
SLOTS = 8
TEXTS = [[1] * CONTEXT, [1, 2] * 12, [2, 2, 1, 2, 1, 1] * 4, [2, 2] + [1] * CONTEXT]
"""What prompts begin with: much in common, and the same tokens after different ones."""
LAYOUTS = {
    "a": KVLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_bytes=128),  # spans of 2 tokens
    "b": KVLayout(layers=1, kv_heads=1, head_dim=4, dtype="float32", block_bytes=128),  # of 4
}


class Executor:
    """Runs nothing by itself: jobs lie here until the test has them end."""

    title = "executor"

    def __init__(self) -> None:
        self.ready: object | None = object()
        self.job: PrefillJob | DecodeJob | None = None

    def submit(self, job: PrefillJob | DecodeJob) -> None:
        assert self.job is None, "one job at a time"
        self.job = job

    def end_lease(self, job: int) -> None:
        pass

    def use_shares(self, job: int, shares: Shares) -> None:
        pass


@dataclass
class Asked:
    """A sequence as a scheduler knows it."""

    model: str
    known: list[int]
    limit: int
    ordered: int = 0
    orders: int = 0
    """Orders that it is in."""
    sampled: bool = False
    """Whether it can decode."""


@dataclass
class Scheduler:
    """Where jobs come from, and what it is told."""

    book: SequenceBook
    told: Callable[[Nearing | Tokens | Ended], None]

    def send(self, event: Nearing | Tokens | Ended) -> None:
        self.told(event)


class BookMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(16, 90), outputs=st.booleans(), enabled=st.sampled_from([True, True, True, False])
    )
    def start(self, blocks: int, outputs: bool, enabled: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(jobs, "WORTH_WAITING", 2)
        self.pool = BlockPool(blocks)
        self.models: dict[str, LoadedModel] = {}
        for name in LAYOUTS:
            self.load(name)
        prefixes = PrefixCache(self.pool, enabled=enabled, outputs=outputs)
        self.book = SequenceBook(cast(ModelTable, self.models), self.pool, prefixes)
        self.owner = Scheduler(self.book, self.on_event)
        numbers = count(1)
        self.queues = {
            "prefill": JobQueue(self.pool, numbers, self.divide),
            "decode": JobQueue(self.pool, numbers, self.divide, lanes=2),
        }
        lanes = [lane for queue in self.queues.values() for lane in queue.lanes]
        self.lanes = dict(zip(("prefill", "decode", "second"), lanes, strict=True))
        self.executors = {kind: Executor() for kind in self.lanes}
        for kind, lane in self.lanes.items():
            lane.executor = cast(Any, self.executors[kind])
        self.kv: dict[tuple[int, int], tuple[str | int, ...]] = {}
        """By block and place in it: the model, and the tokens that it was computed from."""
        self.asked: dict[int, Asked] = {}
        self.orders: dict[int, Order] = {}
        self.numbers = count(1)

    def teardown(self) -> None:
        if not hasattr(self, "patch"):
            return
        self.patch.undo()
        self.book.close_all()
        for kind in self.lanes:
            while self.executors[kind].job is not None:
                self.finish(kind)
        self.pool.check_integrity()
        assert self.pool.available_blocks == self.pool.blocks
        assert not self.orders, "every job has ended"
        for model in self.models.values():
            model.tables.check_integrity()
            assert model.tables.free_slots == SLOTS
            assert model.open_sequences == 0
            model.tables.close()

    def load(self, name: str) -> None:
        layout = LAYOUTS[name]
        tables = SequenceTables.create(layout, SLOTS, CONTEXT)
        weights: Any = SimpleNamespace(spec=SimpleNamespace(vocab_size=9))
        shape = ServedShape(weights, layout, CONTEXT, SLOTS)
        self.pool.register(name, layout, self.pool.blocks)
        self.models[name] = LoadedModel(ModelChoice(name, "x"), shape, tables, AsyncExitStack())

    def divide(self) -> None:
        prefill, decode = (self.queues[kind].shares for kind in ("prefill", "decode"))
        models = [order.model for lane in self.queues["decode"].lanes if (order := lane.order)]
        assert len(set(models)) == len(models), "two jobs of a model may have sequences in common"
        shares = Shares(sum(prefill), sum(decode), max(1, len(decode)))
        for queue in self.queues.values():
            queue.use_shares(shares)

    # What the scheduler hears

    def on_event(self, event: Nearing | Tokens | Ended) -> None:
        if isinstance(event, Tokens):
            for number, position, token in zip(
                event.sequences, event.step.positions, event.step.tokens, strict=True
            ):
                if (asked := self.asked.get(number)) is not None:
                    assert position == len(asked.known)
                    asked.known.append(token)
                    asked.sampled = True
            return
        assert isinstance(event, Ended)
        order = self.orders.pop(event.job)
        refused = dict(event.refused)
        for number in order.sequences:
            if number in self.asked:
                self.asked[number].orders -= 1
        if event.outcome is not Outcome.OK:
            for number in order.sequences:
                self.asked.pop(number, None)
            return
        total = len(order.prompts) * CONTEXT if isinstance(order, DecodeOrder) else 0
        if isinstance(order, PrefillOrder):
            for chunk in order.chunks:
                total += chunk.end - chunk.start
                if chunk.sequence not in refused and chunk.sequence in self.asked:
                    assert chunk.end < len(self.asked[chunk.sequence].known), "the last one samples"
                    self.asked[chunk.sequence].ordered = chunk.end
        assert 0 <= event.cached_tokens <= total
        assert "tokens computed" not in event.error, "both sides agree on how far each sequence is"
        for number in refused:
            if self.asked.pop(number, None) is not None:
                self.book.close([number])

    # Orders

    @rule(
        model=st.sampled_from(sorted(LAYOUTS)),
        text=st.sampled_from(TEXTS),
        cut=st.integers(0, CONTEXT - 4),
        own=st.lists(st.integers(1, 2), min_size=1, max_size=2),
        more=st.integers(1, 8),
    )
    def open(self, model: str, text: list[int], cut: int, own: list[int], more: int) -> None:
        tokens = text[:cut] + own
        number = next(self.numbers)
        limit = min(CONTEXT, len(tokens) + more)
        self.asked[number] = Asked(model, list(tokens), limit)
        self.book.open(Opening(number, model, tuple(tokens), limit, Sampling()))

    def ready(self, model: str, *, sampled: bool) -> list[int]:
        """Sequences that a sensible scheduler could put into an order to decode, or of prompts."""
        return [
            number
            for number, asked in self.asked.items()
            if asked.model == model
            and not asked.orders
            and asked.sampled is sampled
            and len(asked.known) < asked.limit
        ]

    def submit(self, kind: str, order: Order) -> None:
        self.orders[order.job] = order
        for number in order.sequences:
            self.asked[number].orders += 1
        self.queues[kind].submit(self.owner, order)

    @rule(model=st.sampled_from(sorted(LAYOUTS)), data=st.data(), borrow=st.booleans())
    def prefill(self, model: str, data: st.DataObject, borrow: bool) -> None:
        if not (ready := self.ready(model, sampled=False)):
            return
        chunks = []
        for number in data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=4, unique=True)):
            start, known = self.asked[number].ordered, len(self.asked[number].known)
            end = data.draw(st.just(known) | st.integers(start + 1, known))
            chunks.append(Chunk(number, start, end))
        self.submit("prefill", PrefillOrder(next(self.numbers), model, tuple(chunks), 0.5, borrow))

    @rule(
        model=st.sampled_from(sorted(LAYOUTS)), data=st.data(), steps=st.integers(1, 4), borrow=st.booleans()
    )
    def decode(self, model: str, data: st.DataObject, steps: int, borrow: bool) -> None:
        prompts = self.ready(model, sampled=False) if data.draw(st.booleans()) else []
        if ready := self.ready(model, sampled=True) + prompts:
            chosen = data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=4, unique=True))
            self.submit_decode(model, chosen, prompts, steps, borrow)

    def submit_decode(
        self, model: str, chosen: list[int], prompts: list[int], steps: int, borrow: bool = True
    ) -> None:
        joining = frozenset(prompts) & frozenset(chosen)
        number = next(self.numbers)
        order = DecodeOrder(number, model, tuple(chosen), steps, 0.5, borrow=borrow, prompts=joining)
        self.submit("decode", order)

    @rule(
        model=st.sampled_from(sorted(LAYOUTS)),
        prompts=st.lists(st.tuples(st.sampled_from(TEXTS), st.integers(3, 20)), min_size=2, max_size=4),
        steps=st.integers(0, 3),
        part=st.integers(1, 30),
        last=st.sampled_from(["ok", "ok", "ok", "error", "not finite"]),
        keep=st.integers(0, 1),
        join=st.booleans(),
    )
    def serve(
        self,
        model: str,
        prompts: list[tuple[list[int], int]],
        steps: int,
        part: int,
        last: str,
        keep: int,
        join: bool,
    ) -> None:
        """What most sequences do, in one go, so that what is cached and what is found are common."""
        before = self.asked.keys() | set()
        for text, cut in prompts:
            self.open(model, text, cut, [2], 4)
        new = [number for number in self.asked if number not in before]
        for end in (part,) if join else (part, CONTEXT):
            chunks = tuple(
                Chunk(number, asked.ordered, min(end, len(asked.known)))
                for number in new
                if (asked := self.asked.get(number))
                and asked.ordered < len(asked.known)
                and not asked.sampled
            )
            if chunks:
                self.submit("prefill", PrefillOrder(next(self.numbers), model, chunks, 0.5, True))
            while self.executors["prefill"].job is not None:
                self.finish("prefill")
        joining = [n for n in self.ready(model, sampled=False) if n in new] if join else []
        if steps and (going := [n for n in self.ready(model, sampled=True) if n in new] + joining):
            self.submit_decode(model, going, joining, steps)
            while running := [kind for kind in ("decode", "second") if self.executors[kind].job is not None]:
                self.finish(running[0], last)
        gone = [number for number in new if number in self.asked][keep:]
        for number in gone:
            del self.asked[number]
        self.book.close(gone)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.asked)), min_size=1, max_size=3, unique=True))
        for number in chosen:
            del self.asked[number]
        self.book.close(chosen)

    @rule(model=st.sampled_from(sorted(LAYOUTS)), quota=st.integers(0, 30))
    def set_quota(self, model: str, quota: int) -> None:
        self.pool.set_quota(model, quota)

    @rule(model=st.sampled_from(sorted(LAYOUTS)))
    def load_again(self, model: str) -> None:
        if self.models[model].open_sequences == 0:
            self.pool.unregister(model)
            self.models[model].tables.close()
            self.load(model)

    # What executors do

    @rule(
        kind=st.sampled_from(["prefill", "prefill", "decode", "second"]),
        outcome=st.sampled_from(["ok", "ok", "ok", "ok", "stopped", "error", "lost", "not finite"]),
    )
    def finish(self, kind: str, outcome: str = "ok") -> None:
        """The job that runs, if one does, ends; one that decodes and is stopped before its first step."""
        executor, lane = self.executors[kind], self.lanes[kind]
        if (job := executor.job) is None:
            return
        if isinstance(job, PrefillJob):
            self.run_prefill(job, lane, outcome)
        else:
            self.run_decode(job, lane, outcome)
        executor.job = None
        if outcome == "lost":
            executor.ready = None
            lane.on_executor()
            executor.ready = object()
            lane.on_executor()
        else:
            lane.on_report(JobDone(job.job, 1, 0.1, "it failed" if outcome == "error" else ""))

    def run_prefill(self, job: PrefillJob, lane: Lane, outcome: str) -> None:
        for chunk in job.chunks:
            self.compute(job.model, chunk.slot, chunk.start, chunk.end)
        ends = [(chunk.slot, chunk.end, chunk.limit) for chunk in job.chunks if chunk.sampling is not None]
        if ends and outcome in ("ok", "stopped", "not finite"):
            lane.on_report(self.sample(job.job, job.model, ends, outcome == "not finite"))

    def run_decode(self, job: DecodeJob, lane: Lane, outcome: str) -> None:
        if outcome == "stopped":
            return
        rows = [(row.slot, row.length, row.limit) for row in job.rows]
        starts = {row.slot: row.start for row in job.rows if row.start >= 0}
        for step in range(job.steps):
            for slot, length, _ in rows:
                self.compute(job.model, slot, starts.pop(slot, length - 1), length)
            if outcome in ("error", "lost") and step == 1:
                return
            fails = outcome == "not finite" and step == min(1, job.steps - 1)
            told = self.sample(job.job, job.model, rows, fails)
            lane.on_report(told)
            rows = [(s, n + 1, limit) for s, n, limit in rows if n + 1 < limit and s not in told.failed]
            if not rows:
                return

    def compute(self, model: str, slot: int, start: int, end: int) -> None:
        """Read what is there up to `start`, write what is missing up to `end`."""
        tables = self.models[model].tables
        size = LAYOUTS[model].tokens_per_block
        for position in range(end):
            value = (model, *tables.tokens[slot, : position + 1].tolist())
            blocks = tables.blocks[:, slot, :, position // size].ravel().tolist()
            assert min(blocks) >= 0
            for block in blocks:
                if position < start:
                    assert self.kv[block, position % size] == value
                else:
                    self.kv[block, position % size] = value
            assert position < start or self.pool.private(blocks[0])

    def sample(self, job: int, model: str, rows: list[tuple[int, int, int]], fails: bool) -> Step:
        """One step's tokens; the first row has none if it `fails`."""
        failed = (rows[0][0],) if fails else ()
        rows = rows[1:] if fails else rows
        tables = self.models[model].tables
        for slot in failed:
            self.spoil(model, slot)
        tokens = [1 + int(tables.tokens[slot, :length].sum()) % 2 for slot, length, _ in rows]
        for (slot, length, _), token in zip(rows, tokens, strict=True):
            tables.tokens[slot, length] = token
        return Step(
            job,
            slots=tuple(slot for slot, _, _ in rows),
            positions=tuple(length for _, length, _ in rows),
            tokens=tuple(tokens),
            finished=tuple(LENGTH if length + 1 == limit else UNFINISHED for _, length, limit in rows),
            failed=failed,
        )

    def spoil(self, model: str, slot: int) -> None:
        """What this sequence alone holds is not what its tokens come to: nobody is to read it again."""
        for span in range(LAYOUTS[model].spans(CONTEXT)):
            blocks = self.models[model].tables.blocks[:, slot, :, span].ravel().tolist()
            if min(blocks) >= 0 and self.pool.references(blocks[0]) == 1:
                self.kv.update(
                    {
                        (block, at): ("spoilt",)
                        for block in blocks
                        for at in range(LAYOUTS[model].tokens_per_block)
                    }
                )

    # What always holds

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        open_now = [s for n in list(self.book._open) if (s := self.book.get(n)) is not None]
        assert {sequence.number for sequence in open_now} <= self.asked.keys(), "what is lost is closed"
        for sequence in open_now:
            self.check(sequence)

    def check(self, sequence: Sequence) -> None:
        """What it takes for computed is there, and what it will write is its own."""
        size = sequence.model.shape.layout.tokens_per_block
        assert sequence.ordered <= sequence.known
        assert sequence.published * size <= sequence.computed <= sequence.known
        if not sequence.busy and sequence.spans:
            self.compute(sequence.model.name, sequence.slot, sequence.computed, sequence.computed)
            heads = sequence.model.tables.blocks[0, sequence.slot, 0, : sequence.spans].tolist()
            assert all(self.pool.private(head) for head in heads[sequence.computed // size :])


TestBookMachine = BookMachine.TestCase
TestBookMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
