"""What the advisor leaves to residency: who is loaded on a worker, of those that have their places there."""

from __future__ import annotations

from muxserve.placement.advisor_loop import between_workers
from muxserve.placement.advisor_situation import Move, Served
from muxserve.placement.traffic import Traffic


def served(name: str, loaded: str = "", asleep: str = "") -> Served:
    """One letter for each worker."""
    flow = Traffic().flow(name)
    return Served(name, 10, 1, 1, flow, loaded=frozenset(loaded), asleep=frozenset(asleep))


MODELS = [served("a", "u"), served("b", "u"), served("c", asleep="u"), served("twin", "v", asleep="u")]


def test_models_are_not_woken_or_put_to_sleep_for_one_another_on_a_worker() -> None:
    assert between_workers([Move("c", "", "u")], MODELS) == ()
    assert between_workers([Move("a", "u"), Move("c", "", "u")], MODELS) == ()


def test_moves_to_other_workers_are_made_and_requests_wake_who_sleeps_there() -> None:
    moves = [Move("c", "u", "v"), Move("c", "", "v"), Move("a", "u", "v"), Move("twin", "", "u")]
    assert between_workers(moves, MODELS) == (moves[0], moves[2], moves[3])


def test_a_model_may_sleep_while_others_change_places() -> None:
    moves = [Move("a", "u"), Move("twin", "", "u"), Move("a", "u", "v"), Move("a", "", "v")]
    assert between_workers(moves, MODELS) == tuple(moves[:3])
