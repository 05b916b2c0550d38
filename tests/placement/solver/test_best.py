"""`best` and the baselines: the optimum where it can be enumerated, and constraints everywhere."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import ClassVar

import pytest

from muxserve.placement.solver.baselines import greedy, spatial
from muxserve.placement.solver.best import best
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.meshes import Mesh, cuts, fits, group, kinds, settle
from muxserve.placement.solver.objective import MILD_HUNGER, Objective, State, as_state
from muxserve.placement.solver.paper import paper
from muxserve.placement.solver.placement import Placed, Placement
from muxserve.placement.solver.search import anneal, exhaustive
from muxserve.placement.solver.workload import Workload
from tests.placement.solver.inputs import COSTS, random_workload, workload


class Clock:
    """Time that passes with every look: searches are repeatable and end."""

    def __init__(self, step: float = 1e-3) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def solve(work: Workload, costs: CostModel) -> Placement:
    return best(work, costs, 2.0, Clock())


ALGORITHMS: list[Callable[[Workload, CostModel], Placement]] = [paper, greedy, spatial, solve]


def ordered_cuts(gpus: int) -> Iterator[tuple[int, ...]]:
    if gpus == 0:
        yield ()
    for size in (1, 2, 4):
        if size <= gpus:
            for rest in ordered_cuts(gpus - size):
                if not rest or rest[0] <= size:
                    yield (size, *rest)


def optimum(work: Workload) -> float:
    """The largest score of any assignment of any set of models to any mesh, tried one after the other."""
    objective = Objective(work, COSTS)
    models = range(len(work.models))
    sets = [frozenset(i for i in models if bits >> i & 1) for bits in range(2 ** len(models))]
    scores = []
    for sizes in ordered_cuts(work.nodes[0].gpus):
        allowed = [[s for s in sets if objective.allows(Mesh(0, size), s)] for size in sizes]
        for choice in product(*allowed):
            # Meshes of one size are alike: one order of their models is enough.
            keys = [sorted(s) for s in choice]
            if any(a == b and x > y for a, b, x, y in zip(sizes, sizes[1:], keys, keys[1:], strict=False)):
                continue
            state = tuple((Mesh(0, size), s) for size, s in zip(sizes, choice, strict=True))
            scores.append(objective.score(state))
    return max(scores)


def score(work: Workload, placement: Placement) -> float:
    objective = Objective(work, COSTS)
    return objective.score(as_state(placement, objective))


@pytest.mark.parametrize("seed", range(50))
def test_best_is_the_optimum_of_small_instances(seed: int) -> None:
    source = random.Random(seed)
    gpus = source.choice((1, 2, 2, 3, 4))
    work = random_workload(source, source.randint(1, 3 if gpus == 4 else 5 if gpus < 3 else 4), gpus)
    placement = solve(work, COSTS)
    placement.verify(work, COSTS)
    assert score(work, placement) == pytest.approx(optimum(work))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_best_is_the_optimum_of_four_gpus_and_five_models(seed: int) -> None:
    work = random_workload(random.Random(seed), 5, 4)
    assert score(work, solve(work, COSTS)) == pytest.approx(optimum(work))


@pytest.mark.parametrize("seed", range(5))
def test_annealing_finds_what_enumeration_finds(seed: int) -> None:
    work = random_workload(random.Random(seed), 3, 4)
    objective = Objective(work, COSTS)
    exact = exhaustive(objective)
    assert exact is not None
    start: State = ((Mesh(0, 4), frozenset()),)
    clock = Clock(1 / 1500)
    found = anneal(objective, start, clock, seed)
    assert found[0].score == pytest.approx(objective.score(exact), rel=0.01)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(4))
def test_what_any_algorithm_finds_is_valid(
    algorithm: Callable[[Workload, CostModel], Placement], seed: int
) -> None:
    source = random.Random(seed)
    work = random_workload(source, source.randint(1, 7), source.choice((1, 4, 8)))
    algorithm(work, COSTS).verify(work, COSTS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_constraints_hold(algorithm: Callable[[Workload, CostModel], Placement]) -> None:
    work = workload(
        {"a": ("llama-7b", 3), "b": ("llama-7b", 2), "c": ("llama-13b", 2)},
        nodes=2,
        gpus=2,
        constraints={"pin": {"a": 1, "c": [0]}, "apart": [["a", "b"], ["b", "c"]], "spare_gpus": 1},
    )
    placement = algorithm(work, COSTS)
    placement.verify(work, COSTS)
    assert {p.name for unit in placement.units for p in unit.models} >= {"a", "c"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nodes_may_differ_in_size_and_memory(algorithm: Callable[[Workload, CostModel], Placement]) -> None:
    nodes = [{"gpus": 2, "memory_gib": 40}, {"gpus": 3, "memory_gib": 80}]
    work = workload(
        {"a": ("llama-13b", 2), "b": ("llama-30b", 1), "c": ("llama-7b", 4)}, cluster={"nodes": nodes}
    )
    algorithm(work, COSTS).verify(work, COSTS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_models_that_fit_nowhere_are_left_out(algorithm: Callable[[Workload, CostModel], Placement]) -> None:
    work = workload({"big": ("llama-65b", 1), "small": ("llama-7b", 1)}, gpus=1)
    placement = algorithm(work, COSTS)
    placement.verify(work, COSTS)
    assert {p.name for unit in placement.units for p in unit.models} == {"small"}


@pytest.mark.parametrize("hot", [20, 60, 90])
def test_no_model_goes_without_a_place_for_the_sake_of_others(hot: float) -> None:
    """However little of each can be served, and however the rest is judged."""
    rates = {"hot": ("llama-13b", hot), "warm": ("llama-13b", hot / 2), "cold": ("llama-7b", 0.1)}
    work = workload(rates, gpus=2)
    seen: list[Placement] = []

    def judge(placements: Sequence[Placement]) -> list[float]:
        seen.extend(placements)
        return [float(len(placement.units)) for placement in placements]

    for placement in (solve(work, COSTS), best(work, COSTS, 2.0, Clock(), judge), *seen):
        assert {p.name for unit in placement.units for p in unit.models} == {"hot", "warm", "cold"}


def test_a_large_model_is_placed_where_others_have_to_make_room_on_several_gpus_at_once() -> None:
    """Two replicas have to go, two GPUs be joined, and the model come: nothing of that helps by itself."""
    rates = {f"m{i}": ("llama-13b", 18.0) for i in range(4)} | {"large": ("llama-65b", 0.5)}
    work = workload(rates, gpus=8)
    objective = Objective(work, COSTS)
    full = tuple((Mesh(0, 1), frozenset((u % 4,))) for u in range(8))
    part = iter(range(8000))
    found = anneal(objective, full, lambda: next(part) / 300, seed=1)
    assert any(4 in models for _, models in found[0].state)


def test_a_hot_model_gets_replicas_and_cold_ones_share() -> None:
    work = workload({"hot": ("llama-7b", 60), **{f"cold{i}": ("llama-7b", 0.2) for i in range(4)}}, gpus=4)
    placement = solve(work, COSTS)
    hot = [unit for unit in placement.units if any(p.name == "hot" for p in unit.models)]
    assert sum(len(unit.gpus) for unit in hot) >= 3
    assert score(work, placement) > max(score(work, f(work, COSTS)) for f in (paper, greedy, spatial))


def test_the_judge_has_the_last_word() -> None:
    work = random_workload(random.Random(1), 8, 8)
    seen: list[Placement] = []

    def judge(placements: Sequence[Placement]) -> list[float]:
        seen.extend(placements)
        return [float(i) for i in range(len(placements))]

    chosen = best(work, COSTS, 1.0, Clock(), judge)
    assert chosen == seen[-1]
    assert len(seen) == len(set(map(str, seen)))


def test_where_there_is_too_little_the_judge_also_sees_states_that_spread_it_less() -> None:
    work = workload({"hot": ("llama-7b", 60), "warm": ("llama-7b", 50), "large": ("llama-30b", 12)}, gpus=2)
    seen: list[Placement] = []

    def judge(placements: Sequence[Placement]) -> list[float]:
        seen.extend(placements)
        return [0.0] * len(placements)

    best(work, COSTS, 2.0, Clock(), judge)
    mild = Objective(work, COSTS).with_hunger(MILD_HUNGER)
    state = exhaustive(mild)
    assert state is not None
    assert state != exhaustive(Objective(work, COSTS))
    assert mild.score(state) == max(mild.score(as_state(each, mild)) for each in seen)


class PickledClock(Clock):
    """Tells in which thread it was pickled."""

    threads: ClassVar[list[threading.Thread]] = []

    def __reduce__(self) -> tuple[type[Clock], tuple[float]]:
        self.threads.append(threading.current_thread())
        return Clock, (self.step,)


def test_what_the_second_process_gets_is_not_read_while_the_search_adds_to_it() -> None:
    work = random_workload(random.Random(1), 8, 8)
    PickledClock.threads.clear()
    best(work, COSTS, 1.0, PickledClock(), lambda placements: [0.0] * len(placements))
    assert PickledClock.threads == [threading.current_thread()]


def test_the_time_limit_is_kept() -> None:
    work = random_workload(random.Random(2), 8, 8)
    began = time.monotonic()
    best(work, COSTS, 1.0, time.monotonic)
    assert time.monotonic() - began < 5


def test_spatial_shares_nothing_and_gives_what_is_left_to_the_popular() -> None:
    work = workload({"hot": ("llama-7b", 40), "cold": ("llama-7b", 1)}, gpus=4)
    placement = spatial(work, COSTS)
    assert all(len(unit.models) == 1 for unit in placement.units)
    assert sorted(unit.models[0].name for unit in placement.units) == ["cold", "hot", "hot", "hot"]


def test_mesh_groups_are_all_there_and_each_once() -> None:
    work = workload({"a": ("llama-7b", 1)}, nodes=1, gpus=8)
    found = [group(cut) for cut in cuts(kinds(work), (1, 2, 4, 8), 8)]
    assert len(found) == len(set(found)) == 10  # partitions of 8 into powers of two
    assert all(sum(mesh.size for mesh in each) == 8 for each in found)


def test_meshes_fit_nodes_that_are_no_power_of_two() -> None:
    work = workload({"a": ("llama-7b", 1)}, nodes=2, gpus=6)
    kind = kinds(work)[0]
    assert fits(kind, [4, 4, 2, 2])
    assert not fits(kind, [4, 4, 4])
    with pytest.raises(ValueError, match="do not fit"):
        settle([(Mesh(0, 4), [Placed("a", "llama-7b", 0)])] * 3, kinds(work))
