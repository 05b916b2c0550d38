"""BlockPool against a model of it made of plain sets and lists: any sequence of operations, same answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from muxserve.engine.groups import BlockIds
from muxserve.engine.pool import BlockPool, InvalidGroups, ModelBusy, OutOfBlocks
from muxserve.engine.spec import KVLayout

NAMES = ("a", "b", "c")
LAYOUTS = {
    "a": KVLayout(layers=2, kv_heads=1, head_dim=64, dtype="float32", block_bytes=4096),
    "b": KVLayout(layers=3, kv_heads=1, head_dim=80, dtype="bfloat16", block_bytes=4096),
    "c": KVLayout(layers=2, kv_heads=2, head_dim=128, dtype="bfloat16", block_bytes=4096),
}


@dataclass
class Group:
    """A group as the naive model knows it."""

    model: str
    blocks: tuple[int, ...]
    references: int = 1
    span_hash: int | None = None


@dataclass
class Sequence:
    model: str
    groups: list[Group] = field(default_factory=list)

    def ids(self) -> BlockIds:
        width = LAYOUTS[self.model].blocks_per_span
        return np.array([g.blocks for g in self.groups], dtype=np.int32).reshape(len(self.groups), width)


class PoolMachine(RuleBasedStateMachine):
    sequences: Bundle[Sequence] = Bundle("sequences")

    @initialize(blocks=st.integers(1, 40), quota=st.integers(0, 40))
    def start(self, blocks: int, quota: int) -> None:
        self.blocks = blocks
        self.pool = BlockPool(blocks)
        self.free: set[int] = set(range(blocks))
        self.groups: list[Group] = []  # held and cached
        self.cached: list[Group] = []  # least recently used first
        self.quota: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        for model in NAMES[:2]:
            self.register(model, quota)

    def held(self, model: str) -> int:
        return sum(len(g.blocks) for g in self.groups if g.model == model and g.references)

    def available(self) -> int:
        return len(self.free) + sum(len(g.blocks) for g in self.cached)

    def forget(self, group: Group) -> None:
        self.groups.remove(group)
        self.free |= set(group.blocks)

    def touch_peak(self, model: str) -> None:
        self.peak[model] = max(self.peak[model], self.held(model))

    @rule(model=st.sampled_from(NAMES), quota=st.integers(0, 40))
    def register(self, model: str, quota: int) -> None:
        if model in self.quota:
            with pytest.raises(ModelBusy):
                self.pool.register(model, LAYOUTS[model], quota)
            return
        self.pool.register(model, LAYOUTS[model], quota)
        self.quota[model], self.peak[model] = quota, 0

    @rule(model=st.sampled_from(NAMES))
    def unregister(self, model: str) -> None:
        if model not in self.quota:
            with pytest.raises(KeyError):
                self.pool.unregister(model)
        elif self.held(model):
            with pytest.raises(ModelBusy):
                self.pool.unregister(model)
        else:
            self.pool.unregister(model)
            for group in [g for g in self.cached if g.model == model]:
                self.cached.remove(group)
                self.forget(group)
            del self.quota[model], self.peak[model]

    @precondition(lambda self: self.quota)
    @rule(data=st.data(), above_held=st.integers(-8, 12))
    def set_quota(self, data: st.DataObject, above_held: int) -> None:
        model = data.draw(st.sampled_from(sorted(self.quota)))
        quota = max(0, self.held(model) + above_held)
        self.pool.set_quota(model, quota)
        self.quota[model] = quota

    def allocate(self, model: str, count: int, borrow: bool) -> list[Group] | None:
        """Both sides allocate; None if both refuse."""
        wanted = count * LAYOUTS[model].blocks_per_span
        room = self.available()
        if not borrow:
            room = min(room, max(0, self.quota[model] - self.held(model)))
        if wanted > room:
            with pytest.raises(OutOfBlocks) as caught:
                self.pool.allocate(model, count, borrow=borrow)
            assert (caught.value.wanted, caught.value.available) == (wanted, room)
            assert caught.value.limit == ("pool" if wanted > self.available() else "quota")
            assert caught.value.borrowers == {
                m: self.held(m) - q for m, q in self.quota.items() if self.held(m) > q
            }
            return None
        while len(self.free) < wanted:
            self.forget(self.cached.pop(0))
        new = [Group(model, tuple(row)) for row in self.pool.allocate(model, count, borrow=borrow).tolist()]
        taken = [block for group in new for block in group.blocks]
        assert len(taken) == len(set(taken)) == wanted
        assert set(taken) <= self.free
        self.free -= set(taken)
        self.groups += new
        self.touch_peak(model)
        return new

    @precondition(lambda self: self.quota)
    @rule(target=sequences, data=st.data(), count=st.integers(0, 6), borrow=st.booleans())
    def begin(self, data: st.DataObject, count: int, borrow: bool) -> Sequence:
        model = data.draw(st.sampled_from(sorted(self.quota)))
        groups = self.allocate(model, count, borrow)
        return multiple() if groups is None else Sequence(model, groups)  # type: ignore[return-value]

    @rule(sequence=sequences, count=st.integers(1, 3), borrow=st.booleans())
    def extend(self, sequence: Sequence, count: int, borrow: bool) -> None:
        if sequence.model in self.quota:  # else an empty sequence of a model that has gone
            sequence.groups += self.allocate(sequence.model, count, borrow) or []

    @rule(target=sequences, sequence=sequences, keep=st.integers(0, 6))
    def share(self, sequence: Sequence, keep: int) -> Sequence:
        fork = Sequence(sequence.model, sequence.groups[:keep])
        if fork.groups:
            self.pool.share(fork.model, fork.ids())
        for group in fork.groups:
            group.references += 1
        return fork

    @rule(sequence=consumes(sequences))
    def free_sequence(self, sequence: Sequence) -> None:
        if not sequence.groups:
            return
        self.pool.free(sequence.model, sequence.ids())
        for group in sequence.groups:
            group.references -= 1
        gone = {g.blocks: g for g in sequence.groups if not g.references}  # a lookup may find a group twice
        for group in reversed(gone.values()):
            if group.span_hash is None:
                self.forget(group)
            else:
                self.cached.append(group)

    @precondition(lambda self: self.quota)
    @rule(data=st.data(), hashes=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    def live_a_whole_life(self, data: st.DataObject, hashes: list[int]) -> None:
        """What most sequences do, in one step, so that cached groups and evictions are common."""
        model = data.draw(st.sampled_from(sorted(self.quota)))
        sequence = Sequence(model, self.allocate(model, len(hashes), borrow=True) or [])
        data.draw(st.randoms(use_true_random=False)).shuffle(sequence.groups)
        self.publish(sequence, hashes)
        self.free_sequence(sequence)

    @rule(sequence=sequences)
    def free_too_often(self, sequence: Sequence) -> None:
        if sequence.groups:
            times = 1 + max(g.references for g in sequence.groups)
            with pytest.raises(InvalidGroups):
                self.pool.free(sequence.model, np.concatenate([sequence.ids()] * times))

    @rule(sequence=sequences, hashes=st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def publish(self, sequence: Sequence, hashes: list[int]) -> None:
        groups = sequence.groups[: len(hashes)]
        if not groups:
            return
        hashes = hashes[: len(groups)]
        new = 0
        for span_hash, group in zip(hashes, groups, strict=True):
            known = {g.span_hash for g in self.groups if g.model == sequence.model}
            if span_hash not in known and group.span_hash is None:
                group.span_hash = span_hash
                new += 1
        assert self.pool.publish(sequence.model, hashes, sequence.ids()[: len(groups)]) == new

    @precondition(lambda self: self.quota)
    @rule(
        target=sequences,
        data=st.data(),
        hashes=st.lists(st.integers(0, 5), max_size=4),
        borrow=st.booleans(),
    )
    def lookup(self, data: st.DataObject, hashes: list[int], borrow: bool) -> Sequence:
        model = data.draw(st.sampled_from(sorted(self.quota)))
        expected = Sequence(model)
        by_hash = {g.span_hash: g for g in self.groups if g.model == model and g.span_hash is not None}
        for span_hash in hashes:
            group = by_hash.get(span_hash)
            if group is None:
                break
            if group in self.cached:
                if not borrow and self.held(model) + len(group.blocks) > self.quota[model]:
                    break
                self.cached.remove(group)
            group.references += 1
            expected.groups.append(group)
            self.touch_peak(model)
        found = self.pool.lookup(model, hashes, borrow=borrow)
        assert np.array_equal(found, expected.ids())
        return expected

    @rule(sequence=sequences)
    def withdraw(self, sequence: Sequence) -> None:
        if sequence.groups:
            self.pool.withdraw(sequence.model, sequence.ids())
        for group in sequence.groups:
            group.span_hash = None

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free_blocks == len(self.free)
        assert self.pool.available_blocks == self.available()
        assert self.pool.models == tuple(self.quota)
        for group in self.groups:
            assert self.pool.references(group.blocks[0]) == group.references
            alone = group.references == 1 and group.span_hash is None
            assert self.pool.private(group.blocks[0]) == alone
        for model, quota in self.quota.items():
            use = self.pool.use(model)
            assert use.held == self.held(model)
            assert use.quota == quota
            assert use.borrowed == max(0, use.held - quota)
            assert use.peak == self.peak[model]
            assert use.cached == sum(len(g.blocks) for g in self.cached if g.model == model)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
