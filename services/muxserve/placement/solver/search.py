"""How `best` looks for states: all of them where they are few, else by annealing.

States that differ in the order of meshes, or in which of two alike nodes a mesh is on, are one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, product

from muxserve.placement.solver.meshes import Mesh, cuts, fits, sizes_for
from muxserve.placement.solver.objective import Objective, State

FEW = 60_000
"""States that are all looked at."""
MOST_GPUS, MOST_MODELS = 16, 10
"""Beyond either they are not even counted."""
HOT, COLD = 0.02, 0.0004
"""Temperatures at start and end, as parts of the workload's rate."""
KEPT = 12
"""Good states that are remembered."""


def exhaustive(objective: Objective) -> State | None:
    """The best state of all. None: there are too many to look at."""
    if objective.workload.gpus > MOST_GPUS or len(objective.models) > MOST_MODELS:
        return None
    best: tuple[float, State] | None = None
    budget = FEW
    sets: dict[Mesh, list[frozenset[int]]] = {}
    cutting = list(cuts(objective.kinds, sizes_for(objective.workload), objective.workload.gpus))
    for cut in cutting:
        slots = [(Mesh(k, size), count) for k, counts in enumerate(cut) for size, count in counts if count]
        for mesh, _ in slots:
            if mesh not in sets:
                sets[mesh] = _sets(mesh, objective)
        budget -= math.prod(math.comb(len(sets[mesh]) + count - 1, count) for mesh, count in slots)
        if budget < 0:
            return None
    for cut in cutting:
        slots = [(Mesh(k, size), n) for k, counts in enumerate(cut) for size, n in counts if n]
        for choice in product(*(combinations_with_replacement(sets[mesh], n) for mesh, n in slots)):
            state = tuple(
                (mesh, models) for (mesh, _), chosen in zip(slots, choice, strict=True) for models in chosen
            )
            score = objective.score(state)
            if best is None or score > best[0]:
                best = (score, state)
    return best[1] if best is not None else None


def _sets(mesh: Mesh, objective: Objective) -> list[frozenset[int]]:
    """Sets of models that may be on a mesh, the empty one among them."""
    every = range(len(objective.models))
    return [
        frozenset(models)
        for size in range(len(objective.models) + 1)
        for models in combinations(every, size)
        if objective.allows(mesh, models)
    ]


@dataclass(frozen=True, slots=True)
class Found:
    """A state and its score."""

    score: float
    state: State


def anneal(objective: Objective, start: State, part: Callable[[], float], seed: int) -> list[Found]:
    """Good states, the best first, from `start` on. `part()`: how much of the time has passed, 0 to 1; the
    search ends at 1."""
    source = random.Random(seed)
    here = Found(objective.score(start), start)
    found = {_canonical(start): here}
    floor = here.score
    steps = 0
    temperature = HOT * objective.workload.rate
    while True:
        if steps % 16 == 0:
            if (done := part()) >= 1:
                break
            temperature = objective.workload.rate * HOT * (COLD / HOT) ** done
        steps += 1
        state = _neighbour(here.state, objective, source)
        if state is None:
            continue
        score = objective.score(state)
        if score < here.score and source.random() >= math.exp((score - here.score) / temperature):
            continue
        here = Found(score, state)
        if score > floor or len(found) < KEPT:
            found[_canonical(state)] = here
            if len(found) > 4 * KEPT:
                best = sorted(found.items(), key=lambda item: -item[1].score)[:KEPT]
                found, floor = dict(best), best[-1][1].score
    return sorted(found.values(), key=lambda each: -each.score)[:KEPT]


def _canonical(state: State) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    return tuple(sorted((mesh.kind, mesh.size, tuple(sorted(models))) for mesh, models in state))


def _neighbour(state: State, objective: Objective, source: random.Random) -> State | None:
    """A state one change away; None: the change that was drawn is not possible."""
    changes = (_move, _copy, _drop, _swap, _split, _merge, _seat)
    change = source.choices(changes, (30, 15, 10, 25, 10, 10, 10))[0]
    return change(state, objective, source)


def _with(state: State, changed: dict[int, frozenset[int]], objective: Objective) -> State | None:
    """The state with other models on some meshes, if they may be there."""
    if any(
        models - state[u][1] and not objective.allows(state[u][0], models) for u, models in changed.items()
    ):
        return None
    return tuple((mesh, changed.get(u, models)) for u, (mesh, models) in enumerate(state))


def _pick(state: State, source: random.Random) -> tuple[int, int] | None:
    """A mesh and a model on it."""
    u = source.randrange(len(state))
    models = state[u][1]
    return (u, source.choice(sorted(models))) if models else None


def _move(state: State, objective: Objective, source: random.Random) -> State | None:
    if (picked := _pick(state, source)) is None:
        return None
    u, model = picked
    v = source.randrange(len(state))
    if u == v or model in state[v][1]:
        return None
    return _with(state, {u: state[u][1] - {model}, v: state[v][1] | {model}}, objective)


def _copy(state: State, objective: Objective, source: random.Random) -> State | None:
    model, v = source.randrange(len(objective.models)), source.randrange(len(state))
    if model in state[v][1]:
        return None
    return _with(state, {v: state[v][1] | {model}}, objective)


def _drop(state: State, objective: Objective, source: random.Random) -> State | None:
    if (picked := _pick(state, source)) is None:
        return None
    u, model = picked
    return _with(state, {u: state[u][1] - {model}}, objective)


def _swap(state: State, objective: Objective, source: random.Random) -> State | None:
    one, other = _pick(state, source), _pick(state, source)
    if one is None or other is None or one[0] == other[0]:
        return None
    (u, a), (v, b) = one, other
    if a == b or a in state[v][1] or b in state[u][1]:
        return None
    return _with(state, {u: state[u][1] - {a} | {b}, v: state[v][1] - {b} | {a}}, objective)


def _split(state: State, objective: Objective, source: random.Random) -> State | None:
    """Cut a mesh in two; each model goes to one half, or to both."""
    u = source.randrange(len(state))
    mesh, models = state[u]
    if mesh.size == 1:
        return None
    half = Mesh(mesh.kind, mesh.size // 2)
    sides: tuple[set[int], set[int]] = (set(), set())
    for model in models:
        for side in source.choice(((0,), (1,), (0, 1))):
            sides[side].add(model)
    if not all(objective.allows(half, side) for side in sides):
        return None
    rest = [each for v, each in enumerate(state) if v != u]
    return (*rest, (half, frozenset(sides[0])), (half, frozenset(sides[1])))


def _merge(state: State, objective: Objective, source: random.Random) -> State | None:
    """Join two meshes of one size; a side's models may stay behind, on no mesh."""
    u = source.randrange(len(state))
    mesh = state[u][0]
    partners = [v for v, (other, _) in enumerate(state) if v != u and other == mesh]
    whole = Mesh(mesh.kind, 2 * mesh.size)
    if not partners or whole.size not in sizes_for(objective.workload):
        return None
    v = source.choice(partners)
    models = state[u][1] | state[v][1]
    if not objective.allows(whole, models):
        return None
    rest = [each for t, each in enumerate(state) if t not in (u, v)]
    sizes = [other.size for other, _ in rest if other.kind == mesh.kind]
    if not fits(objective.kinds[mesh.kind], [*sizes, whole.size]):
        return None
    return (*rest, (whole, models))


def _seat(state: State, objective: Objective, source: random.Random) -> State | None:
    """Give a model that is nowhere a mesh, cleared of others and joined of smaller ones. Who has no other
    place goes wherever it may. That is several changes at once, each of which alone would not be made."""
    missing = sorted(set(range(len(objective.models))) - {i for _, models in state for i in models})
    if not missing:
        return None
    model, start = source.choice(missing), source.randrange(len(state))
    kind = state[start][0].kind
    sizes = [s for s in sizes_for(objective.workload) if objective.allows(Mesh(kind, s), [model])]
    if not sizes:
        return None
    size = source.choice(sizes)
    taken, total = set[int](), 0
    for u in source.sample(range(len(state)), len(state)):
        mesh = state[u][0]
        if mesh.kind == kind and total + mesh.size <= size:
            taken.add(u)
            total += mesh.size
    rest = [each for u, each in enumerate(state) if u not in taken]
    if total != size or not fits(objective.kinds[kind], [*(m.size for m, _ in rest if m.kind == kind), size]):
        return None
    here = Mesh(kind, size)
    placed = {i for _, models in rest for i in models}
    for homeless in sorted({i for u in taken for i in state[u][1]} - placed):
        options = [v for v, (mesh, models) in enumerate(rest) if objective.allows(mesh, models | {homeless})]
        if not options:
            return None
        v = source.choice(options)
        rest[v] = (rest[v][0], rest[v][1] | {homeless})
    return (*rest, (here, frozenset((model,))))


def neighbours(state: State, objective: Objective) -> Iterator[State]:
    """Every state that one model's move, copy or removal leads to."""
    for u, (_, models) in enumerate(state):
        for model in sorted(models):
            if (dropped := _with(state, {u: models - {model}}, objective)) is not None:
                yield dropped
            for v in _distinct(state):
                if u != v and model not in state[v][1]:
                    moved = _with(state, {u: models - {model}, v: state[v][1] | {model}}, objective)
                    if moved is not None:
                        yield moved
    for v in _distinct(state):
        for model in range(len(objective.models)):
            if model not in state[v][1]:
                copied = _with(state, {v: state[v][1] | {model}}, objective)
                if copied is not None:
                    yield copied


def _distinct(state: State) -> Sequence[int]:
    """One of each sort of mesh with the same models."""
    return list({each: u for u, each in enumerate(state)}.values())


def climb(objective: Objective, start: Found, part: Callable[[], float]) -> Found:
    """The best of what single changes lead to from `start`, while they help and there is time."""
    here = start
    while part() < 1:
        better = None
        for state in neighbours(here.state, objective):
            score = objective.score(state)
            if score > (better or here).score + 1e-9:
                better = Found(score, state)
            if part() >= 1:
                break
        if better is None:
            return here
        here = better
    return here
