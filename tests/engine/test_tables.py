"""SequenceTables: what the worker writes is what executors read."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxserve.engine.spec import KVLayout
from muxserve.engine.tables import NoFreeSlot, SequenceTables, TablesError, TableViews, table_bytes

LAYOUT = KVLayout(layers=3, kv_heads=2, head_dim=80, dtype="float32", block_bytes=4096)  # T = 6
SLOTS, CONTEXT = 4, 50


@pytest.fixture
def tables() -> Iterator[SequenceTables]:
    made = SequenceTables.create(LAYOUT, SLOTS, CONTEXT)
    yield made
    made.check_integrity()
    made.close()


def groups(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count * 6, dtype=np.int32).reshape(count, 6)


def test_shapes_and_first_contents(tables: SequenceTables) -> None:
    assert tables.blocks.shape == (3, 4, 2, 9)
    assert tables.tokens.shape == (4, 50)
    assert (tables.blocks == -1).all()
    assert table_bytes(LAYOUT, SLOTS, CONTEXT) == tables.blocks.nbytes + tables.tokens.nbytes


def test_a_group_lands_at_its_layer_head_and_span_only(tables: SequenceTables) -> None:
    slot = tables.acquire("r1")
    ids = groups(100, 2)
    tables.assign(slot, 3, ids)
    for layer in range(3):
        for head in range(2):
            assert tables.blocks[layer, slot, head, 3:5].tolist() == ids[:, layer * 2 + head].tolist()
    assert (tables.blocks != -1).sum() == 12


def test_groups_come_back_as_assigned(tables: SequenceTables) -> None:
    slot = tables.acquire("r1")
    tables.assign(slot, 0, groups(0, 2))
    tables.assign(slot, 2, groups(60, 1))
    back = tables.groups(slot, 3)
    assert np.array_equal(back, np.concatenate([groups(0, 2), groups(60, 1)]))
    tables.clear(slot)
    assert back[0, 0] == 0, "a copy, not a view"
    assert tables.groups(slot, 0).shape == (0, 6)


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 8)), unique=True, max_size=20),
    first=st.integers(0, 1000),
)
def test_extend_equals_one_assign_each(pairs: list[tuple[int, int]], first: int) -> None:
    one, many = SequenceTables.create(LAYOUT, SLOTS, CONTEXT), SequenceTables.create(LAYOUT, SLOTS, CONTEXT)
    ids = groups(first, len(pairs))
    for made in (one, many):
        for _ in range(SLOTS):
            made.acquire("r")
    for (slot, span), row in zip(pairs, ids, strict=True):
        one.assign(slot, span, row[None])
    many.extend([slot for slot, _ in pairs], [span for _, span in pairs], ids)
    assert np.array_equal(one.blocks, many.blocks)
    for slot in range(SLOTS):
        one.release(slot)
        many.release(slot)
    assert (one.blocks == -1).all()
    assert (many.blocks == -1).all()


def test_a_released_slot_is_empty_and_goes_to_the_next_owner(tables: SequenceTables) -> None:
    slots = [tables.acquire(name) for name in "abcd"]
    assert sorted(slots) == [0, 1, 2, 3]
    with pytest.raises(NoFreeSlot):
        tables.acquire("e")
    tables.assign(slots[1], 0, groups(0, 9))
    tables.release(slots[1])
    assert tables.free_slots == 1
    assert tables.acquire("e") == slots[1]
    assert tables.owner(slots[1]) == "e"
    assert (tables.blocks == -1).all()


def test_a_slot_nobody_has_cannot_be_released(tables: SequenceTables) -> None:
    with pytest.raises(KeyError):
        tables.release(0)
    with pytest.raises(KeyError):
        tables.owner(0)


def test_spans_past_the_context_are_refused(tables: SequenceTables) -> None:
    slot = tables.acquire("r1")
    for first in (-1, 8):
        with pytest.raises(IndexError):
            tables.assign(slot, first, groups(0, 2))
    for span in (-1, 9):
        with pytest.raises(IndexError):
            tables.extend([slot], [span], groups(0, 1))
    assert (tables.blocks == -1).all()


def test_an_attached_side_shares_both_tables(tables: SequenceTables) -> None:
    fd = os.dup(tables.fd)
    views = TableViews.attach(fd, LAYOUT, SLOTS, CONTEXT)
    os.close(fd)
    slot = tables.acquire("r1")
    tables.assign(slot, 0, groups(0, 1))
    tables.tokens[slot, :3] = [5, 6, 7]
    assert np.array_equal(views.blocks, tables.blocks)
    views.tokens[slot, 3] = 8
    assert tables.tokens[slot, :4].tolist() == [5, 6, 7, 8]
    views.close()
    views.close()


def test_attaching_with_another_shape_is_refused(tables: SequenceTables) -> None:
    with pytest.raises(ValueError, match="bytes"):
        TableViews.attach(tables.fd, LAYOUT, SLOTS, CONTEXT + 1)


def test_torch_views_are_the_same_memory(tables: SequenceTables) -> None:
    blocks, tokens = tables.torch_views()
    slot = tables.acquire("r1")
    tables.assign(slot, 0, groups(0, 1))
    tokens[slot, 0] = 42
    assert blocks[:, slot, :, 0].flatten().tolist() == list(range(6))
    assert tables.tokens[slot, 0] == 42


def test_sizes_that_make_no_table_are_refused() -> None:
    for slots, context in ((0, 10), (1, 0)):
        with pytest.raises(ValueError, match="tables of"):
            SequenceTables.create(LAYOUT, slots, context)


def test_check_integrity_sees_lost_slots_and_stale_blocks() -> None:
    made = SequenceTables.create(LAYOUT, SLOTS, CONTEXT)
    made.blocks[0, 2, 0, 0] = 1
    with pytest.raises(TablesError, match="slot 2"):
        made.check_integrity()
    made.blocks.fill(-1)
    made._free.pop()
    with pytest.raises(TablesError, match="add up"):
        made.check_integrity()
