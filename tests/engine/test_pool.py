"""BlockPool: one claim per test. test_pool_machine.py exercises all operations together."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from muxserve.engine.pool import BlockPool, InvalidGroups, ModelBusy, OutOfBlocks, PoolIntegrityError
from muxserve.engine.spec import KVLayout

SMALL = KVLayout(layers=2, kv_heads=1, head_dim=64, dtype="float32", block_bytes=4096)
LARGE = KVLayout(layers=3, kv_heads=2, head_dim=128, dtype="bfloat16", block_bytes=4096)


def make_pool(blocks: int = 24, **quotas: int) -> BlockPool:
    """Models named s… have groups of 2 blocks, all others of 6."""
    pool = BlockPool(blocks)
    for model, quota in quotas.items():
        pool.register(model, SMALL if model.startswith("s") else LARGE, quota)
    return pool


def test_models_of_different_layout_share_the_pool_without_overlap() -> None:
    pool = make_pool(24, small=24, large=24)
    small, large = pool.allocate("small", 3), pool.allocate("large", 3)
    assert small.shape == (3, 2)
    assert large.shape == (3, 6)
    assert small.dtype == large.dtype == np.int32
    assert sorted([*small.ravel(), *large.ravel()]) == list(range(24))
    assert pool.free_blocks == 0
    pool.check_integrity()


def test_allocation_is_all_or_nothing() -> None:
    pool = make_pool(5, s=100)
    with pytest.raises(OutOfBlocks) as caught:
        pool.allocate("s", 3)
    assert (caught.value.wanted, caught.value.available, caught.value.limit) == (6, 5, "pool")
    assert pool.free_blocks == 5
    assert pool.use("s").held == 0


def test_zero_groups_is_an_empty_array() -> None:
    pool = make_pool(s=0)
    ids = pool.allocate("s", 0)
    assert ids.shape == (0, 2)
    pool.free("s", ids)
    pool.free("s", [])
    pool.check_integrity()


def test_above_quota_only_by_borrowing() -> None:
    pool = make_pool(24, s=4)
    pool.allocate("s", 2)
    with pytest.raises(OutOfBlocks) as caught:
        pool.allocate("s", 1)
    assert (caught.value.limit, caught.value.available) == ("quota", 0)
    pool.allocate("s", 3, borrow=True)
    assert pool.use("s").borrowed == 6
    assert pool.borrowers() == {"s": 6}


def test_a_model_within_quota_learns_who_borrows() -> None:
    pool = make_pool(12, s=4, large=6)
    pool.allocate("s", 5, borrow=True)
    with pytest.raises(OutOfBlocks) as caught:
        pool.allocate("large", 1)
    assert caught.value.limit == "pool"
    assert caught.value.borrowers == {"s": 6}


def test_a_quota_below_held_takes_nothing_and_counts_as_borrowed() -> None:
    pool = make_pool(24, s=10)
    ids = pool.allocate("s", 5)
    pool.set_quota("s", 4)
    assert pool.use("s").held == 10
    assert pool.use("s").borrowed == 6
    with pytest.raises(OutOfBlocks):
        pool.allocate("s", 1)
    pool.free("s", ids[:4])
    pool.allocate("s", 1)


def test_peak_is_the_most_ever_held() -> None:
    pool = make_pool(24, s=24)
    pool.free("s", pool.allocate("s", 7))
    pool.allocate("s", 1)
    assert pool.use("s").peak == 14


def test_a_shared_group_is_held_once_and_free_after_its_last_holder() -> None:
    pool = make_pool(8, s=8)
    ids = pool.allocate("s", 2)
    pool.share("s", ids)
    assert pool.use("s").held == 4
    pool.free("s", ids)
    assert pool.free_blocks == 4
    pool.free("s", ids)
    assert pool.free_blocks == 8
    pool.check_integrity()


def test_one_call_may_give_back_several_references_of_a_group() -> None:
    pool = make_pool(8, s=8)
    ids = pool.allocate("s", 2)
    pool.share("s", ids[:1])
    pool.free("s", ids[[0, 1, 0]])
    assert pool.free_blocks == 8
    pool.check_integrity()


@pytest.mark.parametrize(
    "what", ["twice", "in_one_call", "foreign", "mixed", "part", "repeated", "outside", "shape"]
)
def test_ids_that_are_not_held_groups_change_nothing(what: str) -> None:
    pool = make_pool(24, s=24, sother=24)
    ids, foreign = pool.allocate("s", 3), pool.allocate("sother", 1)
    bad = {
        "twice": ids[:1],
        "in_one_call": ids[[1, 2, 1]],
        "foreign": foreign,
        "mixed": np.array([[ids[1, 0], ids[2, 1]]]),
        "part": ids[1:, ::-1],
        "repeated": ids[1:, [0, 0]],
        "outside": ids[1:] + 24,
        "shape": ids[1],
    }[what]
    if what == "twice":
        pool.free("s", ids[:1])
    before = pool.free_blocks
    with pytest.raises(InvalidGroups):
        pool.free("s", bad)
    assert pool.free_blocks == before
    pool.check_integrity()


def test_a_published_prefix_is_found_after_its_sequence_ended() -> None:
    pool = make_pool(24, s=24)
    ids = pool.allocate("s", 4)
    assert pool.publish("s", [b"0", b"1", b"2"], ids[:3]) == 3
    pool.free("s", ids)
    assert (pool.free_blocks, pool.cached_blocks, pool.available_blocks) == (18, 6, 24)
    hit = pool.lookup("s", [b"0", b"1", b"x", b"2"])
    assert np.array_equal(hit, ids[:2])
    assert pool.use("s").held == 4
    assert pool.use("s").cached == 2
    pool.check_integrity()


def test_a_prefix_that_is_in_use_is_shared_by_lookup() -> None:
    pool = make_pool(4, s=4)
    ids = pool.allocate("s", 2)
    pool.publish("s", [b"0", b"1"], ids)
    hit = pool.lookup("s", [b"0", b"1"])
    pool.free("s", ids)
    assert pool.use("s").held == 4
    pool.free("s", hit)
    assert pool.cached_blocks == 4


def test_prefixes_belong_to_their_model() -> None:
    pool = make_pool(24, s=24, sother=24)
    pool.publish("s", [b"0"], pool.allocate("s", 1))
    assert pool.lookup("sother", [b"0"]).shape == (0, 2)


def test_cached_groups_are_free_memory_for_any_model_oldest_and_last_span_first() -> None:
    pool = make_pool(12, s=12, large=12)
    old, new = pool.allocate("s", 2), pool.allocate("s", 2)
    pool.publish("s", [b"old0", b"old1"], old)
    pool.publish("s", [b"new0", b"new1"], new)
    pool.free("s", old)
    pool.free("s", new)
    pool.allocate("large", 1)  # 4 blocks were free, 6 are wanted
    assert len(pool.lookup("s", [b"old0", b"old1"])) == 1
    assert len(pool.lookup("s", [b"new0", b"new1"])) == 2
    pool.check_integrity()


def test_reviving_a_cached_prefix_stays_within_the_quota() -> None:
    pool = make_pool(12, s=12)
    ids = pool.allocate("s", 3)
    pool.publish("s", [b"0", b"1", b"2"], ids)
    pool.free("s", ids)
    pool.set_quota("s", 4)
    hit = pool.lookup("s", [b"0", b"1", b"2"])
    assert len(hit) == 2
    assert len(pool.lookup("s", [b"0", b"1", b"2"], borrow=True)) == 3


def test_a_refused_allocation_evicts_nothing() -> None:
    pool = make_pool(8, s=8, large=8)
    ids = pool.allocate("s", 4)
    pool.publish("s", [b"0", b"1", b"2"], ids[:3])
    pool.free("s", ids[:3])
    with pytest.raises(OutOfBlocks):
        pool.allocate("large", 2)
    assert pool.cached_blocks == 6


def test_a_cached_group_is_held_by_nobody() -> None:
    pool = make_pool(8, s=8)
    ids = pool.allocate("s", 1)
    pool.publish("s", [b"0"], ids)
    pool.free("s", ids)
    for call in (pool.free, pool.share):
        with pytest.raises(InvalidGroups, match="not all are held"):
            call("s", ids)
    pool.check_integrity()


def test_the_second_copy_of_a_prefix_is_freed_not_cached() -> None:
    pool = make_pool(8, s=8)
    first, second = pool.allocate("s", 1), pool.allocate("s", 1)
    assert pool.publish("s", [b"0"], first) == 1
    assert pool.publish("s", [b"0"], second) == 0
    assert pool.publish("s", [b"other"], first) == 0
    pool.free("s", second)
    assert (pool.free_blocks, pool.cached_blocks) == (6, 0)
    with pytest.raises(ValueError, match="hashes"):
        pool.publish("s", [], first)


def test_unregister_refuses_while_blocks_are_held_and_drops_cached_ones() -> None:
    pool = make_pool(8, s=8)
    ids = pool.allocate("s", 2)
    pool.publish("s", [b"0"], ids[:1])
    with pytest.raises(ModelBusy, match="4 blocks"):
        pool.unregister("s")
    pool.free("s", ids)
    pool.unregister("s")
    assert pool.free_blocks == 8
    pool.register("s", SMALL, 8)
    assert len(pool.lookup("s", [b"0"])) == 0
    pool.check_integrity()


def test_bad_arguments_are_named() -> None:
    pool = make_pool(8, s=8)
    with pytest.raises(ModelBusy, match="registered already"):
        pool.register("s", SMALL, 8)
    with pytest.raises(ValueError, match="quota"):
        pool.register("t", SMALL, -1)
    with pytest.raises(ValueError, match="quota"):
        pool.set_quota("s", -1)
    with pytest.raises(ValueError, match="groups"):
        pool.allocate("s", -1)
    with pytest.raises(ValueError, match="holds no token"):
        pool.register("t", KVLayout(layers=1, kv_heads=1, head_dim=256, dtype="float32", block_bytes=1024), 1)
    with pytest.raises(ValueError, match="blocks"):
        BlockPool(0)
    for call in (pool.unregister, pool.use, lambda m: pool.allocate(m, 1), lambda m: pool.set_quota(m, 1)):
        with pytest.raises(KeyError):
            call("unknown")


DAMAGE: dict[str, Callable[[BlockPool], object]] = {
    "a block twice on the stack": lambda p: p._groups._stack.__setitem__(0, p._groups._stack[1]),
    "a block lost": lambda p: setattr(p._groups, "free", p._groups.free - 1),
    "a block in two groups": lambda p: p._groups._head.__setitem__(3, 4),
    "a block's place wrong": lambda p: p._groups._place.__setitem__(3, 0),
    "a reference too many": lambda p: p._groups.references.__setitem__(0, 1),
    "a reference lost": lambda p: p._groups.references.__setitem__(4, 0),
    "a reference inside a group": lambda p: p._groups.references.__setitem__(5, 1),
    "an owner unknown": lambda p: p._groups.owner.__setitem__(4, 7),
    "held miscounted": lambda p: setattr(p._models["s"], "held", 2),
    "cached miscounted": lambda p: setattr(p._prefixes, "cached_blocks", 4),
    "published, not indexed": lambda p: p._prefixes.published.__setitem__(4, True),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_integrity_sees_every_kind_of_damage(damage: str) -> None:
    pool = make_pool(24, s=24)
    ids = pool.allocate("s", 4)
    pool.publish("s", [b"0", b"1"], ids[:2])
    pool.free("s", ids[:1])
    pool.check_integrity()
    DAMAGE[damage](pool)
    with pytest.raises(PoolIntegrityError):
        pool.check_integrity()


def test_a_step_of_64_sequences_costs_well_under_a_millisecond() -> None:
    pool = BlockPool(64 * 90 * 2)
    layout = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="float32", block_bytes=16384)
    pool.register("m", layout, pool.blocks)
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        pool.free("m", pool.allocate("m", 64))
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


def test_the_pool_imports_neither_torch_nor_a_service() -> None:
    code = (
        "import sys, muxserve.engine.pool; "
        "print([m for m in ('torch', 'grpc', 'redis', 'cupy', 'numba') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
