"""Which model goes where."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from muxserve.placement.fit import Capacity, Demand, fit

MIB = 2**20


def demand(name: str, mib: int, *workers: str, load: float = 1.0) -> Demand:
    return Demand(name, dict.fromkeys(workers or ("w0", "w1"), mib * MIB), load)


def room(worker: str, mib: int | None) -> Capacity:
    return Capacity(worker, None if mib is None else mib * MIB)


def test_two_models_of_equal_load_go_to_two_workers() -> None:
    result = fit([demand("a", 100), demand("b", 100)], [room("w0", 500), room("w1", 500)])
    assert sorted(result.assigned.values()) == ["w0", "w1"]


def test_a_hot_model_gets_a_worker_of_its_own() -> None:
    models = [demand("hot", 100, load=9.0), demand("b", 90), demand("c", 80), demand("d", 70)]
    placed = fit(models, [room("w0", None), room("w1", None)]).assigned
    assert [name for name in placed if placed[name] == placed["hot"]] == ["hot"]


def test_a_worker_that_has_models_already_gets_fewer_new_ones() -> None:
    busy = Capacity("w0", None, load=3.0)
    assert fit([demand("a", 10), demand("b", 10)], [busy, room("w1", None)]).assigned == {
        "a": "w1",
        "b": "w1",
    }


def test_packing_wins_where_spreading_leaves_one_without_a_place() -> None:
    models = [demand("a", 60), demand("b", 50), demand("c", 50)]
    assert fit(models, [room("w0", 100), room("w1", 60)]).assigned == {"a": "w1", "b": "w0", "c": "w0"}


def test_a_model_too_big_for_every_worker_is_refused_with_the_numbers() -> None:
    refusal = fit([demand("a", 300)], [room("w0", 200), room("w1", 250)]).refused["a"]
    assert refusal.reason == "its weights need 300.0 MiB, largest free is 250.0 MiB on w1"
    assert refusal.field == "weight_budget"


def test_a_model_goes_only_to_workers_that_accept_it() -> None:
    assert fit([demand("a", 10, "w1")], [room("w0", None), room("w1", None)]).assigned == {"a": "w1"}


def test_models_that_do_not_fit_at_once_take_turns() -> None:
    models = [
        replace(demand("big", 80, "w0"), load=0.1),
        replace(demand("pinned", 20, "w0"), stays=True, load=0.1),
        replace(demand("hot", 50, "w0"), load=9.0),
        replace(demand("favourite", 30, "w0"), priority=1),
        demand("cold", 50, "w0"),
        demand("huge", 90, "w0"),
    ]
    result = fit(models, [Capacity("w0", 100 * MIB, for_turns=100 * MIB)])
    assert result.refused.keys() == {"huge"}  # there is never room for it beside the pinned one
    assert set(result.asleep) == {"big", "cold"}


sizes = st.integers(1, 60)


@given(st.lists(sizes, max_size=8), st.lists(st.integers(0, 120), min_size=1, max_size=4))
def test_every_model_is_decided_and_no_worker_gets_more_than_it_has(
    models: list[int], workers: list[int]
) -> None:
    names = [f"w{i}" for i in range(len(workers))]
    demands = [demand(f"m{i}", size, *names) for i, size in enumerate(models)]
    result = fit(demands, [room(name, mib) for name, mib in zip(names, workers, strict=True)])
    assert result.assigned.keys() | result.refused.keys() == {d.name for d in demands}
    assert not result.assigned.keys() & result.refused.keys()
    for name, mib in zip(names, workers, strict=True):
        assert sum(size for i, size in enumerate(models) if result.assigned.get(f"m{i}") == name) <= mib


@given(st.lists(sizes, max_size=6), st.integers(0, 300))
def test_one_worker_takes_all_that_fits_together(models: list[int], mib: int) -> None:
    demands = [demand(f"m{i}", size, "w0") for i, size in enumerate(models)]
    result = fit(demands, [room("w0", mib)])
    assert bool(result.refused) == (sum(models) > mib)
