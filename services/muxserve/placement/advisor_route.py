"""`find_way`: from what is loaded to what is to be loaded, one move after the other."""

from __future__ import annotations

from dataclasses import dataclass

from muxserve.placement.advisor_situation import Move, Situation, changed
from muxserve.placement.solver.fixed import Loaded

Step = tuple[list[Move], Loaded]
"""A move, of which there may be two parts, and what is loaded after it."""


@dataclass(frozen=True, slots=True)
class Way:
    """After each of its moves weights fit."""

    moves: tuple[Move, ...] = ()
    slept: frozenset[int] = frozenset()
    """Models that are loaded nowhere on the way, though they are asked for."""


def find_way(situation: Situation, goal: Loaded) -> Way | None:
    """From now to `goal`. None: there is none."""
    return _Route(situation, goal).find()


class _Route:
    def __init__(self, situation: Situation, goal: Loaded) -> None:
        self._situation, self._goal = situation, goal
        self._workers, self._models = situation.workers, situation.models
        self._slept: set[int] = set()
        self._asleep = [set(model.asleep) for model in situation.models]
        """By model: workers where it sleeps after the moves so far."""

    def find(self) -> Way | None:
        """See `find_way`."""
        state, moves = self._situation.now, list[Move]()
        while state != self._goal:
            step = self._load(state) or self._unload(state) or self._detour(state) or self._sleep(state)
            if step is None or len(moves) > 4 * len(self._models) * len(self._workers):
                return None
            moves += step[0]
            state = step[1]
        return Way(tuple(moves), frozenset(self._slept))

    def _load(self, state: Loaded) -> Step | None:
        """Load what fits; if it is to leave another place, that is one move. What is asked for most first."""
        missing = [(i, k) for k, models in enumerate(self._goal) for i in models - state[k]]
        for i, k in sorted(missing, key=lambda at: (-self._models[at[0]].flow.rate, at)):
            if not self._situation.fits(k, state[k] | {i}):
                continue
            sets = {k: state[k] | {i}}
            source = next((o for o, m in enumerate(state) if i in m and i not in self._goal[o]), None)
            if source is not None:
                sets[source] = state[source] - {i}
            return self._come(i, k, source, state), changed(state, sets)
        return None

    def _come(self, i: int, k: int, source: int | None, state: Loaded) -> list[Move]:
        """Model `i` leaves `source`, if that is one, for worker `k`. A place where it only sleeps goes there
        too, and is woken there."""
        name, target, asleep = self._models[i].name, self._workers[k].id, self._asleep[i]
        here = target in asleep
        asleep.discard(target)
        if source is not None:
            return [Move(name, self._workers[source].id, target)]
        if here or not asleep or any(i in models for models in state):
            return [Move(name, "", target)]
        left = min(asleep)
        asleep.discard(left)
        return [Move(name, left, target), Move(name, "", target)]

    def _unload(self, state: Loaded) -> Step | None:
        """Unload what is to go and is loaded elsewhere too, or what nobody asks for."""
        for k, models in enumerate(state):
            for i in sorted(models - self._goal[k]):
                if self._situation.can_spare(state, i):
                    return self._gone(state, i, k)
        return None

    def _detour(self, state: Loaded) -> Step | None:
        """Models that are to change places and leave each other no room: one of them waits somewhere else."""
        for i, k in self._stuck(state):
            for other, models in enumerate(state):
                fits = i not in models and self._situation.fits(other, models | {i})
                if fits and other != k and self._situation.may_come(i, other):
                    after = changed(state, {k: state[k] - {i}, other: models | {i}})
                    return [Move(self._models[i].name, self._workers[k].id, self._workers[other].id)], after
        return None

    def _sleep(self, state: Loaded) -> Step | None:
        """The same where there is room nowhere: the one that is asked for least sleeps until there is."""
        for i, k in self._stuck(state):
            model = self._models[i]
            if i not in self._slept and not model.pinned and not model.min_resident:
                self._slept.add(i)
                return self._gone(state, i, k)
        return None

    def _stuck(self, state: Loaded) -> list[tuple[int, int]]:
        """Models and the workers that they are to leave, those that are asked for least first."""
        found = [(i, k) for k, models in enumerate(state) for i in models - self._goal[k]]
        return sorted(found, key=lambda at: (self._models[at[0]].flow.rate, at))

    def _gone(self, state: Loaded, i: int, k: int) -> Step:
        after = changed(state, {k: state[k] - {i}})
        if not any(i in models for models in after):  # its last place stays, asleep
            self._asleep[i].add(self._workers[k].id)
        return [Move(self._models[i].name, self._workers[k].id)], after
