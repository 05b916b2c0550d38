"""`advise`: which models to load, move and unload, now that traffic is what it is. Pure.

From what is loaded now, single changes are tried (a copy, a removal, a move, an exchange) while they help by
more than they cost; then the way there is cut into moves, one after the other, such that weights fit and
every model that is asked for stays loaded somewhere after each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from muxserve.placement.advisor_route import Way, find_way
from muxserve.placement.advisor_situation import Move, Served, Situation, Worker, changed
from muxserve.placement.solver.fixed import Loaded

LOADING_TAKES = 0.3
"""Part of what a worker serves that is lost while it loads a model."""
UNLOADING_TAKES = 0.5
"""Requests that unloading a model costs."""
LOSS = 0.98
"""Part of what is served now that has to be served still, whoever gains."""
EVALUATIONS = 1500
"""Most states that are looked at."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do. Rates are requests per second, those that wait included; one that is served late counts as
    a part of one."""

    moves: tuple[Move, ...]
    """In order. Empty: nothing better was found."""
    worthwhile: bool
    """Whether to do it: what is gained outweighs what moving costs."""
    served: float
    """Rate that is served now."""
    after: float
    """Rate that would be served."""
    cost: float
    """Requests that moving costs."""
    reason: str
    """For people."""
    worth: Mapping[str, float]
    """What a request of each model is worth now: 1 is served in time."""


@dataclass(frozen=True, slots=True)
class Options:
    """When moving is worth it."""

    horizon: float = 120.0
    """Seconds for which traffic is expected to stay as it is."""
    margin: float = 1.5
    """The gain has to be so many times the cost."""
    least: float = 0.02
    """Part of the perfect score that has to be gained."""

    def asked(self) -> Options:
        """Where somebody asks: moves cannot come one after the other by themselves, and less has to be
        gained."""
        return replace(self, margin=1.0, least=0.01)


def advise(workers: Sequence[Worker], models: Sequence[Served], options: Options | None = None) -> Advice:
    """The moves that are worth it."""
    options = options or Options()
    return _Advisor(Situation(workers, models, options.horizon), options).advise()


class _Advisor:
    def __init__(self, situation: Situation, options: Options) -> None:
        self._situation, self._options = situation, options
        self._objective, self._now = situation.objective, situation.now
        self._models = situation.models
        self._looks = 0

    def advise(self) -> Advice:
        """See `advise`."""
        objective, now, options = self._objective, self._now, self._options
        least = options.least * objective.perfect
        score, served = objective.score(now), self._served(now)
        worth = {m.name: each for m, each in zip(self._models, objective.worth(now), strict=True)}
        if objective.perfect - score < least or not objective.perfect:
            return Advice((), False, served, served, 0.0, "what there is serves the traffic well", worth)
        goal, way = self._climb()
        if not way.moves:
            return Advice((), False, served, served, 0.0, "nothing better was found", worth)
        gain, cost, after = objective.score(goal) - score, self._cost(goal, way), self._served(goal)
        enough = gain >= least and gain * options.horizon >= options.margin * cost and after >= LOSS * served
        reason = self._words(now, goal, gain, cost, enough)
        return Advice(way.moves, enough, served, after, cost, reason, worth)

    def _served(self, state: Loaded) -> float:
        worth = self._objective.worth(state)
        return sum(m.rate * each for m, each in zip(self._objective.models, worth, strict=True))

    def _words(self, now: Loaded, goal: Loaded, gain: float, cost: float, enough: bool) -> str:
        before, after = self._objective.worth(now), self._objective.worth(goal)
        changes = sorted(
            range(len(before)), key=lambda i: (before[i] - after[i]) * (self._models[i].flow.rate + 0.01)
        )
        best = changes[0]
        text = f"{self._models[best].name} is served at {before[best]:.0%} of what it could be"
        text += f", then at {after[best]:.0%}"
        if not enough:
            text += f"; not worth it: {gain * self._options.horizon:.1f} requests gained, {cost:.1f} lost"
        return text

    # Where to go

    def _climb(self) -> tuple[Loaded, Way]:
        """The best state that single changes lead to from now, of those that there is a way to."""
        here, way = self._now, Way()
        value = self._value(here, way)
        while self._looks < EVALUATIONS:
            better: list[tuple[float, int, Loaded]] = []
            for state in self._neighbours(here):
                self._looks += 1
                if (worth := self._value(state, way)) > value + 1e-9:
                    better.append((worth, len(better), state))
                if self._looks >= EVALUATIONS:
                    break
            for _, _, state in sorted(better, reverse=True):
                there = find_way(self._situation, state)
                if there is not None and (worth := self._value(state, there)) > value + 1e-9:
                    here, way, value = state, there, worth
                    break
            else:
                break
        return here, way

    def _value(self, state: Loaded, way: Way) -> float:
        """Requests within the horizon, less what it costs to get there."""
        cost = self._cost(state, way)
        return self._objective.score(state) * self._options.horizon - self._options.margin * cost

    def _cost(self, state: Loaded, way: Way) -> float:
        """Requests that loading takes from those that workers serve meanwhile, and that wait for a model
        which is loaded nowhere on the way."""
        total = sum(self._models[i].flow.rate * self._situation.load_seconds(i) for i in way.slept)
        for before, after in zip(self._now, state, strict=True):
            total += UNLOADING_TAKES * len(before - after)
            if after - before:
                rate = sum(self._models[i].flow.rate for i in before)
                total += LOADING_TAKES * sum(map(self._situation.load_seconds, after - before)) * (rate + 0.1)
        return total

    def _neighbours(self, state: Loaded) -> Iterator[Loaded]:
        for k, models in enumerate(state):
            for i in range(len(self._models)):
                if i in models:
                    yield from self._leave(state, i, k)
                elif self._situation.may_come(i, k):
                    yield from self._come(state, i, k)

    def _leave(self, state: Loaded, i: int, k: int) -> Iterator[Loaded]:
        """`i` is not loaded on `k` any more, or is somewhere else."""
        if not self._situation.may_go(i, k):
            return
        # The last place is given up only where another model needs the room.
        if self._situation.can_spare(state, i) and sum(i in models for models in state) > 1:
            yield changed(state, {k: state[k] - {i}})
        for other, models in enumerate(state):
            if i not in models and self._situation.may_come(i, other):
                moved = models | {i}
                if self._situation.fits(other, moved):
                    yield changed(state, {k: state[k] - {i}, other: moved})

    def _come(self, state: Loaded, i: int, k: int) -> Iterator[Loaded]:
        """`i` is loaded on `k` too; where there is no room, in place of another one."""
        more = state[k] | {i}
        if self._situation.fits(k, more):
            yield changed(state, {k: more})
            return
        sources = [
            other for other, models in enumerate(state) if i in models and self._situation.may_go(i, other)
        ]
        for j in state[k]:
            if not self._situation.may_go(j, k) or not self._situation.fits(k, more - {j}):
                continue
            exchanged = {k: more - {j}}
            if self._situation.can_spare(state, j):
                yield changed(state, exchanged)
            yield from self._make_way(state, j, k, exchanged)
            for source in sources:
                swapped = state[source] - {i} | {j}
                may = j not in state[source] and self._situation.may_come(j, source)
                if may and self._situation.fits(source, swapped):
                    yield changed(state, exchanged | {source: swapped})

    def _make_way(self, state: Loaded, j: int, k: int, given: dict[int, frozenset[int]]) -> Iterator[Loaded]:
        """`j` goes from `k`, where something else is `given` instead, to where there is room."""
        for other, models in enumerate(state):
            if other != k and j not in models and self._situation.may_come(j, other):
                moved = models | {j}
                if self._situation.fits(other, moved):
                    yield changed(state, given | {other: moved})
