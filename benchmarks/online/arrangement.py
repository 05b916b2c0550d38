"""Who is loaded where, as benchmarks want it: static placements worth trying, and the way to them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from muxserve.placement.advisor_situation import Move

Loaded: TypeAlias = Mapping[str, frozenset[str]]
"""Workers by model that is loaded there."""


def by_turns(models: Sequence[str], workers: Sequence[str]) -> Loaded:
    """Each in one place."""
    return {model: frozenset({workers[i % len(workers)]}) for i, model in enumerate(models)}


def first_on_all(loaded: Loaded, order: Sequence[str], workers: Sequence[str], room: int) -> Loaded | None:
    """The first model of `order`, the most popular one, on all `workers`, each other one in one place: where
    it is if there is room for it, else on the worker with the fewest. `room`: models of a worker. None: they
    do not fit."""
    if len(workers) + len(order) - 1 > room * len(workers):
        return None
    found = {order[0]: frozenset(workers)}
    counts = dict.fromkeys(workers, 1)
    for model in sorted(order[1:], key=lambda m: len(loaded[m])):  # what has a choice comes last
        open_ones = [worker for worker in workers if counts[worker] < room]
        chosen = min(open_ones, key=lambda w: (w not in loaded[model], counts[w]))
        found[model] = frozenset({chosen})
        counts[chosen] += 1
    return found


def first_apart(order: Sequence[str], workers: Sequence[str], room: int) -> Loaded:
    """The most popular model has a worker with as few others as can be, those that are asked for least.
    `room`: models of a worker; two workers."""
    beside = max(0, len(order) - 1 - room)
    others = {model: frozenset(workers[1:]) for model in order[1 : len(order) - beside]}
    return {model: frozenset(workers[:1]) for model in order} | others


def fits(loaded: Loaded, room: int) -> bool:
    """Whether no worker has more than `room` models."""
    places = [worker for at in loaded.values() for worker in at]
    return all(places.count(worker) <= room for worker in places)


def next_move(loaded: Loaded, wanted: Loaded, room: int) -> Move | None:
    """The next one on the way from `loaded` to `wanted`, on which no worker has more than `room`. No model is
    without a place, but for one that makes room where workers are full and models are to change places. None:
    they are the same."""
    for model, at in loaded.items():  # what is too much makes room
        if at & wanted[model] and at - wanted[model]:
            return Move(model, source=min(at - wanted[model]))
    full = {worker for at in loaded.values() for worker in at if _count(loaded, worker) >= room}
    lost = [model for model, at in loaded.items() if at and not at & wanted[model]]
    for model in lost:
        if targets := wanted[model] - full:
            return Move(model, min(loaded[model]), min(targets))
    if lost:  # a replica that is wanted gives way for a while
        blocking = [m for m, at in loaded.items() if len(at) > 1 and at & wanted[lost[0]]]
        if not blocking:
            return Move(lost[-1], source=min(loaded[lost[-1]]))
        return Move(blocking[0], source=min(loaded[blocking[0]] & wanted[lost[0]]))
    for model, at in loaded.items():
        if targets := wanted[model] - at - full:
            return Move(model, target=min(targets))
    return None


def _count(loaded: Loaded, worker: str) -> int:
    return sum(worker in at for at in loaded.values())
