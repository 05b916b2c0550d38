"""`best`: search with the closed-form estimator, then choose among the best few by simulation."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from muxserve.placement.solver.baselines import greedy, spatial
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.meshes import Mesh
from muxserve.placement.solver.objective import MILD_HUNGER, Objective, State, as_state
from muxserve.placement.solver.paper import paper
from muxserve.placement.solver.placement import Placement
from muxserve.placement.solver.search import Found, anneal, climb, exhaustive
from muxserve.placement.solver.workload import Workload

Judge = Callable[[Sequence[Placement]], Sequence[float]]
"""Says how good placements are, the larger the better: a simulation. The solver itself knows of none."""

STARTS = 2
"""Of the states that other algorithms lead to, those that are annealed from."""
FINALISTS = 12
"""States of its own that are judged, beside placements of baselines."""
LARGE = 20_000
"""Models times GPUs beyond which Algorithm 1 takes too long to start from."""
CLOSE = 0.25
"""A baseline's placement is judged too if the estimator finds it worse by less than this part of the rate."""
SEARCHING = 0.5
"""Part of the time for the search, if there is a judge."""


def best(
    workload: Workload,
    costs: CostModel,
    time_limit: float,
    clock: Callable[[], float],
    judge: Judge | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda done: None,
) -> Placement:
    """A placement. `time_limit` in seconds of `clock`; `progress` is told the part of the search that has
    passed.

    Small instances are solved exactly, as far as the estimator goes.
    """
    objective = Objective(workload, costs)
    until = clock() + time_limit * (SEARCHING if judge else 0.9)
    small = len(workload.models) * workload.gpus <= LARGE
    baselines = [algorithm(workload, costs) for algorithm in (spatial, greedy, *([paper] if small else []))]
    search = partial(_search, baselines=baselines, until=until, clock=clock, seed=seed)
    if judge is None:
        return objective.placement(search(objective, progress=progress)[0].state)
    # Before the search begins, which adds to what the objectives know: the pool would do it meanwhile.
    mild = pickle.dumps(partial(search, objective.with_hunger(MILD_HUNGER)))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as beside:
        of_mild = beside.submit(_thawed, mild)
        found = search(objective, progress=progress)
        milder = of_mild.result()
    close = found[0].score - CLOSE * workload.rate
    rivals = [b for b in baselines if objective.score(as_state(b, objective)) >= close]
    own = [objective.placement(each.state) for pair in zip(found, milder, strict=False) for each in pair]
    candidates = _complete(_distinct([own[0], *rivals, *own[1:]]))[: len(rivals) + FINALISTS]
    scores = judge(candidates)
    return candidates[max(range(len(candidates)), key=lambda i: scores[i])]


def _thawed(search: bytes) -> list[Found]:
    """What a pickled search finds."""
    found: list[Found] = pickle.loads(search)()
    return found


def _search(
    objective: Objective,
    baselines: Sequence[Placement],
    until: float,
    clock: Callable[[], float],
    seed: int,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Found]:
    """Good states, the best first; all of them are looked at where they are few."""
    exact = exhaustive(objective)
    if exact is not None:
        return [Found(objective.score(exact), exact)]
    starts = [as_state(placement, objective) for placement in baselines]
    starts.append(_empty(objective))
    starts.sort(key=objective.score, reverse=True)
    found: list[Found] = []
    began = clock()
    seconds = until - began
    for number, start in enumerate(starts[:STARTS]):
        begin, end = (began + seconds * n * 0.85 / STARTS for n in (number, number + 1))

        def part(begin: float = begin, end: float = end) -> float:
            now = clock()
            progress(min(1.0, (now - began) / max(seconds, 1e-9)))
            return (now - begin) / max(end - begin, 1e-9)

        found += anneal(objective, start, part, seed + number)
    found.sort(key=lambda each: -each.score)
    top = climb(objective, found[0], lambda: 1.0 if clock() >= until else 0.0)
    return [top, *found]


def _empty(objective: Objective) -> State:
    return tuple(
        (Mesh(k, 1), frozenset()) for k, kind in enumerate(objective.kinds) for _ in range(kind.total)
    )


def _complete(placements: Sequence[Placement]) -> list[Placement]:
    """Those that have a place for the most models."""
    present = [len({placed.name for unit in p.units for placed in unit.models}) for p in placements]
    return [p for p, count in zip(placements, present, strict=True) if count == max(present)]


def _distinct(placements: Sequence[Placement]) -> list[Placement]:
    """Each once, and one of those that differ in which GPUs alike units have."""

    def look(placement: Placement) -> tuple[object, ...]:
        return tuple(sorted((len(unit.gpus), repr(unit.models)) for unit in placement.units))

    return list({look(placement): placement for placement in reversed(placements)}.values())[::-1]
