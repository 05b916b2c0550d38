from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.online.arrangement import Loaded, by_turns, first_apart, first_on_all, fits, next_move

MODELS, WORKERS, ROOM = ["m0", "m1", "m2", "m3", "m4"], ["w0", "w1"], 3

PLACES = (frozenset({"w0"}), frozenset({"w1"}), frozenset(WORKERS))
ALL = [dict(zip(MODELS, places, strict=True)) for places in product(PLACES, repeat=len(MODELS))]
PLACEMENTS = st.sampled_from([loaded for loaded in ALL if fits(loaded, ROOM)])


@given(PLACEMENTS, PLACEMENTS)
def test_moves_lead_there_and_leave_no_model_without_a_place(loaded: Loaded, wanted: Loaded) -> None:
    moves = 0
    while (move := next_move(loaded, wanted, ROOM)) is not None:
        at = (loaded[move.model] | {move.target}) - {move.source, ""}
        loaded = {**loaded, move.model: at}
        assert all(loaded.values()) and fits(loaded, ROOM)
        moves += 1
        assert moves <= 3 * len(MODELS)
    assert loaded == wanted


@given(PLACEMENTS)
def test_the_first_model_is_everywhere_and_others_stay_where_there_is_room(loaded: Loaded) -> None:
    found = first_on_all(loaded, MODELS[::-1], WORKERS, ROOM)
    assert found is not None and found["m4"] == frozenset(WORKERS) and fits(found, ROOM)
    assert all(len(at) == 1 for model, at in found.items() if model != "m4")
    alone = {model: at for model, at in loaded.items() if model != "m4" and len(at) == 1}
    if fits({**alone, "m4": frozenset(WORKERS)}, ROOM):
        assert all(found[model] == at for model, at in alone.items())


def test_the_first_model_is_apart_with_the_last_one() -> None:
    found = first_apart(MODELS, WORKERS, ROOM)
    assert {model for model, at in found.items() if "w0" in at} == {"m0", "m4"}
    assert fits(found, ROOM) and all(len(at) == 1 for at in found.values())


def test_models_change_places_where_workers_are_full() -> None:
    order = [*MODELS, "m5"]
    loaded, wanted = first_apart(order, WORKERS, ROOM), first_apart(order[::-1], WORKERS, ROOM)
    assert first_on_all(loaded, order, WORKERS, ROOM) is None and loaded != by_turns(order, WORKERS)
    moves = []
    while (move := next_move(loaded, wanted, ROOM)) is not None:
        loaded = {**loaded, move.model: (loaded[move.model] | {move.target}) - {move.source, ""}}
        assert fits(loaded, ROOM) and sum(not at for at in loaded.values()) <= 1
        moves.append(move)
    assert loaded == wanted and len(moves) == 3
