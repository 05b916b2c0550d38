"""What the advisor moves, and what it leaves alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from muxserve.placement.advisor import Advice, Options, advise
from muxserve.placement.advisor_situation import Move, Served, Worker
from muxserve.placement.traffic import Flow

WEIGHTS = 270 * 2**20
KV = 23040
"""As a model of 135 million parameters has them."""
CORE = 6.0
"""Requests per second that one core can serve, about."""


def worker(name: str, room: int = 0, cores: int = 1) -> Worker:
    return Worker(name, "cpu", cores, room * WEIGHTS, 512 * 2**20)


def model(name: str, rate: float, *loaded: str, prompt: float = 16, output: float = 34) -> Served:
    """`rate`: 1 is about what one core can serve."""
    flow = Flow(CORE * rate, CORE * rate, False, prompt, output, 100.0)
    return Served(name, WEIGHTS, KV, 30, flow, frozenset(loaded))


def after(models: Sequence[Served], moves: Sequence[Move], workers: Sequence[Worker]) -> dict[str, set[str]]:
    """Where models are loaded after `moves`; every one of which has to be valid."""
    places = {m.name: set(m.loaded) for m in models}
    asleep = {m.name: set(m.asleep) for m in models}
    budgets = {w.id: w.weight_budget or float("inf") for w in workers}
    sizes = {m.name: m.weight_bytes for m in models}
    for move in moves:
        where, sleeps = places[move.model], asleep[move.model]
        if move.source in sleeps and move.target:  # it goes on sleeping there
            sleeps ^= {move.source, move.target}
            continue
        if move.target:
            assert move.target not in where
            where.add(move.target)
            sleeps.discard(move.target)
            taken = sum(sizes[m] for m, at in places.items() if move.target in at)
            assert taken <= budgets[move.target], f"no room on {move.target}"
        if move.source:
            assert move.source in where
            where.discard(move.source)
            if not where:
                sleeps.add(move.source)
    return places


def result(workers: Sequence[Worker], models: Sequence[Served]) -> tuple[Advice, Mapping[str, set[str]]]:
    advice = advise(workers, models)
    return advice, after(models, advice.moves if advice.worthwhile else (), workers)


TWO = (worker("a", 3), worker("b", 3))


def test_a_hot_model_is_loaded_where_there_is_room() -> None:
    models = [model("hot", 1.5, "a"), model("m", 0.1, "a"), model("n", 0.1, "b"), model("o", 0.05, "b")]
    advice, places = result(TWO, models)
    assert advice.worthwhile
    assert places["hot"] == {"a", "b"}
    assert advice.after > advice.served
    assert "hot" in advice.reason


def test_when_popularity_flips_the_replica_goes_to_who_is_hot_now() -> None:
    """Room for three on each: the model that was hot has two places, and one of them is the other's."""
    before = [
        model("was", 0.05, "a", "b"),
        model("m", 0.1, "a"),
        model("n", 0.25, "b"),
        model("is", 1.5, "a"),
    ]
    advice, places = result((worker("a", 3), worker("b", 2)), before)
    assert advice.worthwhile
    assert places["is"] == {"a", "b"}
    assert all(places.values()), "nobody is left without a place"
    assert advice.moves[0] == Move("was", "b"), "room has to be made first"


@pytest.mark.parametrize("seed", range(8))
def test_two_hot_models_on_one_worker_are_parted(seed: int) -> None:
    """No room for replicas: four models, two places on each, full."""
    rates = [0.9, 0.7, 0.05, 0.03]
    random.Random(seed).shuffle(rates)
    hot = [f"m{i}" for i, rate in enumerate(rates) if rate > 0.5]
    models = [model(f"m{i}", rate, "a" if f"m{i}" in hot else "b") for i, rate in enumerate(rates)]
    workers = (worker("a", 2), worker("b", 2))
    advice, places = result(workers, models)
    assert advice.worthwhile
    assert all(len(at) == 1 for at in places.values())
    assert places[hot[0]] != places[hot[1]]
    pinned = [replace(m, pinned=True) for m in models]
    assert not advise(workers, pinned).moves, "without room nothing can be done that keeps all where they are"


def test_traffic_that_is_served_well_moves_nothing() -> None:
    rates = [0.2, 0.1, 0.05, 0.02]
    for order in itertools.permutations(rates):
        models = [model(f"m{i}", rate, "ab"[i % 2]) for i, rate in enumerate(order)]
        advice = advise(TWO, models)
        assert not advice.worthwhile
        assert advice.moves == () or advice.cost > 0


def test_noise_around_steady_rates_moves_nothing_back_and_forth() -> None:
    """Once what is advised is done, rates that vary as estimates over three minutes do change nothing."""
    rates = {"hot": 1.1, "m": 0.2, "n": 0.1, "o": 0.05}
    models = [model(name, rate, "ab"[i % 2]) for i, (name, rate) in enumerate(rates.items())]
    _, places = result(TWO, models)
    source, moved = random.Random(5), 0
    for _ in range(20):
        noisy = [model(n, source.gauss(r, (r / CORE / 180) ** 0.5), *places[n]) for n, r in rates.items()]
        advice = advise(TWO, noisy)
        moved += advice.worthwhile
        places = after(noisy, advice.moves if advice.worthwhile else (), TWO)
    assert moved <= 1


def test_nothing_is_moved_where_nothing_comes() -> None:
    assert not advise(TWO, [model("m", 0.0, "a"), model("n", 0.0, "a")]).moves
    assert not advise(TWO, []).moves
    assert not advise([], [model("m", 1.0)]).moves


def test_a_model_that_sleeps_and_is_asked_for_is_loaded_where_there_is_room() -> None:
    """More models than fit: the hot ones are loaded, the others wait for somebody to ask for them."""
    workers = (worker("a", 2), worker("b", 2))
    models = [
        model("hot", 0.5, "a"),
        model("cold", 0.0, "a"),
        model("warm", 0.3, "b"),
        replace(model("sleeper", 0.4), asleep=frozenset({"a"})),
        replace(model("dead", 0.0), asleep=frozenset({"b"})),
    ]
    advice, places = result(workers, models)
    assert advice.worthwhile
    assert places["sleeper"]
    assert places["hot"]
    assert places["warm"]
    assert not places["dead"]
    moves = [m for m in advice.moves if m.model == "sleeper"]
    assert moves[-1].source == ""
    assert len(moves) == (1 if moves[-1].target == "a" else 2), "no place is left behind where it slept"


def test_larger_workers_get_more() -> None:
    """One of four cores and one of one: the hot model belongs on the large one."""
    workers = (worker("small", 2, cores=1), worker("large", 2, cores=4))
    models = [model("hot", 3.0, "small"), model("cold", 0.02, "large"), model("cool", 0.05, "large")]
    advice, places = result(workers, models)
    assert advice.worthwhile
    assert "large" in places["hot"]


def test_a_model_goes_only_where_it_fits() -> None:
    huge = replace(model("huge", 1.0, "large"), weight_bytes=3 * WEIGHTS)
    models = [huge, model("hot", 1.5, "large"), model("m", 0.2, "small")]
    advice, places = result((worker("small", 2), worker("large", 4)), models)
    assert places["huge"] == {"large"}
    assert "small" in places["hot"]
    refused = replace(models[1], refused_by=frozenset({"small"}))
    assert advise((worker("small", 2), worker("large", 4)), [huge, refused, models[2]]).moves == ()
    assert advice.worthwhile


def test_a_worker_that_is_closed_gets_nothing() -> None:
    models = [model("hot", 1.5, "a"), model("m", 0.3, "a")]
    closed = (worker("a", 3), replace(worker("b", 3), closed=True))
    assert not advise(closed, models).moves


def test_pins_frozen_models_and_least_replicas_are_respected() -> None:
    models = [model("hot", 1.5, "a"), model("m", 0.5, "a"), model("n", 0.1, "b")]
    pinned = [replace(m, pinned=True) for m in models]
    advice, places = result(TWO, pinned)
    assert all(m.loaded <= places[m.name] for m in pinned), "replicas may come, but nothing goes"
    assert advice.worthwhile
    assert not advise(TWO, [replace(m, frozen=True) for m in models]).moves
    two = [replace(model("idle", 0.0, "a", "b"), min_resident=2), model("hot", 1.5, "a")]
    assert result((worker("a", 2), worker("b", 1)), two)[1]["idle"] == {"a", "b"}


def test_a_gain_that_does_not_pay_for_loading_is_not_worth_it() -> None:
    models = [model("hot", 1.5, "a"), model("m", 0.3, "a"), model("n", 0.3, "b")]
    slow = [replace(m, load_seconds=7200.0) for m in models]
    advice = advise(TWO, slow)
    assert not advice.worthwhile
    assert advise(TWO, slow, Options(horizon=86400.0)).worthwhile


def test_who_is_in_the_way_of_a_copy_goes_where_there_is_room() -> None:
    """The hot model is to be on both, and the worker that it is not on yet is full."""
    models = [
        model("hot", 1.5, "a"),
        model("k", 0.02, "a"),
        model("l", 0.1, "b"),
        model("m", 0.1, "b"),
        model("n", 0.1, "b"),
    ]
    advice, places = result(TWO, models)
    assert advice.worthwhile
    assert places["hot"] == {"a", "b"}
    assert all(places.values()), "nobody is left without a place"


def test_who_asks_gets_what_is_too_little_to_be_done_by_itself() -> None:
    models = [model("m", 0.42, "a"), model("n", 0.21, "a"), model("o", 0.05, "b")]
    assert not advise(TWO, models).worthwhile
    asked = advise(TWO, models, Options().asked())
    assert asked.worthwhile
    assert asked.moves == (Move("n", "a", "b"),)
    settled = [models[0], replace(models[1], loaded=frozenset("b")), models[2]]
    assert not advise(TWO, settled, Options().asked()).worthwhile, "and nothing more when they ask again"


def test_measured_speeds_decide() -> None:
    """The same traffic on devices that were seen to take four times as long."""
    models = [model("m", 0.2, "a"), model("n", 0.2, "a")]
    assert not advise(TWO, models).worthwhile
    slow = [replace(w, prefill_factor=6.0, decode_factor=6.0) for w in TWO]
    assert advise(slow, models).worthwhile


def test_a_backlog_is_traffic() -> None:
    models = [model("m", 0.2, "a"), model("n", 0.2, "a")]
    assert advise(TWO, [replace(models[0], waiting=150), models[1]]).worthwhile


@pytest.mark.parametrize("seed", range(30))
def test_advice_is_always_valid(seed: int) -> None:
    source = random.Random(seed)
    workers = [worker(f"w{k}", source.choice((0, 1, 2, 3)), source.choice((1, 2))) for k in range(3)]
    room = {w.id: w.weight_budget or float("inf") for w in workers}
    models = []
    for i in range(source.randint(1, 6)):
        size = source.choice((WEIGHTS, WEIGHTS, WEIGHTS // 2, 2 * WEIGHTS))
        at = [w.id for w in workers if room[w.id] >= size and source.random() < 0.5]
        for name in at:
            room[name] -= size
        asleep = frozenset() if at else frozenset({source.choice(workers).id})
        models.append(
            replace(
                model(f"m{i}", source.choice((0.0, 0.01, 0.3, 2.0)), *at),
                weight_bytes=size,
                asleep=asleep,
                pinned=source.random() < 0.2,
            )
        )
    advice = advise(workers, models)
    places = after(models, advice.moves, workers)
    for each in models:
        assert not (each.pinned and not each.loaded <= places[each.name])
        if each.loaded and each.flow.rate > 0.1:
            assert places[each.name], "who is asked for is loaded"
